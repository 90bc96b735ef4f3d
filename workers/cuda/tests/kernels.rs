//! Every kernel file compiles for every architecture, spills no more than it says, and says what is in it.
//!
//! No GPU is needed, only NVRTC: from a toolkit, from the active Python environment, or from the repository's `.venv`
//! (`tests/requirements.txt` names the wheels). A machine without it fails this test, CI above all; where it cannot be had,
//! `--skip kernels_compile` says so in the open.
//!
//! A kernel file has a line `// kernel NAME spill_bytes_max=N` for each kernel, and a line `// variant NAME=VALUE …` for each
//! set of defines worth checking.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use baton_cuda::Compiler;
use baton_cuda::sources::Source;

const ARCHITECTURES: [&str; 3] = ["sm_80", "sm_89", "sm_90a"];

#[test]
fn kernels_compile() {
    let crate_directory = Path::new(env!("CARGO_MANIFEST_DIR"));
    let kernels = crate_directory.join("kernels");
    let environments = [crate_directory.join("../../.venv")];
    let mut faults = Vec::new();
    let mut compiled = 0;
    for architecture in ARCHITECTURES {
        let compiler = Compiler::new(architecture, &environments)
            .unwrap_or_else(|error| panic!("{error}"))
            .including(kernels.clone());
        for file in files(&kernels, "cu") {
            let source = source(&file);
            let stated = stated(source.text);
            for defines in variants(source.text) {
                let place = format!("{} {defines:?} for {architecture}", source.name);
                compiled += 1;
                match compiler.verbose(&source, &defines) {
                    Ok(cubin) => compare(&place, &stated, &spills(&cubin.log), &mut faults),
                    Err(error) => faults.push(format!("{place}: {error}")),
                }
            }
        }
    }
    assert!(
        compiled >= 3 * ARCHITECTURES.len(),
        "only {compiled} compilations"
    );
    assert!(faults.is_empty(), "{}", faults.join("\n"));
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
