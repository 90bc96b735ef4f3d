//! The whole road, end to end. One binary, so that it is linked once.

mod api_server;
mod bad_input;
mod failure;
mod golden;
mod leaving;
mod load;
mod mixed_precision;
mod permissions;
mod same_text;
mod tools;
