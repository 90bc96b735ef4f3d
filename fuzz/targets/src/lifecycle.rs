//! The life of a generation among workers that say anything.

use std::time::Duration;

use arbitrary::{Arbitrary, Unstructured};
use baton_api_server::fuzzing::{Action, Input, Lifecycle, NoReply, Overbooked, Rules, Target};
use baton_protocol::{
    DecodeReply, End, Failure, FailureCode, FinishReason, FrameItem, HandleId, Incarnation,
    KvHandle, Nonce, PROTOCOL_VERSION, PrefillReply, PrefillTimings, ProgressReply, PullReport,
    Refusal, RequestId, TokenLogprobs, WorkerId,
};

use crate::fixture;

#[derive(Arbitrary, Debug)]
struct Case {
    max_tokens: u8,
    min_tokens: u8,
    stop: Option<u8>,
    said: Vec<Said>,
}

#[derive(Arbitrary, Debug)]
enum Said {
    Chosen(Option<Who>),
    Ready {
        who: Who,
        token: u8,
        finish: Option<bool>,
        logprobs: u8,
    },
    Begun(Who, u8),
    Running,
    Done {
        token: u8,
        finish: Option<bool>,
        logprobs: u8,
    },
    PromptFailed(u8),
    NoProgress(u8),
    PrefillRefused(Why),
    PrefillFailed(u8),
    NoPrefill(u8),
    Admitted(Who),
    DecodeRefused(Why),
    NoDecode(u8),
    Item {
        attempt: Attempt,
        index: Index,
        tokens: Vec<u8>,
        logprobs: u8,
        pulled: bool,
        end: Option<Ended>,
    },
    Lost(Who),
    BusBack,
    Leaving,
    Stalled,
    WaitOver,
    RoomMade,
    StopFound,
    Deadline,
    ClientLeft,
    ClientStalled,
    LeaseLost,
    Overbooked(u32, u32),
    NameLost,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Who(u8, bool);

#[derive(Arbitrary, Debug)]
enum Attempt {
    /// The one under way, if there is one.
    Now,
    Any(u32),
}

#[derive(Arbitrary, Debug)]
enum Index {
    /// Where the output ends.
    Next,
    Near(u8),
    Any(u32),
}

#[derive(Arbitrary, Debug)]
enum Ended {
    Stop,
    Length,
    Failed(u8),
}

#[derive(Arbitrary, Debug)]
enum Why {
    Busy(u32),
    Draining,
    WrongModel,
    TooLong(u32),
    Malformed,
    Unreachable,
    WrongRole,
    Unknown,
}

/// Tells the state machine all of it. It ends once or not at all; what it gives out is its output, and no more than was
/// asked for.
pub fn lifecycle(data: &[u8]) {
    let Ok(case) = Case::arbitrary(&mut Unstructured::new(data)) else {
        return;
    };
    let rules = Rules {
        max_tokens: u32::from(case.max_tokens) + 1,
        stop_token_ids: case.stop.map(u32::from).into_iter().collect(),
        min_tokens: u32::from(case.min_tokens),
    };
    let max_tokens = rules.max_tokens as usize;
    let mut actions = Vec::new();
    let mut life = Lifecycle::new(rules, &mut actions);
    let mut told = Vec::new();
    let (mut ends, mut attempts) = (0, 0);
    for said in case.said {
        let was_ended = life.ended();
        life.step(input(said, attempts, life.output().len()), &mut actions);
        assert!(
            !was_ended || actions.is_empty(),
            "{actions:?} after the end"
        );
        assert!(actions.len() <= 8, "{actions:?}");
        for action in actions.drain(..) {
            match action {
                Action::Emit { tokens, .. } => told.extend(tokens),
                Action::Finish(_) | Action::Fail(_) => ends += 1,
                Action::SendDecode { attempt, .. } => {
                    assert_eq!(attempt, attempts, "tries are numbered");
                    attempts += 1;
                }
                _ => {}
            }
        }
        assert_eq!(life.output(), told);
        assert!(told.len() <= max_tokens, "{} of {max_tokens}", told.len());
        assert_eq!(ends, usize::from(life.ended()));
        assert!(!life.ended() || life.involved().is_empty());
    }
}

fn input(said: Said, attempts: u32, output: usize) -> Input {
    const V: u16 = PROTOCOL_VERSION;
    match said {
        Said::Chosen(who) => Input::Chosen(who.map(target)),
        Said::Ready {
            who,
            token,
            finish,
            logprobs,
        } => Input::Prefill(Ok(PrefillReply::Ready {
            v: V,
            handle: Box::new(handle(who, token, finish, logprobs)),
            prompt_logprobs: (logprobs > 100).then(|| probabilities(logprobs)),
        })),
        Said::Begun(who, logprobs) => Input::Prefill(Ok(PrefillReply::Begun {
            v: V,
            handle: Box::new(KvHandle {
                first_token: None,
                ..handle(who, 0, None, logprobs)
            }),
        })),
        Said::Running => Input::Progress(Ok(ProgressReply::Running { v: V, tokens: 1 })),
        Said::Done {
            token,
            finish,
            logprobs,
        } => Input::Progress(Ok(ProgressReply::Done {
            v: V,
            first_token: token.into(),
            first_logprobs: probabilities(logprobs).pop(),
            finish: finish.map(|stop| match stop {
                true => FinishReason::Stop,
                false => FinishReason::Length,
            }),
        })),
        Said::PromptFailed(code) => Input::Progress(Ok(ProgressReply::Failed {
            v: V,
            failure: failure(code),
        })),
        Said::NoProgress(why) => Input::Progress(Err(no_reply(why))),
        Said::PrefillRefused(why) => Input::Prefill(Ok(PrefillReply::Refused {
            v: V,
            refusal: refusal(why),
        })),
        Said::PrefillFailed(code) => Input::Prefill(Ok(PrefillReply::Failed {
            v: V,
            failure: failure(code),
        })),
        Said::NoPrefill(why) => Input::Prefill(Err(no_reply(why))),
        Said::Admitted(who) => Input::Decode(Ok(DecodeReply::Admitted {
            v: V,
            incarnation: target(who).incarnation,
        })),
        Said::DecodeRefused(why) => Input::Decode(Ok(DecodeReply::Refused {
            v: V,
            refusal: refusal(why),
        })),
        Said::NoDecode(why) => Input::Decode(Err(no_reply(why))),
        Said::Item {
            attempt,
            index,
            tokens,
            logprobs,
            pulled,
            end,
        } => Input::Item(FrameItem {
            request: RequestId(1),
            attempt: match attempt {
                Attempt::Now => attempts.saturating_sub(1),
                Attempt::Any(attempt) => attempt,
            },
            index: match index {
                Index::Next => output as u32,
                Index::Near(index) => u32::from(index),
                Index::Any(index) => index,
            },
            tokens: tokens
                .iter()
                .map(|token| u32::from(*token))
                .collect::<Vec<u32>>()
                .into(),
            logprobs: probabilities(logprobs),
            pulled: pulled.then_some(PullReport {
                bytes: u64::MAX,
                seconds: f32::INFINITY,
                handover_seconds: Some(f32::NAN),
                parts: None,
            }),
            end: end.map(|end| match end {
                Ended::Stop => End::Finished(FinishReason::Stop),
                Ended::Length => End::Finished(FinishReason::Length),
                Ended::Failed(code) => End::Failed(failure(code)),
            }),
        }),
        Said::Lost(who) => Input::WorkerLost(target(who)),
        Said::BusBack => Input::BusBack,
        Said::Leaving => Input::Leaving,
        Said::Stalled => Input::Stalled,
        Said::WaitOver => Input::WaitOver,
        Said::RoomMade => Input::RoomMade,
        Said::StopFound => Input::StopFound,
        Said::Deadline => Input::Deadline,
        Said::ClientLeft => Input::ClientLeft,
        Said::ClientStalled => Input::ClientStalled,
        Said::LeaseLost => Input::LeaseLost,
        Said::Overbooked(wait, retry_after) => Input::Overbooked {
            why: match wait % 2 {
                0 => Overbooked::Prompt,
                _ => Overbooked::Decode,
            },
            wait: Duration::from_millis(wait.into()),
            retry_after: Duration::from_millis(retry_after.into()),
        },
        Said::NameLost => Input::NameLost,
    }
}

fn target(Who(name, restarted): Who) -> Target {
    Target {
        worker: WorkerId::new(format!("w{}", name % 4)).expect("a name"),
        incarnation: Incarnation(restarted.into()),
    }
}

fn handle(who: Who, token: u8, finish: Option<bool>, logprobs: u8) -> KvHandle {
    let Target {
        worker,
        incarnation,
    } = target(who);
    KvHandle {
        worker,
        incarnation,
        handle: HandleId(1),
        nonce: Nonce(1),
        model: fixture::fingerprint(),
        kv: fixture::kv(),
        runs: Vec::new(),
        valid_tokens: u32::MAX,
        lease_ms: 0,
        first_token: Some(token.into()),
        first_logprobs: probabilities(logprobs).pop(),
        finish: finish.map(|stop| match stop {
            true => FinishReason::Stop,
            false => FinishReason::Length,
        }),
        cached_tokens: u32::MAX,
        timings: PrefillTimings {
            queue_ms: f32::INFINITY,
            compute_ms: -1.0,
        },
        prefix_pull: None,
    }
}

fn probabilities(count: u8) -> Vec<TokenLogprobs> {
    vec![
        TokenLogprobs {
            logprob: f32::INFINITY,
            top: Vec::new()
        };
        usize::from(count % 8)
    ]
}

fn refusal(why: Why) -> Refusal {
    let detail = String::new();
    match why {
        Why::Busy(retry_after_ms) => Refusal::Busy { retry_after_ms },
        Why::Draining => Refusal::Draining,
        Why::WrongModel => Refusal::WrongModel { detail },
        Why::TooLong(tokens_max) => Refusal::TooLong { tokens_max },
        Why::Malformed => Refusal::Malformed { detail },
        Why::Unreachable => Refusal::Unreachable { detail },
        Why::WrongRole => Refusal::WrongRole { detail },
        Why::Unknown => Refusal::Unknown,
    }
}

fn failure(code: u8) -> Failure {
    let codes = [
        FailureCode::HandleInvalid,
        FailureCode::PullFailed,
        FailureCode::Preempted,
        FailureCode::Executor,
        FailureCode::NoToken,
        FailureCode::Deadline,
        FailureCode::Draining,
        FailureCode::TooLarge,
        FailureCode::Internal,
        FailureCode::Unknown,
    ];
    Failure::new(codes[usize::from(code) % codes.len()], "")
}

fn no_reply(why: u8) -> NoReply {
    match why % 4 {
        0 => NoReply::NoResponders,
        1 => NoReply::TimedOut,
        2 => NoReply::TooLarge {
            bytes: usize::MAX,
            bytes_max: 0,
        },
        _ => NoReply::Broken(String::new()),
    }
}
