//! Where a prompt's beginning is pulled from, if its worker does not have it and another does that is busy.
//!
//! Only the worker that has most of a prompt is thought of: what is cached is mostly one conversation's. Others may read it if they are
//! connected to it, which workers of role `both` are among each other.

use std::cmp::Ordering;

use baton_protocol::PrefixSource;

use super::Scratch;
use super::by_time::EQUAL_US;
use super::columns::{Columns, LANES, NOBODY};
use super::eligible::Eligible;
use crate::fleet::membership::{Member, Membership, Slot};

/// What a pull takes beside its reads: the question for a lease, and the release.
const ASKS_US: f32 = 1_000.0;

/// Computing takes so many times as long as pulling, or nothing is pulled: links are shared, and others' pulls are not known here.
const MARGIN: f32 = 2.0;

/// A prompt's beginning at another worker, which is quicker to pull than to compute.
#[derive(Clone, Debug, PartialEq)]
pub struct Source {
    /// Where it is, as the job says it.
    pub prefix: PrefixSource,
    /// What pulling it is expected to take.
    pub pull_us: f32,
}

/// The worker that has most of the prompt, of those that lease what they have.
#[derive(Clone, Copy, Debug)]
struct Holder {
    slot: Slot,
    /// Tokens of the prompt that it has: whole blocks, and not all of the prompt.
    tokens: usize,
}

/// What a choice knows that looks for a prompt's beginning elsewhere.
pub(super) struct Pulls<'a> {
    pub(super) members: &'a Membership,
    pub(super) eligible: &'a Eligible,
    pub(super) columns: &'a Columns,
    /// With the prompt looked up.
    pub(super) scratch: &'a mut Scratch,
    pub(super) turn: usize,
}

impl Pulls<'_> {
    /// Who has the first token soonest if it pulls the prompt's beginning, where that pays and is sooner than at `best`, which pulls nothing.
    /// The keys of the choice of `best` are gone then.
    pub(super) fn sooner_than(
        &mut self,
        best: Slot,
        tier: usize,
        prompt_tokens: usize,
    ) -> Option<(Slot, Source)> {
        let holder = self.holder(prompt_tokens)?;
        let (slot, tokens) = (holder.slot, holder.tokens);
        let holder = self.members.at(slot)?;
        let Self {
            eligible, scratch, ..
        } = self;
        let prompt = (tier, prompt_tokens as f32);
        let Scratch {
            refused,
            keys,
            cached,
            ..
        } = &mut **scratch;
        let asked = |at: usize| {
            let may = eligible.contexts.word(at) & eligible.timed.word(at);
            let reads = eligible.prefix_readers.word(at) & holder.readers.word(at);
            may & reads & !refused.word(at)
        };
        self.columns
            .pull_keys(keys, asked, cached.all(), prompt, tokens as f32);
        if let Some(own) = keys.of(slot) {
            *own = NOBODY;
        }
        let reader = scratch.best_by_time(self.turn)?;
        let until = |slot, have: usize| self.columns.first_token_us(slot, prompt, have as f32);
        let cached = |slot| {
            let member = self.members.at(slot);
            member.map_or(0, |member| scratch.cached_tokens(slot, member))
        };
        let best_us = match scratch.blame(reader).cmp(&scratch.blame(best)) {
            Ordering::Less => f32::INFINITY,
            Ordering::Equal => until(best, cached(best)),
            Ordering::Greater => return None,
        };
        let have = cached(reader);
        let (computing_us, pulled_us) = (until(reader, have), until(reader, tokens));
        let pull_us = pull_us(self.members.at(reader)?, holder, tokens - have)?;
        let pays = computing_us - pulled_us >= MARGIN * pull_us;
        let is_sooner = pulled_us + pull_us + EQUAL_US < best_us;
        let source = || Source {
            prefix: PrefixSource {
                worker: holder.beat.worker.clone(),
                incarnation: holder.beat.incarnation,
                tokens: tokens as u32,
            },
            pull_us,
        };
        (pays && is_sooner).then(|| (reader, source()))
    }

    /// `None` if nobody has anything of the prompt, as far as workers say.
    fn holder(&self, prompt_tokens: usize) -> Option<Holder> {
        let mut most: Option<Holder> = None;
        for (at, row) in self.scratch.told.all().chunks(LANES).enumerate() {
            if row.iter().all(|blocks| *blocks == 0) {
                continue;
            }
            for (slot, blocks) in row.iter().enumerate() {
                let slot = at * LANES + slot;
                let may = *blocks > 0
                    && self.eligible.serving.contains(slot)
                    && self.scratch.blame(slot) == 0;
                let member = self.members.at(slot).filter(|_| may);
                let Some(member) = member.filter(|member| member.facts.leases_prefixes) else {
                    continue;
                };
                let block = member.facts.block_tokens as usize;
                let whole = prompt_tokens.saturating_sub(1) / block;
                let tokens = (*blocks as usize).min(whole) * block;
                if tokens > most.map_or(0, |most| most.tokens) {
                    most = Some(Holder { slot, tokens });
                }
            }
        }
        most
    }
}

/// What it takes to pull so many tokens, if their rate is known.
fn pull_us(reader: &Member, holder: &Member, tokens: usize) -> Option<f32> {
    let rate = rate(reader, holder)?;
    let kv = &holder.beat.kv;
    let token_bytes = kv.block_bytes() as f32 / kv.block_tokens.max(1) as f32;
    // Gigabytes a second are thousands of bytes a microsecond.
    Some(ASKS_US + tokens as f32 * token_bytes / (rate * 1e3))
}

/// Bytes that a worker reads from another in a nanosecond, by its pulls, or before the first by its probe.
fn rate(reader: &Member, from: &Member) -> Option<f32> {
    let peer = reader.reads(&from.target())?;
    let rate = peer
        .pulled_gigabytes_per_second
        .unwrap_or(peer.gigabytes_per_second);
    (rate.is_finite() && rate > 0.0).then_some(rate)
}
