//! The files of `container/` start `baton` with arguments that it takes.

use std::fs;
use std::process::Command;

use baton_tests::{baton, repository};

/// The argument lists of `baton` in a file of this directory: JSON arrays after one of these keys, or a systemd unit's line.
fn command_lines(name: &str) -> Vec<Vec<String>> {
    let path = repository().join("container").join(name);
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let words = |line: &str| line.split_whitespace().map(str::to_owned).collect();
    let lines = text.lines().filter_map(|line| {
        let line = line.trim();
        if let Some(list) = line
            .strip_prefix("command: ")
            .or(line.strip_prefix("args: "))
        {
            let list: Vec<String> =
                serde_json::from_str(list).unwrap_or_else(|e| panic!("{name}: {list}: {e}"));
            return Some(list);
        }
        let started = line.strip_prefix("ExecStart=/usr/local/bin/baton ")?;
        Some(words(started))
    });
    let of_baton = |list: &Vec<String>| list.first().is_some_and(|first| first != "nats-server");
    lines.filter(of_baton).collect()
}

#[test]
fn every_argument_is_one_that_baton_takes() {
    for (name, count) in [("compose.yaml", 3), ("k8s.yaml", 3), ("baton.service", 1)] {
        let lines = command_lines(name);
        assert_eq!(lines.len(), count, "{name}: {lines:?}");
        for line in lines {
            // `--help` ends it well where all before it was understood
            let output = Command::new(baton())
                .args(&line)
                .arg("--help")
                .output()
                .expect("the binary was just built");
            let error = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{name}: {line:?}: {error}");
        }
    }
}
