//! What a generation puts out, whatever the door through which it was asked for.

mod part;
mod usage;
mod writer;

pub use part::{Call, Finish, LogprobEntry, Part, Piece, Stop};
pub use usage::{Tally, Usage};
pub use writer::{AnswerWriter, Outcome, StreamWriter};
