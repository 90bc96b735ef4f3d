//! CPU time of processes, from `/proc`.

use std::time::Duration;

use crate::Failure;

/// CPU time that processes took between two moments.
pub struct CpuMeter {
    before: Vec<(String, i32, Duration)>,
}

impl CpuMeter {
    /// Starts measuring these processes and this one, the client.
    ///
    /// # Errors
    /// If one of them does not exist.
    pub fn start(pids: &[(String, i32)]) -> Result<Self, Failure> {
        let client = ("client".to_owned(), i32::try_from(std::process::id())?);
        let before = pids
            .iter()
            .chain([&client])
            .map(|(name, pid)| match cpu_time(*pid) {
                Some(time) => Ok((name.clone(), *pid, time)),
                None => Err(format!("there is no process {pid} ({name})")),
            });
        Ok(Self {
            before: before.collect::<Result<_, _>>()?,
        })
    }

    /// What each took since the start; `None` for one that has ended.
    pub fn stop(self) -> Vec<(String, Option<Duration>)> {
        let took = |pid, before| Some(cpu_time(pid)?.saturating_sub(before));
        self.before
            .into_iter()
            .map(|(name, pid, before)| (name, took(pid, before)))
            .collect()
    }
}

/// User and system time of a process and all its threads, in steps of the kernel's clock tick (10 ms).
fn cpu_time(pid: i32) -> Option<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let ticks = ticks(&stat)?;
    Some(Duration::from_secs_f64(
        ticks as f64 / rustix::param::clock_ticks_per_second() as f64,
    ))
}

/// utime + stime, fields 14 and 15 of proc(5)'s stat. Field 2, the name, may hold spaces and brackets.
fn ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut field = || fields.next()?.parse::<u64>().ok();
    Some(field()? + field()?)
}

/// `NAME=PID` of the command line.
pub fn named_pid(text: &str) -> Result<(String, i32), String> {
    let (name, pid) = text
        .split_once('=')
        .ok_or_else(|| format!("{text:?} is not NAME=PID"))?;
    let pid = pid
        .parse()
        .map_err(|_| format!("{pid:?} is no process id"))?;
    Ok((name.to_owned(), pid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_right_fields_are_added() {
        let stat = "42 (a ) b) S 1 42 42 0 -1 4194560 1 2 3 4 250 50 7 8 20 0 1 0 100 0 0";
        assert_eq!(ticks(stat), Some(300));
        assert_eq!(ticks("nonsense"), None);
    }

    #[test]
    fn work_is_seen() {
        let meter = CpuMeter::start(&[]).unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        let before = cpu_time(own).unwrap();
        while cpu_time(own).unwrap() < before + Duration::from_millis(30) {
            std::hint::black_box((0..100_000_u64).sum::<u64>());
        }
        let took = meter.stop();
        assert_eq!(took[0].0, "client");
        assert!(took[0].1.unwrap() >= Duration::from_millis(30), "{took:?}");
    }

    #[test]
    fn a_process_that_is_not_there_is_named() {
        let Err(error) = CpuMeter::start(&[("ghost".to_owned(), i32::MAX)]) else {
            panic!()
        };
        assert!(error.to_string().contains("ghost"), "{error}");
        assert!(named_pid("api").is_err() && named_pid("api=x").is_err());
        assert_eq!(named_pid("api=7").unwrap(), ("api".to_owned(), 7));
    }
}
