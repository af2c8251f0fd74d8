//! Page-locked memory through which small copies to the card go, so that the host does not wait for any of them.
//!
//! Two halves take turns: while the card reads one, the host fills the other, and waits only where the card has not yet read what
//! was written a whole half ago.

use std::ffi::c_void;
use std::ptr;

use cudarc::driver::{DriverError, result, sys};

/// Bytes of a half. The batch and the scalars of a step are far smaller; weights go through in pieces.
const HALF: usize = 4 << 20;
/// Copies begin at multiples of this.
const ALIGN: usize = 256;

/// One half.
struct Half {
    memory: *mut u8,
    /// Recorded behind the last copy out of it
    read: sys::CUevent,
    /// Whether the card may still be reading
    busy: bool,
}

/// Both halves.
pub(super) struct Staging {
    halves: [Half; 2],
    current: usize,
    used: usize,
}

impl Staging {
    /// Allocates both in the context that is current.
    pub fn new() -> Result<Staging, DriverError> {
        let half = || -> Result<Half, DriverError> {
            let read = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
            // SAFETY: a context is current, as the caller says.
            let memory = unsafe { result::malloc_host(HALF, 0) }?;
            Ok(Half { memory: memory.cast(), read, busy: false })
        };
        Ok(Staging { halves: [half()?, half()?], current: 0, used: 0 })
    }

    /// Queues a copy of `bytes` to address `to` on the stream. They have been read when this returns.
    ///
    /// # Safety
    /// `to` is device memory of that many bytes, in the current context, and the stream belongs to it.
    pub unsafe fn copy(&mut self, to: u64, bytes: &[u8], stream: sys::CUstream) -> Result<(), DriverError> {
        let mut at = to;
        for piece in bytes.chunks(HALF) {
            if self.used + piece.len() > HALF {
                // SAFETY: the caller's stream.
                unsafe { self.turn(stream) }?;
            }
            let half = &self.halves[self.current];
            // SAFETY: the piece fits behind what is used of this half, which no copy that still runs reads: `turn` waited.
            // The memory lives as long as this, and `destroy` is called when the stream is idle.
            let staged = unsafe {
                let place = half.memory.add(self.used);
                ptr::copy_nonoverlapping(piece.as_ptr(), place, piece.len());
                std::slice::from_raw_parts(place, piece.len())
            };
            // SAFETY: the address is the caller's; the staged bytes stay as they are until the event behind them has passed.
            unsafe { result::memcpy_htod_async(at, staged, stream) }?;
            self.used += piece.len().next_multiple_of(ALIGN);
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// Goes on with the other half, when the card has read it.
    ///
    /// # Safety
    /// As for [`Staging::copy`].
    unsafe fn turn(&mut self, stream: sys::CUstream) -> Result<(), DriverError> {
        let full = &mut self.halves[self.current];
        // SAFETY: the event is this half's, the stream the caller's.
        unsafe { result::event::record(full.read, stream) }?;
        full.busy = true;
        self.current ^= 1;
        self.used = 0;
        let next = &mut self.halves[self.current];
        if std::mem::take(&mut next.busy) {
            // SAFETY: the event was recorded when this half was full.
            unsafe { result::event::synchronize(next.read) }?;
        }
        Ok(())
    }

    /// Releases both.
    ///
    /// # Safety
    /// Nothing reads them any more, and their context is current.
    pub unsafe fn destroy(&mut self) {
        for half in &self.halves {
            // SAFETY: made by `new`, used by nothing else, as the caller says.
            unsafe {
                let _ = result::free_host(half.memory.cast::<c_void>());
                let _ = result::event::destroy(half.read);
            }
        }
    }
}
