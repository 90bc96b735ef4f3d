//! Memory from the operating system: zeroed, page-aligned, on huge pages where there are any.

use std::ops::{Deref, DerefMut};

use baton_engine::KvMemory;

/// A KV arena in plain memory: for tests, and for a worker that hands its KV to nobody.
pub struct HeapMemory(Pages<u8>);

impl HeapMemory {
    /// `bytes` zero bytes.
    ///
    /// # Panics
    /// If the system has no memory left.
    pub fn new(bytes: usize) -> Self {
        Self(Pages::zeroed(bytes))
    }
}

impl KvMemory for HeapMemory {
    fn base(&self) -> *mut u8 {
        self.0.base
    }

    fn len(&self) -> usize {
        self.0.len
    }
}

/// Element types for which any bytes are a value, zero bytes above all.
pub trait Plain: Copy {}
impl Plain for u8 {}
impl Plain for u16 {}
impl Plain for f32 {}

/// A slice of whole pages of its own. Weights and activations live in these: TLB misses on 4 KiB pages cost
/// a streaming product some percent.
pub struct Pages<T: Plain> {
    base: *mut T,
    len: usize,
    bytes: usize,
}

// SAFETY: it owns its pages; shared access is read-only through `&self`, and the KV arena's writers
// synchronise outside, as `KvMemory` demands.
unsafe impl<T: Plain + Send> Send for Pages<T> {}
// SAFETY: as above.
unsafe impl<T: Plain + Sync> Sync for Pages<T> {}

const HUGE_PAGE: usize = 2 << 20;

impl<T: Plain> Pages<T> {
    /// `len` zero elements.
    pub fn zeroed(len: usize) -> Self {
        let bytes = (len * size_of::<T>()).max(1).next_multiple_of(4096);
        // A huge page needs its alignment, so large pieces ask for one more and start inside.
        let slack = if bytes >= HUGE_PAGE { HUGE_PAGE } else { 0 };
        // SAFETY: a fresh private anonymous mapping; the result is checked.
        let raw = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes + slack,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert!(
            raw != libc::MAP_FAILED,
            "no memory: the system refused {bytes} bytes ({})",
            std::io::Error::last_os_error()
        );
        let mut base = raw.cast::<u8>();
        if slack > 0 {
            let lead = base.align_offset(HUGE_PAGE);
            // SAFETY: head and tail are whole pages of the mapping just made and nothing points there;
            // advice on the rest is only advice.
            unsafe {
                let start = base.add(lead);
                if lead > 0 {
                    libc::munmap(base.cast(), lead);
                }
                libc::munmap(start.add(bytes).cast(), slack - lead);
                libc::madvise(start.cast(), bytes, libc::MADV_HUGEPAGE);
                base = start;
            }
        }
        Self {
            base: base.cast(),
            len,
            bytes,
        }
    }
}

impl<T: Plain> Drop for Pages<T> {
    fn drop(&mut self) {
        // SAFETY: exactly the pages kept by `zeroed`.
        unsafe { libc::munmap(self.base.cast(), self.bytes) };
    }
}

impl<T: Plain> Deref for Pages<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `len` initialised elements (zeroed or written since), owned by self.
        unsafe { std::slice::from_raw_parts(self.base, self.len) }
    }
}

impl<T: Plain> DerefMut for Pages<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.base, self.len) }
    }
}

/// A slice that several threads write at once, each its own part.
pub struct Shared<'a, T> {
    base: *mut T,
    len: usize,
    life: std::marker::PhantomData<&'a mut [T]>,
}

impl<T> Clone for Shared<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Shared<'_, T> {}

// SAFETY: handing it over hands over no access; `slice` carries the obligation.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub fn new(slice: &'a mut [T]) -> Self {
        Self {
            base: slice.as_mut_ptr(),
            len: slice.len(),
            life: std::marker::PhantomData,
        }
    }

    /// The part `at .. at + len`.
    ///
    /// # Safety
    /// No two threads may hold overlapping parts at the same time.
    #[allow(clippy::mut_from_ref)]
    #[inline(always)]
    pub unsafe fn slice(&self, at: usize, len: usize) -> &'a mut [T] {
        assert!(at + len <= self.len, "part {at}+{len} of {}", self.len);
        // SAFETY: inside the slice it was made of; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(at), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_aligned_zero_and_writable_to_the_end() {
        for len in [0usize, 1, 4096, (HUGE_PAGE + 17), 3 * HUGE_PAGE] {
            let mut pages = Pages::<u8>::zeroed(len);
            assert_eq!(pages.len(), len);
            assert_eq!(pages.base.align_offset(4096), 0);
            assert!(pages.iter().all(|b| *b == 0));
            pages.fill(0xff);
        }
        let arena = HeapMemory::new(12_345);
        assert_eq!(arena.len(), 12_345);
        assert_eq!(arena.base().align_offset(4096), 0);
    }
}
