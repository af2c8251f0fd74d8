//! The states of an optimiser as named tensors: what a checkpoint writes and reads, without a copy in between.

use alloc::borrow::Cow;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

/// The element type of a state tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateType {
    /// 32-bit float.
    F32,
    /// Unsigned byte (8-bit codes).
    U8,
}

/// The elements of a state tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum StateData<'a> {
    /// Moments, or the absmax of every block.
    F32(&'a [f32]),
    /// 8-bit codes.
    U8(&'a [u8]),
}

impl<'a> StateData<'a> {
    /// The element type.
    pub fn dtype(&self) -> StateType {
        match self {
            StateData::F32(_) => StateType::F32,
            StateData::U8(_) => StateType::U8,
        }
    }

    /// The elements in file order, little-endian; borrowed where that is how memory holds them.
    pub fn bytes(&self) -> Cow<'a, [u8]> {
        match *self {
            StateData::U8(data) => Cow::Borrowed(data),
            #[cfg(target_endian = "little")]
            StateData::F32(data) => Cow::Borrowed(bytemuck::cast_slice(data)),
            #[cfg(not(target_endian = "little"))]
            StateData::F32(data) => Cow::Owned(data.iter().flat_map(|v| v.to_le_bytes()).collect()),
        }
    }
}

/// A borrowed state tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct StateTensor<'a> {
    /// The parameter's name and which of its states this is, e.g. `layers.0.ffn.up.weight.m_absmax`.
    pub name: String,
    /// The parameter's shape, or `[blocks]` for an absmax.
    pub shape: Vec<usize>,
    /// Its elements.
    pub data: StateData<'a>,
}

/// Why a state tensor cannot be loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StateError {
    /// This optimiser has no state of that name.
    Unknown(String),
    /// A state that this optimiser has is not there.
    Missing(String),
    /// The element type differs, as between 8-bit and float32 states.
    Type {
        /// The tensor.
        name: String,
        /// What it must be.
        expected: StateType,
        /// What the file has.
        found: StateType,
    },
    /// The shape differs.
    Shape {
        /// The tensor.
        name: String,
        /// What it must be.
        expected: Vec<usize>,
        /// What the file has.
        found: Vec<usize>,
    },
    /// Type and shape ask for another number of bytes.
    Bytes {
        /// The tensor.
        name: String,
        /// What type and shape ask for.
        expected: usize,
        /// How many there are.
        found: usize,
    },
    /// A value that no training step can leave: not finite, or a negative second moment or absmax.
    Value(String),
}

impl fmt::Display for StateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StateError::Unknown(name) => write!(f, "`{name}` is no state of this model's optimiser"),
            StateError::Missing(name) => write!(f, "the optimiser state `{name}` is missing"),
            StateError::Type { name, expected, found } => {
                write!(
                    f,
                    "the optimiser state `{name}` is {found:?}, but {expected:?} is configured (8-bit or float32 states)"
                )
            }
            StateError::Shape { name, expected, found } => {
                write!(f, "the optimiser state `{name}` has shape {found:?}; the model needs {expected:?}")
            }
            StateError::Bytes { name, expected, found } => {
                write!(f, "the optimiser state `{name}` has {found} bytes; its type and shape need {expected}")
            }
            StateError::Value(name) => {
                write!(
                    f,
                    "the optimiser state `{name}` holds a value that is not finite, or is negative where none can be"
                )
            }
        }
    }
}

impl core::error::Error for StateError {}

/// Checks a tensor of a file against the state that it is to replace: type, shape, length, and values that a step can leave.
///
/// # Errors
/// The first thing that does not fit.
pub fn check(
    name: &str,
    expected: (StateType, &[usize]),
    found: (StateType, &[usize], &[u8]),
) -> Result<(), StateError> {
    let ((dtype, shape), (found_type, found_shape, bytes)) = (expected, found);
    // Second moments and absmax are never negative; no state is ever infinite or NaN.
    let lowest = if name.ends_with(".m") { f32::MIN } else { 0.0 };
    let name = || name.to_string();
    if dtype != found_type {
        return Err(StateError::Type { name: name(), expected: dtype, found: found_type });
    }
    if shape != found_shape {
        return Err(StateError::Shape { name: name(), expected: shape.to_vec(), found: found_shape.to_vec() });
    }
    let size = if dtype == StateType::F32 { 4 } else { 1 };
    let expected = shape.iter().product::<usize>() * size;
    if expected != bytes.len() {
        return Err(StateError::Bytes { name: name(), expected, found: bytes.len() });
    }
    let sound = |b: &[u8]| (lowest..=f32::MAX).contains(&f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    if dtype == StateType::F32 && !bytes.chunks_exact(4).all(sound) {
        return Err(StateError::Value(name()));
    }
    Ok(())
}

/// Little-endian bytes into floats.
pub(super) fn copy_f32(bytes: &[u8], out: &mut [f32]) {
    for (v, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
        *v = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    }
}
