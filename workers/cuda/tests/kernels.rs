//! Every kernel file compiles for every architecture, spills no more than it says, and says what is in it.
//!
//! No GPU is needed, only NVRTC: from a toolkit, from the active Python environment, or from the repository's `.venv`
//! (`tests/requirements.txt` names the wheels). A machine without it fails this test, CI above all; where it cannot be had,
//! `--skip kernels_compile` says so in the open.
//!
//! What compiled before is not compiled again where nothing that goes into it has changed: the target directory has what the assembler said.
//!
//! A kernel file has a line `// kernel NAME spill_bytes_max=N` for each kernel, and a line `// variant NAME=VALUE …` for each
//! set of defines worth checking.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use baton_cuda::sources::Source;
use baton_cuda::{Compiler, CudaError};
use sha2::{Digest, Sha256};

#[test]
fn kernels_compile_for_sm_80() {
    all_compile("sm_80");
}

#[test]
fn kernels_compile_for_sm_89() {
    all_compile("sm_89");
}

#[test]
fn kernels_compile_for_sm_90a() {
    all_compile("sm_90a");
}

fn all_compile(architecture: &str) {
    let crate_directory = Path::new(env!("CARGO_MANIFEST_DIR"));
    let kernels = crate_directory.join("kernels");
    let environments = [crate_directory.join("../../.venv")];
    let mut faults = Vec::new();
    let mut compiled = 0;
    let compiler = Compiler::new(architecture, &environments)
        .unwrap_or_else(|error| panic!("{error}"))
        .including(kernels.clone());
    let headers: String = files(&kernels, "cuh")
        .iter()
        .map(|file| source(file).text)
        .collect();
    for file in files(&kernels, "cu") {
        let source = source(&file);
        let stated = stated(source.text);
        for defines in variants(source.text) {
            let place = format!("{} {defines:?} for {architecture}", source.name);
            compiled += 1;
            let known = Known::of(&compiler, architecture, source.text, &defines, &headers);
            match known.log_or(|| Ok(compiler.verbose(&source, &defines)?.log)) {
                Ok(log) => compare(&place, &stated, &spills(&log), &mut faults),
                Err(error) => faults.push(format!("{place}: {error}")),
            }
        }
    }
    assert!(compiled >= 3, "only {compiled} compilations");
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// What the assembler said of a kernel that compiled before, in a file named by all that goes into it: the compiler gives the same
/// again, and takes minutes for all of them.
struct Known(PathBuf);

impl Known {
    fn of(
        compiler: &Compiler,
        architecture: &str,
        text: &str,
        defines: &[String],
        headers: &str,
    ) -> Self {
        let mut hash = Sha256::new();
        let version = format!("{:?}", compiler.version());
        // How it is called, and whose headers of CUDA's.
        let how = include_str!("../src/gpu/compile.rs");
        let whose = include_str!("../../../tests/requirements.txt");
        let defines = defines.join(" ");
        for part in [&version, architecture, how, whose, headers, &defines, text] {
            hash.update(part.len().to_le_bytes());
            hash.update(part);
        }
        let name: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels");
        fs::create_dir_all(&directory).expect("a directory below the target directory");
        Self(directory.join(name))
    }

    fn log_or(
        &self,
        compile: impl FnOnce() -> Result<String, CudaError>,
    ) -> Result<String, CudaError> {
        if let Ok(log) = fs::read_to_string(&self.0) {
            return Ok(log);
        }
        let log = compile()?;
        // Whole or not at all, should this be ended meanwhile.
        let part = self.0.with_extension("part");
        fs::write(&part, &log).expect("a file below the target directory");
        fs::rename(&part, &self.0).expect("a file just written");
        Ok(log)
    }
}

fn compare(
    place: &str,
    stated: &BTreeMap<String, u32>,
    found: &BTreeMap<String, u32>,
    faults: &mut Vec<String>,
) {
    for (kernel, bytes) in found {
        match stated.get(kernel) {
            None => faults.push(format!(
                "{place}: no line `// kernel {kernel} spill_bytes_max=…`"
            )),
            Some(max) if bytes > max => {
                faults.push(format!(
                    "{place}: {kernel} spills {bytes} bytes, it states {max}"
                ));
            }
            Some(_) => {}
        }
    }
    for kernel in stated.keys().filter(|kernel| !found.contains_key(*kernel)) {
        faults.push(format!("{place}: there is no kernel {kernel}"));
    }
}

/// Names and spills that the file states: `// kernel NAME spill_bytes_max=N`, other words between.
fn stated(text: &str) -> BTreeMap<String, u32> {
    let lines = text
        .lines()
        .filter_map(|line| line.strip_prefix("// kernel "));
    lines
        .map(|line| {
            let mut words = line.split_whitespace();
            let name = words.next().expect("a kernel's name");
            let bytes = words.find_map(|word| word.strip_prefix("spill_bytes_max=")?.parse().ok());
            let bytes = bytes.unwrap_or_else(|| panic!("{line:?}: no spill_bytes_max=N"));
            (name.to_owned(), bytes)
        })
        .collect()
}

/// The sets of defines that the file states; none at all is one.
fn variants(text: &str) -> Vec<Vec<String>> {
    let lines = text
        .lines()
        .filter_map(|line| line.strip_prefix("// variant "));
    let variants: Vec<Vec<String>> = lines
        .map(|line| line.split_whitespace().map(str::to_owned).collect())
        .collect();
    if variants.is_empty() {
        vec![Vec::new()]
    } else {
        variants
    }
}

/// Bytes of spilled stores and loads of each kernel, by the assembler's report.
fn spills(log: &str) -> BTreeMap<String, u32> {
    let mut spills = BTreeMap::new();
    let mut kernel = None;
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            kernel = rest.split('\'').next().map(str::to_owned);
            spills.extend(kernel.clone().map(|kernel| (kernel, 0)));
        }
        if let (true, Some(kernel)) = (line.contains("bytes spill stores"), &kernel) {
            let numbers = line
                .split(',')
                .skip(1)
                .filter_map(|part| part.split_whitespace().next()?.parse::<u32>().ok());
            spills.insert(kernel.clone(), numbers.sum());
        }
    }
    spills
}

fn source(file: &Path) -> Source {
    let text = std::fs::read_to_string(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    let name = file
        .file_name()
        .expect("a file")
        .to_string_lossy()
        .into_owned();
    Source {
        name: name.leak(), // once a file and test
        text: text.leak(),
    }
}

fn files(directory: &Path, extension: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).expect("the kernels");
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension().is_some_and(|e| e == extension))
        .collect();
    files.sort();
    files
}

#[test]
fn reports_are_read_as_the_assembler_writes_them() {
    let log = "ptxas info    : Compiling entry function 'f' for 'sm_90a'\n\
               ptxas info    : Function properties for f\n    \
               8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n";
    assert_eq!(spills(log), BTreeMap::from([("f".to_owned(), 28)]));
    assert_eq!(
        stated("// kernel f arch=sm_90a spill_bytes_max=3\n"),
        BTreeMap::from([("f".to_owned(), 3)])
    );
    assert_eq!(variants("// variant A=1 B=2\n// variant A=3\n").len(), 2);
}
