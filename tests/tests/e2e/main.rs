//! The whole road, end to end. One binary, so that it is linked once.

mod api_server;
mod bad_input;
mod context_lost;
mod decode_lost;
mod failure;
mod golden;
mod leaving;
mod load;
mod mixed_precision;
mod partition;
mod permissions;
mod same_text;
mod tools;
