//! The units of `container/` start `baton` with arguments that it takes. What is rendered there is tested with `baton render`.

use std::fs;
use std::process::Command;

use baton_tests::{baton, repository};

#[test]
fn every_argument_is_one_that_baton_takes() {
    for unit in [
        "baton.service",
        "systemd/baton-api-server.service",
        "systemd/baton-worker@.service",
    ] {
        let path = repository().join("container").join(unit);
        let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("ExecStart=/usr/local/bin/baton "))
            .expect("the unit starts baton");
        // Without this systemd would think it ready as soon as it runs.
        assert!(text.contains("\nType=notify\n"), "{unit}");
        // `--help` ends it well where all before it was understood
        let output = Command::new(baton())
            .args(line.replace("%i", "decode").split_whitespace())
            .arg("--help")
            .output()
            .expect("the binary was just built");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{line}: {error}");
    }
}
