//! Chaos: real processes, a mixed load, and faults in the middle of it; afterwards an audit.
//!
//! A seed decides everything ([`plan`]): the cluster ([`shape`]), what is asked of it ([`load`]) and what is done to it
//! ([`schedule`]). [`trial`] runs one seed: it learns the undisturbed answers ([`mod@reference`]), lets clients ask
//! ([`client`]) while faults are carried out ([`attack`]), and then judges each request ([`verdict`], over what it
//! [`said`]; [`judgement`] counts them) and the cluster ([`audit`]). Errors are allowed only where a fault accounts for them ([`excuse`]).
//! [`firsts`] has how long first tokens took. [`mod@soak`] is the opposite: hours without a fault, and what the processes hold meanwhile.

mod attack;
pub(crate) mod audit;
pub(crate) mod client;
mod draw;
mod excuse;
mod firsts;
mod judgement;
pub(crate) mod load;
mod plan;
mod reference;
pub(crate) mod said;
mod schedule;
mod service;
mod shape;
pub(crate) mod soak;
mod tally;
mod trial;
pub(crate) mod verdict;
pub(crate) mod vitals;

pub use firsts::Firsts;
pub use plan::{Options, Plan};
pub use reference::Reference;
pub use soak::soak;
pub use tally::Tally;
pub use trial::run;
