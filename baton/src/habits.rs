//! Whoever comes from vLLM types what they know: this says what it is called here.

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Args, Error};

use crate::Failure;

/// Flags of `vllm serve`, and what does the same here.
const FLAGS: [(&str, &str); 21] = [
    ("--allowed-origins", "--cors-origin"),
    (
        "--api-key",
        "--api-keys-file (or the variable BATON_API_KEYS)",
    ),
    ("--block-size", "--block-tokens"),
    (
        "--enable-auto-tool-choice",
        "nothing: tools are on, --tool-format names how the model writes calls",
    ),
    (
        "--enable-chunked-prefill",
        "nothing: it is on, --step-tokens bounds a chunk",
    ),
    (
        "--enable-prefix-caching",
        "nothing: it is on, --no-prefix-cache turns it off",
    ),
    (
        "--gpu-memory-utilization",
        "--kv-cache-free-gpu-memory-fraction, a share of what the model leaves",
    ),
    ("--host", "--api-server-host"),
    ("--max-model-len", "baton model-prep --max-num-tokens"),
    ("--max-num-batched-tokens", "--step-tokens"),
    ("--max-num-seqs", "--batch"),
    ("--no-enable-prefix-caching", "--no-prefix-cache"),
    ("--port", "--api-server-port"),
    ("--quantization", "baton model-prep --dtype fp8"),
    ("--reasoning-parser", "--reasoning-format"),
    ("--served-model-name", "--model-name"),
    ("--ssl-ca-certs", "--tls-client-ca"),
    ("--ssl-certfile", "--tls-cert"),
    ("--ssl-keyfile", "--tls-key"),
    ("--tensor-parallel-size", "--tp-size"),
    ("--tool-call-parser", "--tool-format"),
];

/// The error with a tip, where its flag is one of those.
pub fn with_tip(mut error: Error) -> Error {
    if error.kind() != ErrorKind::UnknownArgument {
        return error;
    }
    let Some(ContextValue::String(given)) = error.get(ContextKind::InvalidArg) else {
        return error;
    };
    let name = given.split('=').next().unwrap_or_default();
    let Some((flag, ours)) = FLAGS.iter().find(|(flag, _)| *flag == name) else {
        return error;
    };
    let tip = format!("vLLM's {flag} is here: {ours}");
    error.remove(ContextKind::SuggestedArg);
    error.insert(
        ContextKind::Suggested,
        ContextValue::StyledStrs(vec![tip.into()]),
    );
    error
}

#[derive(Args, Debug)]
pub struct ServeArgs {
    /// As `vllm serve` takes them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    words: Vec<String>,
}

/// Says what to type instead of `serve MODEL`.
pub fn serve(args: ServeArgs) -> Result<(), Failure> {
    let named = args.words.iter().position(|word| word == "--model");
    let model = match named {
        Some(at) => args.words.get(at + 1),
        None => args.words.first().filter(|word| !word.starts_with('-')),
    };
    let model = model.map_or("MODEL", String::as_str);
    let mut said = format!(
        "there is no `baton serve`; a cluster on this machine is: baton up --model {model}"
    );
    for word in &args.words {
        let name = word.split('=').next().unwrap_or_default();
        if let Some((flag, ours)) = FLAGS.iter().find(|(flag, _)| *flag == name) {
            said += &format!("\n  {flag} is {ours}");
        }
    }
    Err(said.into())
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;
    use crate::Cli;

    #[test]
    fn flags_of_vllm_have_tips_that_name_flags_of_ours() {
        let command = Cli::command();
        let known: Vec<_> = command
            .get_subcommands()
            .flat_map(|sub| sub.get_arguments())
            .filter_map(|arg| arg.get_long())
            .collect();
        for (flag, ours) in FLAGS {
            let line = ["baton", "up", "--model", "m", flag, "1"];
            let error = Cli::try_parse_from(line).expect_err(flag);
            let said = with_tip(error).to_string();
            assert!(said.contains(ours), "{said}");
            for word in ours
                .split([' ', ','])
                .filter_map(|word| word.strip_prefix("--"))
            {
                assert!(known.contains(&word), "{flag}: there is no --{word}");
            }
        }
        let other = Cli::try_parse_from(["baton", "up", "--nothing"]).expect_err("no flag");
        assert!(!with_tip(other).to_string().contains("vLLM"));
    }

    #[test]
    fn who_types_serve_is_told_what_to_type() {
        let said = |line: &str| {
            let words = line.split(' ').map(str::to_owned).collect();
            serve(ServeArgs { words }).unwrap_err().to_string()
        };
        let told = said("meta/llama --port 80 --max-num-seqs=4");
        for part in [
            "baton up --model meta/llama",
            "--port is --api-server-port",
            "--batch",
        ] {
            assert!(told.contains(part), "{told}");
        }
        assert!(said("--model x").contains("baton up --model x"));
        assert!(said("--port 80").contains("--model MODEL"));
    }
}
