//! The unit of `container/` starts `baton` with arguments that it takes. What is rendered there is tested with `baton render`.

use std::fs;
use std::process::Command;

use baton_tests::{baton, repository};

#[test]
fn every_argument_is_one_that_baton_takes() {
    let path = repository().join("container/baton.service");
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("ExecStart=/usr/local/bin/baton "))
        .expect("the unit starts baton");
    // `--help` ends it well where all before it was understood
    let output = Command::new(baton())
        .args(line.split_whitespace())
        .arg("--help")
        .output()
        .expect("the binary was just built");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{line}: {error}");
}
