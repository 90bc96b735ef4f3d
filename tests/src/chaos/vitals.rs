//! What a process holds of the machine, from `/proc`.

use std::fs;

/// Memory, files and threads of one process at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Vitals {
    /// Resident memory of its own in KiB. Not what it shares: weights that are mapped from files; its arena, which is there from
    /// the start; and pages of other workers' arenas, of which a decode worker sees another whenever it first reads one.
    pub resident_kib: u64,
    /// Open files.
    pub files: u64,
    /// Threads.
    pub threads: u64,
}

impl Vitals {
    /// Those of a process now; `None` if it is gone.
    pub fn of(process: u32) -> Option<Self> {
        let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
        let number = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        };
        Some(Self {
            resident_kib: number("RssAnon:")?,
            files: fs::read_dir(format!("/proc/{process}/fd")).ok()?.count() as u64,
            threads: number("Threads:")?,
        })
    }
}

/// Processes that have `word` among their arguments.
pub fn processes_with(word: &str) -> Vec<u32> {
    let named = |process: &u32| {
        let arguments = fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
        arguments
            .split(|byte| *byte == 0)
            .any(|argument| argument == word.as_bytes())
    };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let processes = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    processes.filter(named).collect()
}

#[cfg(test)]
mod tests {
    use super::{Vitals, processes_with};

    #[test]
    fn this_process_has_some() {
        let vitals = Vitals::of(std::process::id()).expect("this process");
        assert!(
            vitals.resident_kib > 100 && vitals.files >= 3 && vitals.threads >= 1,
            "{vitals:?}"
        );
        let name = std::env::args().next().expect("a name");
        assert!(processes_with(&name).contains(&std::process::id()));
    }
}
