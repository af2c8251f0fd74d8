//! The threads of a rayon pool as a team that waits, awake, for one thread's loops.
//!
//! The leader publishes a loop and takes items of it like everyone else, so that nobody has to arrive: members that are
//! late, or busy elsewhere in the pool, find fewer items or none. Every thread begins with a run of items of its own, as
//! neighbouring items mostly read neighbouring memory, and then helps with the runs of the others. A loop lives on the leader's stack. Its members enter by
//! raising `inside` and only then look whether the loop is still open; the leader closes it and waits for `inside` to fall
//! to zero before it returns. Both orders are sequentially consistent: either the leader sees the member inside, or the member
//! sees the loop closed.

use alloc::vec::Vec;
use core::cell::Cell;
use core::ops::Range;
use core::ptr;
use core::sync::atomic::Ordering::{Relaxed, SeqCst};
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize};

use super::{ROUNDS, give_way, wait_until};
use crate::simd::prefetch_later;

/// Bytes that a waiting member asks for at most: a fraction of the second-level cache.
const FETCH: usize = 128 << 10;

/// What the current thread is to a team.
pub(super) enum Place<'a> {
    /// Nothing.
    None,
    /// Its leader, outside of a loop.
    Lead(&'a Team),
    /// Inside of an item of a loop.
    Task,
}

std::thread_local! {
    /// The team that this thread leads, and whether it runs an item.
    static LEADS: Cell<*const Team> = const { Cell::new(ptr::null()) };
    static IN_TASK: Cell<bool> = const { Cell::new(false) };
}

pub(super) fn place<'a>() -> Place<'a> {
    if IN_TASK.get() {
        return Place::Task;
    }
    let team = LEADS.get();
    // SAFETY: `lead` sets the pointer for as long as the team on its stack lives, and this thread runs inside of `lead`
    // then. The caller uses it before it returns to there.
    unsafe { team.as_ref() }.map_or(Place::None, Place::Lead)
}

/// A loop as its members see it.
struct Job<'a> {
    run: &'a (dyn Fn(usize) + Sync),
    items: usize,
    runs: &'a [Run],
    panicked: AtomicBool,
}

/// What concerns a thread's run, on a cache line of its own and the one that comes with it.
#[derive(Default)]
#[repr(align(128))]
struct Run {
    /// The first item that nobody has taken, or any number behind the last
    next: AtomicUsize,
    /// Where the run of the loop to come begins to read; null if nobody said so
    soon: AtomicPtr<u8>,
}

impl Job<'_> {
    /// The items of a run.
    fn bounds(&self, run: usize) -> Range<usize> {
        first_item(self.items, run, self.runs.len())..first_item(self.items, run + 1, self.runs.len())
    }

    fn open(&self) -> bool {
        self.runs.iter().enumerate().any(|(r, run)| run.next.load(SeqCst) < self.bounds(r).end)
    }

    fn close(&self) {
        self.runs.iter().for_each(|run| _ = run.next.fetch_add(self.items, SeqCst));
    }

    fn work(&self) {
        let _in_task = Restore::set(&IN_TASK, true);
        let own = rayon::current_thread_index().unwrap_or(0);
        for r in 0..self.runs.len() {
            let run = (own + r) % self.runs.len();
            let end = self.bounds(run).end;
            loop {
                let item = self.runs[run].next.fetch_add(1, SeqCst);
                if item >= end {
                    break;
                }
                (self.run)(item);
            }
        }
    }
}

/// The first of `items` that belongs to a run.
fn first_item(items: usize, run: usize, runs: usize) -> usize {
    items * run / runs
}

pub(super) struct Team {
    /// One a thread
    runs: Vec<Run>,
    /// The open loop, null between loops
    job: AtomicPtr<()>,
    /// Members that may be looking at it
    inside: AtomicUsize,
    done: AtomicBool,
}

/// Runs `f` as the leader of the current pool's threads.
pub(super) fn lead<R>(f: impl FnOnce() -> R) -> R {
    let runs = (0..rayon::current_num_threads()).map(|_| Run::default()).collect();
    let team = Team { runs, job: AtomicPtr::default(), inside: AtomicUsize::new(0), done: AtomicBool::new(false) };
    rayon::in_place_scope(|scope| {
        // The team is over when `f` is, by return or by panic: the scope waits for its members.
        let _end = OnDrop(|| team.done.store(true, SeqCst));
        let _leads = Restore::set(&LEADS, &raw const team);
        scope.spawn_broadcast(|_, _| team.attend());
        f()
    })
}

impl Team {
    /// A member's part: items of every loop until the team is over.
    fn attend(&self) {
        let mut waited = 0;
        let own = rayon::current_thread_index().and_then(|r| self.runs.get(r));
        let (mut soon, mut fetched) = (ptr::null_mut(), 0);
        while !self.done.load(SeqCst) {
            if !self.job.load(SeqCst).is_null() {
                self.inside.fetch_add(1, SeqCst);
                let _outside = OnDrop(|| {
                    self.inside.fetch_sub(1, SeqCst);
                });
                let job = self.job.load(SeqCst).cast::<Job>();
                // SAFETY: the loop was open after `inside` was raised, so that the leader waits for this member before it
                // leaves the function whose stack holds the job.
                if let Some(job) = unsafe { job.as_ref() }
                    && job.open()
                {
                    let panicked = OnDrop(|| job.panicked.store(true, SeqCst));
                    job.work();
                    core::mem::forget(panicked);
                    waited = 0;
                }
            }
            let expected = own.map_or(ptr::null_mut(), |run| run.soon.load(Relaxed));
            if expected != soon {
                (soon, fetched) = (expected, 0);
            }
            if !soon.is_null() && fetched < FETCH {
                prefetch_later(soon.wrapping_add(fetched));
                fetched += 64;
            }
            waited += 1;
            if waited < ROUNDS {
                core::hint::spin_loop();
            } else {
                give_way();
            }
        }
    }

    pub(super) fn expect(&self, items: usize, at: impl Fn(usize) -> *const u8) {
        for (r, run) in self.runs.iter().enumerate() {
            run.soon.store(at(first_item(items, r, self.runs.len())).cast_mut(), Relaxed);
        }
    }

    /// Calls `run` once with every number below `count`.
    pub(super) fn each(&self, count: usize, run: &(dyn Fn(usize) + Sync)) {
        // Nobody is inside between loops, so that nobody sees the counters being set.
        let job = Job { run, items: count, runs: &self.runs, panicked: AtomicBool::new(false) };
        self.runs.iter().enumerate().for_each(|(r, run)| run.next.store(job.bounds(r).start, SeqCst));
        {
            // By return or by panic: nobody looks at the job when this block is left.
            let _close = OnDrop(|| {
                job.close();
                self.job.store(ptr::null_mut(), SeqCst);
                wait_until(|| self.inside.load(SeqCst) == 0);
            });
            self.job.store((&raw const job).cast_mut().cast(), SeqCst);
            job.work();
        }
        assert!(!job.panicked.load(SeqCst), "a thread of the pool panicked");
    }
}

/// Calls a closure when it goes out of scope.
struct OnDrop<F: FnMut()>(F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// Puts a thread's old value back when it goes out of scope.
struct Restore<T: Copy + 'static> {
    key: &'static std::thread::LocalKey<Cell<T>>,
    old: T,
}

impl<T: Copy> Restore<T> {
    fn set(key: &'static std::thread::LocalKey<Cell<T>>, value: T) -> Restore<T> {
        Restore { key, old: key.replace(value) }
    }
}

impl<T: Copy> Drop for Restore<T> {
    fn drop(&mut self) {
        self.key.set(self.old);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{for_each, together};
    use core::sync::atomic::{AtomicUsize, Ordering::SeqCst};
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::vec::Vec;

    fn in_pool<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(f)
    }

    #[test]
    fn every_item_runs_once_in_every_loop() {
        for threads in [1, 2, 5] {
            in_pool(threads, || {
                let mut counts = [0u32; 97];
                together(|| {
                    for _ in 0..2000 {
                        for_each(counts.iter_mut().collect(), |c| *c += 1);
                    }
                });
                assert_eq!(counts, [2000; 97]);
            });
        }
    }

    #[test]
    fn loops_inside_of_items_and_teams_inside_of_teams_work() {
        in_pool(3, || {
            let mut sums = [[0u32; 4]; 50];
            together(|| {
                together(|| {
                    for_each(sums.iter_mut().collect(), |row| {
                        together(|| for_each(row.iter_mut().collect(), |v| *v += 1));
                    });
                });
                // A single item runs in place, and its loops are the team's.
                for_each(Vec::from([&mut sums]), |sums| for_each(sums.iter_mut().collect(), |row| row[0] += 1));
            });
            assert_eq!(sums, [[2, 1, 1, 1]; 50]);
        });
    }

    /// Wherever the panic happens, it reaches the caller, and the pool goes on.
    #[test]
    fn panics_reach_the_caller() {
        in_pool(3, || {
            for bad in [0, 1, 40, 99] {
                let ran = AtomicUsize::new(0);
                let outcome = catch_unwind(AssertUnwindSafe(|| {
                    together(|| {
                        for_each((0..100).collect::<Vec<i32>>(), |i| {
                            ran.fetch_add(1, SeqCst);
                            assert!(i != bad, "the item's own panic");
                        });
                    });
                }));
                assert!(outcome.is_err());
                assert!(ran.load(SeqCst) <= 100);
                let total = AtomicUsize::new(0);
                together(|| for_each((0..10).collect(), |i: usize| _ = total.fetch_add(i, SeqCst)));
                assert_eq!(total.load(SeqCst), 45);
            }
        });
    }

    #[test]
    fn items_are_dropped_by_their_loop() {
        in_pool(2, || {
            let token = std::sync::Arc::new(());
            together(|| for_each((0..20).map(|_| token.clone()).collect(), drop));
            assert_eq!(std::sync::Arc::strong_count(&token), 1);
        });
    }
}
