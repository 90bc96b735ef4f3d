//! What UCX says of itself and of a connection.

use std::ptr::null_mut;

use libc::FILE;

use crate::context::Context;
use crate::peer::Link;
use crate::pull::Read;

/// Bytes behind the arena that probes read into; also the length of one probe read. As large as a
/// block of a large model, so the rate is that of real pulls.
pub(crate) const SCRATCH_BYTES: usize = 4 << 20;

/// Bytes of the first read from each rank: enough to set the connection up and to show that the key
/// works.
const FIRST_READ_BYTES: u64 = 4096;

/// Most bytes of the measurement.
const PROBE_BYTES: u64 = 64 << 20;

/// A connection that was tried and measured.
#[derive(Clone, Debug, PartialEq)]
pub struct PeerReport {
    /// Transports that carry the reads, as UCX names them, and how: `posix`, `tcp emulated`.
    pub transport: String,
    /// Rate of reading, in 10⁹ bytes a second.
    pub gigabytes_per_second: f32,
}

/// One small read from each rank.
pub(crate) fn first_reads(link: &Link, scratch: u64) -> Vec<Read> {
    link.regions()
        .iter()
        .enumerate()
        .map(|(rank, region)| Read {
            rank: rank as u32,
            remote_offset: 0,
            local_offset: scratch,
            bytes: region.bytes.min(FIRST_READ_BYTES),
        })
        .collect()
}

/// Reads that walk through the first rank's arena. All go to the same place; nobody looks at it.
pub(crate) fn probe_reads(link: &Link, scratch: u64) -> Vec<Read> {
    let arena = link.regions()[0].bytes;
    let length = arena.min(SCRATCH_BYTES as u64);
    (0..PROBE_BYTES / length.max(64 << 10))
        .map(|i| Read {
            rank: 0,
            remote_offset: (i * length) % (arena - length + 1),
            local_offset: scratch,
            bytes: length,
        })
        .collect()
}

/// Transports that UCX found on this host: `posix,cma,tcp`.
pub(crate) fn transports(context: &Context) -> String {
    let text = printed(|file| {
        // SAFETY: context and stream are valid.
        unsafe { (context.ucp.ucp_context_print_info)(context.handle, file) }
    });
    tracing::trace!("{text}");
    let names = text
        .lines()
        .filter(|line| line.contains("resource"))
        .filter_map(transport_name);
    distinct(names)
}

/// How reads over this connection travel.
pub(crate) fn describe(link: &Link) -> String {
    let text = printed(|file| link.print_info(file));
    tracing::debug!("{text}");
    let lanes: Vec<&str> = text.lines().filter(|line| line.contains("lane[")).collect();
    let zero_copy = |line: &&&str| line.split_whitespace().any(|word| word.starts_with("rma"));
    let reading = distinct(
        lanes
            .iter()
            .filter(zero_copy)
            .filter_map(|line| transport_name(line)),
    );
    if !reading.is_empty() {
        return reading;
    }
    // Without a lane for remote memory access, reads become messages that the peer answers.
    format!(
        "{} emulated",
        distinct(lanes.iter().filter_map(|line| transport_name(line)))
    )
}

/// The `posix` of `… posix/memory …`.
fn transport_name(line: &str) -> Option<String> {
    let word = line.split_whitespace().find(|word| {
        word.split_once('/').is_some_and(|(name, device)| {
            !device.is_empty() && name.contains(|c: char| c.is_ascii_lowercase())
        })
    })?;
    let name = word.split('/').next()?;
    Some(name.rsplit(':').next()?.to_owned())
}

fn distinct(names: impl Iterator<Item = String>) -> String {
    let mut seen: Vec<String> = Vec::new();
    for name in names {
        if !seen.contains(&name) {
            seen.push(name);
        }
    }
    seen.join(",")
}

/// What a C function prints to a stream.
fn printed(print: impl FnOnce(*mut FILE)) -> String {
    let (mut text, mut length) = (null_mut(), 0);
    // SAFETY: both are places to write to and outlive the stream.
    let file = unsafe { libc::open_memstream(&mut text, &mut length) };
    if file.is_null() {
        return String::new();
    }
    print(file);
    // SAFETY: opened above; closing it completes `text` and `length`.
    unsafe { libc::fclose(file) };
    // SAFETY: the closed stream left `length` bytes at `text`.
    let bytes = unsafe { std::slice::from_raw_parts(text.cast::<u8>(), length) };
    let string = String::from_utf8_lossy(bytes).into_owned();
    // SAFETY: the stream's buffer is to be freed by us.
    unsafe { libc::free(text.cast()) };
    string
}
