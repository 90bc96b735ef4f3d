//! What happened to each request, put together from what was said on the bus.

use std::collections::BTreeMap;

use baton_protocol::{
    Abort, DecodeJob, End, KvHandle, PrefillJob, PrefillReply, Progress, ProgressReply, RequestId,
    TokenFrame,
};

use crate::tap::Tap;

/// The life of one generation.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    /// Prefill jobs, each with the worker that it was sent to.
    pub prefills: Vec<(String, PrefillJob)>,
    /// Handles that came back.
    pub handles: Vec<KvHandle>,
    /// When each of them did, in the tap's order.
    pub handles_at: Vec<usize>,
    /// Decode jobs, each with the worker that it was sent to.
    pub decodes: Vec<(String, DecodeJob)>,
    /// When each of them was sent, in the tap's order.
    pub decodes_at: Vec<usize>,
    /// Bytes of KV read, one for each pull that was reported.
    pub pulled: Vec<u64>,
    /// Ends of the tries on decode workers.
    pub ends: Vec<End>,
    /// Workers that were told to end it.
    pub aborts: Vec<String>,
    tokens: BTreeMap<u32, u32>,
}

impl Trace {
    /// All generations of which anything was heard since `from`.
    ///
    /// # Panics
    /// If two tries of one generation made different tokens: a retry must give the same text.
    pub async fn all(tap: &Tap, from: usize) -> BTreeMap<RequestId, Self> {
        tap.catch_up().await;
        let mut all: BTreeMap<RequestId, Self> = BTreeMap::new();
        let mut asked: BTreeMap<String, RequestId> = BTreeMap::new();
        let mut followed: BTreeMap<String, Progress> = BTreeMap::new();
        for message in tap.heard(from, |message| Some(message.clone())) {
            if let Some(request) = asked.get(&message.subject) {
                // A handle that comes while its prompt runs has no first token yet.
                let handle = match message.read() {
                    PrefillReply::Ready { handle, .. } | PrefillReply::Begun { handle, .. } => {
                        handle
                    }
                    _ => continue,
                };
                let trace = all.entry(*request).or_default();
                let first: Vec<u32> = handle.first_token.into_iter().collect();
                trace.note(handle.valid_tokens, &first);
                trace.handles.push(*handle);
                trace.handles_at.push(message.index);
                continue;
            }
            if let Some(asked) = followed.get(&message.subject) {
                if let ProgressReply::Done { first_token, .. } = message.read() {
                    let trace = all.entry(asked.request).or_default();
                    let mut handles = trace.handles.iter();
                    let handle = handles.find(|handle| handle.nonce == asked.nonce);
                    if let Some(at) = handle.map(|handle| handle.valid_tokens) {
                        trace.note(at, &[first_token]);
                    }
                }
                continue;
            }
            match message.kind() {
                Some(("prefill", worker)) => {
                    let job: PrefillJob = message.read();
                    let reply = message.reply.clone().expect("a prefill job is a request");
                    asked.insert(reply, job.request);
                    let trace = all.entry(job.request).or_default();
                    trace.prefills.push((worker.to_owned(), job));
                }
                Some(("progress", _)) => {
                    let reply = message.reply.clone().expect("how far it is is asked");
                    followed.insert(reply, message.read());
                }
                Some(("decode", worker)) => {
                    let job: DecodeJob = message.read();
                    let trace = all.entry(job.request).or_default();
                    trace.decodes.push((worker.to_owned(), job));
                    trace.decodes_at.push(message.index);
                }
                Some(("abort", worker)) => {
                    let abort: Abort = message.read();
                    let trace = all.entry(abort.request).or_default();
                    trace.aborts.push(worker.to_owned());
                }
                Some(("tokens", _)) => {
                    let frame: TokenFrame = message.read();
                    for item in frame.items {
                        let trace = all.entry(item.request).or_default();
                        let prompt = trace.prompt().len() as u32;
                        trace.note(prompt + item.index, &item.tokens.0);
                        trace.pulled.extend(item.pulled.map(|report| report.bytes));
                        trace.ends.extend(item.end);
                    }
                }
                _ => {}
            }
        }
        all
    }

    /// The only generation that began since `from`: messages of one before it may come late.
    ///
    /// # Panics
    /// If there is none, or another one.
    pub async fn only(tap: &Tap, from: usize) -> Self {
        let mut all = Self::all(tap, from).await;
        all.retain(|_, trace| !trace.prefills.is_empty());
        assert_eq!(all.len(), 1, "generations: {:?}", all.keys());
        all.into_values().next().expect("just counted")
    }

    /// Ids of the prompt, as the API server made them.
    pub fn prompt(&self) -> &[u32] {
        match self.prefills.first() {
            Some((_, job)) => &job.sequence.tokens.0[..job.sequence.prompt_tokens as usize],
            None => &[],
        }
    }

    /// Ids of the output, all that was made.
    ///
    /// # Panics
    /// If one is missing.
    pub fn output(&self) -> Vec<u32> {
        let first = self.prompt().len() as u32;
        for (expected, position) in (first..).zip(self.tokens.keys()) {
            assert_eq!(
                *position, expected,
                "a gap in the tokens: {:?}",
                self.tokens
            );
        }
        self.tokens.values().copied().collect()
    }

    fn note(&mut self, position: u32, tokens: &[u32]) {
        for (position, token) in (position..).zip(tokens) {
            let was = self.tokens.insert(position, *token).unwrap_or(*token);
            assert_eq!(
                was, *token,
                "two tries made different tokens at position {position}"
            );
        }
    }
}
