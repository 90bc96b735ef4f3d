//! Real processes, end to end. One binary, so that it is linked once.

mod api_server;
mod bad_input;
mod bus_outage;
mod calls;
mod context_lost;
mod decode_lost;
mod deployments;
mod failure;
mod golden;
mod leaving;
mod load;
mod logs;
mod mixed_precision;
mod partition;
mod permissions;
mod ranks;
mod rolling;
mod same_text;
mod slow;
mod slow_link;
mod start;
mod steady;
mod still;
mod stuck;
mod tools;
mod two_api_servers;
