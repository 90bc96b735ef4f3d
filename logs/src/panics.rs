//! Panics, in the log as other lines are.

use std::any::Any;
use std::backtrace::{Backtrace, BacktraceStatus};
use std::panic::{PanicHookInfo, set_hook};

/// From now on what the standard library says of a panic goes the way of all lines: its own hook would hold the thread up on a
/// pipe that nobody reads.
pub(crate) fn log_them() {
    set_hook(Box::new(|info| crate::line(&told(info))));
}

/// The standard library's words.
fn told(info: &PanicHookInfo<'_>) -> String {
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("<unnamed>");
    let place = info.location().map(ToString::to_string).unwrap_or_default();
    let mut told = format!(
        "\nthread '{name}' panicked at {place}:\n{}",
        message(info.payload())
    );
    let trace = Backtrace::capture();
    if trace.status() == BacktraceStatus::Captured {
        told.push_str(&format!("\nstack backtrace:\n{trace}"));
    }
    told
}

fn message(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<&'static str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("Box<dyn Any>")
}
