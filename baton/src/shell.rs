//! What shells and `man` want of a command line: completions and pages.

use std::path::PathBuf;

use clap::{Args, Command};
use clap_complete::Shell;

use crate::Failure;

#[derive(Args, Debug)]
pub struct CompletionsArgs {
    /// The shell; bash: baton completions bash > /etc/bash_completion.d/baton
    #[arg(value_enum)]
    shell: Shell,
}

#[derive(Args, Debug)]
pub struct ManArgs {
    /// Where the pages are written: /usr/local/share/man/man1
    directory: PathBuf,
}

/// Writes completions to standard output.
pub fn completions(args: CompletionsArgs, mut command: Command) -> Result<(), Failure> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut command, "baton", &mut text);
    Ok(std::io::Write::write_all(&mut std::io::stdout(), &text)?)
}

/// Writes a page for `baton` and one for each subcommand.
pub fn man(args: ManArgs, command: Command) -> Result<(), Failure> {
    let directory = args.directory;
    std::fs::create_dir_all(&directory)
        .and_then(|()| clap_mangen::generate_to(command, &directory))
        .map_err(|error| format!("cannot write pages to {}: {error}", directory.display()).into())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::Cli;

    #[test]
    fn there_is_a_page_for_each_subcommand() {
        let directory = tempfile::tempdir().unwrap();
        let args = ManArgs {
            directory: directory.path().join("man1"),
        };
        man(args, Cli::command()).unwrap();
        let page =
            |name: &str| std::fs::read_to_string(directory.path().join("man1").join(name)).unwrap();
        assert!(page("baton.1").contains("baton\\-up(1)"));
        assert!(page("baton-up.1").contains("decode\\-worker\\-count"));
        assert!(page("baton-api-server.1").contains("tls\\-cert"));
    }
}
