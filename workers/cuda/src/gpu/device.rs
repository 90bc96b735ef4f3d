//! One GPU: its context, one stream, its memory.
//!
//! Everything of an executor runs on one stream, in order. The thread that uses a device makes its context current
//! first ([`Device::bind`]).

use std::ffi::c_void;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use baton_kv_memory::{Address, KvMemory};
use cudarc::driver::{result, sys};

use super::libraries;
use crate::error::{CudaError, driver};

/// Products of BF16 came with it.
pub(super) const CAPABILITY_MIN: (u32, u32) = (8, 0);

/// An open GPU.
pub struct Device {
    ordinal: u32,
    name: String,
    capability: (u32, u32),
    multiprocessors: u32,
    has_peers: AtomicBool,
    is_shared: AtomicBool,
    handle: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
}

// SAFETY: the driver's handles may be used from any thread that has made the context current.
unsafe impl Send for Device {}
// SAFETY: as above; the driver locks for itself.
unsafe impl Sync for Device {}

impl Device {
    /// Opens the `ordinal`-th GPU that this process sees.
    ///
    /// # Errors
    /// [`CudaError::Library`] or [`CudaError::Device`] say what is missing.
    pub fn open(ordinal: u32) -> Result<Arc<Self>, CudaError> {
        libraries::driver()?;
        let count = result::device::get_count().map_err(|e| driver("counting GPUs", e))?;
        if i64::from(ordinal) >= i64::from(count) {
            return Err(CudaError::Device(format!(
                "there is no GPU {ordinal}: this process sees {count} (CUDA_VISIBLE_DEVICES decides which)"
            )));
        }
        let failed = |e| driver("opening the GPU", e);
        let handle = result::device::get(ordinal as i32).map_err(failed)?;
        let name = result::device::get_name(handle).map_err(failed)?;
        let attribute = |attribute| {
            // SAFETY: `handle` is a device.
            let value = unsafe { result::device::get_attribute(handle, attribute) };
            value.map(|v| v as u32).map_err(failed)
        };
        use sys::CUdevice_attribute as A;
        let capability = (
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        if capability < CAPABILITY_MIN {
            return Err(CudaError::Device(format!(
                "GPU {ordinal}, {name}, has compute capability {}.{}; BF16 needs 8.0 or later",
                capability.0, capability.1
            )));
        }
        let multiprocessors = attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        // SAFETY: `handle` is a device; the context is released on drop.
        let context = unsafe { result::primary_ctx::retain(handle) }.map_err(failed)?;
        // SAFETY: a live context.
        unsafe { result::ctx::set_current(context) }.map_err(failed)?;
        let stream =
            result::stream::create(result::stream::StreamKind::NonBlocking).map_err(failed)?;
        Ok(Arc::new(Self {
            ordinal,
            name,
            capability,
            multiprocessors,
            has_peers: AtomicBool::new(false),
            is_shared: AtomicBool::new(false),
            handle,
            context,
            stream,
        }))
    }

    /// Lets kernels on this GPU read and write all plain memory of another, of this process.
    ///
    /// # Errors
    /// [`CudaError::Device`] if the two cannot reach each other, [`CudaError::Driver`].
    pub fn reach(&self, peer: &Self) -> Result<(), CudaError> {
        self.has_peers.store(true, Ordering::Relaxed);
        if self.handle == peer.handle && !std::ptr::eq(self, peer) {
            self.is_shared.store(true, Ordering::Relaxed);
        }
        if self.handle == peer.handle {
            return Ok(());
        }
        let mut can = 0;
        // SAFETY: two devices; one integer is written.
        unsafe { sys::cuDeviceCanAccessPeer(&mut can, self.handle, peer.handle) }
            .result()
            .map_err(|e| driver("asking which GPUs reach each other", e))?;
        if can == 0 {
            return Err(CudaError::Device(format!(
                "GPU {} cannot reach the memory of GPU {}: ranks of one worker need GPUs with peer access, by NVLink or PCIe \
                 (`nvidia-smi topo -p2p r` shows which have it)",
                self.ordinal, peer.ordinal
            )));
        }
        self.bind()?;
        // SAFETY: two live contexts; this one is current.
        match unsafe { sys::cuCtxEnablePeerAccess(peer.context, 0) } {
            sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => Ok(()),
            result => result.result().map_err(|e| {
                let what = format!("letting GPU {} reach GPU {}", self.ordinal, peer.ordinal);
                driver(&what, e)
            }),
        }
    }

    /// Whether it is one of a group, whose kernels wait for each other.
    pub(crate) fn has_peers(&self) -> bool {
        self.has_peers.load(Ordering::Relaxed)
    }

    /// Whether several ranks of a group are on this GPU, in tests: no kernel starts early then, for its blocks would wait where
    /// another rank's are waited for.
    pub(crate) fn is_shared(&self) -> bool {
        self.is_shared.load(Ordering::Relaxed)
    }

    /// Which GPU of those this process sees.
    pub fn ordinal(&self) -> u32 {
        self.ordinal
    }

    /// The vendor's name: `NVIDIA H200`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Multiprocessors.
    pub fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    /// Compute capability.
    pub fn capability(&self) -> (u32, u32) {
        self.capability
    }

    /// Whether other processes may have some of its multiprocessors at the same time (MPS), not only in turn.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn shared_by_processes(&self) -> Result<bool, CudaError> {
        let mps = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MPS_ENABLED;
        // SAFETY: `handle` is a device.
        let value = unsafe { result::device::get_attribute(self.handle, mps) };
        Ok(value.map_err(|e| driver("asking about the GPU", e))? != 0)
    }

    /// Makes this thread use this GPU.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn bind(&self) -> Result<(), CudaError> {
        // SAFETY: a live context.
        unsafe { result::ctx::set_current(self.context) }.map_err(|e| driver("using the GPU", e))
    }

    /// Bytes of memory free, and of all. The calling thread has the device bound.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn memory(&self) -> Result<(usize, usize), CudaError> {
        result::mem_get_info().map_err(|e| driver("asking for free memory", e))
    }

    /// Waits until all that was launched is done.
    ///
    /// # Errors
    /// [`CudaError::Driver`]: of the launches before, too.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        // SAFETY: a live stream.
        unsafe { result::stream::synchronize(self.stream) }
            .map_err(|e| driver("waiting for the GPU", e))
    }

    pub(crate) fn stream(&self) -> sys::CUstream {
        self.stream
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: made in `open`; whatever was allocated holds a reference to self and is gone.
        unsafe {
            let _ = result::ctx::set_current(self.context);
            let _ = result::stream::destroy(self.stream);
            let _ = result::primary_ctx::release(self.handle);
        }
    }
}

/// Types that may lie in buffers: zero bytes are a value, and so are any bytes that a kernel leaves there.
pub trait Plain: Copy + 'static {}
impl Plain for u8 {}
impl Plain for u16 {}
impl Plain for i32 {}
impl Plain for u32 {}
impl Plain for f32 {}
impl Plain for f64 {}

/// Numbers in GPU memory: one plain allocation, which other processes can map.
pub struct Buffer<T: Plain> {
    device: Arc<Device>,
    pointer: sys::CUdeviceptr,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Plain> Buffer<T> {
    /// `len` zero numbers for `what`.
    ///
    /// # Errors
    /// [`CudaError::Memory`] says what for.
    pub fn zeroed(device: &Arc<Device>, len: usize, what: &str) -> Result<Self, CudaError> {
        let buffer = Self::uninitialized(device, len, what)?;
        // SAFETY: the allocation just made.
        unsafe { result::memset_d8_async(buffer.pointer, 0, buffer.bytes(), device.stream) }
            .map_err(|e| driver(&format!("clearing {what}"), e))?;
        Ok(buffer)
    }

    /// The numbers of `source`.
    ///
    /// # Errors
    /// As [`Buffer::zeroed`].
    pub fn of(device: &Arc<Device>, source: &[T], what: &str) -> Result<Self, CudaError> {
        let mut buffer = Self::uninitialized(device, source.len(), what)?;
        buffer.write(0, source)?;
        Ok(buffer)
    }

    /// `len` numbers of any value: what reads them has written them first.
    ///
    /// # Errors
    /// As [`Buffer::zeroed`].
    pub fn uninitialized(device: &Arc<Device>, len: usize, what: &str) -> Result<Self, CudaError> {
        device.bind()?;
        let bytes = (len * size_of::<T>()).max(1);
        // SAFETY: a plain allocation, checked.
        let pointer = unsafe { result::malloc_sync(bytes) }.map_err(|e| match e.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => CudaError::Memory {
                what: what.to_owned(),
                bytes,
                free: device.memory().map_or(0, |(free, _)| free),
            },
            _ => driver(&format!("allocating {what}"), e),
        })?;
        Ok(Self {
            device: device.clone(),
            pointer,
            len,
            element: PhantomData,
        })
    }

    /// Copies `source` to `at` and waits for it.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    ///
    /// # Panics
    /// If it does not fit.
    pub fn write(&mut self, at: usize, source: &[T]) -> Result<(), CudaError> {
        assert!(
            at + source.len() <= self.len,
            "{at} + {} of {}",
            source.len(),
            self.len
        );
        // SAFETY: inside the allocation; the source outlives the copy, which is waited for.
        unsafe {
            result::memcpy_htod_async(self.at(at), source, self.device.stream)
                .map_err(|e| driver("copying to the GPU", e))?;
        }
        self.device.synchronize()
    }

    /// The numbers, on the host, after all that was launched.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn read(&self, at: usize, out: &mut [T]) -> Result<(), CudaError> {
        assert!(
            at + out.len() <= self.len,
            "{at} + {} of {}",
            out.len(),
            self.len
        );
        // SAFETY: inside the allocation; waited for before `out` is looked at.
        unsafe {
            result::memcpy_dtoh_async(out, self.at(at), self.device.stream)
                .map_err(|e| driver("copying from the GPU", e))?;
        }
        self.device.synchronize()
    }

    /// Sets every byte.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn fill_bytes(&mut self, byte: u8) -> Result<(), CudaError> {
        // SAFETY: the whole allocation.
        unsafe { result::memset_d8_async(self.pointer, byte, self.bytes(), self.device.stream) }
            .map_err(|e| driver("filling memory", e))
    }

    /// Address of a number on the GPU.
    pub fn at(&self, at: usize) -> sys::CUdeviceptr {
        self.pointer + (at * size_of::<T>()) as u64
    }

    /// Numbers.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }
}

impl<T: Plain> Drop for Buffer<T> {
    fn drop(&mut self) {
        // SAFETY: allocated in `uninitialized`, freed once. Freeing waits for the kernels that use it.
        unsafe {
            let _ = self.device.bind();
            let _ = result::free_sync(self.pointer);
        }
    }
}

/// A KV arena in GPU memory: one plain allocation, which cuda_ipc can share.
pub struct CudaMemory(Buffer<u8>);

impl CudaMemory {
    /// `bytes` of memory, of any content.
    ///
    /// # Errors
    /// [`CudaError::Memory`].
    pub fn new(device: &Arc<Device>, bytes: usize) -> Result<Self, CudaError> {
        Buffer::uninitialized(device, bytes, "the KV arena").map(Self)
    }

    /// Sets every byte. For tests that want to see what is read before it was written.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn fill_bytes(&mut self, byte: u8) -> Result<(), CudaError> {
        self.0.fill_bytes(byte)
    }
}

// SAFETY: one allocation on the GPU, which lives as long as the value; the driver aligns it to 256 KiB at least.
unsafe impl KvMemory for CudaMemory {
    fn address(&self) -> Address {
        Address::Device(self.0.pointer)
    }

    fn len(&self) -> usize {
        self.0.len
    }
}

/// Host memory that the GPU copies from and to directly. Cached: the CPU reads it too.
pub struct Pinned<T: Plain> {
    device: Arc<Device>,
    base: *mut T,
    len: usize,
}

// SAFETY: it owns its memory.
unsafe impl<T: Plain + Send> Send for Pinned<T> {}

impl<T: Plain> Pinned<T> {
    /// `len` zero numbers.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn zeroed(device: &Arc<Device>, len: usize) -> Result<Self, CudaError> {
        device.bind()?;
        let bytes = (len * size_of::<T>()).max(1);
        // SAFETY: fresh memory, checked, cleared before it is seen.
        let base = unsafe {
            let base = result::malloc_host(bytes, 0)
                .map_err(|e| driver(&format!("pinning {bytes} bytes of host memory"), e))?;
            base.cast::<u8>().write_bytes(0, bytes);
            base.cast()
        };
        Ok(Self {
            device: device.clone(),
            base,
            len,
        })
    }

    /// Starts copying the first `count` numbers to the GPU.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    ///
    /// # Safety
    /// `target` has room; nobody writes these numbers before the copy is done.
    pub unsafe fn upload(&self, count: usize, target: sys::CUdeviceptr) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe { result::memcpy_htod_async(target, &self[..count], self.device.stream) }
            .map_err(|e| driver("copying a step to the GPU", e))
    }

    /// Starts copying `count` numbers to `at` from the GPU.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    ///
    /// # Safety
    /// `source` has as many; nobody reads these numbers before the copy is done.
    pub unsafe fn download(
        &mut self,
        at: usize,
        count: usize,
        source: sys::CUdeviceptr,
    ) -> Result<(), CudaError> {
        let stream = self.device.stream;
        // SAFETY: the caller's promise.
        unsafe { result::memcpy_dtoh_async(&mut self[at..at + count], source, stream) }
            .map_err(|e| driver("copying results from the GPU", e))
    }
}

impl<T: Plain> std::ops::Deref for Pinned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `len` initialised numbers owned by self.
        unsafe { std::slice::from_raw_parts(self.base, self.len) }
    }
}

impl<T: Plain> std::ops::DerefMut for Pinned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.base, self.len) }
    }
}

impl<T: Plain> Drop for Pinned<T> {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed`; copies of it are waited for by those who start them.
        unsafe {
            let _ = self.device.bind();
            let _ = result::stream::synchronize(self.device.stream);
            let _ = result::free_host(self.base.cast::<c_void>());
        }
    }
}
