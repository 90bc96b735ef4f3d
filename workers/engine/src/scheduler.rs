//! Which sequences run in a step, and with how many tokens.
//!
//! Sequences wait in arrival order, prompts for blocks and a place in the batch, resumed sequences
//! (which hold their blocks) for a place. Running ones share each step's token budget:
//!
//! 1. one token for every decoding sequence;
//! 2. at least half of the rest for the oldest unfinished prompt, so that the longest prompt ends;
//! 3. what is left by shortest remaining prompt, so that a short one does not wait behind a long one.
//!
//! So a prompt of `L` tokens that has its blocks waits for no more than the prompts that came before it: all of theirs and
//! its own run in `2 (older + L) / budget` steps, however many short ones come after it. And a short one waits for the
//! short ones before it: whatever long ones are under way, those that fit into the other half of a step start at once and
//! run in the next. Neither bound counts the time in which nobody can start, because blocks are missing: then the
//! first in the queue is waited for, and nobody passes it.
//!
//! A prompt takes all its blocks on admission, so two half-done prompts never wait for each other's. Output
//! takes blocks one at a time, and when none is left the youngest generating sequence gives up its own.
//!
//! Drafts take what is left: tokens of the step that neither decoding sequences nor prompts want, and blocks when everybody
//! has one for the token it is sure of. So they move none of these bounds, and nobody is thrown out for a draft.
//!
//! While steps are in flight the next is planned if it needs nothing that only their end can tell:
//!
//! - it is a decode step, and no prompt could run. Beside a step of prompts what the host does is short, and those that come
//!   until it ends can be in the next; a decode step is short itself.
//! - every sequence in it goes on from a token that the device knows, and no penalty counts one that it does not. Else all
//!   wait: a step without one of them would cost that one half its speed.
//! - there is a block for everyone: nobody is thrown out for a guess.
//!
//! A sequence with a constraint needs the mask of its next token, which depends on the token before. So the tokens of a step behind
//! one in flight are chosen later: the device runs the layers, the tokens of the step before come, masks are made of them, and then
//! the executor is told to choose. A sequence whose mask is late sits out; if its row runs already, it is run again.
//!
//! A sequence whose drafts are in flight sits out, for nobody knows which position comes next; the others go ahead.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::draft::Drafts;
use crate::flight::{Flight, FlightRow};
use crate::sequence::Sequence;
use crate::{BlockPool, Event, Follows, SequenceStep, StepPlan, TokenMask};

/// Prompts admitted in order of arrival though fewer would fill the step: more would only hold blocks, and miss
/// prefixes that those before them are about to share.
const PROMPTS_IN_FLIGHT: usize = 4;

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
    /// Prompts without blocks.
    pub waiting: VecDeque<Sequence>,
    /// Resumed sequences without a place in the batch.
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
            waiting: VecDeque::new(),
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
        self.admit();
        self.ask_for_masks(now + MASK_PATIENCE, events);
        self.plan_decodes(events);
        self.plan_prefills(now);
        self.plan.sequences.len()
    }

    /// Plan a step behind those in flight; the number of its rows, 0 if it has to wait for them.
    pub fn plan_ahead(&mut self, now: Instant) -> usize {
        self.begin_plan();
        let prompts_in_flight = self.prefilling.iter().any(|s| s.in_flight > 0);
        if prompts_in_flight && !self.waiting.is_empty() {
            // They may share what is being computed, so their blocks are chosen after it.
            return 0;
        }
        self.admit();
        if self.prefilling.iter().any(|s| s.remaining() > 0) {
            return 0;
        }
        for sequence in self.decoding.iter_mut().filter(|s| s.in_flight == 0) {
            sequence.constrained.ask(now);
            if sequence.constrained.failure.is_some() {
                return 0; // it is told when none is in flight
            }
        }
        let (drafts, tokens_max) = (&self.drafts, self.tokens_max);
        let goes_on =
            |s: &Sequence| !s.is_ending(tokens_max) && !drafts.sits_out(s) && !s.lacks_mask();
        for sequence in self.decoding.iter_mut().filter(|s| goes_on(s)) {
            let tokens = sequence.tokens.len() + sequence.in_flight;
            if !sequence.can_follow()
                || sequence.blocks.capacity() < tokens && !sequence.blocks.grow()
            {
                return 0;
            }
        }
        self.push_decodes();
        self.flight.decodes
    }

    fn begin_plan(&mut self) {
        self.plan.sequences.clear();
        self.plan.tokens.clear();
        self.plan.blocks.clear();
        self.plan.targets.clear();
        self.plan.chooses_later = false;
        self.flight = Flight::default();
    }

    /// Fill the batch, the oldest first. Resumed sequences overtake a prompt that cannot start: it may be
    /// their blocks that it waits for.
    fn admit(&mut self) {
        let mut prompts_blocked = false;
        while self.prefilling.len() + self.decoding.len() < self.running_max {
            let prompt = self
                .waiting
                .front()
                .filter(|_| !prompts_blocked)
                .map(|s| s.arrival);
            let resumed = self.parked.front().map(|s| s.arrival);
            match (prompt, resumed) {
                (Some(prompt), resumed) if resumed.is_none_or(|resumed| prompt < resumed) => {
                    prompts_blocked = !self.admit_prompt();
                }
                (_, Some(_)) => self.decoding.extend(self.parked.pop_front()),
                (_, None) => break,
            }
        }
    }

    /// Start the next prompt if its blocks are there. Where blocks are missing nobody overtakes it, or a long one
    /// could wait for ever.
    fn admit_prompt(&mut self) -> bool {
        let Some(at) = self.next_prompt() else {
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
        sequence.computed = blocks.indexed() * self.pool.block_tokens();
        sequence.prompt.cached_tokens = sequence.computed;
        sequence.blocks = blocks;
        let place = self
            .prefilling
            .partition_point(|s| s.arrival < sequence.arrival);
        self.prefilling.insert(place, sequence);
        true
    }

    /// Which waiting prompt starts next: the first, unless enough are under way; then the first of those that fit into
    /// the half of a step that the oldest prompt does not have, beside the short ones that are under way.
    fn next_prompt(&self) -> Option<usize> {
        let first = self.waiting.front()?;
        let before = self.prefilling.iter().filter(|s| s.arrival < first.arrival);
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
            row += usize::from(self.make_room(row, events));
        }
        self.push_decodes();
    }

    /// Rows for all generating sequences that can have one; each has a block for the token it is sure of.
    fn push_decodes(&mut self) {
        let wanted: usize = self.prefilling.iter().map(Sequence::remaining).sum();
        let left = self.step_tokens - self.decoding.len();
        self.drafts.budget = left.saturating_sub(wanted);
        for sequence in &mut self.decoding {
            if sequence.is_ending(self.tokens_max)
                || self.drafts.sits_out(sequence)
                || sequence.lacks_mask()
            {
                continue;
            }
            let drafts = self.drafts.of(sequence);
            push_row(&mut self.plan, &mut self.flight, sequence, 1, drafts);
        }
        self.flight.decodes = self.flight.rows.len();
    }

    /// See to it that this generating sequence has a block for its last token. `false` if it had to give
    /// up itself: then another one stands at this index, or none.
    fn make_room(&mut self, row: usize, events: &mut Vec<Event>) -> bool {
        loop {
            let sequence = &mut self.decoding[row];
            if sequence.blocks.capacity() >= sequence.tokens.len() || sequence.blocks.grow() {
                return true;
            }
            let youngest_parked = self.parked.back().map(|s| s.arrival);
            let youngest = self.decoding.last().map(|s| s.arrival);
            let victim = match youngest_parked > youngest {
                true => self.parked.pop_back(),
                false => self.decoding.pop(),
            };
            events.extend(victim.map(|victim| Event::Preempted { key: victim.key }));
            if row >= self.decoding.len() {
                return false;
            }
        }
    }

    fn plan_prefills(&mut self, now: Instant) {
        let Some(oldest) = self.prefilling.first() else {
            return;
        };
        // Drafts are in it only if all prompts fit beside them.
        let mut budget = self.step_tokens - self.plan.tokens.len();
        let guaranteed = oldest.remaining().min(budget.div_ceil(2));
        budget -= guaranteed;

        let mut order = std::mem::take(&mut self.shortest_first);
        order.clear();
        order.extend(0..self.prefilling.len());
        // Stable: among equals the oldest first.
        order.sort_by_key(|at| self.prefilling[*at].remaining());
        for at in &order {
            let sure = if *at == 0 { guaranteed } else { 0 };
            let more = budget.min(self.prefilling[*at].remaining() - sure);
            budget -= more;
            self.plan_chunk(*at, sure + more, now);
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
        push_row(&mut self.plan, &mut self.flight, sequence, tokens, &[]);
    }
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
        sample: (end >= sequence.tokens.len()).then(|| sequence.sample_run(drafts.len())),
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
