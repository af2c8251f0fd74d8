//! Samplers.

use alloc::boxed::Box;
use core::mem::MaybeUninit;

use super::arrays::{Room, array, array_mut};
use super::status::{Guarded, call, free, given};
use super::{ElleciMessage, ElleciStatus};
use crate::sampler::{Sampler, SamplerOptions};

/// How tokens are chosen, and how many draws have been made.
#[derive(Debug)]
pub struct ElleciSampler(pub(super) Guarded<Sampler>);

/// How the next token is chosen. The filters work in the order of llama.cpp: repetition penalty, top-k, top-p, min-p,
/// temperature.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct ElleciSamplerOptions {
    /// Divides the logits. 0 chooses the likeliest token always.
    pub temperature: f32,
    /// Only the likeliest so many tokens are drawn from. 0 = no limit.
    pub top_k: u32,
    /// Only the likeliest tokens that together have at least this probability are drawn from. 1 = all.
    pub top_p: f32,
    /// Only tokens with at least this share of the likeliest token's probability are drawn from. 0 = all.
    pub min_p: f32,
    /// Positive logits of recent tokens are divided by this, negative ones multiplied. 1 = no penalty.
    pub repetition_penalty: f32,
    /// How many of the last tokens count as recent. 0 = none.
    pub repetition_window: u32,
    /// Seed of the draws.
    pub seed: u64,
}

/// Bytes of a saved sampler.
pub const ELLECI_SAMPLER_BYTES: usize = 44;
const _: () = assert!(ELLECI_SAMPLER_BYTES == Sampler::STATE_BYTES, "the constant of the header");

/// Sets the options that one starts from: temperature 0.8, top-k 40, top-p 0.95, min-p 0.05, no penalty, seed 0.
#[unsafe(no_mangle)]
pub extern "C" fn elleci_sampler_defaults(
    options: Option<&mut MaybeUninit<ElleciSamplerOptions>>,
    message: Option<&mut MaybeUninit<ElleciMessage>>,
) -> ElleciStatus {
    call(message, || {
        let options = given(options, "options")?;
        let d = SamplerOptions::default();
        options.write(ElleciSamplerOptions {
            temperature: d.temperature,
            top_k: d.top_k,
            top_p: d.top_p,
            min_p: d.min_p,
            repetition_penalty: d.repetition_penalty,
            repetition_window: d.repetition_window,
            seed: d.seed,
        });
        Ok(())
    })
}

/// Makes a sampler that has drawn nothing yet.
#[unsafe(no_mangle)]
pub extern "C" fn elleci_sampler_new(
    options: Option<&ElleciSamplerOptions>,
    sampler: Option<&mut MaybeUninit<*mut ElleciSampler>>,
    message: Option<&mut MaybeUninit<ElleciMessage>>,
) -> ElleciStatus {
    call(message, || {
        let sampler = given(sampler, "sampler")?.write(core::ptr::null_mut());
        let o = given(options, "options")?;
        let made = Sampler::new(SamplerOptions {
            temperature: o.temperature,
            top_k: o.top_k,
            top_p: o.top_p,
            min_p: o.min_p,
            repetition_penalty: o.repetition_penalty,
            repetition_window: o.repetition_window,
            seed: o.seed,
        })?;
        *sampler = ElleciSampler::handle(made);
        Ok(())
    })
}

impl ElleciSampler {
    fn handle(sampler: Sampler) -> *mut ElleciSampler {
        Box::into_raw(Box::new(ElleciSampler(Guarded::new("sampler", sampler))))
    }
}

/// Frees a sampler that no call uses. Null is fine.
#[unsafe(no_mangle)]
pub extern "C" fn elleci_sampler_free(sampler: Option<Box<ElleciSampler>>) -> ElleciStatus {
    free(sampler, |s| s.0.free())
}

/// Chooses a token. `logits` are used as scratch; `history` is the sequence so far, prompt included, for the repetition
/// penalty. A logit that is not finite is never chosen, so that -INFINITY bans a token.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elleci_sampler_sample(
    sampler: Option<&ElleciSampler>,
    logits: *mut f32,
    logit_count: usize,
    history: *const u32,
    history_count: usize,
    token: Option<&mut MaybeUninit<u32>>,
    message: Option<&mut MaybeUninit<ElleciMessage>>,
) -> ElleciStatus {
    call(message, || {
        let (sampler, token) = (given(sampler, "sampler")?, given(token, "token")?);
        // SAFETY: the caller vouches for both arrays.
        let (logits, history) =
            unsafe { (array_mut(logits, logit_count, "logits")?, array(history, history_count, "history")?) };
        token.write(sampler.0.with(|s| Ok(s.sample(logits, history)?))?);
        Ok(())
    })
}

/// Writes everything that the next choices depend on: ELLECI_SAMPLER_BYTES.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elleci_sampler_save(
    sampler: Option<&ElleciSampler>,
    bytes: *mut u8,
    capacity: usize,
    message: Option<&mut MaybeUninit<ElleciMessage>>,
) -> ElleciStatus {
    call(message, || {
        let sampler = given(sampler, "sampler")?;
        // SAFETY: the caller vouches for the array.
        let room = unsafe { Room::new(bytes, capacity, "bytes") }?;
        sampler.0.with(|s| room.fill(&s.to_bytes()))
    })
}

/// Makes a sampler from what elleci_sampler_save wrote. It makes the choices that the saved one would have made.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elleci_sampler_restore(
    bytes: *const u8,
    length: usize,
    sampler: Option<&mut MaybeUninit<*mut ElleciSampler>>,
    message: Option<&mut MaybeUninit<ElleciMessage>>,
) -> ElleciStatus {
    call(message, || {
        let sampler = given(sampler, "sampler")?.write(core::ptr::null_mut());
        // SAFETY: the caller vouches for the array.
        let bytes = unsafe { array(bytes, length, "bytes") }?;
        *sampler = ElleciSampler::handle(Sampler::from_bytes(bytes)?);
        Ok(())
    })
}
