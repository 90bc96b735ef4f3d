//! Which sequences run in a step, and with how many tokens.
//!
//! Sequences wait in the order of [`Sequence::place`]: interactive before batch, then by priority, then by arrival; prompts for blocks
//! and a place in the batch, resumed sequences (which hold their blocks) for a place. Running ones share each step's token budget:
//!
//! 1. one token for every decoding sequence;
//! 2. at least half of the rest for the first unfinished prompt, so that the longest prompt ends;
//! 3. what is left by shortest remaining prompt, interactive before batch, so that a short one does not wait behind a long one.
//!
//! The budget is what time allows, once it is known what steps cost ([`Scheduler::cost`]). With decoding sequences a step has prompt
//! tokens only as far as the time allows that each of them was promised between tokens in the mean: one that was quick so far has time to
//! spare, and a part of what comes later may be used before ([`Sequence::due`]), since few large chunks of prompts take less than many
//! small ones. It has a block's at least, or a prompt would never end where decoding alone takes all the time. Without, it is as large as is efficient and no larger: more would only make others wait.
//!
//! So a prompt of `L` tokens that has its blocks waits for no more than the prompts that came before it: all of theirs and
//! its own run in `2 (older + L) / budget` steps, however many short ones come after it. And a short one waits for the
//! short ones before it: whatever long ones are under way, those that fit into the other half of a step start at once and
//! run in the next. Neither bound counts the time in which nobody can start, because blocks are missing: then the
//! first in the queue is waited for, and nobody passes it. Both hold within a class. Batch prompts take what interactive ones leave: one of
//! them begins every [`BATCH_TURN`] at least, and the oldest that has begun gets a block's tokens of each step, so they end some day.
//!
//! A prompt takes all its blocks on admission, so two half-done prompts never wait for each other's. Output
//! takes blocks one at a time, and when none is left the youngest generating sequence gives up its own.
//!
//! Drafts take what is left: tokens of the step that neither decoding sequences nor prompts want, and blocks when everybody
//! has one for the token it is sure of. So they move none of these bounds, and nobody is thrown out for a draft.
//!
//! While steps are in flight the next is planned if it needs nothing that only their end can tell:
//!
//! - every generating sequence in it goes on from a token that the device knows, and no penalty counts one that it does not. Else all
//!   wait: a step without one of them would cost that one half its speed.
//! - there is a block for everyone: nobody is thrown out for a guess.
//!
//! Chunks of prompts need nothing of the kind: a prompt's tokens are known. One that waits begins in such a step unless it could share
//! what a step in flight computes: then its blocks are chosen after that.
//!
//! A sequence with a constraint needs the mask of its next token, which depends on the token before. So the tokens of a step behind
//! one in flight are chosen later: the device runs the layers, the tokens of the step before come, masks are made of them, and then
//! the executor is told to choose. A sequence whose mask is late sits out; if its row runs already, it is run again.
//!
//! A sequence whose drafts are in flight sits out, for nobody knows which position comes next; the others go ahead.

mod turns;

use std::cmp::Ordering;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_protocol::deadlines::BATCH_TURN_MS;
use baton_protocol::{ITL_PART, PAUSE_MAX, Tier};

use crate::cost::CostModel;
use crate::draft::Drafts;
use crate::flight::{Flight, FlightRow};
use crate::sequence::Sequence;
use crate::{BlockPool, Event, Follows, SequenceStep, StepPlan, TokenMask};

/// Prompts admitted in order of arrival though fewer would fill the step: more would only hold blocks, and miss
/// prefixes that those before them are about to share.
const PROMPTS_IN_FLIGHT: usize = 4;

/// Batch prompts wait while interactive ones do, but one of them begins after no more than this. So do batch sequences that generate
/// ([`turns`]).
pub const BATCH_TURN: Duration = Duration::from_millis(BATCH_TURN_MS);

/// How long a step is held back for masks that are not made yet: much less than a step takes, and more than a mask.
pub const MASK_PATIENCE: Duration = Duration::from_millis(1);

/// The engine's sequences, and the step being planned.
pub struct Scheduler {
    pub pool: BlockPool,
    /// Most sequences that run at once. No more than `step_tokens`, so each can have a token.
    pub running_max: usize,
    /// Token budget of a step.
    pub step_tokens: usize,
    pub prefix_cache: bool,
    /// What steps cost, once that is known.
    pub cost: Option<CostModel>,
    /// Time between tokens that sequences are promised which were not promised one of their own.
    pub itl: Option<Duration>,
    /// Prompts without blocks, by their place.
    pub waiting: VecDeque<Sequence>,
    /// Since when batch prompts wait and none of them began.
    batch_waits: Option<Instant>,
    /// The arrival of the batch sequence that goes on until it ends, whatever else waits.
    turn: Option<u64>,
    /// Resumed sequences without a place in the batch, by theirs.
    pub parked: VecDeque<Sequence>,
    /// Running prompts, oldest first.
    pub prefilling: Vec<Sequence>,
    /// Generating sequences, oldest first.
    pub decoding: Vec<Sequence>,
    pub drafts: Drafts,
    pub plan: StepPlan,
    /// The same step as it will be collected.
    pub flight: Flight,
    /// Longest sequence.
    tokens_max: usize,
    /// Scratch of [`Self::plan_prefills`].
    shortest_first: Vec<usize>,
}

impl Scheduler {
    pub fn new(
        pool: BlockPool,
        running_max: usize,
        step_tokens: usize,
        tokens_max: usize,
        prefix_cache: bool,
    ) -> Self {
        assert!(
            0 < running_max && running_max <= step_tokens,
            "every running sequence can have a token"
        );
        Self {
            pool,
            running_max,
            step_tokens,
            prefix_cache,
            cost: None,
            itl: None,
            waiting: VecDeque::new(),
            batch_waits: None,
            turn: None,
            parked: VecDeque::new(),
            prefilling: Vec::new(),
            decoding: Vec::new(),
            drafts: Drafts::default(),
            plan: StepPlan::default(),
            flight: Flight::default(),
            tokens_max,
            shortest_first: Vec::new(),
        }
    }

    /// All sequences, in no order.
    pub fn sequences(&self) -> impl Iterator<Item = &Sequence> {
        let queued = self.waiting.iter().chain(&self.parked);
        queued.chain(&self.prefilling).chain(&self.decoding)
    }

    /// Take a sequence out, wherever it is.
    pub fn remove(&mut self, key: u64) -> Option<Sequence> {
        let is = |sequence: &Sequence| sequence.key == key;
        if let Some(at) = self.decoding.iter().position(is) {
            return Some(self.decoding.remove(at));
        }
        if let Some(at) = self.prefilling.iter().position(is) {
            return Some(self.prefilling.remove(at));
        }
        if let Some(at) = self.waiting.iter().position(is) {
            return self.waiting.remove(at);
        }
        let at = self.parked.iter().position(is)?;
        self.parked.remove(at)
    }

    /// Plan the next step, with none in flight; the number of its rows. Sequences that had to give up their blocks are
    /// reported.
    pub fn plan(&mut self, now: Instant, events: &mut Vec<Event>) -> usize {
        self.begin_plan();
        self.admit(now);
        self.ask_for_masks(now + MASK_PATIENCE, events);
        self.plan_decodes(events);
        self.plan_prefills(now, now);
        self.note_expected();
        self.plan.sequences.len()
    }

    /// A prompt waits from now on.
    pub fn queue(&mut self, sequence: Sequence) {
        insert(&mut self.waiting, sequence);
    }

    /// A resumed sequence waits for a place in the batch from now on.
    pub fn park(&mut self, sequence: Sequence) {
        insert(&mut self.parked, sequence);
    }

    /// Plan a step behind those in flight, which end at `starts`; the number of its rows, 0 if it has to wait for them.
    pub fn plan_ahead(&mut self, now: Instant, starts: Instant) -> usize {
        self.begin_plan();
        self.admit(now);
        for sequence in self.decoding.iter_mut().filter(|s| s.in_flight == 0) {
            sequence.constrained.ask(now);
            if sequence.constrained.failure.is_some() {
                return 0; // it is told when none is in flight
            }
        }
        let (drafts, tokens_max) = (&self.drafts, self.tokens_max);
        let goes_on = |s: &Sequence| {
            !s.sits_out && !s.is_ending(tokens_max) && !drafts.sits_out(s) && !s.lacks_mask()
        };
        for sequence in self.decoding.iter_mut().filter(|s| goes_on(s)) {
            let tokens = sequence.tokens.len() + sequence.in_flight;
            if !sequence.can_follow()
                || sequence.blocks.capacity() < tokens && !sequence.blocks.grow()
            {
                return 0;
            }
        }
        self.push_decodes();
        self.plan_prefills(now, starts);
        self.note_expected();
        self.flight.rows.len()
    }

    fn begin_plan(&mut self) {
        self.plan.sequences.clear();
        self.plan.tokens.clear();
        self.plan.blocks.clear();
        self.plan.targets.clear();
        self.plan.chooses_later = false;
        self.flight = Flight::default();
    }

    /// Fill the batch, and have batch sequences give their places to interactive ones.
    fn admit(&mut self, now: Instant) {
        match self.waiting.back().map(|s| s.service.tier) {
            Some(Tier::Batch) => drop(self.batch_waits.get_or_insert(now)),
            _ => self.batch_waits = None,
        }
        self.give_turn(now);
        self.fill(now);
        if self.make_places(now) {
            self.fill(now);
        }
        self.keep_to_time(now);
    }

    /// Fill the batch, the first first. Resumed sequences overtake a prompt that cannot start: it may be
    /// their blocks that it waits for.
    fn fill(&mut self, now: Instant) {
        let mut prompts_blocked = false;
        while self.prefilling.len() + self.decoding.len() < self.running_max {
            let prompt = self
                .waiting
                .front()
                .filter(|_| !prompts_blocked)
                .map(Sequence::place);
            let next = self.next_parked();
            let resumed = next.map(|at| &self.parked[at]);
            let has_turn = resumed.is_some_and(|s| Some(s.arrival) == self.turn);
            let prompt_goes = |prompt| {
                self.batch_prompt_is_due(now)
                    || !has_turn && resumed.is_none_or(|resumed| prompt < resumed.place())
            };
            match (prompt, next) {
                (Some(prompt), _) if prompt_goes(prompt) => {
                    prompts_blocked = !self.admit_prompt(now);
                }
                (_, Some(at)) => {
                    let sequence = self.parked.remove(at);
                    self.decoding.extend(sequence);
                    self.decoding.sort_by_key(|s| s.arrival);
                }
                (_, None) => break,
            }
        }
    }

    /// Start the next prompt if its blocks are there. Where blocks are missing nobody overtakes it, or a long one
    /// could wait for ever.
    fn admit_prompt(&mut self, now: Instant) -> bool {
        let Some(at) = self.next_prompt(now).filter(|at| !self.may_share(*at)) else {
            return false;
        };
        let front = &self.waiting[at];
        // Log-probabilities of the prompt need every position computed.
        let reuses = self.prefix_cache && front.prompt.logprobs_top.is_none();
        let reuse = reuses.then_some(front.cache_salt);
        // A block for each generating sequence stays, or they would soon throw each other out.
        let keep_free = self.decoding.len();
        let Some(blocks) = self.pool.admit(&front.tokens, reuse, keep_free) else {
            return false;
        };
        let mut sequence = self.waiting.remove(at).expect("it was found there");
        if sequence.is_batch() {
            self.batch_waits = None;
        }
        sequence.computed = blocks.indexed() * self.pool.block_tokens();
        sequence.prompt.cached_tokens = sequence.computed;
        sequence.blocks = blocks;
        let place = self
            .prefilling
            .partition_point(|s| s.arrival < sequence.arrival);
        self.prefilling.insert(place, sequence);
        true
    }

    /// Whether this waiting prompt may share blocks that a step in flight computes.
    fn may_share(&self, at: usize) -> bool {
        let waiting = &self.waiting[at];
        let block_tokens = self.pool.block_tokens();
        let mut in_flight = self.prefilling.iter().filter(|s| s.in_flight > 0);
        self.prefix_cache
            && in_flight.any(|s| {
                let alike = s.tokens.iter().zip(&waiting.tokens);
                s.cache_salt == waiting.cache_salt
                    && alike.take_while(|(a, b)| a == b).count() / block_tokens > s.blocks.indexed()
            })
    }

    fn batch_prompt_is_due(&self, now: Instant) -> bool {
        let is_due = |since| now.saturating_duration_since(since) >= BATCH_TURN;
        self.batch_waits.is_some_and(is_due)
    }

    /// Which waiting prompt starts next: a batch prompt whose turn has come; else the first, unless enough are under way; then the first of those that fit into
    /// the half of a step that the oldest prompt does not have, beside the short ones that are under way.
    fn next_prompt(&self, now: Instant) -> Option<usize> {
        if self.batch_prompt_is_due(now) {
            let interactive = |s: &Sequence| s.service.tier == Tier::Interactive;
            return Some(self.waiting.partition_point(interactive));
        }
        let first = self.waiting.front()?;
        let before = self.prefilling.iter().filter(|s| s.place() < first.place());
        let (mut count, mut in_flight) = (0, 0);
        for sequence in before {
            count += 1;
            in_flight += sequence.remaining();
        }
        if count < PROMPTS_IN_FLIGHT || in_flight < self.step_tokens {
            return Some(0);
        }
        let half = self.step_tokens / 2;
        let under_way = self.prefilling.iter().map(Sequence::remaining);
        let short: usize = under_way.filter(|remaining| *remaining <= half).sum();
        let fits = |s: &Sequence| short + s.remaining() <= half;
        self.waiting.iter().position(fits)
    }

    /// Asks for the masks that the next tokens need, all of them until `deadline` at most. A sequence that gets none leaves.
    fn ask_for_masks(&mut self, deadline: Instant, events: &mut Vec<Event>) {
        let mut ask = |sequence: &mut Sequence| {
            sequence.constrained.ask(deadline);
            let failure = sequence.constrained.failure.take();
            let failed = failure.is_some();
            events.extend(failure.map(|detail| Event::Failed {
                key: sequence.key,
                detail,
            }));
            !failed
        };
        self.decoding.retain_mut(&mut ask);
        self.prefilling.retain_mut(ask);
    }

    /// The masks of a step whose tokens are to be chosen now, by row, waited for until `deadline` at most. Rows of sequences that
    /// have left need none; those whose mask does not come are void, and get one that allows nothing.
    pub fn masks(
        &mut self,
        rows: &mut [FlightRow],
        deadline: Instant,
    ) -> Vec<Option<Arc<TokenMask>>> {
        let mut masks = vec![None; rows.len()];
        let mut sequences = self.decoding.iter_mut().peekable();
        // Both are in order of arrival.
        for (row, mask) in rows.iter_mut().zip(&mut masks) {
            while sequences.next_if(|s| s.arrival < row.arrival).is_some() {}
            let own = sequences.next_if(|s| s.arrival == row.arrival);
            let Some(sequence) = own.filter(|_| row.masked_later) else {
                continue;
            };
            let made = sequence.constrained.mask_of_row(deadline);
            row.is_void = made.is_none();
            *mask = made.or_else(|| Some(Arc::new(TokenMask::new(Box::default()))));
        }
        masks
    }

    fn plan_decodes(&mut self, events: &mut Vec<Event>) {
        let mut row = 0;
        while row < self.decoding.len() {
            row = self.make_room(row, events);
        }
        self.push_decodes();
    }

    /// Rows for all generating sequences that can have one; each has a block for the token it is sure of.
    fn push_decodes(&mut self) {
        let wanted: usize = self.prefilling.iter().map(Sequence::remaining).sum();
        let left = self.step_tokens - self.decoding.len();
        self.drafts.budget = left.saturating_sub(wanted);
        for sequence in &mut self.decoding {
            if sequence.sits_out
                || sequence.is_ending(self.tokens_max)
                || self.drafts.sits_out(sequence)
                || sequence.lacks_mask()
            {
                continue;
            }
            let drafts = self.drafts.of(sequence);
            let kv_tokens = sequence.computed + sequence.in_flight;
            push_row(&mut self.plan, &mut self.flight, sequence, 1, drafts);
            sequence.passed_over = None;
            let shape = &mut self.flight.shape;
            shape.tokens += 1 + drafts.len() as u64;
            shape.rows += 1 + drafts.len() as u64;
            shape.kv_tokens += kv_tokens as u64;
        }
        self.flight.decodes = self.flight.rows.len();
    }

    /// See to it that this generating sequence has a block for its last token; the index of the next one. Where blocks are missing
    /// batch sequences give up theirs, then the youngest; it may be this one.
    fn make_room(&mut self, mut row: usize, events: &mut Vec<Event>) -> usize {
        let rank = |s: &Sequence| (s.service.tier, s.arrival);
        loop {
            let sequence = &mut self.decoding[row];
            if sequence.sits_out
                || sequence.blocks.capacity() >= sequence.tokens.len()
                || sequence.blocks.grow()
            {
                return row + 1;
            }
            let parked = (0..self.parked.len()).max_by_key(|at| rank(&self.parked[*at]));
            let parked = parked.map(|at| (rank(&self.parked[at]), at));
            let decoding = (0..self.decoding.len()).max_by_key(|at| rank(&self.decoding[*at]));
            let decoding = decoding.map(|at| (rank(&self.decoding[at]), at));
            let mut preempted =
                |victim: Sequence| events.push(Event::Preempted { key: victim.key });
            match (parked, decoding) {
                (Some((_, at)), _) if parked > decoding => {
                    self.parked.remove(at).into_iter().for_each(preempted);
                }
                (_, Some((_, at))) => {
                    preempted(self.decoding.remove(at));
                    match at.cmp(&row) {
                        Ordering::Less => row -= 1,
                        Ordering::Equal => return row,
                        Ordering::Greater => {}
                    }
                }
                (_, None) => return row,
            }
        }
    }

    /// How long the step takes that is planned.
    fn note_expected(&mut self) {
        if let Some(model) = &self.cost {
            self.flight.expected = model.cost().step_time(self.flight.shape);
        }
    }

    /// The longest that this step may take, in microseconds, if it begins at `starts`: until the first is due of the sequences that generate, by
    /// the time between tokens that each was promised. `None` if none was promised any, or if it is not known what steps cost.
    fn limit_us(&self, starts: Instant) -> Option<f32> {
        let model = self.cost.as_ref()?;
        if self.flight.decodes == 0 {
            return None;
        }
        let step = model.cost().step_time(self.flight.shape);
        let own = |s: &Sequence| s.service.itl_ms.map(|ms| Duration::from_millis(ms.into()));
        // Batch is promised no times.
        let promised = self.decoding.iter().filter(|s| !s.is_batch());
        let due = |s: &Sequence| {
            let itl = own(s).or(self.itl)?.mul_f32(ITL_PART);
            Some(
                s.due(itl, step)
                    .saturating_duration_since(starts)
                    .min(itl * PAUSE_MAX),
            )
        };
        let least = promised.filter_map(due).min()?;
        Some(least.as_secs_f32() * 1e6)
    }

    /// How many of these tokens of a prompt behind `context` others the step may have beside what is in it.
    fn within(&self, limit_us: Option<f32>, context: usize, tokens: usize) -> usize {
        match (&self.cost, limit_us) {
            (Some(model), Some(limit)) => {
                let (cost, shape) = (model.cost(), self.flight.shape);
                cost.prompt_tokens_within(limit, shape, context as u64, tokens as u64) as usize
            }
            _ => tokens,
        }
    }

    fn plan_prefills(&mut self, now: Instant, starts: Instant) {
        let unfinished =
            (0..self.prefilling.len()).filter(|at| self.prefilling[*at].remaining() > 0);
        let mut order = std::mem::take(&mut self.shortest_first);
        order.clear();
        order.extend(unfinished);
        let (Some(&oldest), Some(&first)) = (
            order.first(),
            order.iter().min_by_key(|at| self.prefilling[**at].place()),
        ) else {
            self.shortest_first = order;
            return;
        };
        let block_tokens = self.pool.block_tokens();
        let limit = self.limit_us(starts);
        // Drafts are in it only if all prompts fit beside them.
        let left = self.step_tokens - self.plan.tokens.len();
        let mut budget = match (&self.cost, limit) {
            (Some(_), Some(_)) => {
                let context = self.prefilling[first].computed + self.prefilling[first].in_flight;
                self.within(limit, context, left)
                    .max(block_tokens.min(left))
            }
            (Some(model), None) => {
                let enough = model.cost().efficient_tokens(self.step_tokens as u64) as usize;
                left.min(enough.max(block_tokens))
            }
            _ => left,
        };
        let half = budget.div_ceil(2).max(block_tokens.min(budget));
        let guaranteed = self.prefilling[first].remaining().min(half);
        budget -= guaranteed;
        // A batch prompt that has begun ends some day.
        let for_oldest = match oldest == first {
            true => 0,
            false => self.prefilling[oldest]
                .remaining()
                .min(block_tokens)
                .min(budget),
        };
        budget -= for_oldest;

        // Stable: among equals the oldest first.
        order.sort_by_key(|at| {
            let sequence = &self.prefilling[*at];
            (sequence.service.tier, sequence.remaining())
        });
        for at in &order {
            let sequence = &self.prefilling[*at];
            let (mut sure, mut least) = (0, 0);
            if *at == first {
                (sure, least) = (guaranteed, guaranteed.min(block_tokens));
            } else if *at == oldest {
                (sure, least) = (for_oldest, for_oldest);
            }
            let more = budget.min(sequence.remaining() - sure);
            budget -= more;
            let context = sequence.computed + sequence.in_flight;
            let fits = self.within(limit, context, sure + more).max(least);
            self.plan_chunk(*at, fits, now);
        }
        self.shortest_first = order;
    }

    fn plan_chunk(&mut self, at: usize, tokens: usize, now: Instant) {
        if tokens == 0 {
            return;
        }
        let sequence = &mut self.prefilling[at];
        // The last token of a prompt waits for the mask of the one that is chosen after it.
        let is_last = tokens == sequence.remaining() && sequence.constrained.is_late();
        let tokens = tokens - usize::from(is_last);
        if tokens == 0 {
            return;
        }
        sequence.prompt.started.get_or_insert(now);
        let context = (sequence.computed + sequence.in_flight) as u64;
        push_row(&mut self.plan, &mut self.flight, sequence, tokens, &[]);
        let chooses = self.flight.rows.last().is_some_and(|row| row.samples);
        self.flight.shape = self.flight.shape.and_prompt(tokens as u64, context);
        self.flight.shape.rows += u64::from(chooses);
    }
}

/// Into a queue that is in the order of places.
fn insert(queue: &mut VecDeque<Sequence>, sequence: Sequence) {
    let place = sequence.place();
    let at = queue.partition_point(|s| s.place() < place);
    queue.insert(at, sequence);
}

/// Plan the next `count` tokens of a sequence and drafts of those after them; with its last token goes the choice of the next,
/// and one after each draft.
fn push_row(
    plan: &mut StepPlan,
    flight: &mut Flight,
    sequence: &mut Sequence,
    count: usize,
    drafts: &[u32],
) {
    let start = sequence.computed + sequence.in_flight;
    let end = start + count;
    let (first_token, first_block) = (plan.tokens.len(), plan.blocks.len());
    let (first_target, first_draft) = (plan.targets.len(), flight.drafts.len());
    let known = sequence.tokens.get(start..end);
    let masked_later = known.is_none() && !sequence.constrained.is_free();
    plan.chooses_later |= masked_later;
    flight.is_unchosen |= masked_later;
    match known {
        Some(tokens) => plan.tokens.extend_from_slice(tokens),
        None => plan.tokens.push(0),
    }
    if !drafts.is_empty() {
        plan.tokens.extend_from_slice(drafts);
        flight.drafts.extend_from_slice(drafts);
    }
    plan.blocks.extend_from_slice(sequence.blocks.ids());
    if sequence.prompt.logprobs_top.is_some() {
        let to = (end + 1).min(sequence.prompt_tokens);
        plan.targets
            .extend_from_slice(sequence.tokens.get(start + 1..to).unwrap_or(&[]));
    }
    let step = SequenceStep {
        key: sequence.key,
        tokens: first_token..plan.tokens.len(),
        follows: known.is_none().then_some(sequence.last),
        start: start as u32,
        blocks: first_block..plan.blocks.len(),
        sample: (end >= sequence.tokens.len()).then(|| sequence.sample_run(end, drafts.len())),
        targets: first_target..plan.targets.len(),
        target_top: sequence.prompt.logprobs_top.unwrap_or(0),
    };
    flight.rows.push(FlightRow {
        arrival: sequence.arrival,
        tokens: step.tokens.len() as u32,
        targets: step.targets.len() as u32,
        drafts: first_draft as u32..flight.drafts.len() as u32,
        samples: step.sample.is_some(),
        masked_later,
        is_void: false,
    });
    sequence.in_flight += step.tokens.len();
    sequence.drafted += drafts.len();
    sequence.last = Follows {
        step: plan.id,
        sequence: plan.sequences.len(),
    };
    plan.sequences.push(step);
}
