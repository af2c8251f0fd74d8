//! Threads that are handed in.

use alloc::boxed::Box;
#[cfg(feature = "capi")]
use alloc::{format, sync::Arc};
use core::mem::MaybeUninit;

use super::status::{Failure, call, free, given};
use super::{ElleciMessage, ElleciStatus};

/// The most threads that a pool may have.
pub const ELLECI_MAX_THREADS: usize = 1024;

/// A pool of threads. Calls that take one do their work on it and wait; several may share one pool.
#[derive(Debug)]
pub struct ElleciThreads {
    /// Shared with the calls that work on it; none after the end
    #[cfg(feature = "capi")]
    pool: Option<Arc<rayon::ThreadPool>>,
    #[cfg(feature = "capi")]
    members: alloc::vec::Vec<std::thread::JoinHandle<()>>,
}

/// Waits for the threads to end, which rayon does not: a program may unload the library afterwards.
#[cfg(feature = "capi")]
impl Drop for ElleciThreads {
    fn drop(&mut self) {
        drop(self.pool.take());
        for member in self.members.drain(..) {
            // Rayon's threads do not panic, and there would be nobody to tell.
            let _ = member.join();
        }
    }
}

/// Starts `count` threads; 0 means as many as the machine runs at once. Results are the same bits with any number of them.
#[unsafe(no_mangle)]
pub extern "C" fn elleci_threads_new(
    count: usize,
    threads: Option<&mut MaybeUninit<*mut ElleciThreads>>,
    message: Option<&mut MaybeUninit<ElleciMessage>>,
) -> ElleciStatus {
    call(message, || {
        let threads = given(threads, "threads")?.write(core::ptr::null_mut());
        *threads = Box::into_raw(Box::new(start(count)?));
        Ok(())
    })
}

#[cfg(feature = "capi")]
fn start(count: usize) -> Result<ElleciThreads, Failure> {
    if count > ELLECI_MAX_THREADS {
        let text = format!("`count` is {count}; it must be at most {ELLECI_MAX_THREADS}");
        return Err(Failure::new(ElleciStatus::InvalidArgument, text));
    }
    let mut threads = ElleciThreads { pool: None, members: alloc::vec::Vec::new() };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(count).spawn_handler(|member| {
        let named = std::thread::Builder::new().name(format!("elleci-{}", member.index()));
        threads.members.push(named.spawn(|| member.run())?);
        Ok(())
    });
    let pool = pool.build().map_err(|e| Failure::new(ElleciStatus::Threads, format!("{count} threads: {e}")))?;
    threads.pool = Some(Arc::new(pool));
    Ok(threads)
}

#[cfg(not(feature = "capi"))]
fn start(_: usize) -> Result<ElleciThreads, Failure> {
    Err(Failure::new(ElleciStatus::Unsupported, "this library was built without threads; pass a null pointer for them"))
}

/// Ends threads that no call works on, and waits for them. Null is fine.
#[unsafe(no_mangle)]
pub extern "C" fn elleci_threads_free(threads: Option<Box<ElleciThreads>>) -> ElleciStatus {
    free(threads, in_use)
}

#[cfg(feature = "capi")]
fn in_use(threads: &ElleciThreads) -> Result<(), Failure> {
    match &threads.pool {
        Some(pool) if Arc::strong_count(pool) > 1 => {
            Err(Failure::new(ElleciStatus::Busy, "the threads are in use by a call; wait for that to return"))
        }
        _ => Ok(()),
    }
}

#[cfg(not(feature = "capi"))]
fn in_use(_: &ElleciThreads) -> Result<(), Failure> {
    Ok(())
}

/// Runs `f` on the pool, or on this thread.
pub(super) fn on<R: Send>(threads: Option<&ElleciThreads>, f: impl FnOnce() -> R + Send) -> R {
    #[cfg(feature = "capi")]
    if let Some(pool) = threads.and_then(|threads| threads.pool.clone()) {
        return pool.install(f);
    }
    let _ = threads;
    f()
}
