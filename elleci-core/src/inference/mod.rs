//! Running a packed model: sessions that take tokens and give logits.
//!
//! ```no_run
//! use elleci_core::archive::{AlignedBytes, Archive};
//! use elleci_core::inference::Session;
//!
//! let bytes = std::fs::read("model.elleci")?;
//! let archive = Archive::open(AlignedBytes::from(&bytes[..]))?;
//! let mut session = Session::new(archive.model())?;
//! let logits = session.extend(archive.model(), &[17, 4, 99])?; // a prompt, or one token
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! A [`Session`] is the state of one sequence; a [`Batch`] advances several at once, whatever each of them is fed: one token or a
//! whole prompt. Rows of a pass share the products with the weights; the mixers run a sequence at a time. What a session
//! computes does not depend on its company: the same tokens in the same calls give the same bits.
//!
//! Nor does it depend on how tokens are cut into calls, but for one thing: several tokens of a sequence expand the cached latents into keys
//! and values, and the only token of a call reads the latents themselves (absorbed attention). The ternary integers are equal and the
//! floats differ by rounding. [`Batch::with_one_form`] leaves the absorbed form out.

mod absorbed;
mod attention;
mod batch;
mod expanded;
mod mamba;
mod pass;
mod save;
mod schedule;
mod session;

use core::fmt;

pub use batch::{Batch, Feed, Output, Probe};
pub use session::Session;

use crate::archive::ArchiveError;

/// Why a session cannot go on. It is as it was before the call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InferenceError {
    /// A token that is not in the vocabulary.
    Token {
        /// The token.
        token: u32,
        /// Tokens that there are.
        vocab_size: usize,
    },
    /// No token was given, so that there are no logits.
    NoTokens,
    /// The session was made for another model.
    OtherModel,
    /// The last call that worked on the session was ended by a panic.
    Interrupted,
    /// The model is damaged where it is only now looked at.
    Archive(ArchiveError),
    /// A session of this model needs more memory than there is.
    Memory {
        /// Bytes asked for.
        bytes: usize,
    },
    /// Saved bytes are no session of this model.
    Saved(&'static str),
}

impl fmt::Display for InferenceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            InferenceError::Token { token, vocab_size } => {
                write!(f, "token {token} is not in the vocabulary of {vocab_size}")
            }
            InferenceError::NoTokens => write!(f, "no tokens to go on from"),
            InferenceError::OtherModel => write!(f, "the session was made for another model"),
            InferenceError::Interrupted => {
                write!(f, "a panic ended the session's last call: go back to a mark, or begin anew")
            }
            InferenceError::Archive(error) => write!(f, "{error}"),
            InferenceError::Memory { bytes } => write!(f, "a session of this model needs {bytes} bytes of memory"),
            InferenceError::Saved(what) => write!(f, "the saved session is unusable: {what}"),
        }
    }
}

impl core::error::Error for InferenceError {}

impl From<ArchiveError> for InferenceError {
    fn from(error: ArchiveError) -> InferenceError {
        InferenceError::Archive(error)
    }
}
