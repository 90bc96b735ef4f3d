//! Memory from the operating system: zeroed, page-aligned, on huge pages where there are any.

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

use baton_kv_memory::{Address, KvMemory};

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

// SAFETY: whole pages of a mapping that lives as long as the value. `Pages` makes references of them only when asked to, and
// nobody else has these.
unsafe impl KvMemory for HeapMemory {
    fn address(&self) -> Address {
        match NonNull::new(self.0.base) {
            Some(base) => Address::Host(base),
            None => unreachable!("a mapping at 0"),
        }
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

/// A slice of whole pages. Weights and activations live in these: TLB misses on 4 KiB pages cost a streaming
/// product some percent.
pub struct Pages<T: Plain> {
    base: *mut T,
    len: usize,
    /// Keeps the pages mapped.
    _mapping: Arc<Mapping>,
}

// SAFETY: nobody else holds its part of the mapping; shared access is read-only through `&self`, and the KV
// arena's writers synchronise outside, as `KvMemory` demands.
unsafe impl<T: Plain + Send> Send for Pages<T> {}
// SAFETY: as above.
unsafe impl<T: Plain + Sync> Sync for Pages<T> {}

impl<T: Plain> Pages<T> {
    /// `len` zero elements in a mapping of their own.
    ///
    /// # Panics
    /// If the system has no memory left.
    pub fn zeroed(len: usize) -> Self {
        let mapping = Arc::new(Mapping::new(bytes_of::<T>(len)));
        Self {
            base: mapping.base.cast(),
            len,
            _mapping: mapping,
        }
    }
}

/// Whole pages for `len` elements.
fn bytes_of<T>(len: usize) -> usize {
    (len * size_of::<T>()).max(1).next_multiple_of(PAGE)
}

/// Cuts slices out of large mappings, one after the other: a matrix that is smaller than a huge page lies on one
/// all the same. SmolLM2's decode steps gained 4 to 5%.
#[derive(Default)]
pub struct Carver {
    mapping: Option<Arc<Mapping>>,
    used: usize,
}

impl Carver {
    const CHUNK: usize = 16 * HUGE_PAGE;

    /// `len` zero elements.
    ///
    /// # Panics
    /// If the system has no memory left.
    pub fn zeroed<T: Plain>(&mut self, len: usize) -> Pages<T> {
        let bytes = bytes_of::<T>(len);
        if bytes >= Self::CHUNK / 2 {
            return Pages::zeroed(len);
        }
        let mapping = match &self.mapping {
            Some(mapping) if mapping.bytes - self.used >= bytes => mapping,
            _ => {
                self.used = 0;
                self.mapping.insert(Arc::new(Mapping::new(Self::CHUNK)))
            }
        };
        // SAFETY: inside the mapping, checked above.
        let base = unsafe { mapping.base.add(self.used) };
        self.used += bytes;
        Pages {
            base: base.cast(),
            len,
            _mapping: Arc::clone(mapping),
        }
    }
}

const PAGE: usize = 4096;
const HUGE_PAGE: usize = 2 << 20;

/// Private memory of this process.
struct Mapping {
    base: *mut u8,
    bytes: usize,
}

// SAFETY: an address range; those who cut it up carry the obligation.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// `bytes` zero bytes, whole pages.
    fn new(bytes: usize) -> Self {
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
        Self { base, bytes }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly the pages kept by `new`.
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
        assert_eq!(arena.address().number() % 4096, 0);
    }

    #[test]
    fn carved_slices_are_apart_and_outlive_their_carver() {
        let mut carver = Carver::default();
        let lens = [1, 4096, 4097, Carver::CHUNK / 2, 20 << 20, 7];
        let mut slices: Vec<Pages<u8>> = lens.iter().map(|len| carver.zeroed(*len)).collect();
        drop(carver);
        for (i, slice) in (1..).zip(&mut slices) {
            assert_eq!(slice.as_ptr() as usize % PAGE, 0);
            slice.fill(i);
        }
        for ((i, slice), len) in (1..).zip(&slices).zip(lens) {
            assert_eq!(slice.len(), len);
            assert!(slice.iter().all(|byte| *byte == i));
        }
    }
}
