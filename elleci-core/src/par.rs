//! Data parallelism over whatever thread pool the caller runs in.
//!
//! [`for_each`] spreads its items over the current rayon pool; outside of a pool (or without `std`) it is a loop on
//! the calling thread. So an application decides about threads by where it calls from (`pool.install(|| ..)`), and
//! nothing here ever starts one. Items never share output, and no bit depends on how work is cut into items:
//! results are the same at every thread count.
//!
//! Decoding one token is some two hundred short parallel loops with short serial parts between them. Waking a sleeping
//! thread takes as long as such a loop, so [`together`] keeps the pool's threads awake and waiting for the next loop for
//! as long as a closure runs.

use alloc::vec::Vec;
use core::cell::UnsafeCell;
use core::ops::{Deref, DerefMut};
use core::sync::atomic::{AtomicBool, Ordering};

#[cfg(feature = "std")]
mod team;

/// Runs `f` on every item, in parallel when called from inside a rayon pool. Items that a panic of `f` leaves are leaked.
pub fn for_each<T: Send>(items: Vec<T>, f: impl Fn(T) + Sync + Send) {
    let items = Items::new(items);
    // SAFETY: `each` gives every index below the count once.
    each(items.count, &|i| f(unsafe { items.take(i) }));
}

/// Calls `run` once with every number below `count`. Not generic, so that the thread pools' machinery is compiled once and not for
/// every loop of this crate, and a loop's body not once for every way to run it: that was half of the crate's code.
fn each(count: usize, run: &(dyn Fn(usize) + Sync)) {
    #[cfg(feature = "std")]
    if count > 1 && rayon::current_thread_index().is_some() && rayon::current_num_threads() > 1 {
        use rayon::iter::{IndexedParallelIterator, IntoParallelIterator, ParallelIterator};
        match team::place() {
            team::Place::Lead(team) => return team.each(count, run),
            // The other threads have items of their own.
            team::Place::Task => {}
            team::Place::None => return (0..count).into_par_iter().with_max_len(1).for_each(run),
        }
    }
    (0..count).for_each(run);
}

/// Items, each taken once; what is not taken is leaked.
struct Items<T> {
    /// Of length 0, so that it drops its memory and nothing in it
    storage: Vec<T>,
    count: usize,
}

// SAFETY: an item is touched by the one thread that takes it, and may be sent there.
unsafe impl<T: Send> Sync for Items<T> {}

impl<T> Items<T> {
    fn new(mut storage: Vec<T>) -> Items<T> {
        let count = storage.len();
        // SAFETY: no element is as good as initialised.
        unsafe { storage.set_len(0) };
        Items { storage, count }
    }

    /// # Safety
    /// Every index is below the count, and given once.
    unsafe fn take(&self, i: usize) -> T {
        // SAFETY: the items are still where they were, and nobody else takes this one.
        unsafe { self.storage.as_ptr().add(i).read() }
    }
}

/// As [`for_each`], with working memory for `f`: what `init` makes, as often as threads need one, and whatever items before have left
/// in it.
pub fn for_each_init<T: Send, S: Send>(
    items: Vec<T>,
    init: impl Fn() -> S + Sync + Send,
    f: impl Fn(&mut S, T) + Sync + Send,
) {
    for_each_with(items, &mut Vec::new(), init, f);
}

/// As [`for_each_init`], with working memory that the caller keeps: `spare` is taken from and given back to, and has as many in the end
/// as threads ever needed at once.
pub fn for_each_kept<T: Send, S: Send + Default>(
    items: Vec<T>,
    spare: &mut Vec<S>,
    f: impl Fn(&mut S, T) + Sync + Send,
) {
    for_each_with(items, spare, S::default, f);
}

fn for_each_with<T: Send, S: Send>(
    items: Vec<T>,
    spare: &mut Vec<S>,
    init: impl Fn() -> S + Sync + Send,
    f: impl Fn(&mut S, T) + Sync + Send,
) {
    let shared = Exclusive::new(core::mem::take(spare));
    for_each(items, |item| {
        let taken = shared.take().pop();
        let mut state = taken.unwrap_or_else(&init);
        f(&mut state, item);
        shared.take().push(state);
    });
    *spare = shared.into_inner();
}

/// Runs `f` with the threads of the current pool waiting for its [`for_each`] loops, and nothing else. For work of
/// milliseconds that is made of many loops of microseconds.
pub fn together<R>(f: impl FnOnce() -> R) -> R {
    #[cfg(feature = "std")]
    if rayon::current_thread_index().is_some()
        && rayon::current_num_threads() > 1
        && matches!(team::place(), team::Place::None)
    {
        return team::lead(f);
    }
    f()
}

/// Says, before serial work, what the next [`for_each`] will read: item i begins at `at(i)`. Threads that wait for it meanwhile fetch
/// the beginnings of their runs. Any address will do, as nothing is read from there.
pub fn expect(items: usize, at: impl Fn(usize) -> *const u8) {
    #[cfg(feature = "std")]
    if let team::Place::Lead(team) = team::place() {
        team.expect(items, &at);
    }
    let _ = (items, at);
}

/// Threads that [`for_each`] would use here: 1 outside of a rayon pool, and inside of an item of a team's loop.
pub fn threads() -> usize {
    #[cfg(feature = "std")]
    if rayon::current_thread_index().is_some() && !matches!(team::place(), team::Place::Task) {
        return rayon::current_num_threads();
    }
    1
}

/// Rounds that a thread waits before it offers its processor to others: a few tens of microseconds.
const ROUNDS: u32 = 1 << 12;

/// Waits for what another thread is about to do.
pub fn wait_until(done: impl Fn() -> bool) {
    let mut rounds = 0..ROUNDS;
    while !done() {
        match rounds.next() {
            Some(_) => core::hint::spin_loop(),
            None => give_way(),
        }
    }
}

/// Offers the processor to others, where there is somebody to take it.
fn give_way() {
    #[cfg(feature = "std")]
    std::thread::yield_now();
    #[cfg(not(feature = "std"))]
    core::hint::spin_loop();
}

/// A value that one thread at a time has. For moments, and for uses that rarely meet: who waits stays awake.
#[derive(Debug, Default)]
pub struct Exclusive<T> {
    taken: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: a value that may be sent is reached by one thread at a time.
unsafe impl<T: Send> Sync for Exclusive<T> {}

impl<T> Exclusive<T> {
    /// Nobody has it.
    pub fn new(value: T) -> Exclusive<T> {
        Exclusive { taken: AtomicBool::new(false), value: UnsafeCell::new(value) }
    }

    /// The value, until what is returned is dropped, by return or by panic.
    pub fn take(&self) -> Taken<'_, T> {
        wait_until(|| !self.taken.swap(true, Ordering::Acquire));
        Taken(self)
    }

    /// The value itself.
    pub fn into_inner(self) -> T {
        self.value.into_inner()
    }
}

/// An [`Exclusive`] value while this thread has it.
#[derive(Debug)]
pub struct Taken<'a, T>(&'a Exclusive<T>);

// SAFETY: what shares it reads the value alone, which may be shared.
unsafe impl<T: Sync> Sync for Taken<'_, T> {}

impl<T> Deref for Taken<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: nobody else has the value.
        unsafe { &*self.0.value.get() }
    }
}

impl<T> DerefMut for Taken<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as above.
        unsafe { &mut *self.0.value.get() }
    }
}

impl<T> Drop for Taken<'_, T> {
    fn drop(&mut self) {
        self.0.taken.store(false, Ordering::Release);
    }
}
