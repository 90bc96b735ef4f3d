//! Rate of pulls between the memories of GPUs, from workers of one size to workers of another, each process seeing its own GPUs only;
//! beside it the peer copy of one process that sees both.
//!
//! `cargo bench -p baton-cuda --bench gpu_pull` on a machine with two GPUs and UCX with CUDA (`BATON_UCX_LIB_DIR`); elsewhere
//! copy the binary that `--no-run` names. `UCX_TLS` given as an argument is that of both agents, and then sizes are equal.
//!
//! KV of the Llama-8B and 70B shapes: 131,072 and 327,680 bytes a token, blocks of 32 tokens, 8 heads. Every word says to which block
//! and head it belongs; what arrived is compared with that.

mod ceiling;
mod kv;
mod side;

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};

use baton_cuda::Device;

use crate::kv::SHAPES;

/// Which side this process is: nothing, `serve` or `read`.
const SIDE: &str = "BATON_GPU_PULL_SIDE";
/// The GPUs that KV comes from and goes to, by rank: `0,1`.
const FROM: &str = "BATON_GPU_PULL_FROM";
const TO: &str = "BATON_GPU_PULL_TO";
const SHAPE: &str = "BATON_GPU_PULL_SHAPE";
const ROUNDS: usize = 15;

fn main() {
    let tls = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    match std::env::var(SIDE).as_deref() {
        Ok("serve") => side::serve(tls),
        Ok("read") => side::read(tls),
        _ => run(tls.as_deref()),
    }
}

/// Starts both sides for each pair of workers.
fn run(tls: Option<&str>) {
    let gpus = Device::open(0).and_then(|_| Device::open(1)).is_ok();
    let pairs: &[[&str; 2]] = match (gpus, tls) {
        (false, _) => &[["0", "0"]],
        (true, Some(_)) => &[["0", "1"]],
        (true, None) => &[
            ["0", "1"],
            ["0", "0,1"],
            ["0,1", "1"],
            ["0,1", "1,0"],
            ["0", "0"],
        ],
    };
    if gpus && tls.is_none() {
        ceiling::ceiling();
    }
    let mut failed = Vec::new();
    for shape in SHAPES {
        for [from, to] in pairs {
            println!("\n{}, from GPU {from} to GPU {to}", shape.name);
            if let Err(error) = pair(shape.name, from, to, tls) {
                println!("{error}");
                failed.push(format!("{} {from} to {to}", shape.name));
            }
        }
    }
    assert!(failed.is_empty(), "failed: {failed:?}");
}

fn pair(shape: &str, from: &str, to: &str, tls: Option<&str>) -> Result<(), String> {
    let start = |which, gpus| {
        let mut command = side(which, gpus, tls);
        command.env(FROM, from).env(TO, to).env(SHAPE, shape);
        command.spawn().expect("the program can run itself")
    };
    let mut server = start("serve", from);
    let mut output = BufReader::new(server.stdout.take().expect("it is piped"));
    let mut descriptor = String::new();
    output
        .read_line(&mut descriptor)
        .expect("the server speaks");
    if descriptor.is_empty() {
        let status = server.wait().expect("it is our child");
        return Err(format!("the server failed: {status}"));
    }
    let mut reader: Child = start("read", to);
    let mut input = reader.stdin.take().expect("it is piped");
    input.write_all(descriptor.as_bytes()).expect("it listens");
    let printed = BufReader::new(reader.stdout.take().expect("it is piped"));
    for line in printed.lines().map_while(Result::ok) {
        println!("{line}");
    }
    let status = reader.wait().expect("it is our child");
    // Its standard input closes, which ends it.
    drop(server.stdin.take());
    let _ = server.wait();
    match status.success() {
        true => Ok(()),
        false => Err(format!("the reader failed: {status}")),
    }
}

fn side(which: &str, gpus: &str, tls: Option<&str>) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("the program has a path"));
    command
        .args(tls)
        .env(SIDE, which)
        .env("CUDA_VISIBLE_DEVICES", gpus)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    command
}
