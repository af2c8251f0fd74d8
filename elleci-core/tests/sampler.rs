//! The sampler allocates nothing after its first token.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use elleci_core::sampler::{Sampler, SamplerOptions};

struct Counting;
static CALLS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system allocator unchanged; the counter is an atomic.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        CALLS.fetch_add(1, Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// The only test of this file: another one beside it would be counted too.
#[test]
fn nothing_is_allocated_after_the_first_token() {
    let vocab_size = 32_128;
    let cases = [
        SamplerOptions { repetition_penalty: 1.2, ..SamplerOptions::default() },
        SamplerOptions { top_k: 0, top_p: 0.99, min_p: 0.0, ..SamplerOptions::default() },
        SamplerOptions { top_k: 0, top_p: 1.0, min_p: 0.0, ..SamplerOptions::default() },
        SamplerOptions { top_k: 5000, ..SamplerOptions::greedy() },
    ];
    for options in cases {
        let mut sampler = Sampler::new(options).unwrap();
        let mut logits = vec![0.0; vocab_size];
        let mut history = vec![0; 64];
        let mut allocated = Vec::with_capacity(64);
        for step in 0..64u32 {
            for (i, l) in logits.iter_mut().enumerate() {
                *l = ((i as u32 ^ step.wrapping_mul(977)).wrapping_mul(2_654_435_761) >> 8) as f32 / 2e6;
            }
            // From one logit that has all the mass to a flat distribution that needs every candidate ordered.
            let scale = 1.0 / (1 + step) as f32;
            logits.iter_mut().for_each(|l| *l *= scale);
            let before = CALLS.load(Relaxed);
            let token = sampler.sample(&mut logits, &history).unwrap();
            allocated.push(CALLS.load(Relaxed) - before);
            history[step as usize % 64] = token;
        }
        assert!(allocated[1..].iter().all(|a| *a == 0), "{options:?}: {allocated:?}");
    }
}
