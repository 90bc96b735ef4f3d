//! Anthropic's schema: what requests to `/v1/messages` may say, and what answers look like.

mod answer;
mod blocks;
mod chat;
mod events;
mod request;
mod thinking;
mod tools;

pub use answer::MessageWriter;
pub use request::{CountRequest, read};
