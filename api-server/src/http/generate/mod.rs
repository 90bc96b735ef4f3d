//! What the endpoints that generate do: a body becomes prompts, each choice of each prompt has a driver, and what the drivers bring
//! becomes a stream or an answer in one piece.

mod answer;
mod choice;
mod completions;
mod outbox;
mod presence;
mod sse;
mod tokens;
mod whole;

pub use self::answer::Answer;
pub use self::completions::{Asked, Asker, chat, chat_through, text};
pub use self::presence::Presence;
