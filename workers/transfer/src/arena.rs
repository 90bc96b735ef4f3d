//! Registered memory that peers may read.

use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

use baton_kv_memory::{Address, KvMemory};
use baton_protocol::{Base64Bytes, MemoryType, RankRegion};
use ucx_sys::*;

use crate::context::{Context, check, status_text, transports};
use crate::seal::{Kind, seal};
use crate::staging::MakeStaging;
use crate::{TransferError, memory};

/// Bytes behind the arena that probes read into; also the length of one probe read. As large as what real pulls
/// read at once, so that the rate is theirs: a block of a large model, and between GPUs, which need more to come near
/// their peak, sixteen.
pub(crate) const fn scratch_bytes(memory: MemoryType) -> usize {
    match memory {
        MemoryType::Host => 4 << 20,
        MemoryType::Cuda => 64 << 20,
    }
}

/// Where an arena's memory comes from.
#[derive(Clone, Debug)]
pub enum ArenaSource {
    /// UCX allocates host memory, which lets it be shared memory that peers on the host read in place.
    Host {
        /// Its length.
        bytes: usize,
    },
    /// Memory on a GPU, allocated elsewhere and registered by its address.
    Gpu(GpuMemory),
}

impl ArenaSource {
    /// Bytes of host memory that it takes.
    pub(crate) fn host_bytes(&self) -> usize {
        match self {
            Self::Host { bytes } => *bytes,
            Self::Gpu(_) => 0,
        }
    }
}

/// Memory on an NVIDIA GPU, one plain allocation of [`gpu_allocation_bytes`]: what cuda_ipc can share.
#[derive(Clone)]
pub struct GpuMemory {
    /// Its address, aligned to 4096. Nothing for the CPU to follow.
    pub base: u64,
    /// Length of the arena; the allocation is longer.
    pub bytes: usize,
    /// Makes the GPU the calling thread's own, as UCX wants it when it registers the memory and when it reads into it; also
    /// keeps the memory alive as long as an arena is made of it. An error is a sentence.
    pub bind: Arc<dyn Fn() -> Result<(), String> + Send + Sync>,
    /// Makes host memory and copies for peers that cannot read the GPU's. Not called where there are several ranks: making it
    /// would wait for the GPU's work, which may wait for another rank's.
    pub staging: MakeStaging,
    /// Whether UCX is to be told of the memory. Without, everything is staged.
    pub registered: bool,
}

/// Bytes to allocate for an arena of `bytes` on a GPU: probes read into what lies behind it.
pub fn gpu_allocation_bytes(bytes: usize) -> usize {
    bytes.next_multiple_of(4096) + scratch_bytes(MemoryType::Cuda)
}

impl std::fmt::Debug for GpuMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GpuMemory")
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

/// The memory that holds the KV of one rank: zeroed at first if UCX allocated it, registered with UCX, and readable by
/// connected peers at any moment. It lives until the last clone and the agent's thread are gone.
#[derive(Clone)]
pub struct Arena {
    region: Arc<Region>,
}

impl Arena {
    pub(crate) fn new(region: Arc<Region>) -> Self {
        Self { region }
    }

    /// Kind of memory.
    pub fn memory(&self) -> MemoryType {
        self.region.memory
    }
}

// SAFETY: the region is mapped, or its owner keeps it allocated, as long as the value lives; it begins on a page, and is of
// the kind that it was made as. Nobody makes a reference to its bytes.
unsafe impl KvMemory for Arena {
    fn address(&self) -> Address {
        self.region.address()
    }

    fn len(&self) -> usize {
        self.region.bytes
    }
}

impl std::fmt::Debug for Arena {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Arena")
            .field("bytes", &self.len())
            .field("memory", &self.memory())
            .finish()
    }
}

/// A mapped piece of memory: the arena, and behind it scratch space that probes read into.
pub(crate) struct Region {
    context: Arc<Context>,
    /// None for GPU memory that UCX does not know.
    handle: Option<ucp_mem_h>,
    base: *mut u8,
    bytes: usize,
    memory: MemoryType,
    /// Keeps memory alive that UCX did not allocate.
    gpu: Option<GpuMemory>,
}

// SAFETY: the pointers are to memory and to a handle that live as long as the value; what is written to
// the memory, and by whom, is the arena's users' agreement.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    fn map(context: Arc<Context>, source: ArenaSource) -> Result<Self, TransferError> {
        let (bytes, gpu) = match source {
            ArenaSource::Host { bytes } => (bytes, None),
            ArenaSource::Gpu(gpu) => (gpu.bytes, Some(gpu)),
        };
        let failed = |detail: String| TransferError::Arena { bytes, detail };
        if bytes == 0 {
            return Err(failed("it has no bytes".into()));
        }
        let memory = match gpu {
            None => MemoryType::Host,
            Some(_) => MemoryType::Cuda,
        };
        let length = bytes
            .checked_next_multiple_of(4096)
            .and_then(|bytes| bytes.checked_add(scratch_bytes(memory)))
            .ok_or_else(|| failed("that is more than there are addresses".into()))?;
        let gpu = match gpu {
            Some(gpu) => {
                (gpu.bind)().map_err(failed)?;
                return Ok(Self::map_gpu(context, gpu, length));
            }
            None => gpu,
        };
        memory::check(length as u64, "it").map_err(failed)?;
        if context.has_system_v_arenas {
            memory::check_segment(length as u64).map_err(failed)?;
        }
        let params = ucp_mem_map_params_t {
            field_mask: UCP_MEM_MAP_PARAM_FIELD_LENGTH
                | UCP_MEM_MAP_PARAM_FIELD_FLAGS
                | UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE,
            length,
            flags: UCP_MEM_MAP_ALLOCATE,
            memory_type: UCS_MEMORY_TYPE_HOST,
            ..Default::default()
        };
        let ucp = context.ucp;
        let mut handle = null_mut();
        // SAFETY: context and params are valid; `handle` is a place to write to.
        let status = unsafe { (ucp.ucp_mem_map)(context.handle, &params, &mut handle) };
        if status != UCS_OK {
            let status = status_text(ucp, status);
            return Err(failed(match context.has_system_v_arenas {
                true => format!(
                    "a System V shared memory segment cannot be had ({status}): see the process's limits (ulimit -v, and -l \
                     with RDMA), kernel.shmmax, kernel.shmall and vm.overcommit_memory; --ucx-tls tcp,self does without \
                     shared memory"
                ),
                false => status,
            }));
        }
        let mut attributes = ucp_mem_attr_t {
            field_mask: UCP_MEM_ATTR_FIELD_ADDRESS | UCP_MEM_ATTR_FIELD_LENGTH,
            ..Default::default()
        };
        // SAFETY: the handle was just made; the attributes are a place to write to.
        let status = unsafe { (ucp.ucp_mem_query)(handle, &mut attributes) };
        let region = Self {
            context,
            handle: Some(handle),
            base: attributes.address.cast(),
            bytes,
            memory,
            gpu,
        };
        check(ucp, "ucp_mem_query", status)?;
        if !region.base.addr().is_multiple_of(4096) || attributes.length < length {
            return Err(failed("UCX mapped it unaligned or short".into()));
        }
        populate(region.base, length).map_err(failed)?;
        Ok(region)
    }

    /// Makes its GPU the calling thread's own. Nothing for host memory.
    pub(crate) fn bind(&self) -> Result<(), String> {
        self.gpu.as_ref().map_or(Ok(()), |gpu| (gpu.bind)())
    }

    /// GPU memory that UCX refuses is not shared with anybody; KV then goes through host memory.
    fn map_gpu(context: Arc<Context>, gpu: GpuMemory, length: usize) -> Self {
        let params = ucp_mem_map_params_t {
            field_mask: UCP_MEM_MAP_PARAM_FIELD_ADDRESS
                | UCP_MEM_MAP_PARAM_FIELD_LENGTH
                | UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE,
            address: gpu.base as *mut std::ffi::c_void,
            length,
            memory_type: UCS_MEMORY_TYPE_CUDA,
            ..Default::default()
        };
        let ucp = context.ucp;
        let mut handle = null_mut();
        // A UCX without CUDA might take the address for one in host memory.
        let refused = if !gpu.registered || !transports(&context).contains("cuda") {
            gpu.registered
                .then(|| "it has no transport for CUDA".to_owned())
        } else {
            // SAFETY: context and params are valid; `handle` is a place to write to.
            let status = unsafe { (ucp.ucp_mem_map)(context.handle, &params, &mut handle) };
            (status != UCS_OK).then(|| status_text(ucp, status))
        };
        if let Some(why) = refused {
            handle = null_mut();
            tracing::warn!("this UCX cannot register {length} bytes of GPU memory: {why}");
        }
        Self {
            context,
            handle: (!handle.is_null()).then_some(handle),
            base: gpu.base as *mut u8,
            bytes: gpu.bytes,
            memory: MemoryType::Cuda,
            gpu: Some(gpu),
        }
    }

    fn address(&self) -> Address {
        match (self.memory, NonNull::new(self.base)) {
            (MemoryType::Host, Some(base)) => Address::Host(base),
            // GPU memory; host memory that was mapped is never at 0.
            _ => Address::Device(self.base.addr() as u64),
        }
    }

    /// What a peer needs to read the arena.
    fn describe(&self) -> Result<RankRegion, TransferError> {
        let ucp = self.context.ucp;
        let (base, bytes) = (self.base.addr() as u64, self.bytes());
        let Some(handle) = self.handle else {
            return Ok(RankRegion {
                rkey: Base64Bytes(Vec::new()),
                base,
                bytes,
                memory: self.memory,
            });
        };
        let (mut buffer, mut length) = (null_mut(), 0);
        // SAFETY: context and handle are valid; the rest are places to write to.
        check(ucp, "ucp_rkey_pack", unsafe {
            (ucp.ucp_rkey_pack)(self.context.handle, handle, &mut buffer, &mut length)
        })?;
        // SAFETY: UCX says that there are `length` bytes.
        let packed = unsafe { std::slice::from_raw_parts(buffer.cast::<u8>(), length) };
        let rkey = Base64Bytes(seal(Kind::Key { base, bytes }, packed));
        // SAFETY: packed above, and copied.
        unsafe { (ucp.ucp_rkey_buffer_release)(buffer) };
        Ok(RankRegion {
            rkey,
            base,
            bytes,
            memory: self.memory,
        })
    }

    /// Kind of memory.
    pub(crate) fn memory(&self) -> MemoryType {
        self.memory
    }

    /// UCX's handle, if UCX knows the memory.
    pub(crate) fn handle(&self) -> Option<ucp_mem_h> {
        self.handle
    }

    /// Length of the arena.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes as u64
    }

    /// Address of the byte at `offset`. Scratch space begins at [`Self::scratch`].
    pub(crate) fn at(&self, offset: u64) -> *mut u8 {
        self.base.wrapping_add(offset as usize)
    }

    /// Offset of [`scratch_bytes`] bytes that nobody else uses.
    pub(crate) fn scratch(&self) -> u64 {
        self.bytes.next_multiple_of(4096) as u64
    }

    /// UCX's number for the kind of memory.
    pub(crate) fn ucs_memory_type(&self) -> u32 {
        match self.memory {
            MemoryType::Host => UCS_MEMORY_TYPE_HOST,
            MemoryType::Cuda => UCS_MEMORY_TYPE_CUDA,
        }
    }
}

/// The regions of all ranks, one at least: all in host memory, or each on a GPU.
pub(crate) struct Regions(Vec<Arc<Region>>);

/// What to do about a UCX that cannot register GPU memory.
const UCX_WITH_CUDA: &str = "take the UCX of the Python package libucx-cu13 (BATON_UCX_LIB_DIR), and leave cuda_ipc in --ucx-tls";

impl Regions {
    /// Whether arenas can be made of these.
    pub(crate) fn check(sources: &[ArenaSource]) -> Result<(), TransferError> {
        let is_gpu = |source: &ArenaSource| matches!(source, ArenaSource::Gpu(_));
        let detail = match sources {
            [] => "there is no rank that it could be of",
            several if several.iter().all(is_gpu) || !several.iter().any(is_gpu) => return Ok(()),
            _ => "those of one worker are all in host memory, or all on GPUs",
        };
        let detail = detail.to_owned();
        Err(TransferError::Arena { bytes: 0, detail })
    }

    pub(crate) fn map(
        context: &Arc<Context>,
        sources: Vec<ArenaSource>,
    ) -> Result<Self, TransferError> {
        let map = |source| Region::map(context.clone(), source).map(Arc::new);
        let regions = sources.into_iter().map(map);
        let regions = Self(regions.collect::<Result<_, _>>()?);
        let unknown = regions.0.iter().position(|region| region.handle.is_none());
        match (unknown, regions.0.len()) {
            (None, _) => {}
            (Some(_), 1) => {
                tracing::warn!("KV goes through host memory, many times slower: {UCX_WITH_CUDA}")
            }
            (Some(rank), _) => {
                return Err(TransferError::Arena {
                    bytes: regions.0[rank].bytes,
                    detail: format!(
                        "UCX cannot register rank {rank}'s, and KV of several ranks does not go through host memory: {UCX_WITH_CUDA}"
                    ),
                });
            }
        }
        Ok(regions)
    }

    pub(crate) fn describe(&self) -> Result<Vec<RankRegion>, TransferError> {
        self.0.iter().map(|region| region.describe()).collect()
    }

    /// By rank.
    pub(crate) fn all(&self) -> &[Arc<Region>] {
        &self.0
    }

    /// That of a rank of ours.
    pub(crate) fn of(&self, rank: u32) -> &Region {
        &self.0[rank as usize]
    }

    /// That of rank 0.
    pub(crate) fn first(&self) -> &Arc<Region> {
        &self.0[0]
    }

    /// Kind of memory of all of them.
    pub(crate) fn memory(&self) -> MemoryType {
        self.first().memory()
    }

    /// Whether UCX knows all of them.
    pub(crate) fn are_registered(&self) -> bool {
        self.0.iter().all(|region| region.handle().is_some())
    }
}

/// Pages that the system gives at a time. Between them it is asked whether the rest is still there: others start too.
const POPULATE_BYTES: usize = 256 << 20;

/// Has the system give every page now. Where it cannot, the worker does not start; without this it would be killed by the
/// first request that needs the page, and in shared memory that outgrew /dev/shm without a word.
fn populate(base: *mut u8, bytes: usize) -> Result<(), String> {
    for offset in (0..bytes).step_by(POPULATE_BYTES) {
        let left = bytes - offset;
        memory::check_mapped(left as u64, "the rest of it")?;
        populate_piece(base.wrapping_add(offset), left.min(POPULATE_BYTES))?;
    }
    Ok(())
}

fn populate_piece(base: *mut u8, bytes: usize) -> Result<(), String> {
    // SAFETY: pages of a mapping of the caller's; they keep what they hold.
    let outcome = unsafe { libc::madvise(base.cast(), bytes, libc::MADV_POPULATE_WRITE) };
    if outcome == 0 {
        return Ok(());
    }
    let error = std::io::Error::last_os_error();
    match error.raw_os_error() {
        // Linux before 5.14 gives each page when it is first written.
        Some(libc::EINVAL) => Ok(()),
        _ => Err(format!(
            "the system does not have it ({error}), or its container may not: see its memory limit and the size of /dev/shm"
        )),
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        let Some(handle) = self.handle else { return };
        // SAFETY: mapped by this context, which is alive, and nobody holds the memory any more.
        let status = unsafe { (self.context.ucp.ucp_mem_unmap)(self.context.handle, handle) };
        if status != UCS_OK {
            tracing::warn!(
                "UCX: ucp_mem_unmap failed: {}",
                status_text(self.context.ucp, status)
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ptr::null_mut;

    use baton_kv_memory::KvMemory;

    use super::{ArenaSource, populate};
    use crate::{Agent, AgentConfig};

    #[test]
    fn every_page_of_an_arena_is_there_from_the_start() {
        let bytes = 8 << 20;
        let config = AgentConfig {
            arenas: vec![ArenaSource::Host { bytes }],
            tls: None,
        };
        let (_agent, arenas) = Agent::start(config).expect("an agent");
        let base = arenas[0].address().host().expect("host memory");
        let mut pages = vec![0_u8; bytes / 4096];
        // SAFETY: the arena's own pages, and a byte of room for each.
        let status = unsafe { libc::mincore(base.as_ptr().cast(), bytes, pages.as_mut_ptr()) };
        assert_eq!(status, 0);
        let missing = pages.iter().filter(|page| **page & 1 == 0).count();
        assert_eq!(missing, 0, "of {} pages", pages.len());
    }

    #[test]
    fn pages_that_the_system_does_not_have_are_an_error_and_no_signal() {
        // SAFETY: a mapping of two pages of a file without any, which nobody touches.
        let base = unsafe {
            let file = libc::memfd_create(c"empty".as_ptr(), 0);
            assert!(file >= 0);
            let (rights, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
            let base = libc::mmap(null_mut(), 8192, rights, flags, file, 0);
            libc::close(file);
            base
        };
        assert_ne!(base, libc::MAP_FAILED);
        let told = populate(base.cast(), 8192);
        // SAFETY: mapped above.
        unsafe { libc::munmap(base, 8192) };
        assert!(
            told.is_err_and(|told| told.contains("/dev/shm")),
            "it has them"
        );
    }
}
