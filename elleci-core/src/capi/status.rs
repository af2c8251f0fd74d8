//! What a call answers.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::ffi::c_char;
use core::mem::MaybeUninit;

use atomic_refcell::{AtomicRefCell, AtomicRefMut};

use crate::archive::ArchiveError;
use crate::generate::GenerateError;
use crate::inference::InferenceError;
use crate::sampler::SamplerError;

/// What became of a call. One that fails has changed nothing but its outputs, which it sets to null or leaves alone; except that
/// after ELLECI_STATUS_INTERNAL all is open, and that elleci_generate keeps what it has fed until then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum ElleciStatus {
    /// It was done.
    Ok = 0,
    /// A pointer that is needed is null.
    NullPointer = 1,
    /// An argument or an option has a value without meaning, or an array is misaligned.
    InvalidArgument = 2,
    /// The caller's array is too small.
    BufferTooSmall = 3,
    /// The file cannot be opened or read.
    Io = 4,
    /// The bytes are no archive that this library can use, or are damaged.
    Archive = 5,
    /// A token is not in the vocabulary.
    Token = 6,
    /// No tokens were given where there must be one at least.
    NoTokens = 7,
    /// Handles belong to different models.
    OtherModel = 8,
    /// There is not as much memory as a session of this model needs.
    Memory = 9,
    /// The bytes are no saved session, or no saved sampler, or are damaged.
    Saved = 10,
    /// No logit is a finite number: there is no token to choose.
    NoCandidate = 11,
    /// The session, sampler, batch or threads are in use by another call.
    Busy = 12,
    /// The system gives no threads.
    Threads = 13,
    /// This library was built without what the call needs: files or threads.
    Unsupported = 14,
    /// A fault of this library. What was in the call can only be freed; a session may be rewound.
    Internal = 15,
}

/// Bytes of an ElleciMessage.
pub const ELLECI_MESSAGE_BYTES: usize = 512;

/// Room for the reason of a failure: UTF-8, ended by a zero byte, cut where it is too long. Written by a call that fails
/// and by no other.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct ElleciMessage {
    /// The text.
    pub text: [c_char; ELLECI_MESSAGE_BYTES],
}

impl ElleciMessage {
    pub(super) fn new(text: &str) -> ElleciMessage {
        let mut message = ElleciMessage { text: [0; ELLECI_MESSAGE_BYTES] };
        let mut end = text.len().min(ELLECI_MESSAGE_BYTES - 1);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        message.text.iter_mut().zip(&text.as_bytes()[..end]).for_each(|(to, from)| *to = *from as c_char);
        message
    }
}

/// Why a call fails.
#[derive(Debug)]
pub(super) struct Failure {
    pub status: ElleciStatus,
    pub text: String,
}

impl Failure {
    pub fn new(status: ElleciStatus, text: impl Into<String>) -> Failure {
        Failure { status, text: text.into() }
    }
}

impl From<ArchiveError> for Failure {
    fn from(error: ArchiveError) -> Failure {
        Failure::new(ElleciStatus::Archive, error.to_string())
    }
}

impl From<InferenceError> for Failure {
    fn from(error: InferenceError) -> Failure {
        let status = match error {
            InferenceError::Token { .. } => ElleciStatus::Token,
            InferenceError::NoTokens => ElleciStatus::NoTokens,
            InferenceError::OtherModel => ElleciStatus::OtherModel,
            InferenceError::Interrupted => ElleciStatus::Internal,
            InferenceError::Archive(_) => ElleciStatus::Archive,
            InferenceError::Memory { .. } => ElleciStatus::Memory,
            InferenceError::Saved(_) => ElleciStatus::Saved,
        };
        Failure::new(status, error.to_string())
    }
}

impl From<SamplerError> for Failure {
    fn from(error: SamplerError) -> Failure {
        let status = match error {
            SamplerError::Temperature(_)
            | SamplerError::TopP(_)
            | SamplerError::MinP(_)
            | SamplerError::RepetitionPenalty(_) => ElleciStatus::InvalidArgument,
            SamplerError::NoCandidate => ElleciStatus::NoCandidate,
            SamplerError::StateLength { .. } | SamplerError::StateVersion(_) => ElleciStatus::Saved,
        };
        Failure::new(status, error.to_string())
    }
}

impl From<GenerateError> for Failure {
    fn from(error: GenerateError) -> Failure {
        match error {
            GenerateError::EmptyStop(_) => Failure::new(ElleciStatus::InvalidArgument, error.to_string()),
            GenerateError::Inference(error) => error.into(),
            GenerateError::Sampler(error) => error.into(),
        }
    }
}

/// Runs a call and tells the caller what became of it; `message` is null when it wants no words. A panic ends here.
pub(super) fn call(
    message: Option<&mut MaybeUninit<ElleciMessage>>,
    f: impl FnOnce() -> Result<(), Failure>,
) -> ElleciStatus {
    match caught(f) {
        Ok(()) => ElleciStatus::Ok,
        Err(failure) => {
            if let Some(message) = message {
                message.write(ElleciMessage::new(&failure.text));
            }
            failure.status
        }
    }
}

#[cfg(feature = "std")]
fn caught(f: impl FnOnce() -> Result<(), Failure>) -> Result<(), Failure> {
    // Unwind safety: what a panic may leave half done is a session, a batch or a sampler. Those are told apart by `Guarded`.
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).unwrap_or_else(|payload| {
        let said = payload.downcast_ref::<String>().map(String::as_str);
        let said = said.or(payload.downcast_ref::<&str>().copied()).unwrap_or("no reason given");
        let text = format!("a fault of the library, please report it: {said}");
        // Dropping a payload may panic again.
        core::mem::forget(payload);
        Err(Failure::new(ElleciStatus::Internal, text))
    })
}

#[cfg(not(feature = "std"))]
fn caught(f: impl FnOnce() -> Result<(), Failure>) -> Result<(), Failure> {
    f()
}

/// A handle or a structure that must be there.
pub(super) fn given<T>(pointer: Option<T>, name: &str) -> Result<T, Failure> {
    pointer.ok_or_else(|| Failure::new(ElleciStatus::NullPointer, format!("`{name}` is null")))
}

/// Something that one call at a time may use.
#[derive(Debug)]
pub(super) struct Guarded<T> {
    cell: AtomicRefCell<Contents<T>>,
    name: &'static str,
}

#[derive(Debug)]
struct Contents<T> {
    value: T,
    /// A call panicked while it worked on the value.
    broken: bool,
}

impl<T> Guarded<T> {
    pub fn new(name: &'static str, value: T) -> Guarded<T> {
        Guarded { cell: AtomicRefCell::new(Contents { value, broken: false }), name }
    }

    fn lock(&self) -> Result<AtomicRefMut<'_, Contents<T>>, Failure> {
        self.cell.try_borrow_mut().map_err(|_| {
            Failure::new(
                ElleciStatus::Busy,
                format!("the {} is in use by another call; wait for that to return", self.name),
            )
        })
    }

    /// Whether a call is using it.
    pub fn free(&self) -> Result<(), Failure> {
        self.lock().map(|_| ())
    }

    fn sound(&self) -> Result<AtomicRefMut<'_, Contents<T>>, Failure> {
        let contents = self.lock()?;
        if contents.broken {
            let text = format!("an earlier call failed inside of this {}; free it", self.name);
            return Err(Failure::new(ElleciStatus::Internal, text));
        }
        Ok(contents)
    }

    /// Hands the value to `f` for good or ill: after a panic in it nothing else may use the value.
    pub fn with<R>(&self, f: impl FnOnce(&mut T) -> Result<R, Failure>) -> Result<R, Failure> {
        let mut contents = self.sound()?;
        contents.broken = true;
        let done = f(&mut contents.value);
        contents.broken = false;
        done
    }

    /// As [`Guarded::with`], for several: all of them or none.
    pub fn with_all<'a, R>(
        all: impl Iterator<Item = &'a Guarded<T>>,
        f: impl FnOnce(Vec<&mut T>) -> Result<R, Failure>,
    ) -> Result<R, Failure>
    where
        T: 'a,
    {
        let mut all = all.map(Guarded::sound).collect::<Result<Vec<_>, Failure>>()?;
        all.iter_mut().for_each(|contents| contents.broken = true);
        let done = f(all.iter_mut().map(|contents| &mut contents.value).collect());
        all.iter_mut().for_each(|contents| contents.broken = false);
        done
    }

    /// Gives it a new value, whatever the state of the old one.
    pub fn replace(&self, f: impl FnOnce(&mut T)) -> Result<(), Failure> {
        let mut contents = self.lock()?;
        contents.broken = true;
        f(&mut contents.value);
        contents.broken = false;
        Ok(())
    }
}

/// Frees a handle that no call uses; null is fine. `guarded` says whether one does.
pub(super) fn free<T>(handle: Option<Box<T>>, guarded: impl FnOnce(&T) -> Result<(), Failure>) -> ElleciStatus {
    let Some(handle) = handle else { return ElleciStatus::Ok };
    call(None, || {
        let free = guarded(&handle);
        // A call in progress still has it.
        match free {
            Ok(()) => drop(handle),
            Err(_) => {
                Box::leak(handle);
            }
        }
        free
    })
}
