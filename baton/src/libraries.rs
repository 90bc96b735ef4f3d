//! `baton libraries`: what is loaded at run time, and whether this machine has it.

use std::io::Write;

use baton_worker::Library;
use clap::Args;
use serde_json::json;

use crate::Failure;

#[derive(Args, Debug)]
pub struct LibrariesArgs {
    /// Fail unless these are here and work: ucx, driver, nvrtc, cublaslt
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = library)]
    need: Vec<Library>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn library(name: &str) -> Result<Library, String> {
    let known = Library::ALL.into_iter().find(|it| it.name() == name);
    known.ok_or_else(|| {
        let names = Library::ALL.map(Library::name).join(", ");
        format!("libraries are {names}")
    })
}

/// Loads each library in turn and prints what is to be said of it; fails if one that is needed does not work.
pub fn run(args: LibrariesArgs) -> Result<(), Failure> {
    let mut missing = Vec::new();
    let mut rows = Vec::new();
    for library in Library::ALL {
        let name = library.name();
        let (works, says) = match library.check() {
            Ok(text) => (true, text),
            Err(text) => {
                if args.need.contains(&library) {
                    missing.push(name);
                }
                (false, text)
            }
        };
        if args.json {
            rows.push(json!({"library": name, "works": works, "says": says}));
            continue;
        }
        let mark = match works {
            true => "ok",
            false => "no",
        };
        writeln!(std::io::stdout(), "{name:<9} {mark}  {says}")?;
    }
    if args.json {
        let all = json!({"libraries": rows, "missing": missing});
        writeln!(std::io::stdout(), "{all:#}")?;
    }
    match missing.as_slice() {
        [] => Ok(()),
        names => Err(format!("not here, or not working: {}", names.join(", ")).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_needed_by_name() {
        assert_eq!(library("nvrtc"), Ok(Library::Nvrtc));
        let error = library("nccl").expect_err("there is no such library");
        assert!(error.contains("ucx, driver, nvrtc, cublaslt"), "{error}");
    }

    /// The tests' machine has UCX, as every machine that runs workers apart.
    #[test]
    fn ucx_is_found() {
        let found = Library::Ucx.check().expect("container/install-deps.sh run");
        assert!(found.starts_with("ucx 1."), "{found}");
        let args = |need| LibrariesArgs { need, json: false };
        run(args(vec![Library::Ucx])).expect("it is here");
    }
}
