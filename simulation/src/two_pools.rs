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
//! Simplified: a block holds one token; an engine's step runs one sequence; messages of one connection come in order and
//! none is lost; a decode worker keeps no blocks for a job that it refused; the bounds on tries and waits are absent, so
//! that nothing ends by giving up.

use std::collections::{HashMap, VecDeque};

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

/// The API server's view: `lifecycle::Phase`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Phase {
    Queued,
    Prefilling,
    Staged,
    Pulling,
    Decoding,
    Ended,
}

/// What the context worker has of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Context {
    Nothing,
    Waiting,
    Running,
    Leased,
}

/// What the decode worker has of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Decode {
    Nothing,
    /// `is_whole`: the lease that it reads from has not ended since.
    Pulling {
        is_whole: bool,
    },
    Running,
}

/// What the decode worker says of its end of a try.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum News {
    Finished,
    Again,
}

/// A renewal of the handle that the API server has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Renewal {
    Idle,
    /// Under way to the context worker.
    Asked,
    /// Under way back.
    Answered {
        is_valid: bool,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Request {
    phase: Phase,
    /// Output so far.
    made: u8,
    context: Context,
    context_blocks: u8,
    decode: Decode,
    decode_blocks: u8,
    /// Under way to the API server: the handle, or that it is finished already.
    ready: Option<bool>,
    /// The handle that the API server has, or that is under way to it, is that of the lease.
    is_current: bool,
    news: Option<News>,
    renewal: Renewal,
    /// The blocks of its lease were free for a while.
    is_void: bool,
    /// Under way to the workers.
    context_abort: bool,
    decode_abort: bool,
    /// Its API server is gone.
    is_orphan: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    requests: Vec<Request>,
    /// Prompts without blocks, in order of arrival.
    waiting: Vec<usize>,
    /// Generating sequences, in order of arrival.
    running: Vec<usize>,
    context_free: u8,
    decode_free: u8,
}

/// Whether a transition comes for sure, if it stays possible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Surely {
    Comes,
    Perhaps,
}

type Next = (Surely, &'static str, usize, State);

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
            decode: Decode::Nothing,
            decode_blocks: 0,
            ready: None,
            is_current: false,
            news: None,
            renewal: Renewal::Idle,
            is_void: false,
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

    fn api_server(&self, state: &State, r: usize, next: &mut Vec<Next>) {
        let request = &state.requests[r];
        if request.is_orphan {
            return;
        }
        let mut put = |what, state| next.push((Surely::Comes, what, r, state));
        // `Driver::send_prefill`, `Desk::take_prefill`, `Engine::submit`. What an earlier try left ends; an abort sent
        // before comes before.
        if request.phase == Phase::Queued && !request.context_abort {
            let mut after = state.clone();
            after.end_context(r);
            after.requests[r].phase = Phase::Prefilling;
            after.requests[r].context = Context::Waiting;
            after.waiting.push(r);
            put("the prompt is queued", after);
        }
        // `Lifecycle::prefilled`.
        if let (Phase::Prefilling, Some(is_finished)) = (request.phase, request.ready) {
            let mut after = state.clone();
            let request = &mut after.requests[r];
            request.ready = None;
            request.made += 1;
            request.phase = if is_finished {
                Phase::Ended
            } else {
                Phase::Staged
            };
            put("the handle comes", after);
        }
        // `Lease::renew`: by the clock, and mostly not at all.
        let has_handle = matches!(request.phase, Phase::Staged | Phase::Pulling);
        if has_handle && request.renewal == Renewal::Idle {
            let mut after = state.clone();
            after.requests[r].renewal = Renewal::Asked;
            next.push((Surely::Perhaps, "a renewal is sent", r, after));
        }
        let mut put = |what, state| next.push((Surely::Comes, what, r, state));
        // `Lease::renewed`, `Lifecycle::lease_lost`: while it is pulled the release decides.
        if let Renewal::Answered { is_valid } = request.renewal {
            let mut after = state.clone();
            after.requests[r].renewal = Renewal::Idle;
            if !is_valid && request.phase == Phase::Staged {
                after.give_up(r, Phase::Queued);
            }
            put("a renewal is answered", after);
        }
        // `Driver::send_decode`, `Desk::take_decode`: refused without blocks, and tried again (`no_decode_worker`).
        let need = self.requests[r].0 + request.made;
        let has_room = match self.rules.refusals {
            true => state.decode_free >= need,
            false => state.decode_free > 0,
        };
        if request.phase == Phase::Staged && !request.decode_abort && has_room {
            let mut after = state.clone();
            after.end_decode(r);
            let taken = need.min(after.decode_free);
            after.decode_free -= taken;
            let request = &mut after.requests[r];
            request.phase = Phase::Pulling;
            request.decode_blocks = taken;
            request.decode = Decode::Pulling {
                is_whole: request.is_current && request.context == Context::Leased,
            };
            put("the pull begins", after);
        }
        // `Lifecycle::item` with an end, `worker_failed`.
        if let (Phase::Pulling | Phase::Decoding, Some(news)) = (request.phase, request.news) {
            let mut after = state.clone();
            after.requests[r].news = None;
            match news {
                News::Finished => after.requests[r].phase = Phase::Ended,
                News::Again => after.give_up(r, Phase::Queued),
            }
            put("the end of a try is heard", after);
        }
    }

    fn context_worker(&self, state: &State, r: usize, next: &mut Vec<Next>) {
        let request = &state.requests[r];
        let mut put = |what, state| next.push((Surely::Comes, what, r, state));
        let need = self.requests[r].0 + request.made;
        // `Scheduler::admit_prompt`: the first of the queue, with all its blocks.
        let is_first = state.waiting.first() == Some(&r);
        if request.context == Context::Waiting && self.rules.whole_prompts {
            if is_first && state.context_free >= need {
                let mut after = state.clone();
                after.waiting.retain(|other| *other != r);
                after.context_free -= need;
                after.requests[r].context_blocks = need;
                after.requests[r].context = Context::Running;
                put("the prompt is admitted", after);
            }
        } else if request.context == Context::Waiting && state.context_free > 0 {
            let mut after = state.clone();
            after.context_free -= 1;
            after.requests[r].context_blocks += 1;
            if after.requests[r].context_blocks == need {
                after.waiting.retain(|other| *other != r);
                after.requests[r].context = Context::Running;
            }
            put("the prompt takes a block", after);
        }
        // `Engine::collect_prefills`, `Desk::on_prefilled`, `LeaseTable::grant`. The last token of all needs no lease.
        if request.context == Context::Running {
            let mut after = state.clone();
            let is_finished = request.made + 1 == self.requests[r].1;
            if is_finished {
                after.end_context(r);
            }
            let request = &mut after.requests[r];
            if !is_finished {
                request.context = Context::Leased;
            }
            request.is_void = false;
            request.is_current = !is_finished;
            request.ready = (request.phase == Phase::Prefilling).then_some(is_finished);
            put("the prompt is done", after);
        }
        // `LeaseTable::expire`. Nothing to wait for while its API server renews it.
        if request.context == Context::Leased && self.rules.expiry {
            let mut after = state.clone();
            after.end_context(r);
            let is_renewed = request.is_current
                && !request.is_orphan
                && matches!(request.phase, Phase::Staged | Phase::Pulling);
            let surely = match is_renewed {
                true => Surely::Perhaps,
                false => Surely::Comes,
            };
            next.push((surely, "the lease ends", r, after));
        }
        let mut put = |what, state| next.push((Surely::Comes, what, r, state));
        // `Desk::on_renew`, `LeaseTable::renew`.
        if request.renewal == Renewal::Asked {
            let mut after = state.clone();
            let renewed = &mut after.requests[r];
            let mut is_valid = request.context == Context::Leased && request.is_current;
            if !self.rules.ended_stays_ended && request.context == Context::Nothing {
                renewed.context = Context::Leased;
                (renewed.is_current, renewed.is_void) = (true, true);
                is_valid = true;
            }
            renewed.renewal = Renewal::Answered { is_valid };
            put("the context worker hears the renewal", after);
        }
        // `Desk::on_abort`.
        if request.context_abort {
            let mut after = state.clone();
            after.requests[r].context_abort = false;
            if request.context != Context::Leased || self.rules.aborts_end_leases {
                after.end_context(r);
            }
            put("the context worker hears the abort", after);
        }
        // `Desk::drop_gone_api_servers`, on both workers.
        if request.is_orphan && self.rules.silence_ends {
            for of_context in [true, false] {
                let mut after = state.clone();
                match of_context {
                    true => after.end_context(r),
                    false => after.end_decode(r),
                }
                put("a worker misses the API server", after);
            }
        }
    }

    fn decode_worker(&self, state: &State, r: usize, next: &mut Vec<Next>) -> Result<(), String> {
        let request = &state.requests[r];
        let (prompt, output) = self.requests[r];
        let mut put = |what, state| next.push((Surely::Comes, what, r, state));
        if let Decode::Pulling { is_whole } = request.decode {
            if request.decode_blocks < prompt + request.made {
                // Only where nothing is refused: it waits for the rest.
                if state.decode_free > 0 {
                    let mut after = state.clone();
                    after.decode_free -= 1;
                    after.requests[r].decode_blocks += 1;
                    put("the pull takes a block", after);
                }
            } else {
                // `Pull::outcome`, `Desk::on_release`, `Desk::on_pulled`: valid if the lease is there, and is that one.
                let is_valid =
                    request.context == Context::Leased && (is_whole || !self.rules.nonces);
                let mut after = state.clone();
                if is_valid {
                    if !is_whole || request.is_void {
                        return Err("KV is used whose lease had ended".to_owned());
                    }
                    after.end_context(r);
                    after.requests[r].decode = Decode::Running;
                    after.running.push(r);
                    if request.phase == Phase::Pulling {
                        after.requests[r].phase = Phase::Decoding;
                        after.requests[r].renewal = Renewal::Idle;
                    }
                } else {
                    after.end_decode(r);
                    after.requests[r].news =
                        (request.phase == Phase::Pulling).then_some(News::Again);
                }
                put("the release is answered", after);
            }
        }
        // `Scheduler::plan_decodes`, `make_room`: one token more, whoever has to give way.
        if request.decode == Decode::Running {
            let mut after = state.clone();
            if request.decode_blocks < prompt + request.made {
                if after.decode_free == 0 {
                    if !self.rules.preemption {
                        return Ok(());
                    }
                    let youngest = *state.running.last().expect("at least this one runs");
                    after.end_decode(youngest);
                    let victim = &mut after.requests[youngest];
                    victim.news = (victim.phase == Phase::Decoding).then_some(News::Again);
                    put("the youngest gives way", after);
                    return Ok(());
                }
                after.decode_free -= 1;
                after.requests[r].decode_blocks += 1;
            }
            after.requests[r].made += 1;
            if after.requests[r].made == output {
                after.end_decode(r);
                after.requests[r].news =
                    (request.phase == Phase::Decoding).then_some(News::Finished);
            }
            put("a token is made", after);
        }
        if request.decode_abort {
            let mut after = state.clone();
            after.requests[r].decode_abort = false;
            after.end_decode(r);
            put("the decode worker hears the abort", after);
        }
        Ok(())
    }

    fn faults(&self, state: &State, r: usize, next: &mut Vec<Next>) {
        let request = &state.requests[r];
        let mut put = |what, state| next.push((Surely::Perhaps, what, r, state));
        let is_alive = request.phase != Phase::Ended;
        if self.faults.aborts && is_alive {
            // `Lifecycle::end_early`.
            let mut after = state.clone();
            after.give_up(r, Phase::Ended);
            put("the client leaves", after);
        }
        if self.faults.api_server_lost && is_alive {
            let mut after = state.clone();
            let request = &mut after.requests[r];
            request.phase = Phase::Ended;
            request.is_orphan = true;
            request.renewal = Renewal::Idle;
            (request.ready, request.news) = (None, None);
            put("the API server is lost", after);
        }
        // One crash takes everything, so it is drawn once.
        if self.faults.crashes && r == 0 {
            let mut after = state.clone();
            for r in 0..state.requests.len() {
                after.end_context(r);
                let request = &mut after.requests[r];
                // What it had said before is heard before the loss.
                if request.phase == Phase::Prefilling && request.ready.is_none()
                    || request.phase == Phase::Staged
                    || request.phase == Phase::Pulling
                {
                    after.give_up(r, Phase::Queued);
                }
                after.requests[r].context_abort = false;
            }
            put("the context worker is lost", after);
            let mut after = state.clone();
            for r in 0..state.requests.len() {
                after.end_decode(r);
                let request = &mut after.requests[r];
                let is_open = matches!(request.phase, Phase::Pulling | Phase::Decoding);
                if is_open && request.news.is_none() {
                    after.give_up(r, Phase::Queued);
                }
                after.requests[r].decode_abort = false;
            }
            put("the decode worker is lost", after);
        }
    }
}

impl State {
    /// What the context worker has of it is free again: `Desk::end_prefill`, `LeaseTable::abort`.
    fn end_context(&mut self, r: usize) {
        self.waiting.retain(|other| *other != r);
        let request = &mut self.requests[r];
        self.context_free += std::mem::take(&mut request.context_blocks);
        request.context = Context::Nothing;
        request.is_current = false;
        if let Decode::Pulling { is_whole } = &mut request.decode {
            *is_whole = false;
        }
    }

    /// What the decode worker has of it is free again: `Desk::end_decode`.
    fn end_decode(&mut self, r: usize) {
        self.running.retain(|other| *other != r);
        let request = &mut self.requests[r];
        self.decode_free += std::mem::take(&mut request.decode_blocks);
        request.decode = Decode::Nothing;
    }

    /// `Lifecycle::abort_involved`, and on to another phase.
    fn give_up(&mut self, r: usize, phase: Phase) {
        let request = &mut self.requests[r];
        match request.phase {
            Phase::Prefilling | Phase::Staged => request.context_abort = true,
            Phase::Pulling => (request.context_abort, request.decode_abort) = (true, true),
            Phase::Decoding => request.decode_abort = true,
            Phase::Queued | Phase::Ended => {}
        }
        request.phase = phase;
        request.renewal = Renewal::Idle;
        (request.ready, request.news) = (None, None);
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
mod tests {
    use super::*;

    const ALL: Faults = Faults {
        aborts: true,
        crashes: true,
        api_server_lost: true,
    };

    /// Requests of `(prompt, output)` blocks, both pools no larger than the largest needs, or a little larger.
    fn models(faults: Faults) -> Vec<Model> {
        let two = [
            vec![(1, 2), (1, 2)],
            vec![(2, 2), (1, 3)],
            vec![(1, 3), (1, 3)],
        ];
        let mut all = Vec::new();
        for requests in two {
            let largest = requests.iter().map(|(p, o)| p + o).max().unwrap_or(0);
            for (more_context, more_decode) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                all.push(Model {
                    context_blocks: largest - 1 + more_context,
                    decode_blocks: largest - 1 + more_decode,
                    requests: requests.clone(),
                    faults,
                    rules: Rules::default(),
                });
            }
        }
        all
    }

    fn three(faults: Faults) -> Model {
        Model {
            context_blocks: 3,
            decode_blocks: 3,
            requests: vec![(1, 2), (1, 3), (2, 2)],
            faults,
            rules: Rules::default(),
        }
    }

    #[test]
    fn two_requests_always_end_whatever_goes_wrong() {
        for model in models(ALL) {
            let explored = model
                .explore()
                .unwrap_or_else(|wrong| panic!("{model:?}: {wrong}"));
            assert!(explored.states > 1_000, "{:?} {explored:?}", model.requests);
        }
    }

    #[test]
    fn three_requests_always_end() {
        let faults = Faults {
            aborts: true,
            ..Faults::default()
        };
        for faults in [Faults::default(), faults] {
            let explored = three(faults)
                .explore()
                .unwrap_or_else(|wrong| panic!("{wrong}"));
            assert!(explored.states > 10_000, "{explored:?}");
        }
    }

    /// Some model fails without the rule.
    fn is_needed(faults: Faults, without: fn(&mut Rules)) -> bool {
        models(faults)
            .into_iter()
            .chain([three(faults)])
            .any(|mut model| {
                without(&mut model.rules);
                model.explore().is_err()
            })
    }

    #[test]
    fn every_rule_is_needed() {
        let none = Faults::default();
        let aborts = Faults {
            aborts: true,
            ..none
        };
        let lost = Faults {
            api_server_lost: true,
            ..none
        };
        assert!(
            is_needed(none, |rules| rules.whole_prompts = false),
            "whole prompts"
        );
        assert!(
            is_needed(none, |rules| rules.preemption = false),
            "preemption"
        );
        assert!(is_needed(none, |rules| rules.refusals = false), "refusals");
        assert!(is_needed(ALL, |rules| rules.nonces = false), "nonces");
        assert!(
            is_needed(none, |rules| rules.ended_stays_ended = false),
            "a lease that ended stays ended"
        );
        assert!(
            is_needed(aborts, |rules| {
                rules.expiry = false;
                rules.aborts_end_leases = false;
            }),
            "a lease ends by itself or by an abort"
        );
        assert!(
            is_needed(lost, |rules| {
                rules.expiry = false;
                rules.silence_ends = false;
            }),
            "a lease ends by itself or by silence"
        );
    }
}
