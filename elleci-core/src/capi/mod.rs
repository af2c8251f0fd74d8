//! The C ABI: what `include/elleci.h` declares. The header is made from these modules by cbindgen, and `tests/committed.rs`
//! holds it to them.
//!
//! The rules, which the header states for its readers, too:
//!
//! - Handles are opaque. A session keeps its model alive, so that handles may be freed in any order.
//! - Every call returns an [`ElleciStatus`]. The reason in words goes into an [`ElleciMessage`] of the caller's, if it gives
//!   one: there is no global and no thread-local state.
//! - Null pointers, misaligned arrays and sizes that do not fit are refused. A session, sampler or batch that is in use (by
//!   another thread, or by the call whose callback is running) answers `Busy`: it is never waited for and never shared.
//! - No panic crosses the boundary. Without `std` there is no unwinding, and a panic is whatever the program's handler makes
//!   of it.
//! - Threads are the caller's: a call works on the calling thread, or on the pool that it is given.
//!
//! References stand in the signatures where C has pointers (`Option<&T>` is a pointer that may be null): a caller from C
//! vouches that a pointer which is not null is the handle or the structure that its type says.
#![expect(
    clippy::missing_safety_doc,
    reason = "one contract holds for all functions and stands at the head of the module"
)]

mod arrays;
mod batch;
mod generate;
mod model;
mod sampler;
mod session;
mod status;
#[cfg(test)]
mod tests;
mod threads;

pub use batch::*;
pub use generate::*;
pub use model::*;
pub use sampler::*;
pub use session::*;
pub use status::*;
pub use threads::*;

/// The version of this interface. It is raised whenever a function, structure or code changes its meaning; new functions
/// alone do not raise it.
pub const ELLECI_ABI_VERSION: u32 = 1;

/// The version of the library that is linked: it must equal ELLECI_ABI_VERSION of the header.
#[unsafe(no_mangle)]
pub extern "C" fn elleci_abi_version() -> u32 {
    ELLECI_ABI_VERSION
}
