//! CLI hints: what people type by habit from vLLM, Ollama or Docker, and what it is called here.

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

/// Subcommands of other programs, and what does the same here.
const COMMANDS: [(&[&str], &str); 10] = [
    (
        &["run", "start", "launch"],
        "`baton up MODEL` starts a cluster; `baton chat` in another terminal talks to it",
    ),
    (
        &["stop", "down", "kill"],
        "Ctrl-C or SIGTERM ends `baton up` and all that it started; `baton drain WORKER` ends one worker",
    ),
    (
        &["ps", "list", "ls", "info"],
        "`baton status` shows the workers of a cluster and its model, `baton top` its requests",
    ),
    (
        &["models", "show"],
        "`baton status` names the model of a cluster; those that `baton up` prepared are in ~/.cache/baton/models",
    ),
    (
        &["pull", "download", "convert", "prepare"],
        "`baton up MODEL` prepares a model first; `baton model-prep --model MODEL --out DIR` does no more than that",
    ),
    (
        &["logs", "log"],
        "`baton up` prints the log lines of all its processes; RUST_LOG=debug prints more",
    ),
    (
        &["generate", "complete", "ask", "prompt"],
        "`baton chat \"QUESTION\"` asks a running cluster",
    ),
    (
        &["benchmark"],
        "`baton bench` loads a cluster and measures it",
    ),
    (
        &["doctor", "check", "collect-env"],
        "`baton self-check` looks at this machine",
    ),
    (&["version"], "`baton --version`"),
];

/// The error with a tip, where something here does what was meant.
pub fn with_tip(mut error: Error) -> Error {
    let (replaced, tip) = match error.kind() {
        ErrorKind::UnknownArgument => (ContextKind::SuggestedArg, of_argument(&error)),
        ErrorKind::InvalidSubcommand => (ContextKind::SuggestedSubcommand, of_command(&error)),
        ErrorKind::MissingRequiredArgument => (ContextKind::SuggestedArg, of_missing(&error)),
        _ => return error,
    };
    if let Some(tip) = tip {
        error.remove(replaced);
        let tips = ContextValue::StyledStrs(vec![tip.into()]);
        error.insert(ContextKind::Suggested, tips);
    }
    error
}

fn given(error: &Error, kind: ContextKind) -> Option<&str> {
    match error.get(kind) {
        Some(ContextValue::String(given)) => Some(given),
        _ => None,
    }
}

/// A flag of vLLM, or a value where flags are expected.
fn of_argument(error: &Error) -> Option<String> {
    let given = given(error, ContextKind::InvalidArg)?;
    let name = given.split('=').next().unwrap_or_default();
    if let Some((flag, ours)) = FLAGS.iter().find(|(flag, _)| *flag == name) {
        return Some(format!("vLLM's {flag} is here: {ours}"));
    }
    let usage = match error.get(ContextKind::Usage) {
        Some(ContextValue::StyledStr(usage)) => usage.to_string(),
        _ => return None,
    };
    let flags = ["--model", "--tokenizer"].into_iter();
    let mut wanted = flags.filter(|flag| usage.contains(&format!("{flag} <")));
    match given.starts_with('-') || usage.contains("MODEL|") {
        true => None,
        false => Some(format!(
            "a model is named by its flag: {} {given}",
            wanted.next()?
        )),
    }
}

fn of_command(error: &Error) -> Option<String> {
    let given = given(error, ContextKind::InvalidSubcommand)?;
    let known = COMMANDS.iter().find(|(names, _)| names.contains(&given));
    if let Some((_, ours)) = known {
        return Some((*ours).to_owned());
    }
    let is_model = given.contains('/') || given.ends_with(".gguf");
    is_model.then(|| format!("`baton up {given}` serves a model"))
}

/// `baton up` alone.
fn of_missing(error: &Error) -> Option<String> {
    let Some(ContextValue::Strings(missing)) = error.get(ContextKind::InvalidArg) else {
        return None;
    };
    let is_model = missing
        .iter()
        .any(|name| name.contains("--config <FILE>|--model <MODEL>"));
    is_model.then(|| {
        "MODEL is a model directory, a GGUF file, or a name: baton up qwen3-0.6b".to_owned()
    })
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

    /// What is printed for this line of words.
    fn said(line: &str) -> String {
        let error = Cli::try_parse_from(line.split(' ')).expect_err(line);
        with_tip(error).to_string()
    }

    #[test]
    fn subcommands_of_other_programs_have_tips_that_name_ours() {
        let command = Cli::command();
        for (names, tip) in COMMANDS {
            for name in names {
                assert!(command.find_subcommand(name).is_none(), "there is a {name}");
                let said = said(&format!("baton {name} x"));
                assert!(said.contains(tip), "{said}");
                assert!(!said.contains("similar subcommand"), "{said}");
            }
            let commands = tip.split("`baton ").skip(1);
            for ours in commands.filter(|ours| !ours.starts_with("--")) {
                let ours = ours.split([' ', '`']).next().unwrap();
                assert!(command.find_subcommand(ours).is_some(), "{ours}");
            }
        }
        assert!(said("baton ./model").contains("`baton up ./model` serves a model"));
        assert!(said("baton statsu").contains("status"));
    }

    #[test]
    fn a_model_without_its_flag_has_a_tip() {
        let model_prep = said("baton model-prep smollm2 --out x");
        assert!(model_prep.contains("--model smollm2"), "{model_prep}");
        let worker = said("baton worker ./model");
        assert!(worker.contains("--model ./model"), "{worker}");
        let server = said("baton api-server ./model");
        assert!(server.contains("--tokenizer ./model"), "{server}");
        assert!(said("baton up").contains("baton up qwen3-0.6b"));
        for other in [
            "baton up a b",
            "baton top x",
            "baton up --model a --nothing",
        ] {
            assert!(!said(other).contains("by its flag"), "{}", said(other));
        }
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
