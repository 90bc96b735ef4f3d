//! `baton tether`: how `baton up` makes sure that nothing outlives it.
//!
//! The kernel can send a signal to a process whose parent died, but only the process itself can ask for it. This
//! step runs in the child: it asks, then becomes the real program, which keeps the request (see prctl(2),
//! `PR_SET_PDEATHSIG`). So even a `kill -9` of `baton up` leaves no nats-server and no worker behind.

use std::{ffi::OsString, os::unix::process::CommandExt, process::Command};

use clap::Args;
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};

use crate::Failure;

#[derive(Args, Debug)]
pub struct TetherArgs {
    /// The process to die with; it must be the parent
    #[arg(long)]
    parent: i32,
    /// The program to become, and its arguments
    #[arg(required = true, last = true)]
    program: Vec<OsString>,
}

/// Becomes the program; returns only if that fails.
pub fn run(args: TetherArgs) -> Result<(), Failure> {
    set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|error| format!("cannot ask to die with process {}: {error}", args.parent))?;
    // The parent may have died before the request was in place; then the signal never comes.
    if getppid() != Pid::from_raw(args.parent) {
        return Err(format!(
            "process {} ended while it started {:?}",
            args.parent, args.program[0]
        )
        .into());
    }
    let error = Command::new(&args.program[0])
        .args(&args.program[1..])
        .exec();
    Err(format!("cannot run {:?}: {error}", args.program[0]).into())
}
