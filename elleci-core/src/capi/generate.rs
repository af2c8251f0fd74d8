//! Text from a session.

use alloc::vec::Vec;
use core::ffi::{c_int, c_void};
use core::mem::MaybeUninit;
use core::ops::ControlFlow;

use super::arrays::array;
use super::status::{Failure, call, given};
use super::threads::on;
use super::{ElleciMessage, ElleciSampler, ElleciSession, ElleciStatus, ElleciThreads};
use crate::generate::{GenerateOptions, Generated, LogitsHook, StopReason, generate};

/// Sees every token of the text as soon as it is certain that it belongs to it. Anything but 0 ends the text.
pub type ElleciOnToken = Option<unsafe extern "C" fn(token: u32, user: *mut c_void) -> c_int>;

/// Sees, and may change, the logits before each choice; with them the sequence so far, prompt included.
pub type ElleciOnLogits = Option<
    unsafe extern "C" fn(
        logits: *mut f32,
        logit_count: usize,
        tokens: *const u32,
        token_count: usize,
        user: *mut c_void,
    ),
>;

/// A sequence of tokens.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct ElleciTokens {
    /// The tokens.
    pub tokens: *const u32,
    /// How many they are.
    pub count: usize,
}

/// What to generate. All zeros but `max_tokens` is a good start.
///
/// Callbacks run while the session and the sampler are in use: calls for those answer ELLECI_STATUS_BUSY. With threads handed
/// in, they run on one of those threads while the caller waits. They must return: a longjmp or an exception out of them is
/// undefined.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct ElleciGenerateOptions {
    /// Tokens at most. 0 feeds the prompt and chooses nothing.
    pub max_tokens: usize,
    /// Sequences that end the text and are no part of it. None may be empty.
    pub stop: *const ElleciTokens,
    /// How many they are.
    pub stop_count: usize,
    /// Called with every token, unless null.
    pub on_token: ElleciOnToken,
    /// Called before every choice, unless null.
    pub on_logits: ElleciOnLogits,
    /// Handed to the callbacks.
    pub user: *mut c_void,
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum ElleciStopReason {
    /// `max_tokens` were generated.
    MaxTokens = 0,
    /// A stop sequence was met.
    StopSequence = 1,
    /// The callback asked for it.
    Cancelled = 2,
}

/// A text that was generated.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct ElleciGenerated {
    /// Tokens that the callback saw.
    pub token_count: usize,
    /// Why there are no more.
    pub reason: ElleciStopReason,
    /// Which stop sequence was met; 0 when none was.
    pub stop_index: usize,
}

impl From<Generated> for ElleciGenerated {
    fn from(text: Generated) -> ElleciGenerated {
        let (reason, stop_index) = match text.reason {
            StopReason::MaxTokens => (ElleciStopReason::MaxTokens, 0),
            StopReason::Stop(index) => (ElleciStopReason::StopSequence, index),
            StopReason::Cancelled => (ElleciStopReason::Cancelled, 0),
        };
        ElleciGenerated { token_count: text.tokens.len(), reason, stop_index }
    }
}

/// What goes to the pool's thread.
struct Callbacks(ElleciGenerateOptions);

// SAFETY: the caller has been told that callbacks run on the threads that it hands in, one at a time while it waits.
unsafe impl Send for Callbacks {}

impl Callbacks {
    fn token(&self, token: u32) -> ControlFlow<()> {
        // SAFETY: the caller vouches for its function and for what it makes of `user`.
        let answer = self.0.on_token.map_or(0, |f| unsafe { f(token, self.0.user) });
        if answer == 0 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    }

    fn logits(&self, logits: &mut [f32], tokens: &[u32]) {
        if let Some(f) = self.0.on_logits {
            // SAFETY: both arrays are as long as is said; the rest is as for `token`.
            unsafe { f(logits.as_mut_ptr(), logits.len(), tokens.as_ptr(), tokens.len(), self.0.user) };
        }
    }
}

/// Feeds `prompt`, which may not be empty, to the session and continues it. Afterwards the session has taken the prompt and
/// everything that was chosen except for the last token, which has not been needed yet: begin the next prompt with what
/// elleci_session_tokens lacks. `generated` may be null. After a failure, the tokens that the callback has seen stand.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elleci_generate(
    session: Option<&ElleciSession>,
    sampler: Option<&ElleciSampler>,
    options: Option<&ElleciGenerateOptions>,
    threads: Option<&ElleciThreads>,
    prompt: *const u32,
    prompt_count: usize,
    generated: Option<&mut MaybeUninit<ElleciGenerated>>,
    message: Option<&mut MaybeUninit<ElleciMessage>>,
) -> ElleciStatus {
    call(message, || {
        let (session, sampler) = (given(session, "session")?, given(sampler, "sampler")?);
        let callbacks = Callbacks(*given(options, "options")?);
        // SAFETY: the caller vouches for the arrays.
        let (prompt, stop) = unsafe {
            let stop = array(callbacks.0.stop, callbacks.0.stop_count, "stop")?;
            let stop = stop.iter().map(|s| array(s.tokens, s.count, "stop[..].tokens"));
            (array(prompt, prompt_count, "prompt")?, stop.collect::<Result<Vec<_>, Failure>>()?)
        };
        let max_tokens = callbacks.0.max_tokens;
        let model = session.archive.model();
        let text = session.state.with(|session| {
            sampler.0.with(|sampler| {
                on(threads, || {
                    let callbacks = callbacks;
                    let mut hook = |logits: &mut [f32], tokens: &[u32]| callbacks.logits(logits, tokens);
                    let hook = callbacks.0.on_logits.map(|_| &mut hook as &mut LogitsHook<'_>);
                    let options = GenerateOptions { max_tokens, stop: &stop, hook };
                    Ok(generate(model, session, sampler, options, prompt, |token| callbacks.token(token))?)
                })
            })
        })?;
        if let Some(generated) = generated {
            generated.write(text.into());
        }
        Ok(())
    })
}
