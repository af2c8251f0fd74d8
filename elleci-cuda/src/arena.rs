//! One block of device memory, cut before anything is allocated: the plan and the allocation are the same list.

use std::ops::Range;

/// Buffers begin at multiples of this.
const ALIGN: u64 = 256;

/// What the elements of a buffer are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names of the types")]
pub enum Dtype {
    F32,
    Bf16,
    F64,
    I8,
    U8,
    E4m3,
    I32,
    U32,
}

impl Dtype {
    /// Bytes of an element.
    pub fn bytes(self) -> u64 {
        match self {
            Dtype::I8 | Dtype::U8 | Dtype::E4m3 => 1,
            Dtype::Bf16 => 2,
            Dtype::F32 | Dtype::I32 | Dtype::U32 => 4,
            Dtype::F64 => 8,
        }
    }
}

/// A piece of a device's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buf {
    /// Bytes from the start of the arena.
    pub at: u64,
    /// Elements.
    pub len: usize,
    /// What they are.
    pub dtype: Dtype,
}

impl Buf {
    /// Its size in bytes.
    pub fn bytes(&self) -> u64 {
        self.len as u64 * self.dtype.bytes()
    }

    /// `len` elements from element `from` on.
    ///
    /// # Panics
    /// When they are not all in the buffer.
    pub fn part(&self, from: usize, len: usize) -> Buf {
        assert!(from + len <= self.len, "elements {from}..{} of a buffer of {}", from + len, self.len);
        Buf { at: self.at + from as u64 * self.dtype.bytes(), len, dtype: self.dtype }
    }

    /// The same bytes as elements of another type.
    ///
    /// # Panics
    /// When they are no whole number of those.
    pub fn with(&self, dtype: Dtype) -> Buf {
        assert!(self.bytes().is_multiple_of(dtype.bytes()), "{self:?} as {dtype:?}");
        Buf { len: (self.bytes() / dtype.bytes()) as usize, dtype, ..*self }
    }
}

/// What a buffer is for; the memory plan adds up by this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Latent weights.
    Weights,
    /// Packed ternary forms.
    Ternary,
    /// Gradients.
    Gradients,
    /// Optimizer states.
    Optimizer,
    /// The running mean of the weights.
    Average,
    /// What the forward keeps for the backward.
    Activations,
    /// What lives for one operation, and the batch.
    Scratch,
}

/// A named buffer of an [`Arena`].
#[derive(Clone, Debug)]
pub struct Region {
    /// What it holds.
    pub name: String,
    /// What it is for.
    pub purpose: Use,
    /// Where it is.
    pub buf: Buf,
    /// Whether it lies in memory that is counted for what else lies there; see [`Arena::borrow`].
    pub lent: bool,
}

/// The plan of a device's memory.
#[derive(Clone, Debug, Default)]
pub struct Arena {
    regions: Vec<Region>,
    cursor: u64,
    peak: u64,
    guard: u64,
    phase: Option<u64>,
}

impl Arena {
    /// An empty plan. With `guard` > 0, that many bytes stay unused behind every buffer, and phases do not share memory: a
    /// device that checks accesses then sees every step over a buffer's end.
    pub fn new(guard: u64) -> Arena {
        Arena { guard, ..Arena::default() }
    }

    /// Takes memory for `len` elements.
    pub fn buffer(&mut self, purpose: Use, name: impl Into<String>, dtype: Dtype, len: usize) -> Buf {
        let buf = Buf { at: self.cursor, len, dtype };
        self.cursor = (self.cursor + buf.bytes() + self.guard).next_multiple_of(ALIGN);
        self.peak = self.peak.max(self.cursor);
        self.regions.push(Region { name: name.into(), purpose, buf, lent: false });
        buf
    }

    /// As [`Arena::buffer`], but in `free`, which is what is left of memory whose owner has no use for it meanwhile; in memory of its
    /// own where it does not fit there, or where a guard shall keep buffers apart.
    pub fn borrow(
        &mut self,
        free: &mut Range<u64>,
        purpose: Use,
        name: impl Into<String>,
        dtype: Dtype,
        len: usize,
    ) -> Buf {
        let buf = Buf { at: free.start.next_multiple_of(ALIGN), len, dtype };
        if self.guard > 0 || buf.at + buf.bytes() > free.end {
            return self.buffer(purpose, name, dtype, len);
        }
        free.start = buf.at + buf.bytes();
        self.regions.push(Region { name: name.into(), purpose, buf, lent: true });
        buf
    }

    /// Where the next buffer will lie; see [`Arena::overlay`].
    pub fn here(&self) -> u64 {
        self.cursor
    }

    /// What follows is needed at another time than what was taken since `here` was this: both lie in the same place.
    pub fn overlay(&mut self, here: u64) {
        if self.guard == 0 {
            self.cursor = here;
        }
    }

    /// What follows is needed at another time than what came since the last call: both lie in the same place.
    pub fn phase(&mut self) {
        let start = *self.phase.get_or_insert(self.cursor);
        self.overlay(start);
    }

    /// Ends the phases: what follows lies behind the largest.
    pub fn end_phases(&mut self) {
        self.phase = None;
        self.cursor = self.peak;
    }

    /// Bytes of all of it.
    pub fn bytes(&self) -> u64 {
        self.peak
    }

    /// All buffers, in order.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Bytes of a purpose that lie in memory of another.
    pub fn lent_to(&self, purpose: Use) -> u64 {
        self.regions.iter().filter(|r| r.purpose == purpose && r.lent).map(|r| r.buf.bytes()).sum()
    }

    /// Bytes of a purpose, without those in memory of another. Scratch shares memory, so its share is what is left beside all others.
    pub fn bytes_of(&self, purpose: Use) -> u64 {
        let sum = |p: Use| -> u64 {
            let own = self.regions.iter().filter(|r| r.purpose == p && !r.lent);
            own.map(|r| (r.buf.bytes() + self.guard).next_multiple_of(ALIGN)).sum()
        };
        match purpose {
            Use::Scratch => {
                let others =
                    [Use::Weights, Use::Ternary, Use::Gradients, Use::Optimizer, Use::Average, Use::Activations];
                self.peak - others.into_iter().map(sum).sum::<u64>()
            }
            other => sum(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_share_memory_and_guards_keep_buffers_apart() {
        for guard in [0, 64] {
            let mut arena = Arena::new(guard);
            let a = arena.buffer(Use::Weights, "a", Dtype::F32, 3);
            arena.phase();
            let b = arena.buffer(Use::Scratch, "b", Dtype::I8, 1000);
            arena.phase();
            let c = arena.buffer(Use::Scratch, "c", Dtype::F64, 10);
            arena.end_phases();
            let d = arena.buffer(Use::Activations, "d", Dtype::Bf16, 1);
            assert_eq!((a.at, b.at), (0, 256));
            assert_eq!(c.at == b.at, guard == 0);
            assert!(d.at >= b.at + b.bytes() && d.at >= c.at + c.bytes() + guard);
            assert_eq!(arena.bytes_of(Use::Weights) + arena.bytes_of(Use::Activations), 512);
            assert_eq!(arena.bytes_of(Use::Scratch), arena.bytes() - 512);
        }
    }

    #[test]
    fn lent_memory_is_counted_once() {
        for guard in [0, 64] {
            let mut arena = Arena::new(guard);
            let owner = arena.buffer(Use::Gradients, "owner", Dtype::F32, 300);
            let mut free = owner.at..owner.at + owner.bytes();
            let mut take = |name: &str| arena.borrow(&mut free, Use::Activations, name, Dtype::F32, 100);
            let (a, b, c) = (take("a"), take("b"), take("c"));
            assert_eq!((a.at == owner.at, b.at == 512), (guard == 0, guard == 0));
            assert!(c.at >= owner.at + owner.bytes(), "only two begin at whole multiples and end within 1200 bytes");
            assert_eq!(arena.lent_to(Use::Activations), if guard == 0 { 800 } else { 0 });
            assert_eq!(arena.bytes_of(Use::Gradients) + arena.bytes_of(Use::Activations), arena.bytes());
        }
    }

    #[test]
    fn parts_are_counted_in_elements() {
        let buf = Buf { at: 256, len: 10, dtype: Dtype::F64 };
        assert_eq!(buf.part(2, 3), Buf { at: 272, len: 3, dtype: Dtype::F64 });
    }
}
