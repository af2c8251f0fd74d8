//! Several sessions at once.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::mem::MaybeUninit;

use super::arrays::{Room, array};
use super::status::{Failure, Guarded, call, free, given};
use super::threads::on;
use super::{ElleciMessage, ElleciSession, ElleciStatus, ElleciThreads};
use crate::inference::{Batch, Feed, InferenceError};

/// Working memory for advancing several sessions at once. It holds no state between calls.
#[derive(Debug)]
pub struct ElleciBatch(Guarded<Batch>);

/// Tokens for one session.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct ElleciFeed {
    /// The sequence.
    pub session: *const ElleciSession,
    /// What comes next in it: a prompt or a single token.
    pub tokens: *const u32,
    /// How many they are.
    pub token_count: usize,
}

/// Makes an empty batch.
#[unsafe(no_mangle)]
pub extern "C" fn elleci_batch_new(
    batch: Option<&mut MaybeUninit<*mut ElleciBatch>>,
    message: Option<&mut MaybeUninit<ElleciMessage>>,
) -> ElleciStatus {
    call(message, || {
        let batch = given(batch, "batch")?;
        batch.write(Box::into_raw(Box::new(ElleciBatch(Guarded::new("batch", Batch::new())))));
        Ok(())
    })
}

/// Frees a batch that no call uses. Null is fine.
#[unsafe(no_mangle)]
pub extern "C" fn elleci_batch_free(batch: Option<Box<ElleciBatch>>) -> ElleciStatus {
    free(batch, |b| b.0.free())
}

/// Advances every session by its tokens and writes the logits after the last of each: `vocab_size` floats a feed, in the
/// order of the feeds. All sessions are of one model, and none comes twice. What a session computes does not depend on its
/// company: the bits are those of elleci_session_extend. `logits` may be null, with a capacity of 0, when they are not wanted.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elleci_batch_extend(
    batch: Option<&ElleciBatch>,
    threads: Option<&ElleciThreads>,
    feeds: *const ElleciFeed,
    feed_count: usize,
    logits: *mut f32,
    logits_capacity: usize,
    message: Option<&mut MaybeUninit<ElleciMessage>>,
) -> ElleciStatus {
    call(message, || {
        let batch = given(batch, "batch")?;
        // SAFETY: the caller vouches for the array, and for the handles and arrays in it.
        let feeds = unsafe {
            let feeds = array(feeds, feed_count, "feeds")?.iter();
            let feeds = feeds.map(|f| {
                let session = given(f.session.as_ref(), "feeds[..].session")?;
                Ok((session, array(f.tokens, f.token_count, "feeds[..].tokens")?))
            });
            feeds.collect::<Result<Vec<(&ElleciSession, &[u32])>, Failure>>()?
        };
        let model = feeds.first().ok_or(InferenceError::NoTokens)?.0.archive.model();
        let count = feeds.len().saturating_mul(model.config().vocab_size);
        // SAFETY: the caller vouches for the array.
        let room = unsafe { Room::wanted(logits, logits_capacity, count, "logits") }?;
        batch.0.with(|batch| {
            Guarded::with_all(feeds.iter().map(|(session, _)| &session.state), |sessions| {
                let tokens = feeds.iter().map(|(_, tokens)| *tokens);
                let mut feeds: Vec<Feed<'_>> =
                    sessions.into_iter().zip(tokens).map(|(session, tokens)| Feed { session, tokens }).collect();
                let logits = on(threads, || batch.extend(model, &mut feeds))?;
                room.as_ref().map_or(Ok(()), |room| room.fill(logits))
            })
        })
    })
}
