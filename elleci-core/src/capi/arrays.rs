//! Arrays of the caller's.

use alloc::format;
use core::marker::PhantomData;

use super::ElleciStatus;
use super::status::Failure;

fn check<T>(pointer: *const T, count: usize, name: &str) -> Result<(), Failure> {
    if pointer.is_null() {
        return Err(Failure::new(ElleciStatus::NullPointer, format!("`{name}` is null, but has {count} elements")));
    }
    if !pointer.is_aligned() {
        let text = format!("`{name}` is not aligned to {} bytes", align_of::<T>());
        return Err(Failure::new(ElleciStatus::InvalidArgument, text));
    }
    if count.checked_mul(size_of::<T>()).is_none_or(|bytes| bytes > isize::MAX as usize) {
        return Err(Failure::new(ElleciStatus::InvalidArgument, format!("`{name}` cannot have {count} elements")));
    }
    Ok(())
}

/// An array to be read. Null is an empty one.
///
/// # Safety
/// When not null, `pointer` has `count` elements that nothing writes to for `'a`.
pub(super) unsafe fn array<'a, T>(pointer: *const T, count: usize, name: &str) -> Result<&'a [T], Failure> {
    if count == 0 {
        return Ok(&[]);
    }
    check(pointer, count, name)?;
    // SAFETY: not null, aligned, of a size that an object may have; the rest is the caller's promise.
    Ok(unsafe { core::slice::from_raw_parts(pointer, count) })
}

/// An array to be read and written.
///
/// # Safety
/// When not null, `pointer` has `count` initialised elements that nothing else uses for `'a`.
pub(super) unsafe fn array_mut<'a, T>(pointer: *mut T, count: usize, name: &str) -> Result<&'a mut [T], Failure> {
    if count == 0 {
        return Ok(&mut []);
    }
    check(pointer, count, name)?;
    // SAFETY: as for `array`.
    Ok(unsafe { core::slice::from_raw_parts_mut(pointer, count) })
}

/// An array to be filled, which need not be initialised.
pub(super) struct Room<'a, T> {
    pointer: *mut T,
    capacity: usize,
    name: &'static str,
    borrows: PhantomData<&'a mut T>,
}

// SAFETY: it is a `&mut [MaybeUninit<T>]` by another name; `new` has its caller promise so.
unsafe impl<T: Send> Send for Room<'_, T> {}

impl<T: Copy> Room<'_, T> {
    /// # Safety
    /// When not null, `pointer` has room for `capacity` elements that nothing else uses for `'a`.
    pub unsafe fn new(pointer: *mut T, capacity: usize, name: &'static str) -> Result<Self, Failure> {
        if capacity != 0 {
            check(pointer, capacity, name)?;
        }
        Ok(Room { pointer, capacity, name, borrows: PhantomData })
    }

    /// [`Room::new`] for `count` elements; `None` for a null pointer of capacity 0, when they are not wanted.
    ///
    /// # Safety
    /// As for [`Room::new`].
    pub unsafe fn wanted(
        pointer: *mut T,
        capacity: usize,
        count: usize,
        name: &'static str,
    ) -> Result<Option<Self>, Failure> {
        if pointer.is_null() && capacity == 0 {
            return Ok(None);
        }
        // SAFETY: the caller's promise.
        let room = unsafe { Room::new(pointer, capacity, name) }?;
        room.fits(count)?;
        Ok(Some(room))
    }

    /// Whether `count` elements fit.
    pub fn fits(&self, count: usize) -> Result<(), Failure> {
        if count <= self.capacity {
            return Ok(());
        }
        let text = format!("`{}` has room for {} elements of {count}", self.name, self.capacity);
        Err(Failure::new(ElleciStatus::BufferTooSmall, text))
    }

    /// Writes to the start.
    pub fn fill(&self, values: &[T]) -> Result<(), Failure> {
        self.fits(values.len())?;
        if !values.is_empty() {
            // SAFETY: there is room for `capacity` elements, at least as many as `values` has, and nothing else uses it.
            unsafe { self.pointer.copy_from_nonoverlapping(values.as_ptr(), values.len()) };
        }
        Ok(())
    }
}
