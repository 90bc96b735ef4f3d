//! What main memory there still is: of the machine, of the control groups that this process is in, and of its own limits.
//!
//! A KV arena is mapped and filled at start. If there is less memory than that, nobody says no: the kernel kills whatever
//! process it chooses. So it is compared first. A bound counts only where it certainly holds: where memory cannot be had, not
//! where it may be short.

use std::fs;
use std::path::{Path, PathBuf};

/// Left to the process for everything else, or it would be killed by the first request.
const RESERVE: u64 = 64 << 20;

/// A control group without a limit says a number like this one.
const UNLIMITED: u64 = 1 << 60;

/// What one bound leaves.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Room {
    bytes: u64,
    /// Whose bound, and what it is: a clause.
    of: String,
}

/// Compares what is asked for with what there is.
///
/// # Errors
/// A sentence that names what was asked for, the tightest bound, and how much fits.
pub fn check(asked: u64, what: &str) -> Result<(), String> {
    let machine = Machine::this();
    fits(machine.rooms(), asked, what)?;
    fits(machine.address_space(), asked, what)
}

/// Bytes that can still be had, and whose bound that is, as a clause; `None` where nobody says.
pub fn room() -> Option<(u64, String)> {
    let machine = Machine::this();
    let rooms = machine.rooms().into_iter().chain(machine.address_space());
    let tightest = rooms.min_by_key(|room| room.bytes)?;
    Some((tightest.bytes.saturating_sub(RESERVE), tightest.of))
}

/// The same for memory whose addresses the process has already.
pub(crate) fn check_mapped(asked: u64, what: &str) -> Result<(), String> {
    fits(Machine::this().rooms(), asked, what)
}

/// Compares a System V shared memory segment of this length with what the kernel's settings allow.
///
/// # Errors
/// A sentence that names the setting to raise.
pub(crate) fn check_segment(bytes: u64) -> Result<(), String> {
    Machine::this().check_segment(bytes)
}

/// Compares what is asked for with the tightest of these.
fn fits(rooms: impl IntoIterator<Item = Room>, asked: u64, what: &str) -> Result<(), String> {
    let Some(tightest) = rooms.into_iter().min_by_key(|room| room.bytes) else {
        return Ok(());
    };
    let most = tightest.bytes.saturating_sub(RESERVE);
    if asked <= most {
        return Ok(());
    }
    Err(format!(
        "{what} needs {} of main memory, and {}: {} fit",
        amount(asked),
        tightest.of,
        amount(most)
    ))
}

/// Where to look.
struct Machine {
    root: PathBuf,
    page: u64,
}

impl Machine {
    fn this() -> Self {
        // SAFETY: it takes and gives a number.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        Self {
            root: PathBuf::from("/"),
            page: u64::try_from(page).unwrap_or(4096),
        }
    }

    fn rooms(&self) -> Vec<Room> {
        let memory = Meminfo(self.read("proc/meminfo"));
        // What is not in the bounds below: a System V segment may lie in huge pages that were set aside, and pages may go to swap.
        let beside = memory.bytes("SwapFree")
            + memory.count("HugePages_Free") * memory.bytes("Hugepagesize");
        let mut rooms = self.cgroups();
        rooms.extend(self.machine(&memory));
        for room in &mut rooms {
            room.bytes = room.bytes.saturating_add(beside);
        }
        rooms
    }

    /// The machine itself. Not where the kernel is none of Linux's own (gVisor): there the total that is shown is small at first
    /// and grows with what is used, and no account of its zones is given.
    fn machine(&self, memory: &Meminfo) -> Option<Room> {
        if !self.root.join("proc/zoneinfo").exists() {
            return None;
        }
        let available = memory.get("MemAvailable")?;
        let total = memory.bytes("MemTotal");
        let of = format!(
            "the machine has {}, of which {} are available",
            amount(total),
            amount(available)
        );
        Some(Room {
            bytes: available,
            of,
        })
    }

    /// Limit on this process's addresses (`ulimit -v`).
    fn address_space(&self) -> Option<Room> {
        let limits = self.read("proc/self/limits");
        let line = limits
            .lines()
            .find_map(|line| line.strip_prefix("Max address space"))?;
        let limit: u64 = line.split_whitespace().next()?.parse().ok()?;
        let used = Meminfo(self.read("proc/self/status")).bytes("VmSize");
        let of = format!(
            "this process may have {} of addresses (ulimit -v) and uses {}",
            amount(limit),
            amount(used)
        );
        Some(Room {
            bytes: limit.saturating_sub(used),
            of,
        })
    }

    /// All control groups with a limit on memory that this process is in, from its own up to the outermost that can be seen.
    fn cgroups(&self) -> Vec<Room> {
        let memberships = self.read("proc/self/cgroup");
        let mounts = self.read("proc/self/mountinfo");
        let mut rooms = Vec::new();
        for mount in mounts.lines().filter_map(Mount::parse) {
            let Some(path) = mount.membership(&memberships) else {
                continue;
            };
            let relative = path.strip_prefix(mount.root).unwrap_or(Path::new(""));
            // A path with `..` leads out of what can be seen.
            let is_inside = relative.components().all(|part| part.as_os_str() != "..");
            let relative = if is_inside { relative } else { Path::new("") };
            for group in relative.ancestors() {
                let directory = mount.point.strip_prefix("/").unwrap_or(mount.point);
                let directory = self.root.join(directory).join(group);
                rooms.extend(room_of_group(&directory, mount.is_v2, group));
            }
        }
        rooms
    }

    fn check_segment(&self, bytes: u64) -> Result<(), String> {
        let setting = |name: &str| -> Option<u64> {
            self.read(&format!("proc/sys/kernel/{name}"))
                .trim()
                .parse()
                .ok()
        };
        let asked = amount(bytes);
        let segments = self.read("proc/sysvipc/shm");
        let sizes = segments
            .lines()
            .skip(1)
            .filter_map(|line| line.split_whitespace().nth(3)?.parse::<u64>().ok());
        let (count, used) = sizes.fold((0, 0_u64), |(count, used), size| {
            (count + 1, used.saturating_add(size))
        });
        if let Some(most) = setting("shmmax").filter(|most| bytes > *most) {
            return Err(format!(
                "a System V shared memory segment of {asked} is over kernel.shmmax, {}: raise it (sysctl -w kernel.shmmax={bytes})",
                amount(most)
            ));
        }
        let all = setting("shmall").map(|pages| pages.saturating_mul(self.page));
        if let Some(all) = all.filter(|all| bytes.saturating_add(used) > *all) {
            return Err(format!(
                "a System V shared memory segment of {asked} does not fit into kernel.shmall, {} of which {} are taken: raise it (sysctl -w kernel.shmall={}, in pages)",
                amount(all),
                amount(used),
                bytes.saturating_add(used).div_ceil(self.page)
            ));
        }
        if let Some(most) = setting("shmmni").filter(|most| count >= *most) {
            return Err(format!(
                "there are {count} System V shared memory segments, as many as kernel.shmmni allows ({most}): raise it, or remove those that nobody uses (ipcs -m)"
            ));
        }
        Ok(())
    }

    /// A file's text; none if it cannot be read.
    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.root.join(path)).unwrap_or_default()
    }
}

/// Lines of the form `Name:   123 kB`.
struct Meminfo(String);

impl Meminfo {
    fn get(&self, name: &str) -> Option<u64> {
        let value = |line: &str| {
            line.strip_prefix(name)?
                .strip_prefix(':')
                .map(str::to_owned)
        };
        let value = self.0.lines().find_map(value)?;
        let mut words = value.split_whitespace();
        let number: u64 = words.next()?.parse().ok()?;
        match words.next() {
            Some("kB") => number.checked_mul(1024),
            _ => Some(number),
        }
    }

    fn bytes(&self, name: &str) -> u64 {
        self.get(name).unwrap_or(0)
    }

    fn count(&self, name: &str) -> u64 {
        self.bytes(name)
    }
}

/// A mounted hierarchy of control groups that may bound memory.
struct Mount<'a> {
    /// Which part of the hierarchy is mounted.
    root: &'a Path,
    point: &'a Path,
    is_v2: bool,
}

impl<'a> Mount<'a> {
    /// A line of `mountinfo`, proc(5).
    fn parse(line: &'a str) -> Option<Self> {
        let (before, after) = line.split_once(" - ")?;
        let mut fields = before.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        let mut after = after.split(' ');
        let (kind, options) = (after.next()?, after.nth(1).unwrap_or_default());
        let is_v2 = match kind {
            "cgroup2" => true,
            "cgroup" if options.split(',').any(|option| option == "memory") => false,
            _ => return None,
        };
        Some(Self {
            root: Path::new(root),
            point: Path::new(point),
            is_v2,
        })
    }

    /// This process's group, by its lines `number:controllers:path`.
    fn membership<'b>(&self, lines: &'b str) -> Option<&'b Path> {
        lines.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':');
            let (number, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
            let is_this = match self.is_v2 {
                true => number == "0" && controllers.is_empty(),
                false => controllers.split(',').any(|name| name == "memory"),
            };
            is_this.then_some(Path::new(path))
        })
    }
}

/// What the limit of one group leaves, if it has one. Pages of files can be taken back, so they do not count as used.
fn room_of_group(directory: &Path, is_v2: bool, group: &Path) -> Option<Room> {
    let read = |name: &str| fs::read_to_string(directory.join(name)).unwrap_or_default();
    let (limit, usage, files) = match is_v2 {
        true => (
            "memory.max",
            "memory.current",
            ["inactive_file", "active_file"],
        ),
        false => (
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            ["total_inactive_file", "total_active_file"],
        ),
    };
    let limit: u64 = read(limit).trim().parse().ok()?;
    if limit >= UNLIMITED {
        return None;
    }
    let usage: u64 = read(usage).trim().parse().ok()?;
    let stat = read("memory.stat");
    let of_files = stat.lines().filter_map(|line| {
        let (name, bytes) = line.split_once(' ')?;
        files.contains(&name).then(|| bytes.parse::<u64>().ok())?
    });
    let used = usage.saturating_sub(of_files.sum());
    Some(Room {
        bytes: limit.saturating_sub(used),
        of: format!(
            "the control group /{} may have {} and uses {}",
            group.display(),
            amount(limit),
            amount(used)
        ),
    })
}

/// Bytes for people.
fn amount(bytes: u64) -> String {
    match bytes {
        0..=0x27ff_ffff => format!("{} MiB", bytes >> 20),
        _ => format!("{:.1} GiB", bytes as f64 / (1_u64 << 30) as f64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    impl Machine {
        fn check(&self, asked: u64, what: &str) -> Result<(), String> {
            fits(self.rooms(), asked, what)
        }
    }

    /// A machine of these files.
    fn machine(name: &str, files: &[(&str, &str)]) -> Machine {
        let root = std::env::temp_dir().join(format!("baton-memory-{}-{name}", std::process::id()));
        for (path, text) in files {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        Machine { root, page: 4096 }
    }

    impl Drop for Machine {
        fn drop(&mut self) {
            if self.root.starts_with(std::env::temp_dir()) {
                let _ = fs::remove_dir_all(&self.root);
            }
        }
    }

    const MEMINFO: (&str, &str) = (
        "proc/meminfo",
        "MemTotal:       16777216 kB\nMemFree:        100 kB\nMemAvailable:   8388608 kB\nSwapFree:              0 kB\n",
    );
    const ZONES: (&str, &str) = ("proc/zoneinfo", "Node 0, zone Normal\n");
    const V1: [(&str, &str); 2] = [
        ("proc/self/cgroup", "4:cpu,memory:/a/b\n0::/\n"),
        (
            "proc/self/mountinfo",
            "30 20 0:26 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n\
             31 20 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
        ),
    ];
    const V2: (&str, &str) = (
        "proc/self/mountinfo",
        "31 20 0:27 /pod /sys/fs/cgroup ro,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n",
    );

    #[test]
    fn what_the_machine_does_not_have_is_refused_with_what_fits() {
        let machine = machine("total", &[MEMINFO, ZONES]);
        assert_eq!(machine.check(7 * GIB, "the KV arena"), Ok(()));
        let told = machine.check(95 << 40, "the KV arena").unwrap_err();
        assert_eq!(
            told,
            "the KV arena needs 97280.0 GiB of main memory, and the machine has 16.0 GiB, of which 8.0 GiB are available: 7.9 GiB fit"
        );
    }

    #[test]
    fn a_total_that_grows_with_what_is_used_is_no_bound() {
        let machine = machine("grows", &[MEMINFO]);
        assert_eq!(machine.check(1 << 40, "the KV arena"), Ok(()));
    }

    #[test]
    fn swap_and_huge_pages_that_are_free_count() {
        let meminfo = "MemTotal: 4194304 kB\nMemAvailable: 1048576 kB\nSwapFree: 1048576 kB\nHugePages_Free: 1024\nHugepagesize: 2048 kB\n";
        let machine = machine("swap", &[("proc/meminfo", meminfo), ZONES]);
        assert_eq!(machine.check(3 * GIB, "it"), Ok(()));
        assert!(machine.check(4 * GIB, "it").is_err());
    }

    #[test]
    fn the_tightest_of_nested_groups_holds_and_files_in_memory_do_not_count_as_used() {
        let mut files = vec![MEMINFO, ZONES];
        files.extend(V1);
        let group = "sys/fs/cgroup/memory/a";
        let texts = [
            ("b/memory.limit_in_bytes", "9223372036854771712\n"),
            ("b/memory.usage_in_bytes", "5\n"),
            ("memory.limit_in_bytes", "4294967296\n"),
            ("memory.usage_in_bytes", "3221225472\n"),
            (
                "memory.stat",
                "cache 1\ntotal_inactive_file 1073741824\ntotal_active_file 1073741824\n",
            ),
        ];
        let texts = texts.map(|(name, text)| (format!("{group}/{name}"), text));
        files.extend(texts.iter().map(|(name, text)| (name.as_str(), *text)));
        let machine = machine("nested", &files);
        assert_eq!(machine.check(2 * GIB, "it"), Ok(()));
        let told = machine.check(3 * GIB, "it").unwrap_err();
        let why = "the control group /a may have 4.0 GiB and uses 1.0 GiB: 2.9 GiB fit";
        assert!(told.ends_with(why), "{told}");
    }

    #[test]
    fn a_container_sees_its_own_group_at_the_mount() {
        // Without a namespace of its own the path is the host's, with one it is `/`, or leads out of it.
        for (name, path) in [
            ("same", "0::/pod\n"),
            ("own", "0::/\n"),
            ("out", "0::/../x\n"),
        ] {
            let files = [
                MEMINFO,
                ZONES,
                V2,
                ("proc/self/cgroup", path),
                ("sys/fs/cgroup/memory.max", "1073741824\n"),
                ("sys/fs/cgroup/memory.current", "10485760\n"),
                (
                    "sys/fs/cgroup/memory.stat",
                    "inactive_file 4096\nactive_file 0\n",
                ),
            ];
            let machine = machine(name, &files);
            assert!(machine.check(2 * GIB, "it").is_err(), "{path}");
            assert_eq!(machine.check(GIB / 2, "it"), Ok(()), "{path}");
        }
        let files = [
            MEMINFO,
            ZONES,
            V2,
            ("proc/self/cgroup", "0::/\n"),
            ("sys/fs/cgroup/memory.max", "max\n"),
        ];
        assert_eq!(machine("max", &files).check(7 * GIB, "it"), Ok(()));
    }

    #[test]
    fn addresses_are_bounded_by_the_process_s_own_limit() {
        let files = [
            MEMINFO,
            ZONES,
            (
                "proc/self/limits",
                "Limit  Soft Limit  Hard Limit  Units\nMax address space         2147483648           unlimited            bytes\n",
            ),
            ("proc/self/status", "VmPeak:  9 kB\nVmSize:  1048576 kB\n"),
        ];
        let machine = machine("as", &files);
        let told = fits(machine.address_space(), GIB, "it").unwrap_err();
        assert!(told.contains("ulimit -v"), "{told}");
    }

    #[test]
    fn a_segment_that_the_kernel_s_settings_do_not_allow_names_the_setting() {
        let segments = "       key      shmid perms                  size  cpid  lpid nattch\n         0          3   660            1073741824     1     1      2\n";
        let of = |name, max: u64, all: u64, number: u64| {
            let (max, all, number) = (max.to_string(), all.to_string(), number.to_string());
            let files = [
                ("proc/sys/kernel/shmmax", max.as_str()),
                ("proc/sys/kernel/shmall", &all),
                ("proc/sys/kernel/shmmni", &number),
                ("proc/sysvipc/shm", segments),
            ];
            machine(name, &files).check_segment(2 * GIB)
        };
        let pages = 3 * GIB / 4096;
        assert_eq!(of("fits", 2 * GIB, pages, 2), Ok(()));
        for (name, outcome) in [
            ("shmmax", of("a", 2 * GIB - 1, pages, 2)),
            ("shmall", of("b", 2 * GIB, pages - 1, 2)),
            ("shmmni", of("c", 2 * GIB, pages, 1)),
        ] {
            let told = outcome.unwrap_err();
            assert!(told.contains(&format!("kernel.{name}")), "{told}");
        }
    }

    #[test]
    fn this_machine_has_some_memory_and_not_any_amount() {
        assert_eq!(check(1 << 20, "it"), Ok(()));
        assert!(check(1 << 50, "it").is_err());
        assert_eq!(check_segment(1 << 20), Ok(()));
    }
}
