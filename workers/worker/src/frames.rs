//! Tokens on their way to the bus.
//!
//! The engine thread puts each step's tokens into [`TokenOutbox`] and goes on; the publisher task takes
//! whatever is there. While the bus keeps up, that is one step and one message for each API server. When
//! it does not, the tokens of several steps merge into one message: the slower the bus, the fewer the
//! messages. What may wait is bounded, and a full outbox stops the engine.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};

use baton_protocol::{
    ApiServerId, End, Failure, FailureCode, FrameItem, Incarnation, PROTOCOL_VERSION, PackedTokens,
    RequestId, TokenFrame, WorkerId, encode,
};
use tokio::sync::Notify;

/// Tokens that may wait for the bus, and twenty alternatives count like twenty tokens. About 2 MB of JSON.
const WAITING_MAX: usize = 1 << 16;

/// Whose tokens these are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Route {
    pub(crate) api_server: ApiServerId,
    pub(crate) request: RequestId,
    pub(crate) attempt: u32,
}

impl Route {
    /// An item that only says how this try ended; `index` is that of the next token had there been one.
    pub(crate) fn failed(&self, index: u32, failure: Failure) -> FrameItem {
        FrameItem {
            end: Some(End::Failed(failure)),
            ..self.at_work(index)
        }
    }

    /// An item that only says that this worker is at it; `index` is that of a token that is yet to come, or came before.
    pub(crate) fn at_work(&self, index: u32) -> FrameItem {
        FrameItem {
            request: self.request,
            attempt: self.attempt,
            index,
            tokens: PackedTokens::default(),
            logprobs: Vec::new(),
            pulled: None,
            end: None,
        }
    }
}

/// What waits for the publisher.
#[derive(Default)]
pub(crate) struct TokenOutbox {
    waiting: Mutex<Waiting>,
    filled: Notify,
}

#[derive(Default)]
struct Waiting {
    servers: BTreeMap<ApiServerId, ServerItems>,
    weight: usize,
}

#[derive(Default)]
struct ServerItems {
    items: Vec<FrameItem>,
    /// Where the open item of a try stands.
    at: HashMap<(RequestId, u32), usize>,
}

/// What the publisher took.
pub(crate) struct Taken {
    pub(crate) servers: Vec<(ApiServerId, Vec<FrameItem>)>,
    /// The engine may have stopped because of this much.
    pub(crate) was_full: bool,
}

impl TokenOutbox {
    /// Whether another step's tokens may come.
    pub(crate) fn has_room(&self) -> bool {
        self.lock().weight < WAITING_MAX
    }

    /// Adds one step's items.
    pub(crate) fn push(&self, items: Vec<(ApiServerId, FrameItem)>) {
        if items.is_empty() {
            return;
        }
        let mut waiting = self.lock();
        for (api_server, item) in items {
            waiting.weight += weight(&item);
            waiting.servers.entry(api_server).or_default().push(item);
        }
        drop(waiting);
        self.filled.notify_one();
    }

    /// Takes all there is, waiting until there is something.
    pub(crate) async fn take(&self) -> Taken {
        loop {
            if let Some(taken) = self.try_take() {
                return taken;
            }
            self.filled.notified().await;
        }
    }

    /// Takes all there is now.
    pub(crate) fn try_take(&self) -> Option<Taken> {
        let mut waiting = self.lock();
        if waiting.servers.is_empty() {
            return None;
        }
        let Waiting { servers, weight } = std::mem::take(&mut *waiting);
        drop(waiting);
        let servers = servers
            .into_iter()
            .map(|(id, server)| (id, server.items))
            .collect();
        Some(Taken {
            servers,
            was_full: weight >= WAITING_MAX,
        })
    }

    /// A panic while the lock was held leaves whole items behind, so a poisoned lock is still good.
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ServerItems {
    /// Appends to the try's open item when the tokens follow on, else begins a new item.
    fn push(&mut self, item: FrameItem) {
        let key = (item.request, item.attempt);
        let open = self.at.get(&key).map(|&at| &mut self.items[at]);
        match open {
            Some(open) if follows(open, &item) => {
                open.tokens.0.extend(item.tokens.0);
                open.logprobs.extend(item.logprobs);
                open.pulled = open.pulled.or(item.pulled);
                open.end = item.end;
            }
            _ => {
                self.at.insert(key, self.items.len());
                self.items.push(item);
            }
        }
    }
}

/// Whether `item` goes on where `open` stops. Log-probabilities are all or none in one item.
fn follows(open: &FrameItem, item: &FrameItem) -> bool {
    let whole = |item: &FrameItem| item.tokens.0.is_empty() || !item.logprobs.is_empty();
    let none = |item: &FrameItem| item.logprobs.is_empty();
    open.end.is_none()
        && open.index as usize + open.tokens.0.len() == item.index as usize
        && ((whole(open) && whole(item)) || (none(open) && none(item)))
}

fn weight(item: &FrameItem) -> usize {
    let logprobs: usize = item
        .logprobs
        .iter()
        .map(|logprobs| 1 + logprobs.top.len())
        .sum();
    1 + item.tokens.0.len() + logprobs
}

/// The messages that carry these items, each at most `bytes_max` bytes: one if it fits, else items and,
/// where one item alone is too large, its tokens are divided. Their order is kept.
pub(crate) fn messages(
    worker: &WorkerId,
    incarnation: Incarnation,
    items: Vec<FrameItem>,
    bytes_max: usize,
) -> Vec<Vec<u8>> {
    let mut done = Vec::new();
    let mut rest = vec![items];
    while let Some(items) = rest.pop() {
        let frame = TokenFrame {
            v: PROTOCOL_VERSION,
            worker: worker.clone(),
            incarnation,
            items,
            prompts: Vec::new(),
        };
        match encode(&frame) {
            Ok(bytes) if bytes.len() <= bytes_max => done.push(bytes),
            _ => {
                let (head, tail) = halves(frame.items, bytes_max);
                rest.extend(tail);
                rest.extend(head);
            }
        }
    }
    done
}

/// Divides what does not fit. A single token that does not fit becomes a failure that does.
fn halves(
    mut items: Vec<FrameItem>,
    bytes_max: usize,
) -> (Option<Vec<FrameItem>>, Option<Vec<FrameItem>>) {
    if items.len() > 1 {
        let tail = items.split_off(items.len() / 2);
        return (Some(items), Some(tail));
    }
    let Some(mut head) = items.pop() else {
        return (None, None);
    };
    let tokens = head.tokens.0.len();
    if tokens > 1 {
        let middle = tokens / 2;
        let tail = FrameItem {
            request: head.request,
            attempt: head.attempt,
            index: head.index + middle as u32,
            tokens: PackedTokens(head.tokens.0.split_off(middle)),
            logprobs: head.logprobs.split_off(middle.min(head.logprobs.len())),
            pulled: None,
            end: head.end.take(),
        };
        return (Some(vec![head]), Some(vec![tail]));
    }
    let said_so =
        matches!(&head.end, Some(End::Failed(failure)) if failure.code == FailureCode::TooLarge);
    if said_so {
        tracing::error!(request = %head.request, bytes_max, "the bus carries no message large enough for a failure");
        return (None, None);
    }
    head.tokens.0.clear();
    head.logprobs.clear();
    let message = format!(
        "one token with what is asked for beside it is over the bus's bound of {bytes_max} bytes: ask for fewer log-probabilities, or raise max_payload of nats-server"
    );
    head.end = Some(End::Failed(Failure::new(FailureCode::TooLarge, message)));
    (Some(vec![head]), None)
}

#[cfg(test)]
mod tests {
    use baton_protocol::{FinishReason, PullReport, TokenLogprobs, TopLogprob, decode};
    use proptest::prelude::*;

    use super::*;

    fn api(name: &str) -> ApiServerId {
        ApiServerId::new(name).unwrap()
    }

    fn item(request: u128, index: u32, tokens: &[u32], logprobs: bool) -> FrameItem {
        let one = |token: &u32| TokenLogprobs {
            logprob: *token as f32,
            top: vec![TopLogprob(*token, -0.1234567); 20],
        };
        FrameItem {
            request: RequestId(request),
            attempt: 0,
            index,
            tokens: tokens.to_vec().into(),
            logprobs: if logprobs {
                tokens.iter().map(one).collect()
            } else {
                Vec::new()
            },
            pulled: None,
            end: None,
        }
    }

    #[test]
    fn steps_merge_while_the_publisher_is_away() {
        let outbox = TokenOutbox::default();
        let finished = FrameItem {
            end: Some(End::Finished(FinishReason::Stop)),
            ..item(1, 6, &[11], false)
        };
        let pulled = FrameItem {
            pulled: Some(PullReport::default()),
            ..item(1, 5, &[10], false)
        };
        outbox.push(vec![
            (api("a"), pulled),
            (api("b"), item(2, 0, &[20], false)),
        ]);
        outbox.push(vec![
            (api("a"), finished),
            (api("b"), item(2, 1, &[21], false)),
        ]);
        outbox.push(vec![(api("a"), item(1, 0, &[30], false))]);
        let mut servers = outbox.try_take().unwrap().servers;
        servers.sort_by(|a, b| a.0.cmp(&b.0));
        let [(_, a), (_, b)] = &servers[..] else {
            panic!("two API servers: {servers:?}")
        };
        assert_eq!(a[0].tokens.0, [10, 11]);
        assert_eq!(a[0].pulled, Some(PullReport::default()));
        assert_eq!(a[0].end, Some(End::Finished(FinishReason::Stop)));
        assert_eq!(
            (a[1].index, &a[1].tokens.0),
            (0, &vec![30]),
            "nothing follows an end"
        );
        assert_eq!((b.len(), &b[0].tokens.0), (1, &vec![20, 21]));
        assert!(outbox.try_take().is_none());
    }

    #[test]
    fn what_does_not_follow_on_is_not_merged() {
        let outbox = TokenOutbox::default();
        let other_try = FrameItem {
            attempt: 1,
            ..item(1, 2, &[12], false)
        };
        // A gap, the same again, another try: each must reach the API server as what it is.
        for item in [
            item(1, 0, &[10], false),
            item(1, 2, &[12], false),
            item(1, 2, &[12], false),
            other_try,
        ] {
            outbox.push(vec![(api("a"), item)]);
        }
        let items = outbox.try_take().unwrap().servers.pop().unwrap().1;
        let seen: Vec<_> = items
            .iter()
            .map(|item| (item.attempt, item.index, item.tokens.0.len()))
            .collect();
        assert_eq!(seen, [(0, 0, 1), (0, 2, 1), (0, 2, 1), (1, 2, 1)]);
    }

    #[test]
    fn a_full_outbox_says_so() {
        let outbox = TokenOutbox::default();
        assert!(outbox.has_room());
        outbox.push(vec![(api("a"), item(1, 0, &vec![1; WAITING_MAX], false))]);
        assert!(!outbox.has_room());
        assert!(outbox.try_take().unwrap().was_full);
        assert!(outbox.has_room());
    }

    #[test]
    fn a_token_that_cannot_travel_ends_its_try() {
        let worker = WorkerId::new("w").unwrap();
        let messages = messages(&worker, Incarnation(1), vec![item(1, 0, &[7], true)], 450);
        let frame: TokenFrame = decode(&messages[0]).unwrap();
        assert!(
            matches!(&frame.items[0].end, Some(End::Failed(failure)) if !failure.code.retryable()),
            "{frame:?}"
        );
    }

    proptest! {
        /// Whatever the bound, messages keep within it, and put together again they are what went in.
        #[test]
        fn division_loses_nothing(
            counts in prop::collection::vec((1..40usize, any::<bool>()), 1..12),
            bytes_max in 1_200..20_000usize,
        ) {
            let worker = WorkerId::new("w").unwrap();
            let mut items = Vec::new();
            for (i, (count, logprobs)) in counts.into_iter().enumerate() {
                let tokens: Vec<u32> = (0..count as u32).collect();
                items.push(FrameItem {
                    pulled: Some(PullReport { bytes: 5, seconds: 0.5, ..PullReport::default() }),
                    end: Some(End::Finished(FinishReason::Length)),
                    ..item(i as u128, 3, &tokens, logprobs)
                });
            }
            let outbox = TokenOutbox::default();
            for bytes in messages(&worker, Incarnation(1), items.clone(), bytes_max) {
                prop_assert!(bytes.len() <= bytes_max);
                let frame: TokenFrame = decode(&bytes).unwrap();
                outbox.push(frame.items.into_iter().map(|item| (api("a"), item)).collect());
            }
            let again = outbox.try_take().unwrap().servers.pop().unwrap().1;
            prop_assert_eq!(again, items);
        }
    }
}
