//! Moments on the card's stream, for measurements.

use cudarc::driver::{result, sys};

use super::Card;
use super::faults::fault;
use crate::device::Result;

/// A moment on the stream of a card. It must not outlive the card.
pub struct Mark(sys::CUevent);

impl Drop for Mark {
    fn drop(&mut self) {
        // SAFETY: made by `Card::mark`, used by nothing else.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}

impl Card {
    /// The moment when everything queued so far is done.
    ///
    /// # Errors
    /// A fault of the device.
    pub fn mark(&self) -> Result<Mark> {
        self.enter()?;
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map_err(fault("make an event"))?;
        let mark = Mark(event);
        // SAFETY: the event was just made, the stream lives as long as the card.
        unsafe { result::event::record(mark.0, self.stream) }.map_err(fault("record an event"))?;
        Ok(mark)
    }

    /// Milliseconds from one moment to a later one, which is waited for.
    ///
    /// # Errors
    /// A fault of the device.
    pub fn milliseconds(&self, from: &Mark, to: &Mark) -> Result<f64> {
        self.enter()?;
        // SAFETY: both events were recorded on this card's stream and live as long as the marks.
        let elapsed = unsafe { result::event::synchronize(to.0).and_then(|()| result::event::elapsed(from.0, to.0)) };
        Ok(elapsed.map_err(fault("read an event"))? as f64)
    }

    /// Bytes of the card's memory that are free, and all.
    ///
    /// # Errors
    /// A fault of the device.
    pub fn memory(&self) -> Result<(u64, u64)> {
        self.enter()?;
        let (free, total) = result::mem_get_info().map_err(fault("ask for the free memory"))?;
        Ok((free as u64, total as u64))
    }
}
