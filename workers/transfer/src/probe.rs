//! What UCX says of itself and of a connection.

use std::num::NonZeroU64;
use std::ops::Range;

use baton_protocol::{MemoryType, UcxVersion};

use crate::arena::{Regions, scratch_bytes};
use crate::peer::Link;
use crate::printed::{distinct, printed, transport_name};
use crate::pull::Read;

/// Bytes of the first read from each rank: enough to set the connection up and to show that the key
/// works.
const FIRST_READ_BYTES: u64 = 4096;

/// The same where GPU memory is at either end.
const FIRST_GPU_READ_BYTES: u64 = 1 << 20;

/// Most probe reads of the measurement, of full length.
const PROBE_READS: u64 = 32;

/// Most pairs of ranks that the measurement reads between at once: those of the largest workers.
const PROBE_PAIRS: usize = 8;

/// The measurement stays within this many reads of the arena: pages of shared memory are slow to touch for the
/// first time, and it is the lasting rate that matters.
const PROBE_WINDOW_READS: u64 = 4;

/// A connection that was tried and measured.
#[derive(Clone, Debug, PartialEq)]
pub struct PeerReport {
    /// Transports that carry the reads, as UCX names them, and how: `posix`, `tcp emulated`.
    pub transport: String,
    /// Rate of reading while it was tried, that of the fastest stretch, in 10⁹ bytes a second. See [`crate::Agent::pulled_rate`] for
    /// that of pulls.
    pub gigabytes_per_second: f32,
}

/// One read from each rank; where a GPU is, into each of our ranks, and long enough to map the peer's memory there: that takes
/// as long as many reads, and no pull is to wait for it.
pub(crate) fn first_reads(link: &Link, regions: &Regions) -> Vec<Read> {
    let (theirs, ours) = (link.regions().len(), regions.all().len());
    let (bytes, into) = match link.is_gpu(regions.memory()) {
        true => (FIRST_GPU_READ_BYTES, ours),
        false => (FIRST_READ_BYTES, 1),
    };
    let pairs = (0..theirs).flat_map(|source| (0..into).map(move |to| (source, to)));
    pairs
        .map(|(source, destination)| Read {
            source: source as u32,
            destination: destination as u32,
            remote_offset: 0,
            local_offset: regions.all()[destination].scratch(),
            bytes: link.regions()[source].bytes.get().min(bytes),
        })
        .collect()
}

/// Reads that walk round arenas of the peer's: between GPUs each rank of either side takes part, in host memory the first ones. All
/// that go to a rank go to the same place; nobody looks at it.
pub(crate) fn probe_reads(link: &Link, regions: &Regions) -> Vec<Read> {
    let (theirs, ours) = (link.regions().len(), regions.all().len());
    let longest = scratch_bytes(regions.memory()) as u64;
    let pairs = match regions.memory() {
        MemoryType::Host => theirs.min(1),
        MemoryType::Cuda if theirs > 0 => theirs.max(ours).min(PROBE_PAIRS),
        MemoryType::Cuda => 0,
    };
    let pairs = (0..pairs).map(|pair| (pair % theirs, pair % ours));
    pairs
        .flat_map(|(source, destination)| {
            let walk = walk(link.regions()[source].bytes, longest);
            walk.map(move |range| Read {
                source: source as u32,
                destination: destination as u32,
                remote_offset: range.start,
                local_offset: regions.all()[destination].scratch(),
                bytes: range.end - range.start,
            })
        })
        .collect()
}

/// Ranges of an arena to probe, none longer than `longest`.
pub(crate) fn walk(
    arena_bytes: NonZeroU64,
    longest: u64,
) -> impl Iterator<Item = Range<u64>> + use<> {
    let window = arena_bytes.get().min(PROBE_WINDOW_READS * longest);
    let length = window.min(longest);
    // An arena shorter than a page or so gives no rate worth the time.
    (0..(PROBE_READS * longest / length).min(1024)).map(move |i| {
        let start = i % (window / length) * length;
        start..start + length
    })
}

/// Ends the name of a transport on which the peer answers reads with messages.
const EMULATED: &str = " emulated";

/// How reads over this connection travel; the link is told too.
pub(crate) fn describe(link: &Link, ucx: UcxVersion) -> String {
    let text = printed(|file| link.print_info(file));
    tracing::debug!("{text}");
    let transport = transport(&text, ucx);
    link.emulated.set(transport.ends_with(EMULATED));
    transport
}

/// Transports that read a GPU's memory in place.
const READ_GPUS: [&str; 3] = ["cuda_ipc", "rc", "dc"];

/// Whether this transport, as [`describe`] names it, reads GPU memory in place.
pub(crate) fn reads_gpus(transport: &str) -> bool {
    let reads = |name: &str| READ_GPUS.iter().any(|reads| name.starts_with(reads));
    !transport.ends_with(EMULATED) && transport.split(',').any(reads)
}

/// The name of the staged transport over this connection: `tcp staged`.
pub(crate) fn describe_staged(link: &Link) -> String {
    let text = printed(|file| link.print_info(file));
    tracing::debug!("{text}");
    let lanes = text.lines().filter(|line| line.contains("lane["));
    // Copies within a process are no transport between two.
    let names = lanes
        .filter_map(transport_name)
        .filter(|name| !name.starts_with("cuda_"));
    format!("{} staged", distinct(names))
}

/// Reads UCX's description of an endpoint: `lane[1]:  4:posix/memory.0 md[3] …` is a lane, and
/// `get[1]: …` says that lane 1 can read remote memory by itself. Where none can, reads become messages
/// that the peer answers. Releases since 1.14 no longer say which, but sockets never can.
fn transport(text: &str, ucx: UcxVersion) -> String {
    let lanes = || text.lines().filter(|line| line.contains("lane["));
    let reads = |lane: &&str| {
        let number = lane
            .split_once("lane[")
            .and_then(|(_, rest)| rest.split_once(']'));
        number.is_some_and(|(number, _)| text.contains(&format!("get[{number}]:")))
            || lane.split_whitespace().any(|word| word.starts_with("rma"))
    };
    let reading = distinct(lanes().filter(reads).filter_map(transport_name));
    let all = distinct(lanes().filter_map(transport_name));
    match (reading.is_empty(), (ucx.0, ucx.1) < (1, 14)) {
        (false, _) => reading,
        (true, old) if old || all == "tcp" => format!("{all}{EMULATED}"),
        (true, _) => all,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: UcxVersion = UcxVersion(1, 13, 1);

    #[test]
    fn lanes_that_read_by_themselves_are_named() {
        let text = "
# lane[0]:  3:sysv/memory.0 md[2]  -> md[2]/sysv/sysdev[255] am am_bw#0 keepalive
# lane[1]:  4:posix/memory.0 md[3]  -> md[3]/posix/sysdev[255]
# get[1]: 0..<bcopy>..(inf)";
        assert_eq!(transport(text, OLD), "posix");
    }

    #[test]
    fn without_one_reads_are_emulated() {
        let text =
            "# lane[0]:  1:tcp/lo.0 md[1]  -> md[1]/tcp/sysdev[255] am am_bw#0 keepalive wireup\n#";
        assert_eq!(transport(text, OLD), "tcp emulated");
        assert_eq!(transport(text, UcxVersion(1, 22, 0)), "tcp emulated");
        assert_eq!(
            transport("# lane[0]:  3:sysv/memory.0 md[2]", UcxVersion(1, 22, 0)),
            "sysv"
        );
    }

    #[test]
    fn transports_that_read_gpus_are_told_apart() {
        for transport in ["cuda_ipc", "rc_mlx5", "tcp,cuda_ipc", "dc_mlx5,cuda_ipc"] {
            assert!(reads_gpus(transport), "{transport}");
        }
        for transport in [
            "tcp emulated",
            "tcp",
            "sysv,posix",
            "tcp,cuda_copy",
            "cuda_ipc emulated",
        ] {
            assert!(!reads_gpus(transport), "{transport}");
        }
    }
}
