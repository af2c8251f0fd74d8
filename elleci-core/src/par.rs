//! Data parallelism over whatever thread pool the caller runs in.
//!
//! [`for_each`] spreads its items over the current rayon pool; outside of a pool (or without `std`) it is a loop on
//! the calling thread. So an application decides about threads by where it calls from (`pool.install(|| ..)`), and
//! nothing here ever starts one. Items never share output, and how work is cut into items depends on shapes alone:
//! results are the same bits at every thread count.

use alloc::vec::Vec;

/// Runs `f` on every item, in parallel when called from inside a rayon pool.
pub fn for_each<T: Send>(items: Vec<T>, f: impl Fn(T) + Sync + Send) {
    #[cfg(feature = "std")]
    if items.len() > 1 && rayon::current_thread_index().is_some() && rayon::current_num_threads() > 1 {
        use rayon::iter::{IndexedParallelIterator, IntoParallelIterator, ParallelIterator};
        items.into_par_iter().with_max_len(1).for_each(f);
        return;
    }
    items.into_iter().for_each(f);
}

/// Threads that [`for_each`] would use here: 1 outside of a rayon pool.
pub fn threads() -> usize {
    #[cfg(feature = "std")]
    if rayon::current_thread_index().is_some() {
        return rayon::current_num_threads();
    }
    1
}
