//! Ctrl-C: the first one ends the text being generated, one more ends the process, and so does one while nothing is
//! being generated.

use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

static GENERATING: AtomicBool = AtomicBool::new(false);
static REQUESTED: AtomicBool = AtomicBool::new(false);
static INSTALL: Once = Once::new();

/// While this lives, Ctrl-C is a request and not the end of the process.
pub struct Generating(());

impl Generating {
    /// Begins; a request from before is forgotten.
    pub fn begin() -> Generating {
        INSTALL.call_once(|| {
            let handler = || {
                if !GENERATING.load(SeqCst) || REQUESTED.swap(true, SeqCst) {
                    std::process::exit(130);
                }
            };
            if let Err(e) = ctrlc::set_handler(handler) {
                crate::exit::errln!("warning: Ctrl-C will end the program at once: {e}");
            }
        });
        REQUESTED.store(false, SeqCst);
        GENERATING.store(true, SeqCst);
        Generating(())
    }

    /// Whether Ctrl-C has been pressed since the beginning.
    pub fn stopped(&self) -> bool {
        REQUESTED.load(SeqCst)
    }
}

impl Drop for Generating {
    fn drop(&mut self) {
        GENERATING.store(false, SeqCst);
    }
}
