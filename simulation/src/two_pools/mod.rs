//! The protocol between the two pools, explored to its end.
//!
//! A small model of a context worker, a decode worker, and an API server with a few requests: blocks, queue, leases, pulls,
//! refusals, preemption, aborts, and the loss of each party. Every state that can be reached is looked at, whatever the
//! order of what happens. Each transition names the function that it follows.
//!
//! Shown for every reachable state: no block is lost or held twice, no KV is used whose lease had ended, and however
//! things stand, they can still go on to all requests ended and both pools free, by steps alone that are sure to come
//! (so there is no deadlock, and no livelock unless something that can always happen never does). That the model can fail
//! is shown by taking away one rule after the other ([`Rules`]).
//!
//! A lease is renewed by its API server for as long as the handle waits or is pulled. So while the API server lives, its end is
//! nothing to rely on, and the way to the end must be there without it.
//!
//! A prompt of several blocks runs in as many chunks, and is streamed: its handle goes out after the first of them, and the decode
//! worker reads each block when its step was collected.
//!
//! Simplified: a block holds one token; an engine's step runs one sequence; messages of one connection come in order and
//! none is lost; a decode worker keeps no blocks for a job that it refused; the bounds on tries and waits are absent, so
//! that nothing ends by giving up.

mod api_server;
mod context;
mod decode;
mod faults;
mod state;

use std::collections::{HashMap, VecDeque};

use state::{Context, Decode, Next, Phase, Renewal, Request, State, Surely};

/// What is to be explored.
#[derive(Clone, Debug)]
pub struct Model {
    /// Blocks of the context worker's pool.
    pub context_blocks: u8,
    /// Blocks of the decode worker's pool.
    pub decode_blocks: u8,
    /// Prompt and output of each request, in blocks.
    pub requests: Vec<(u8, u8)>,
    /// What may go wrong.
    pub faults: Faults,
    /// Rules in force.
    pub rules: Rules,
}

/// What may happen and need not.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// Clients leave.
    pub aborts: bool,
    /// A worker dies with all that it has, and is back.
    pub crashes: bool,
    /// The API server dies without a word.
    pub api_server_lost: bool,
    /// A prompt ends in the middle, by its deadline or for want of a token.
    pub prompts_fail: bool,
}

/// The rules that make it work, each of which can be taken away.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// A prompt takes all its blocks at once. Else one after the other.
    pub whole_prompts: bool,
    /// Without a block for its next token the youngest sequence gives way. Else it waits.
    pub preemption: bool,
    /// The decode worker refuses what it has no blocks for, before it pulls. Else the pull holds what there is and waits.
    pub refusals: bool,
    /// Leases end by themselves.
    pub expiry: bool,
    /// A release counts for its own lease alone. Else for any that the request has.
    pub nonces: bool,
    /// An abort ends a lease too.
    pub aborts_end_leases: bool,
    /// Workers drop the requests of an API server that fell silent.
    pub silence_ends: bool,
    /// A renewal counts for a lease that is alive. Else it brings back one that ended.
    pub ended_stays_ended: bool,
    /// Blocks are told to be there when the step that fills them was collected. Else when it was submitted.
    pub collected_first: bool,
    /// The release comes after the last read. Else when the prompt is done.
    pub release_comes_last: bool,
    /// Whatever ends a prompt that runs ends its lease. Else the lease goes on.
    pub prompts_end_leases: bool,
    /// A prompt keeps the blocks that its handle names. Else it may take equal ones in their place.
    pub blocks_stay: bool,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            whole_prompts: true,
            preemption: true,
            refusals: true,
            expiry: true,
            nonces: true,
            aborts_end_leases: true,
            silence_ends: true,
            ended_stays_ended: true,
            collected_first: true,
            release_comes_last: true,
            prompts_end_leases: true,
            blocks_stay: true,
        }
    }
}

/// What the exploration found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explored {
    /// States that can be reached.
    pub states: usize,
    /// Transitions between them.
    pub transitions: usize,
}

impl Model {
    /// Looks at every state.
    ///
    /// # Errors
    /// What is wrong, with the way that leads there.
    pub fn explore(&self) -> Result<Explored, String> {
        let first = self.first();
        let mut index = HashMap::from([(first.clone(), 0)]);
        let mut states = vec![first];
        let mut came: Vec<Option<(usize, &'static str, usize)>> = vec![None];
        let mut before: Vec<Vec<usize>> = vec![Vec::new()];
        let (mut at, mut transitions) = (0, 0);
        while at < states.len() {
            let next = self
                .next(&states[at])
                .map_err(|wrong| format!("{wrong}{}", way(&states, &came, at)))?;
            for (surely, what, request, state) in next {
                transitions += 1;
                let to = *index.entry(state.clone()).or_insert_with(|| {
                    states.push(state);
                    came.push(Some((at, what, request)));
                    before.push(Vec::new());
                    states.len() - 1
                });
                if let Err(wrong) = self.check(&states[to]) {
                    return Err(format!("{wrong}{}", way(&states, &came, to)));
                }
                if surely == Surely::Comes {
                    before[to].push(at);
                }
            }
            at += 1;
        }
        // From where the end can be reached, going back from all ends.
        let mut can_end = vec![false; states.len()];
        let mut queue: VecDeque<usize> = (0..states.len())
            .filter(|at| self.is_over(&states[*at]))
            .collect();
        while let Some(at) = queue.pop_front() {
            if !std::mem::replace(&mut can_end[at], true) {
                queue.extend(&before[at]);
            }
        }
        match can_end.iter().position(|can| !can) {
            Some(at) => Err(format!("no way to an end{}", way(&states, &came, at))),
            None => Ok(Explored {
                states: states.len(),
                transitions,
            }),
        }
    }

    fn first(&self) -> State {
        let request = Request {
            phase: Phase::Queued,
            made: 0,
            context: Context::Nothing,
            context_blocks: 0,
            computed: 0,
            decode: Decode::Nothing,
            decode_blocks: 0,
            begun: false,
            is_streamed: false,
            ready: None,
            is_current: false,
            news: None,
            renewal: Renewal::Idle,
            is_void: false,
            is_ghost: false,
            context_abort: false,
            decode_abort: false,
            is_orphan: false,
        };
        State {
            requests: vec![request; self.requests.len()],
            waiting: Vec::new(),
            running: Vec::new(),
            context_free: self.context_blocks,
            decode_free: self.decode_blocks,
        }
    }

    fn is_over(&self, state: &State) -> bool {
        state.requests.iter().all(|r| r.phase == Phase::Ended)
            && state.context_free == self.context_blocks
            && state.decode_free == self.decode_blocks
    }

    fn check(&self, state: &State) -> Result<(), String> {
        let context: u8 = state.requests.iter().map(|r| r.context_blocks).sum();
        let decode: u8 = state.requests.iter().map(|r| r.decode_blocks).sum();
        let adds_up = context + state.context_free == self.context_blocks
            && decode + state.decode_free == self.decode_blocks;
        let idle_holds = state.requests.iter().any(|r| {
            matches!(r.context, Context::Nothing | Context::Waiting)
                && self.rules.whole_prompts
                && r.context_blocks > 0
                || r.decode == Decode::Nothing && r.decode_blocks > 0
        });
        match adds_up && !idle_holds {
            true => Ok(()),
            false => Err("blocks do not add up".to_owned()),
        }
    }

    /// Everything that may happen next.
    fn next(&self, state: &State) -> Result<Vec<Next>, String> {
        let mut next = Vec::new();
        for r in 0..state.requests.len() {
            self.api_server(state, r, &mut next);
            self.context_worker(state, r, &mut next);
            self.decode_worker(state, r, &mut next)?;
            self.faults(state, r, &mut next);
        }
        Ok(next)
    }
}

/// How a state was reached, and the state.
fn way(states: &[State], came: &[Option<(usize, &'static str, usize)>], to: usize) -> String {
    let mut steps = Vec::new();
    let mut at = to;
    while let Some((from, what, request)) = came[at] {
        steps.push(format!("\n  request {request}: {what}"));
        at = from;
    }
    steps.reverse();
    format!(", after{}\n{:#?}", steps.concat(), states[to])
}

#[cfg(test)]
mod tests;
