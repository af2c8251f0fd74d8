//! Sessions.

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::mem::MaybeUninit;

use super::arrays::{Room, array};
use super::model::Bytes;
use super::status::{Failure, Guarded, call, free, given};
use super::threads::on;
use super::{ElleciMessage, ElleciModel, ElleciStatus, ElleciThreads};
use crate::archive::Archive;
use crate::inference::{InferenceError, Session};

/// The state of one sequence. It keeps its model alive.
#[derive(Debug)]
pub struct ElleciSession {
    pub(super) archive: Arc<Archive<Bytes>>,
    pub(super) state: Guarded<Session>,
}

impl ElleciSession {
    fn handle(archive: Arc<Archive<Bytes>>, session: Session) -> *mut ElleciSession {
        Box::into_raw(Box::new(ElleciSession { archive, state: Guarded::new("session", session) }))
    }
}

/// Begins an empty sequence.
#[unsafe(no_mangle)]
pub extern "C" fn elleci_session_new(
    model: Option<&ElleciModel>,
    session: Option<&mut MaybeUninit<*mut ElleciSession>>,
    message: Option<&mut MaybeUninit<ElleciMessage>>,
) -> ElleciStatus {
    call(message, || {
        let session = given(session, "session")?.write(core::ptr::null_mut());
        let archive = &given(model, "model")?.0;
        *session = ElleciSession::handle(archive.clone(), Session::new(archive.model())?);
        Ok(())
    })
}

/// Frees a session that no call uses. Null is fine.
#[unsafe(no_mangle)]
pub extern "C" fn elleci_session_free(session: Option<Box<ElleciSession>>) -> ElleciStatus {
    free(session, |s| s.state.free())
}

/// Makes a second session that stands where this one does. It is cheap: the two share what neither has changed since.
#[unsafe(no_mangle)]
pub extern "C" fn elleci_session_fork(
    session: Option<&ElleciSession>,
    fork: Option<&mut MaybeUninit<*mut ElleciSession>>,
    message: Option<&mut MaybeUninit<ElleciMessage>>,
) -> ElleciStatus {
    call(message, || {
        let fork = given(fork, "fork")?.write(core::ptr::null_mut());
        let session = given(session, "session")?;
        let copy = session.state.with(|s| Ok(s.clone()))?;
        *fork = ElleciSession::handle(session.archive.clone(), copy);
        Ok(())
    })
}

/// Puts a session where `mark` stands, another session of the same model: mostly an earlier fork, to come back to.
#[unsafe(no_mangle)]
pub extern "C" fn elleci_session_rewind(
    session: Option<&ElleciSession>,
    mark: Option<&ElleciSession>,
    message: Option<&mut MaybeUninit<ElleciMessage>>,
) -> ElleciStatus {
    call(message, || {
        let (session, mark) = (given(session, "session")?, given(mark, "mark")?);
        if session.archive.model().fingerprint() != mark.archive.model().fingerprint() {
            return Err(InferenceError::OtherModel.into());
        }
        // A clone, so that the two need not be locked at once: they may be the same.
        let mark = mark.state.with(|m| Ok(m.clone()))?;
        session.state.replace(|s| s.rewind(&mark))
    })
}

/// Tokens that the sequence has so far.
#[unsafe(no_mangle)]
pub extern "C" fn elleci_session_position(
    session: Option<&ElleciSession>,
    position: Option<&mut MaybeUninit<usize>>,
    message: Option<&mut MaybeUninit<ElleciMessage>>,
) -> ElleciStatus {
    call(message, || {
        let (session, position) = (given(session, "session")?, given(position, "position")?);
        position.write(session.state.with(|s| Ok(s.position()))?);
        Ok(())
    })
}

/// Copies the tokens that the sequence has so far. `count` is set to their number, also when `capacity` is too small for
/// them.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elleci_session_tokens(
    session: Option<&ElleciSession>,
    tokens: *mut u32,
    capacity: usize,
    count: Option<&mut MaybeUninit<usize>>,
    message: Option<&mut MaybeUninit<ElleciMessage>>,
) -> ElleciStatus {
    call(message, || {
        let (session, count) = (given(session, "session")?, given(count, "count")?);
        // SAFETY: the caller vouches for the array.
        let room = unsafe { Room::new(tokens, capacity, "tokens") }?;
        session.state.with(|s| {
            count.write(s.position());
            room.fill(s.tokens())
        })
    })
}

/// Takes the next tokens, a prompt or a single one, and writes the logits of the token after them: `vocab_size` floats.
/// `logits` may be null, with a capacity of 0, when they are not wanted.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elleci_session_extend(
    session: Option<&ElleciSession>,
    threads: Option<&ElleciThreads>,
    tokens: *const u32,
    token_count: usize,
    logits: *mut f32,
    logits_capacity: usize,
    message: Option<&mut MaybeUninit<ElleciMessage>>,
) -> ElleciStatus {
    call(message, || {
        let session = given(session, "session")?;
        let model = session.archive.model();
        // SAFETY: the caller vouches for the array.
        let tokens = unsafe { array(tokens, token_count, "tokens") }?;
        let count = model.config().vocab_size;
        // SAFETY: the caller vouches for the array.
        let room = unsafe { Room::wanted(logits, logits_capacity, count, "logits") }?;
        session.state.with(|s| {
            on(threads, || {
                let logits = s.extend(model, tokens)?;
                room.map_or(Ok(()), |room| room.fill(logits))
            })
        })
    })
}

/// Writes the whole state of a session. `length` is set to its bytes, also when `capacity` is too small for them: a first
/// call with a capacity of 0 asks for the size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elleci_session_save(
    session: Option<&ElleciSession>,
    bytes: *mut u8,
    capacity: usize,
    length: Option<&mut MaybeUninit<usize>>,
    message: Option<&mut MaybeUninit<ElleciMessage>>,
) -> ElleciStatus {
    call(message, || {
        let (session, length) = (given(session, "session")?, given(length, "length")?);
        // SAFETY: the caller vouches for the array.
        let room = unsafe { Room::new(bytes, capacity, "bytes") }?;
        let saved = session.state.with(|s| Ok(s.to_bytes()))?;
        length.write(saved.len());
        room.fill(&saved)
    })
}

/// Makes a session from what elleci_session_save wrote, of the same model. It goes on to the bit as the saved one would.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elleci_session_restore(
    model: Option<&ElleciModel>,
    bytes: *const u8,
    length: usize,
    session: Option<&mut MaybeUninit<*mut ElleciSession>>,
    message: Option<&mut MaybeUninit<ElleciMessage>>,
) -> ElleciStatus {
    call(message, || {
        let session = given(session, "session")?.write(core::ptr::null_mut());
        let archive = &given(model, "model")?.0;
        // SAFETY: the caller vouches for the array.
        let bytes = unsafe { array(bytes, length, "bytes") }?;
        let restored = Session::from_bytes(archive.model(), bytes).map_err(Failure::from)?;
        *session = ElleciSession::handle(archive.clone(), restored);
        Ok(())
    })
}
