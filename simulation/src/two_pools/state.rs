//! A state of the two pools and of the API server.

/// The API server's view: `lifecycle::Phase`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Phase {
    Queued,
    Prefilling,
    Staged,
    Pulling,
    Decoding,
    Ended,
}

/// What the context worker has of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Context {
    Nothing,
    Waiting,
    Running,
    Leased,
}

/// What the decode worker has of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Decode {
    Nothing,
    Pulling(Pull),
    Running,
}

/// A pull: blocks are read one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Pull {
    /// Blocks of the handle.
    pub(super) blocks: u8,
    /// Blocks of it that were read.
    pub(super) read: u8,
    /// The lease that it reads from has not ended since.
    pub(super) is_whole: bool,
    /// A block was read before its step was over.
    pub(super) is_torn: bool,
    /// It was released, and that was valid.
    pub(super) is_released: bool,
}

/// What the decode worker says of its end of a try.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum News {
    Finished,
    Again,
}

/// A renewal of the handle that the API server has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Renewal {
    Idle,
    /// Under way to the context worker.
    Asked,
    /// Under way back.
    Answered {
        is_valid: bool,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Request {
    pub(super) phase: Phase,
    /// Output so far.
    pub(super) made: u8,
    pub(super) context: Context,
    pub(super) context_blocks: u8,
    /// Blocks of the prompt whose steps were collected: a chunk is one block.
    pub(super) computed: u8,
    pub(super) decode: Decode,
    pub(super) decode_blocks: u8,
    /// Under way to the API server: the handle of a prompt that still runs.
    pub(super) begun: bool,
    /// The API server has that handle and waits for the first token.
    pub(super) is_streamed: bool,
    /// Under way to the API server: the first token, with the handle if it has none, or that it is finished already.
    pub(super) ready: Option<bool>,
    /// The handle that the API server has, or that is under way to it, is that of the lease.
    pub(super) is_current: bool,
    pub(super) news: Option<News>,
    pub(super) renewal: Renewal,
    /// The blocks of its lease were free for a while.
    pub(super) is_void: bool,
    /// The prompt is gone, and its lease is not: only where a rule is taken away.
    pub(super) is_ghost: bool,
    /// Under way to the workers.
    pub(super) context_abort: bool,
    pub(super) decode_abort: bool,
    /// Its API server is gone.
    pub(super) is_orphan: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct State {
    pub(super) requests: Vec<Request>,
    /// Prompts without blocks, in order of arrival.
    pub(super) waiting: Vec<usize>,
    /// Generating sequences, in order of arrival.
    pub(super) running: Vec<usize>,
    pub(super) context_free: u8,
    pub(super) decode_free: u8,
}

/// Whether a transition comes for sure, if it stays possible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Surely {
    Comes,
    Perhaps,
}

pub(super) type Next = (Surely, &'static str, usize, State);

impl State {
    /// What the context worker has of it is free again: `Desk::end_prefill`, `LeaseTable::abort`.
    pub(super) fn end_context(&mut self, r: usize) {
        self.waiting.retain(|other| *other != r);
        let request = &mut self.requests[r];
        self.context_free += std::mem::take(&mut request.context_blocks);
        request.context = Context::Nothing;
        request.computed = 0;
        request.is_current = false;
        if let Decode::Pulling(pull) = &mut request.decode {
            pull.is_whole = false;
        }
    }

    /// What the decode worker has of it is free again: `Desk::end_decode`.
    pub(super) fn end_decode(&mut self, r: usize) {
        self.running.retain(|other| *other != r);
        let request = &mut self.requests[r];
        self.decode_free += std::mem::take(&mut request.decode_blocks);
        request.decode = Decode::Nothing;
    }

    /// `Lifecycle::abort_involved`, and on to another phase.
    pub(super) fn give_up(&mut self, r: usize, phase: Phase) {
        let request = &mut self.requests[r];
        match request.phase {
            Phase::Prefilling | Phase::Staged => request.context_abort = true,
            Phase::Pulling => (request.context_abort, request.decode_abort) = (true, true),
            Phase::Decoding => request.decode_abort = true,
            Phase::Queued | Phase::Ended => {}
        }
        request.phase = phase;
        request.renewal = Renewal::Idle;
        (request.begun, request.is_streamed) = (false, false);
        (request.ready, request.news) = (None, None);
    }
}
