//! Loaded kernels, and how they are launched.

use std::ffi::{CString, c_void};
use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::device::Device;
use crate::error::{CudaError, driver};

/// Shared memory a block gets without asking.
const SHARED_BYTES_PLAIN: u32 = 48 << 10;

/// Machine code on a device.
pub struct Module {
    device: Arc<Device>,
    handle: sys::CUmodule,
}

// SAFETY: the driver's handles may be used from any thread that has made the context current.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    /// Loads a cubin.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn load(device: &Arc<Device>, image: &[u8]) -> Result<Arc<Self>, CudaError> {
        device.bind()?;
        // SAFETY: an ELF image made for this device; the driver copies it.
        let handle = unsafe { result::module::load_data(image.as_ptr().cast()) }
            .map_err(|e| driver("loading a kernel", e))?;
        Ok(Arc::new(Self {
            device: device.clone(),
            handle,
        }))
    }

    /// An `int[4]` of the module: what its file tells the host.
    ///
    /// # Errors
    /// [`CudaError::Driver`] if there is none of that name.
    pub fn constants(&self, name: &str) -> Result<[i32; 4], CudaError> {
        let failed = |e| driver(&format!("reading the constants {name}"), e);
        self.device.bind()?;
        let c_name = CString::new(name).expect("constants' names are identifiers");
        let mut out = [0; 4];
        // SAFETY: a loaded module; the size is checked before the copy.
        unsafe {
            let (address, bytes) =
                result::module::get_global(self.handle, c_name).map_err(failed)?;
            assert_eq!(bytes, size_of_val(&out), "{name} is an int[4]");
            result::memcpy_dtoh_sync(&mut out, address).map_err(failed)?;
        }
        Ok(out)
    }

    /// A kernel of the module that uses up to this much dynamic shared memory.
    ///
    /// # Errors
    /// [`CudaError::Driver`] if there is none of that name, or the device has less shared memory.
    pub fn kernel(
        self: &Arc<Self>,
        name: &str,
        shared_bytes_max: u32,
    ) -> Result<Kernel, CudaError> {
        self.device.bind()?;
        let c_name = CString::new(name).expect("kernel names are identifiers");
        // SAFETY: a loaded module.
        let function = unsafe { result::module::get_function(self.handle, c_name) }
            .map_err(|e| driver(&format!("finding the kernel {name}"), e))?;
        if shared_bytes_max > SHARED_BYTES_PLAIN {
            let attribute =
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a loaded function.
            unsafe {
                result::function::set_function_attribute(
                    function,
                    attribute,
                    shared_bytes_max as i32,
                )
            }
            .map_err(|e| {
                driver(
                    &format!("giving {name} {shared_bytes_max} bytes of shared memory"),
                    e,
                )
            })?;
        }
        if self.device.has_peers() {
            // Its code is on the GPU now, not at its first launch: that may wait for kernels that run, and one of those may be
            // waiting for this one on another GPU.
            // SAFETY: a function of a loaded module.
            unsafe { sys::cuFuncLoad(function) }
                .result()
                .map_err(|e| driver(&format!("loading {name}"), e))?;
        }
        Ok(Kernel {
            module: self.clone(),
            function,
            name: name.to_owned(),
        })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: loaded in `load`; kernels hold a reference to self.
        unsafe {
            let _ = self.device.bind();
            let _ = result::module::unload(self.handle);
        }
    }
}

/// One kernel.
pub struct Kernel {
    module: Arc<Module>,
    function: sys::CUfunction,
    name: String,
}

// SAFETY: as `Module`.
unsafe impl Send for Kernel {}
// SAFETY: as `Module`.
unsafe impl Sync for Kernel {}

/// How a kernel is launched: CUDA's launch configuration.
#[derive(Clone, Copy, Debug)]
pub struct LaunchConfig {
    /// Blocks.
    pub grid: (u32, u32, u32),
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory.
    pub shared_bytes: u32,
    /// Blocks of a cluster, in a row; 0 asks for none. Hopper and later.
    pub cluster: u32,
    /// May start before the kernel before it has ended (programmatic dependent launch): the kernel waits for what it
    /// needs with `griddepcontrol.wait`. Ignored before Hopper.
    pub early: bool,
}

impl LaunchConfig {
    /// A row of `blocks` blocks.
    pub fn row(blocks: usize, threads: u32) -> Self {
        Self::plane(blocks, 1, threads)
    }

    /// `x` by `y` blocks.
    pub fn plane(x: usize, y: usize, threads: u32) -> Self {
        Self {
            grid: (x as u32, y as u32, 1),
            threads,
            shared_bytes: 0,
            cluster: 0,
            early: false,
        }
    }

    /// With this much dynamic shared memory.
    pub fn shared(self, shared_bytes: u32) -> Self {
        Self {
            shared_bytes,
            ..self
        }
    }

    /// In clusters of this many blocks.
    pub fn cluster(self, blocks: usize) -> Self {
        Self {
            cluster: blocks as u32,
            ..self
        }
    }

    /// May start before its predecessor has ended.
    pub fn early(self) -> Self {
        Self {
            early: true,
            ..self
        }
    }
}

impl Kernel {
    /// Launches on the device's stream. Use [`launch!`](crate::launch), which makes the argument list.
    ///
    /// # Errors
    /// [`CudaError::Driver`]. An error of the kernel itself shows at the next wait.
    ///
    /// # Safety
    /// The arguments are the kernel's, in number, order and type, and what they point to is as it expects.
    pub unsafe fn launch(
        &self,
        shape: LaunchConfig,
        args: &mut [*mut c_void],
    ) -> Result<(), CudaError> {
        let device = &self.module.device;
        use sys::CUlaunchAttributeID as Id;
        let attribute = |id, value| sys::CUlaunchAttribute {
            id,
            pad: [0; 4],
            value,
        };
        let early = sys::CUlaunchAttributeValue {
            programmaticStreamSerializationAllowed: 1,
        };
        let cluster = sys::CUlaunchAttributeValue {
            clusterDim: sys::CUlaunchAttributeValue_union__bindgen_ty_1 {
                x: shape.cluster,
                y: 1,
                z: 1,
            },
        };
        let mut attributes = [
            attribute(
                Id::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                early,
            ),
            attribute(Id::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, cluster),
        ];
        let hopper = device.capability() >= (9, 0);
        let first = usize::from(!(shape.early && hopper && !device.is_shared()));
        let last = 1 + usize::from(shape.cluster > 0 && hopper);
        let chosen = &mut attributes[first..last.max(first)];
        let config = sys::CUlaunchConfig {
            gridDimX: shape.grid.0,
            gridDimY: shape.grid.1,
            gridDimZ: shape.grid.2,
            blockDimX: shape.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shape.shared_bytes,
            hStream: device.stream(),
            attrs: chosen.as_mut_ptr(),
            numAttrs: chosen.len() as u32,
        };
        // SAFETY: the caller's promise; config and arguments outlive the call.
        unsafe {
            sys::cuLaunchKernelEx(
                &config,
                self.function,
                args.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
        .result()
        .map_err(|e| driver(&format!("launching {} as {shape:?}", self.name), e))
    }

    /// Blocks of this shape that fit one multiprocessor at once.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn blocks_per_multiprocessor(&self, shape: LaunchConfig) -> Result<u32, CudaError> {
        self.module.device.bind()?;
        let (threads, shared) = (shape.threads as i32, shape.shared_bytes as usize);
        // SAFETY: a loaded function.
        let blocks = unsafe {
            result::occupancy::max_active_block_per_multiprocessor(self.function, threads, shared)
        };
        blocks
            .map(|blocks| blocks as u32)
            .map_err(|e| driver(&format!("asking for the occupancy of {}", self.name), e))
    }
}

/// Launches a kernel: `launch!(kernel, shape, arguments…)`. Arguments are numbers and device addresses (`u64`) of
/// exactly the widths that the kernel declares.
///
/// # Safety
/// As [`Kernel::launch`].
#[macro_export]
macro_rules! launch {
    ($kernel:expr, $shape:expr, $($arg:expr),+ $(,)?) => {
        $kernel.launch(
            $shape,
            &mut [$(std::ptr::from_ref(&$arg).cast_mut().cast::<std::ffi::c_void>()),+],
        )
    };
}
