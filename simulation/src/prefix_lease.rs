//! A model of leases without a prompt: two workers' prompts whose beginning a third has, explored to the last state that can be reached.
//!
//! The source has the KV of a beginning in its index, where it may give way at any time to something else, and may be computed again in
//! other blocks. Each reader asks for a lease, reads block by block, releases, keeps what it read if that was valid, and runs its prompt;
//! at any point it may give up, because computing would be as quick or because its request has ended. Messages come when they like; the
//! question outlives who asked it, and a release that nobody waits for may be lost. The source may die.
//!
//! What must hold: nothing is kept that is not the KV that was asked for; no block is written by a read that its reader has given up; and from
//! everywhere there is a way to the end, where nothing is held. Each rule is needed for it, which the tests show by taking it away.

use std::collections::{HashMap, VecDeque};

/// Blocks of the beginning.
const BLOCKS: u8 = 2;

/// Readers.
const READERS: usize = 2;

/// The rules; all hold in the product.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// What is leased is held: it does not give way. Else it does.
    pub leases_hold: bool,
    /// The release comes after the last read. Else at any time.
    pub release_comes_last: bool,
    /// What was read is kept only if the release was valid.
    pub only_valid: bool,
    /// A release is of one lease. Else any lease that is alive makes it valid.
    pub nonces: bool,
    /// Blocks of a pull that was given up are not used before its reads have ended.
    pub quarantine: bool,
    /// A lease ends by itself.
    pub expiry: bool,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            leases_hold: true,
            release_comes_last: true,
            only_valid: true,
            nonces: true,
            quarantine: true,
            expiry: true,
        }
    }
}

/// A prompt at its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Prompt {
    /// Just came.
    Waits,
    /// `PrefixPull::lease`: blocks are reserved, and the source is asked.
    Asked,
    /// `Reading`.
    Reads {
        of: u8,
        read: u8,
        is_good: bool,
    },
    /// `Pull::have_released`, before the last read where a rule is taken away.
    Released {
        of: u8,
        read: u8,
        is_good: bool,
        is_valid: bool,
    },
    /// `Command::Prefill`.
    Runs,
    Over,
}

/// What is on its way between a reader and the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Word {
    None,
    Ask,
    /// The lease, of blocks of this life of the prefix; or that there is none.
    Answer(Option<u8>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Reader {
    prompt: Prompt,
    word: Word,
    /// A release that nobody waits for is on its way.
    lets_go: bool,
    /// Its lease at the source: of which life of the prefix.
    lease: Option<u8>,
    /// Which set of blocks it has.
    set: Option<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    readers: [Reader; READERS],
    /// A read that was given up is yet to write to this set of blocks.
    lands: [bool; READERS],
    /// Which time the prefix was computed, and whether its blocks still hold it.
    life: u8,
    is_there: bool,
    source_lives: bool,
}

/// A transition: whether it comes for sure if it stays possible, what it is, and where it leads.
type Next = (bool, &'static str, State);

/// Looks at every state where both readers have `sets` sets of blocks between them. How many there are.
///
/// # Errors
/// What is wrong, with the way that leads there.
pub fn explore(rules: Rules, sets: u8) -> Result<usize, String> {
    let reader = Reader {
        prompt: Prompt::Waits,
        word: Word::None,
        lets_go: false,
        lease: None,
        set: None,
    };
    let first = State {
        readers: [reader; READERS],
        lands: [false; READERS],
        life: 0,
        is_there: true,
        source_lives: true,
    };
    let mut index = HashMap::from([(first.clone(), 0)]);
    let mut states = vec![first];
    let mut came: Vec<Option<(usize, &'static str)>> = vec![None];
    let mut before: Vec<Vec<usize>> = vec![Vec::new()];
    let mut at = 0;
    while at < states.len() {
        let state = states[at].clone();
        let next = state.next(rules, sets);
        let next = next.map_err(|wrong| format!("{wrong}{}", way(&states, &came, at)))?;
        for (is_sure, what, state) in next {
            let to = *index.entry(state.clone()).or_insert_with(|| {
                states.push(state);
                came.push(Some((at, what)));
                before.push(Vec::new());
                states.len() - 1
            });
            if is_sure {
                before[to].push(at);
            }
        }
        at += 1;
    }
    let mut can_end = vec![false; states.len()];
    let mut queue: VecDeque<usize> = (0..states.len())
        .filter(|at| states[*at].is_over())
        .collect();
    while let Some(at) = queue.pop_front() {
        if !std::mem::replace(&mut can_end[at], true) {
            queue.extend(&before[at]);
        }
    }
    match can_end.iter().position(|can| !can) {
        Some(at) => Err(format!("no way to an end{}", way(&states, &came, at))),
        None => Ok(states.len()),
    }
}

/// How a state was reached, and the state.
fn way(states: &[State], came: &[Option<(usize, &'static str)>], to: usize) -> String {
    let (mut steps, mut at) = (Vec::new(), to);
    while let Some((from, what)) = came[at] {
        steps.push(format!("\n  {what}"));
        at = from;
    }
    steps.reverse();
    format!(", after{}\n{:#?}", steps.concat(), states[to])
}

impl State {
    fn is_over(&self) -> bool {
        let is_over = |reader: &Reader| {
            let Reader {
                prompt,
                word,
                lets_go,
                lease,
                set,
            } = *reader;
            prompt == Prompt::Over
                && word == Word::None
                && !lets_go
                && lease.is_none()
                && set.is_none()
        };
        self.readers.iter().all(is_over) && self.lands == [false; READERS]
    }

    /// Blocks of this life of the prefix hold it.
    fn holds(&self, of: u8) -> bool {
        self.source_lives && self.is_there && of == self.life
    }

    /// A reader with these changes.
    fn with(&self, r: usize, change: impl FnOnce(&mut Reader)) -> Self {
        let mut after = self.clone();
        change(&mut after.readers[r]);
        after
    }

    fn free_set(&self, rules: Rules, sets: u8) -> Option<u8> {
        let is_free = |set: &u8| {
            let is_taken = self.readers.iter().any(|reader| reader.set == Some(*set));
            let waits = rules.quarantine && self.lands[usize::from(*set)];
            !(is_taken || waits)
        };
        (0..sets).find(is_free)
    }

    fn next(&self, rules: Rules, sets: u8) -> Result<Vec<Next>, String> {
        let mut next = Vec::new();
        for r in 0..READERS {
            self.reader(rules, sets, r, &mut next)?;
            self.source(rules, r, &mut next);
        }
        for set in 0..READERS {
            if self.lands[set] {
                // A read that its reader does not wait for ends.
                if self
                    .readers
                    .iter()
                    .any(|reader| reader.set == Some(set as u8))
                {
                    return Err(
                        "a read that was given up writes to blocks that are in use".to_owned()
                    );
                }
                let mut after = self.clone();
                after.lands[set] = false;
                next.push((true, "a read that was given up ends", after));
            }
        }
        let is_held = self
            .readers
            .iter()
            .any(|reader| reader.lease == Some(self.life));
        if self.is_there && (!is_held || !rules.leases_hold) {
            let mut after = self.clone();
            after.is_there = false;
            next.push((false, "the prefix gives way", after));
        }
        if self.source_lives && !self.is_there && self.life == 0 {
            let mut after = self.clone();
            (after.is_there, after.life) = (true, 1);
            next.push((false, "the prefix is computed again", after));
        }
        if self.source_lives {
            let mut after = self.clone();
            after.source_lives = false;
            for reader in &mut after.readers {
                (reader.lease, reader.lets_go) = (None, false);
                reader.word = Word::None;
            }
            next.push((false, "the source dies", after));
        }
        Ok(next)
    }

    /// What one reader does next.
    fn reader(&self, rules: Rules, sets: u8, r: usize, next: &mut Vec<Next>) -> Result<(), String> {
        let reader = self.readers[r];
        match reader.prompt {
            Prompt::Waits => {
                if let Some(set) = self.free_set(rules, sets) {
                    let after = self.with(r, |reader| {
                        (reader.prompt, reader.word) = (Prompt::Asked, Word::Ask);
                        reader.set = Some(set);
                        if !self.source_lives {
                            reader.word = Word::None;
                        }
                    });
                    next.push((true, "a lease is asked for", after));
                }
                let after = self.with(r, |reader| reader.prompt = Prompt::Runs);
                next.push((true, "a prompt runs without", after));
            }
            Prompt::Asked => {
                if let Word::Answer(answer) = reader.word {
                    let after = self.with(r, |reader| {
                        reader.word = Word::None;
                        reader.prompt = match answer {
                            Some(of) => Prompt::Reads {
                                of,
                                read: 0,
                                is_good: true,
                            },
                            None => Prompt::Runs,
                        };
                        if answer.is_none() {
                            reader.set = None;
                        }
                    });
                    next.push((true, "the answer comes", after));
                }
            }
            Prompt::Reads { of, read, is_good } => {
                if read < BLOCKS && self.source_lives {
                    let is_good = is_good && self.holds(of);
                    let after = self.with(r, |reader| {
                        reader.prompt = Prompt::Reads {
                            of,
                            read: read + 1,
                            is_good,
                        };
                    });
                    next.push((true, "a block is read", after));
                }
                if (read == BLOCKS || !rules.release_comes_last) && self.source_lives {
                    let mut after = self.clone();
                    let own = after.readers[r].lease.take();
                    let others = after.readers.iter().any(|reader| reader.lease.is_some());
                    let is_valid = own == Some(of) || !rules.nonces && others;
                    after.readers[r].prompt = Prompt::Released {
                        of,
                        read,
                        is_good,
                        is_valid,
                    };
                    next.push((true, "it is released", after));
                }
            }
            Prompt::Released {
                of,
                read,
                is_good,
                is_valid,
            } if read < BLOCKS => {
                let is_good = is_good && self.holds(of);
                let after = self.with(r, |reader| {
                    reader.prompt = Prompt::Released {
                        of,
                        read: read + 1,
                        is_good,
                        is_valid,
                    };
                });
                next.push((true, "a block is read after the release", after));
            }
            Prompt::Released {
                is_good, is_valid, ..
            } => {
                // `BlockTable::keep`: the blocks stay, and give way to whoever needs them.
                if (is_valid || !rules.only_valid) && !is_good {
                    return Err("KV is kept that is not what was asked for".to_owned());
                }
                let after = self.with(r, |reader| {
                    (reader.prompt, reader.set) = (Prompt::Runs, None)
                });
                next.push((true, "what was read is kept, or thrown away", after));
            }
            Prompt::Runs => {
                let after = self.with(r, |reader| reader.prompt = Prompt::Over);
                next.push((true, "the prompt is done", after));
            }
            Prompt::Over => {}
        }
        // It takes too long, and the prompt runs; or its request has ended.
        if matches!(
            reader.prompt,
            Prompt::Asked | Prompt::Reads { .. } | Prompt::Released { .. }
        ) {
            for then in [Prompt::Runs, Prompt::Over] {
                let mut after = self.clone();
                let set = after.readers[r].set.take();
                if let (Prompt::Reads { read: 1.., .. }, Some(set)) = (reader.prompt, set) {
                    after.lands[usize::from(set)] = true;
                }
                after.readers[r].lets_go =
                    self.source_lives && matches!(reader.prompt, Prompt::Reads { .. });
                after.readers[r].prompt = then;
                // Comes for sure: there is a deadline.
                next.push((true, "the pull is given up", after));
            }
        }
        if reader.lets_go {
            let lost = self.with(r, |reader| reader.lets_go = false);
            next.push((false, "a release is lost", lost));
        }
        Ok(())
    }

    /// What the source does next for one of them: `ContextSide::lend`, `release_lent`, `LeaseTable::expire`.
    fn source(&self, rules: Rules, r: usize, next: &mut Vec<Next>) {
        let reader = self.readers[r];
        if reader.word == Word::Ask {
            let lease = self.is_there.then_some(self.life);
            let after = self.with(r, |reader| {
                (reader.lease, reader.word) = (lease, Word::Answer(lease));
            });
            next.push((true, "the source hears the question", after));
        }
        // Nobody waits for it any more.
        if matches!(reader.word, Word::Answer(_)) && reader.prompt != Prompt::Asked {
            let after = self.with(r, |reader| reader.word = Word::None);
            next.push((true, "an answer finds nobody", after));
        }
        if reader.lease.is_some() && rules.expiry {
            let is_orphan = !matches!(reader.prompt, Prompt::Asked | Prompt::Reads { .. });
            let after = self.with(r, |reader| reader.lease = None);
            next.push((is_orphan, "a lease ends by itself", after));
        }
        if reader.lets_go {
            let after = self.with(r, |reader| (reader.lets_go, reader.lease) = (false, None));
            next.push((true, "a release without answer is heard", after));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_always_end_and_keep_only_what_they_asked_for() {
        for sets in [1, 2] {
            let states = explore(Rules::default(), sets).unwrap_or_else(|wrong| panic!("{wrong}"));
            assert!(states > 1_000, "{states}");
        }
    }

    #[test]
    fn every_rule_is_needed() {
        let needed = |without: fn(&mut Rules)| {
            let mut rules = Rules::default();
            without(&mut rules);
            [1, 2]
                .into_iter()
                .find_map(|sets| explore(rules, sets).err())
        };
        let says = |wrong: Option<String>, what: &str| {
            assert!(
                wrong.as_ref().is_some_and(|wrong| wrong.starts_with(what)),
                "{wrong:?}"
            );
        };
        says(needed(|rules| rules.leases_hold = false), "KV is kept");
        says(
            needed(|rules| rules.release_comes_last = false),
            "KV is kept",
        );
        says(needed(|rules| rules.only_valid = false), "KV is kept");
        says(needed(|rules| rules.nonces = false), "KV is kept");
        says(
            needed(|rules| rules.quarantine = false),
            "a read that was given up",
        );
        says(needed(|rules| rules.expiry = false), "no way to an end");
    }
}
