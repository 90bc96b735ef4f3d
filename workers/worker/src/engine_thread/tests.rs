use baton_engine::{
    EngineConfig, Executor, ExecutorError, ExecutorInfo, FakeConfig, FakeExecutor, StepOutput,
    StepPlan, TokenMask,
};
use baton_protocol::{CacheSalt, Generation, RequestId, SequenceSpec};

use super::*;

mod grammars;
mod token_rules;

/// Works until the given step, and then fails or panics.
struct Breaking {
    inner: FakeExecutor,
    steps_left: u32,
    panics: bool,
}

impl Executor for Breaking {
    fn info(&self) -> &ExecutorInfo {
        self.inner.info()
    }

    fn submit(&mut self, plan: &StepPlan) -> Result<(), ExecutorError> {
        self.inner.submit(plan)
    }

    fn choose(&mut self, masks: &[Option<Arc<TokenMask>>]) -> Result<(), ExecutorError> {
        self.inner.choose(masks)
    }

    fn collect(&mut self) -> Result<StepOutput, ExecutorError> {
        if self.steps_left == 0 {
            assert!(!self.panics, "out of steps");
            return Err(ExecutorError::failed("the device is gone"));
        }
        self.steps_left -= 1;
        self.inner.collect()
    }
}

struct Fixture {
    engine: EngineHandle,
    events: mpsc::Receiver<EngineEvent>,
    tokens: Arc<TokenOutbox>,
    pool: baton_engine::BlockPool,
}

fn start(executor: impl Executor + 'static) -> Fixture {
    start_with(executor, None)
}

fn start_with(executor: impl Executor + 'static, grammars: Option<Grammars>) -> Fixture {
    let config = EngineConfig {
        step_tokens_max: 64,
        sequences_max: 8,
        queue_max: 8,
        prefix_cache: false,
    };
    let engine = Engine::new(Box::new(executor), config);
    let pool = engine.pool();
    let tokens = Arc::new(TokenOutbox::default());
    let (engine, events) = EngineHandle::start(engine, grammars, tokens.clone(), 16).unwrap();
    Fixture {
        engine,
        events,
        tokens,
        pool,
    }
}

fn spec(max_tokens: u32) -> SequenceSpec {
    SequenceSpec {
        tokens: vec![5; 20].into(),
        prompt_tokens: 20,
        generation: Generation {
            max_tokens,
            ..Generation::default()
        },
        cache_salt: CacheSalt::NONE,
        service: baton_protocol::Service::default(),
    }
}

fn route(key: u64) -> Route {
    Route {
        api_server: ApiServerId::new("api").unwrap(),
        request: RequestId(key.into()),
        attempt: 0,
    }
}

fn decode(fixture: &Fixture, key: u64, max_tokens: u32) {
    let route = route(key);
    let blocks = fixture.pool.reserve(2).unwrap();
    let (spec, pulled) = (spec(max_tokens), PullReport::default());
    assert!(fixture.engine.send(Command::Decode {
        key,
        route,
        spec,
        next: 7,
        first: None,
        blocks,
        pulled,
        trace: None,
    }));
}

fn breaks(panics: bool, says: &str) {
    let inner = FakeExecutor::new(FakeConfig::default());
    let mut fixture = start(Breaking {
        inner,
        steps_left: 5,
        panics,
    });
    decode(&fixture, 1, 100);
    let Some(EngineEvent::Failed { message }) = fixture.events.blocking_recv() else {
        panic!("no failure was reported");
    };
    assert!(message.contains(says), "{message}");
    let items = fixture.tokens.try_take().unwrap().servers.pop().unwrap().1;
    assert_eq!(items[0].tokens.0.len(), 5, "the tokens before it are good");
    let Some(End::Failed(failure)) = &items[0].end else {
        panic!("{items:?}")
    };
    assert_eq!(failure.code, FailureCode::Executor);
    assert_eq!(fixture.pool.stats().used, 0);

    // Whatever comes later is turned away.
    assert!(fixture.engine.send(Command::Prefill {
        key: 2,
        spec: spec(3),
        prompt_logprobs: None,
        stream: false,
    }));
    let left = fixture.events.blocking_recv();
    assert!(matches!(
        left,
        Some(EngineEvent::Left {
            key: 2,
            refusal: Some(_)
        })
    ));
    fixture.engine.shutdown();
}

#[test]
fn a_failing_executor_ends_everything() {
    breaks(false, "the device is gone");
}

#[test]
fn a_panicking_executor_is_a_failing_one() {
    breaks(true, "out of steps");
}

#[test]
fn a_full_outbox_stops_the_engine_but_not_aborts() {
    for steps_in_flight in [1, 2] {
        a_full_outbox(steps_in_flight);
    }
}

fn a_full_outbox(steps_in_flight: usize) {
    let config = FakeConfig {
        steps_in_flight,
        tokens_max: 1 << 20,
        blocks: 1 << 16,
        ..FakeConfig::default()
    };
    let mut fixture = start(FakeExecutor::new(config));
    decode(&fixture, 1, 1 << 20);
    while fixture.tokens.has_room() {
        std::thread::yield_now();
    }
    // Nobody takes tokens: an abort is carried out all the same.
    assert!(fixture.engine.send(Command::Abort {
        key: 1,
        failure: None
    }));
    let left = fixture.events.blocking_recv();
    assert!(matches!(
        left,
        Some(EngineEvent::Left {
            key: 1,
            refusal: None
        })
    ));
    // A step in flight is waited for; that is not the bus's doing.
    while fixture.pool.stats().used > 0 {
        std::thread::yield_now();
    }
    let taken = fixture.tokens.try_take().unwrap();
    assert!(taken.was_full);
    let count = taken.servers[0].1[0].tokens.0.len();
    assert!(count < 2 * (1 << 16), "it went on for {count} tokens");
    fixture.engine.shutdown();
}

#[test]
fn blocks_that_come_back_let_a_waiting_prompt_run() {
    let config = FakeConfig {
        blocks: 4,
        ..FakeConfig::default()
    };
    let mut fixture = start(FakeExecutor::new(config));
    let held = HeldBlocks::new(
        fixture.pool.reserve(3).unwrap(),
        fixture.engine.waker.clone(),
    );
    assert!(fixture.engine.send(Command::Prefill {
        key: 1,
        spec: spec(3),
        prompt_logprobs: None,
        stream: false,
    }));
    drop(held);
    let done = fixture.events.blocking_recv();
    assert!(matches!(done, Some(EngineEvent::Prefilled(done)) if done.key == 1));
    fixture.engine.shutdown();
}
