//! One request: its lifecycle, and who carries it out.

pub mod decode_room;
pub mod driver;
pub mod inbox;
pub mod lifecycle;
pub mod running;
pub mod spent;
pub mod trace;
