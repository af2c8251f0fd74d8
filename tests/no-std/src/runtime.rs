// The two things that a program without the standard library must bring: an allocator and a panic handler. Were any
// dependency to link `std`, its panic handler would clash with the one here.

use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicUsize, Ordering};

/// 64 MiB that are handed out once; only the last piece is ever taken back.
const ARENA_BYTES: usize = 64 << 20;

struct Arena {
    memory: UnsafeCell<[u8; ARENA_BYTES]>,
    used: AtomicUsize,
}

// SAFETY: the memory is only reached through pointers to disjoint pieces, which `used` hands out atomically.
unsafe impl Sync for Arena {}

// SAFETY: every piece lies within the arena, is aligned as asked, and overlaps no other that has not been given back.
unsafe impl GlobalAlloc for Arena {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let base = self.memory.get().cast::<u8>();
        let mut piece = 0;
        let taken = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
            piece = (base as usize + used).checked_next_multiple_of(layout.align())? - base as usize;
            piece.checked_add(layout.size()).filter(|end| *end <= ARENA_BYTES)
        });
        match taken {
            // SAFETY: `piece + size` is at most the arena's length.
            Ok(_) => unsafe { base.add(piece) },
            Err(_) => core::ptr::null_mut(),
        }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        let piece = pointer as usize - self.memory.get() as usize;
        // Nothing lies behind the last piece.
        let _ = self.used.compare_exchange(piece + layout.size(), piece, Ordering::Relaxed, Ordering::Relaxed);
    }
}

#[global_allocator]
static ARENA: Arena = Arena { memory: UnsafeCell::new([0; ARENA_BYTES]), used: AtomicUsize::new(0) };

unsafe extern "C" {
    fn abort() -> !;
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    // SAFETY: the C library's `abort` takes nothing and does not return.
    unsafe { abort() }
}

/// The shipped `alloc` was compiled to unwind and names this symbol, which `std` would define; nothing here unwinds
/// (`panic = "abort"`), so it is never called.
#[unsafe(no_mangle)]
pub extern "C" fn rust_eh_personality() {}
