//! What the state machine is told and what it says.

use std::time::Duration;

use baton_protocol::{
    DecodeReply, FinishReason, FrameItem, Incarnation, KvHandle, PrefillReply, ProgressReply,
    PullReport, TokenLogprobs, WorkerId,
};

use crate::error::ApiError;

/// One life of one worker.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    /// The worker.
    pub worker: WorkerId,
    /// Which life of it.
    pub incarnation: Incarnation,
}

/// Where a generation stands.
#[derive(Clone, Debug, PartialEq)]
pub enum Phase {
    /// Looking for a context worker.
    Queued,
    /// A context worker has the prompt.
    Prefilling {
        /// Which.
        context: Target,
    },
    /// The KV is ready, or comes while the prompt runs; looking for a decode worker.
    Staged {
        /// Where it is.
        handle: Box<KvHandle>,
    },
    /// A decode worker was asked to pull it.
    Pulling {
        /// Where the KV is.
        handle: Box<KvHandle>,
        /// Who pulls.
        decode: Target,
    },
    /// Tokens come from a decode worker.
    Decoding {
        /// Which.
        decode: Target,
    },
    /// Ended by its own rules.
    Done,
    /// Ended otherwise.
    Failed,
}

impl Phase {
    /// Where it is, for people: goes on after "while".
    pub fn place(&self) -> String {
        match self {
            Self::Queued => "it waited for a context worker with room".to_owned(),
            Self::Prefilling { context } => format!("it was prefilling on {}", context.worker),
            Self::Staged { handle } if handle.is_streamed() => {
                format!("it was prefilling on {}", handle.worker)
            }
            Self::Staged { handle } => {
                format!(
                    "its KV waited on {} for a decode worker with room",
                    handle.worker
                )
            }
            Self::Pulling { handle, decode } if handle.is_streamed() => {
                let (context, decode) = (&handle.worker, &decode.worker);
                format!("it was prefilling on {context}, and {decode} pulled its KV")
            }
            Self::Pulling { handle, decode } => {
                format!("{} pulled its KV from {}", decode.worker, handle.worker)
            }
            Self::Decoding { decode } => format!("it was decoding on {}", decode.worker),
            Self::Done | Self::Failed => "it ended".to_owned(),
        }
    }
}

/// Why a request on the bus has no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoReply {
    /// Nobody listens there.
    NoResponders,
    /// No answer in time.
    TimedOut,
    /// The message is over the bus's bound.
    TooLarge {
        /// Its size.
        bytes: usize,
        /// The bound.
        bytes_max: usize,
    },
    /// The bus failed, or the answer makes no sense.
    Broken(String),
}

/// What the cluster has too much of to take a request on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overbooked {
    /// Prompts: its first token would come later than promised.
    Prompt,
    /// Generations: no decode worker would take it in time.
    Decode,
}

/// What happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// The best worker for what [`Action::ChooseContext`] or [`Action::ChooseDecode`] asked, if any.
    Chosen(Option<Target>),
    /// The context worker's answer.
    Prefill(Result<PrefillReply, NoReply>),
    /// Its answer to [`Action::AwaitPrompt`].
    Progress(Result<ProgressReply, NoReply>),
    /// The decode worker's answer.
    Decode(Result<DecodeReply, NoReply>),
    /// This request's share of a token frame.
    Item(FrameItem),
    /// A worker is gone.
    WorkerLost(Target),
    /// Nothing was heard for too long.
    Stalled,
    /// The bus was away and is back.
    BusBack,
    /// The time of [`Action::Wait`] is over.
    WaitOver,
    /// A place became free on a decode worker, before that time was over.
    RoomMade,
    /// The lease of the KV that waits for a decode worker has ended.
    LeaseLost,
    /// Before its prompt was sent: it would wait too long.
    Overbooked {
        /// For what.
        why: Overbooked,
        /// How long: for a decode worker, or from its arrival to its first token.
        wait: Duration,
        /// When that may have become short enough.
        retry_after: Duration,
    },
    /// A stop string was found in the text.
    StopFound,
    /// The budget is used up.
    Deadline,
    /// The client left.
    ClientLeft,
    /// This API server ends, and has waited for as long as it may.
    Leaving,
    /// Another API server has this one's name.
    NameLost,
    /// The client is there and reads nothing.
    ClientStalled,
}

/// What to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Find a context worker and answer [`Input::Chosen`].
    ChooseContext,
    /// Find a decode worker for the staged handle and answer [`Input::Chosen`], unless the best one can have it only when its prompt is
    /// done.
    ChooseDecode,
    /// Send prompt and output so far.
    SendPrefill(Target),
    /// Ask the holder of the handle for the first token, and answer [`Input::Progress`].
    AwaitPrompt,
    /// Send the handle. The attempt tells its frames from those of other tries.
    SendDecode {
        /// To whom.
        decode: Target,
        /// Number of the try.
        attempt: u32,
    },
    /// The first prefill is done: what it reports of the prompt.
    Prompt {
        /// Tokens the prefix index had.
        cached_tokens: u32,
        /// Milliseconds the prompt waited on the worker.
        queue_ms: f32,
        /// For `echo`.
        logprobs: Option<Vec<TokenLogprobs>>,
    },
    /// The pull is done.
    Pulled(PullReport),
    /// Tokens for the client. `stop` tells that the last one is a stop id, which has no text.
    Emit {
        /// New tokens.
        tokens: Vec<u32>,
        /// One for each, if asked for.
        logprobs: Vec<TokenLogprobs>,
        /// The last token is a stop id.
        stop: bool,
    },
    /// Answer [`Input::WaitOver`] after this time.
    Wait(Duration),
    /// Tell a worker to drop the request.
    Abort {
        /// Whom.
        target: Target,
        /// Why.
        reason: &'static str,
    },
    /// It is retried; for metrics and logs.
    Retried(&'static str),
    /// The end, by its own rules.
    Finish(FinishReason),
    /// The end, otherwise.
    Fail(ApiError),
}
