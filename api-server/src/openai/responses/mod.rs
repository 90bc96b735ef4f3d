//! OpenAI's Responses: items in, items out, and a store that lets a request go on from an earlier answer.

mod answer;
mod events;
mod input;
mod reasoned;
mod references;
mod request;
mod settings;
mod store;
mod tools;

pub use answer::{Keeping, ResponseWriter};
pub use request::{ResponseRequest, not_kept, read};
pub use store::{Kept, ResponseStore};
