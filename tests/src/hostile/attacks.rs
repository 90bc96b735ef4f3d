//! The attacks, in the order in which they are carried out.

use std::pin::Pin;

use super::scene::Scene;
use super::{answers, bodies, descriptors, ending, flood, full, jobs, leaving, logs, memory, text};

/// Carries an attack out and gives a sentence for each thing that did not hold.
type Carry = for<'s, 'a> fn(&'s mut Scene<'a>) -> Pin<Box<dyn Future<Output = Vec<String>> + 's>>;

/// One attack.
#[derive(Clone, Copy)]
pub struct Attack {
    /// Its name, for `--only`.
    pub name: &'static str,
    /// What is done.
    pub what: &'static str,
    /// How it is done.
    pub(super) carry: Carry,
}

macro_rules! attack {
    ($name:literal, $what:literal, $carry:path) => {
        Attack {
            name: $name,
            what: $what,
            carry: |scene| Box::pin($carry(scene)),
        }
    };
}

/// All of them.
pub const ATTACKS: &[Attack] = &[
    attack!(
        "digits",
        "64 prompts of 16 MiB of digits at once",
        bodies::digits
    ),
    attack!(
        "words",
        "64 prompts of 16 MiB of short words at once",
        bodies::words
    ),
    attack!("chats", "32 chats of 16 MiB at once", bodies::chats),
    attack!(
        "half-bodies",
        "64 clients leave in the middle of a large body",
        bodies::half
    ),
    attack!(
        "tokenising",
        "clients leave while their prompts are tokenised",
        bodies::left
    ),
    attack!(
        "choices",
        "40 streams of 128 choices whose clients leave before the head",
        leaving::choices
    ),
    attack!("given-up", "2,000 requests given up", leaving::given_up),
    attack!(
        "whole",
        "whole answers of 128 choices with 20 alternatives",
        answers::whole
    ),
    attack!(
        "echo",
        "echo of a long prompt with 20 alternatives",
        answers::echo
    ),
    attack!(
        "offsets",
        "echo of characters split over tokens, and of special tokens",
        text::offsets
    ),
    attack!(
        "control-tokens",
        "special tokens in contents and roles",
        text::control_tokens
    ),
    attack!("wrong-role", "jobs for the other role", jobs::wrong_role),
    attack!(
        "swapped-roles",
        "two workers swap their roles under load",
        jobs::swapped_roles
    ),
    attack!(
        "liar",
        "a worker that calls every job malformed",
        jobs::liar
    ),
    attack!(
        "namesake",
        "a second API server of the same name",
        jobs::namesake
    ),
    attack!(
        "malformed",
        "5,000 malformed HTTP requests",
        flood::malformed
    ),
    attack!("forged-beats", "60 forged beats of 3.5 MB", flood::beats),
    attack!(
        "stopped-thread",
        "a flood behind stopped threads",
        flood::behind_stopped_threads
    ),
    attack!(
        "descriptors",
        "context workers with forged descriptors",
        descriptors::forged
    ),
    attack!(
        "full",
        "more streams than places, and leases shorter than the wait",
        full::full
    ),
    attack!(
        "stderr",
        "standard error full, closed, or unread",
        logs::stderr
    ),
    attack!(
        "no-room",
        "more KV than there is memory, and hardly any",
        memory::no_room
    ),
    attack!(
        "signals",
        "SIGTERM, also before the bus is there",
        ending::signals
    ),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::ATTACKS;

    #[test]
    fn attacks_are_told_apart_by_their_names() {
        let names: BTreeSet<&str> = ATTACKS.iter().map(|attack| attack.name).collect();
        assert_eq!(names.len(), ATTACKS.len());
    }
}
