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
    #[cfg(feature = "capi")]
    pool: Arc<rayon::ThreadPool>,
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
    let name = |i| format!("elleci-{i}");
    let pool = rayon::ThreadPoolBuilder::new().num_threads(count).thread_name(name).build();
    let pool = pool.map_err(|e| Failure::new(ElleciStatus::Threads, format!("{count} threads: {e}")))?;
    Ok(ElleciThreads { pool: Arc::new(pool) })
}

#[cfg(not(feature = "capi"))]
fn start(_: usize) -> Result<ElleciThreads, Failure> {
    Err(Failure::new(ElleciStatus::Unsupported, "this library was built without threads; pass a null pointer for them"))
}

/// Ends the threads once no call works on them. Null is fine.
#[unsafe(no_mangle)]
pub extern "C" fn elleci_threads_free(threads: Option<Box<ElleciThreads>>) -> ElleciStatus {
    free(threads, |_| Ok(()))
}

/// Runs `f` on the pool, or on this thread.
pub(super) fn on<R: Send>(threads: Option<&ElleciThreads>, f: impl FnOnce() -> R + Send) -> R {
    #[cfg(feature = "capi")]
    if let Some(threads) = threads {
        // A callback may free the handle.
        let pool = Arc::clone(&threads.pool);
        return pool.install(f);
    }
    let _ = threads;
    f()
}
