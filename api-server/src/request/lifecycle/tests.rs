use super::ends::{EXECUTORS_MAX, RETRIES_MAX};
use super::room::ABSENT_WAIT;
use super::streaming::UNANSWERED_MAX;
use super::*;
use baton_protocol::{
    Failure, HandleId, Incarnation, ModelFingerprint, Nonce, PackedTokens, PrefillTimings,
    ProgressReply, Refusal,
};
use proptest::prelude::*;

use crate::fleet::membership::tests::beat;
use baton_protocol::{PROTOCOL_VERSION, RequestId, Role};

const V: u16 = PROTOCOL_VERSION;

fn target(name: &str) -> Target {
    Target {
        worker: WorkerId::new(name).unwrap(),
        incarnation: Incarnation(1),
    }
}

pub(crate) fn handle(worker: &str, first_token: u32) -> Box<KvHandle> {
    Box::new(KvHandle {
        worker: WorkerId::new(worker).unwrap(),
        incarnation: Incarnation(1),
        handle: HandleId(1),
        nonce: Nonce(2),
        model: ModelFingerprint::new("0".repeat(64)).unwrap(),
        kv: beat("x", Role::Both, &[]).kv,
        runs: Vec::new(),
        valid_tokens: 3,
        lease_ms: 1000,
        first_token: Some(first_token),
        first_logprobs: None,
        finish: None,
        cached_tokens: 0,
        timings: PrefillTimings::default(),
        prefix_pull: None,
    })
}

fn ready(worker: &str, token: u32) -> Input {
    let handle = handle(worker, token);
    Input::Prefill(Ok(PrefillReply::Ready {
        v: V,
        handle,
        prompt_logprobs: None,
    }))
}

fn item(attempt: u32, index: u32, tokens: &[u32], end: Option<End>) -> Input {
    Input::Item(FrameItem {
        request: RequestId(1),
        attempt,
        index,
        tokens: PackedTokens(tokens.to_vec()),
        logprobs: Vec::new(),
        pulled: None,
        end,
    })
}

fn admitted() -> Input {
    Input::Decode(Ok(DecodeReply::Admitted {
        v: V,
        incarnation: Incarnation(1),
    }))
}

fn busy_decode(retry_after_ms: u32) -> Input {
    let refusal = Refusal::Busy { retry_after_ms };
    Input::Decode(Ok(DecodeReply::Refused { v: V, refusal }))
}

fn busy_prefill() -> Input {
    let refusal = Refusal::Busy {
        retry_after_ms: 700,
    };
    Input::Prefill(Ok(PrefillReply::Refused { v: V, refusal }))
}

struct Run {
    life: Lifecycle,
    out: Vec<Action>,
}

impl Run {
    fn new() -> Self {
        let mut out = Vec::new();
        let rules = Rules {
            max_tokens: 100,
            stop_token_ids: vec![2],
            min_tokens: 0,
        };
        let life = Lifecycle::new(rules, &mut out);
        out.clear();
        Self { life, out }
    }

    fn step(&mut self, input: Input) -> Vec<Action> {
        self.life.step(input, &mut self.out);
        std::mem::take(&mut self.out)
    }

    /// With its first token, and KV on `c`.
    fn staged() -> Self {
        let mut run = Self::new();
        run.step(Input::Chosen(Some(target("c"))));
        run.step(ready("c", 10));
        run
    }

    fn decoding() -> Self {
        let mut run = Self::new();
        run.step(Input::Chosen(Some(target("c"))));
        run.step(ready("c", 10));
        run.step(Input::Chosen(Some(target("d"))));
        run.step(admitted());
        run.step(item(0, 1, &[11], None));
        assert_eq!(
            run.life.phase(),
            &Phase::Decoding {
                decode: target("d")
            }
        );
        run
    }
}

fn aborts(actions: &[Action]) -> Vec<&str> {
    let abort = |action: &'_ Action| match action {
        Action::Abort { target, .. } => Some(target.worker.clone()),
        _ => None,
    };
    let names: Vec<WorkerId> = actions.iter().filter_map(abort).collect();
    names
        .iter()
        .map(|name| if name.as_str() == "c" { "c" } else { "d" })
        .collect()
}

#[test]
fn the_straight_road() {
    let mut run = Run::new();
    let context = target("c");
    assert_eq!(
        run.step(Input::Chosen(Some(context.clone()))),
        [Action::SendPrefill(context)]
    );
    let actions = run.step(ready("c", 10));
    assert!(matches!(actions[0], Action::Prompt { .. }));
    let first = Action::Emit {
        tokens: vec![10],
        logprobs: Vec::new(),
        stop: false,
    };
    assert_eq!(actions[1..], [first, Action::ChooseDecode]);
    let decode = target("d");
    assert_eq!(
        run.step(Input::Chosen(Some(decode.clone()))),
        [Action::SendDecode { decode, attempt: 0 }]
    );
    assert!(run.step(admitted()).is_empty());
    let end = Some(End::Finished(FinishReason::Stop));
    let actions = run.step(item(0, 1, &[11, 2], end));
    let last = Action::Emit {
        tokens: vec![11, 2],
        logprobs: Vec::new(),
        stop: true,
    };
    assert_eq!(actions, [last, Action::Finish(FinishReason::Stop)]);
    assert_eq!(run.life.output(), [10, 11, 2]);
}

#[test]
fn a_first_token_that_ends_it_needs_no_decode_worker() {
    let mut run = Run::new();
    run.step(Input::Chosen(Some(target("c"))));
    let mut done = handle("c", 2);
    done.finish = Some(FinishReason::Stop);
    let reply = PrefillReply::Ready {
        v: V,
        handle: done,
        prompt_logprobs: None,
    };
    let actions = run.step(Input::Prefill(Ok(reply)));
    assert_eq!(actions.last(), Some(&Action::Finish(FinishReason::Stop)));
}

#[test]
fn busy_goes_to_the_next_worker_and_then_to_the_client() {
    let mut run = Run::new();
    run.step(Input::Chosen(Some(target("c"))));
    assert_eq!(run.step(busy_prefill()), [Action::ChooseContext]);
    assert_eq!(run.life.refused(), [WorkerId::new("c").unwrap()]);
    let actions = run.step(Input::Chosen(None));
    let [Action::Fail(error)] = actions.as_slice() else {
        panic!("{actions:?}")
    };
    assert_eq!(
        (error.kind, error.retry_after_ms),
        (ErrorKind::Busy, Some(700))
    );
}

fn too_long(tokens_max: u32) -> Refusal {
    Refusal::TooLong { tokens_max }
}

#[test]
fn what_is_too_long_for_one_worker_may_fit_another() {
    let mut run = Run::new();
    for (name, tokens_max) in [("c", 64), ("d", 128)] {
        run.step(Input::Chosen(Some(target(name))));
        let refusal = too_long(tokens_max);
        let reply = Input::Prefill(Ok(PrefillReply::Refused { v: V, refusal }));
        assert_eq!(run.step(reply), [Action::ChooseContext]);
    }
    let actions = run.step(Input::Chosen(None));
    let [Action::Fail(error)] = actions.as_slice() else {
        panic!("{actions:?}")
    };
    assert_eq!(error.kind, ErrorKind::ContextLength);
    assert!(error.message.contains("128 tokens"), "{}", error.message);
}

#[test]
fn what_fits_no_decode_worker_is_not_tried_again() {
    let mut run = Run::new();
    run.step(Input::Chosen(Some(target("c"))));
    run.step(ready("c", 10));
    run.step(Input::Chosen(Some(target("d"))));
    let refusal = too_long(64);
    let reply = Input::Decode(Ok(DecodeReply::Refused { v: V, refusal }));
    assert_eq!(run.step(reply), [Action::ChooseDecode]);
    let actions = run.step(Input::Chosen(None));
    let [Action::Abort { .. }, Action::Fail(error)] = actions.as_slice() else {
        panic!("{actions:?}")
    };
    assert_eq!(error.kind, ErrorKind::ContextLength);
}

/// It was killed and is starting again; until it is missed it seems to serve.
#[test]
fn a_decode_worker_that_is_not_there_is_waited_for() {
    let mut run = Run::staged();
    let mut waited = Duration::ZERO;
    while waited < ABSENT_WAIT {
        run.step(Input::Chosen(Some(target("d"))));
        let nobody = Input::Decode(Err(NoReply::NoResponders));
        assert_eq!(run.step(nobody), [Action::ChooseDecode]);
        let actions = run.step(Input::Chosen(None));
        let [Action::Wait(time)] = actions[..] else {
            panic!("after {waited:?}: {actions:?}")
        };
        waited += time;
        assert_eq!(run.step(Input::WaitOver), [Action::ChooseDecode]);
    }
    run.step(Input::Chosen(Some(target("d"))));
    run.step(Input::Decode(Err(NoReply::NoResponders)));
    let actions = run.step(Input::Chosen(None));
    let [Action::Abort { .. }, Action::Fail(error)] = actions.as_slice() else {
        panic!("{actions:?}")
    };
    assert_eq!(error.kind, ErrorKind::NoWorker);
}

/// Waits as long as a hundred absent ones would be waited for, asked again by the clock and by places that became free.
#[test]
fn whoever_has_a_first_token_waits_for_a_full_worker_until_its_deadline() {
    let mut run = Run::staged();
    let mut waited = Duration::ZERO;
    let mut rounds = 0;
    while waited < 100 * ABSENT_WAIT {
        run.step(Input::Chosen(Some(target("d"))));
        assert_eq!(run.step(busy_decode(20)), [Action::ChooseDecode]);
        let actions = run.step(Input::Chosen(None));
        let [Action::Wait(time)] = actions[..] else {
            panic!("after {waited:?}: {actions:?}")
        };
        waited += time;
        rounds += 1;
        let over = match rounds % 3 {
            0 => Input::RoomMade,
            _ => Input::WaitOver,
        };
        assert_eq!(run.step(over), [Action::ChooseDecode]);
    }
    let actions = run.step(Input::Deadline);
    assert!(
        matches!(actions.last(), Some(Action::Fail(error)) if error.kind == ErrorKind::Deadline),
        "{actions:?}"
    );
}

#[test]
fn waits_for_room_are_as_long_as_the_worker_says_within_bounds() {
    for (hint, expected) in [(0, 50), (20, 50), (321, 321), (60_000, 500)] {
        let mut run = Run::staged();
        run.step(Input::Chosen(Some(target("d"))));
        run.step(busy_decode(hint));
        let wait = Action::Wait(Duration::from_millis(expected));
        assert_eq!(run.step(Input::Chosen(None)), [wait]);
    }
}

/// A retry that finds every context worker full has the client's first token, too.
#[test]
fn a_retry_waits_for_a_full_context_worker() {
    let mut run = Run::decoding();
    run.step(Input::WorkerLost(target("d")));
    let mut waited = Duration::ZERO;
    while waited < 10 * ABSENT_WAIT {
        run.step(Input::Chosen(Some(target("c"))));
        assert_eq!(run.step(busy_prefill()), [Action::ChooseContext]);
        let actions = run.step(Input::Chosen(None));
        let [Action::Wait(time)] = actions[..] else {
            panic!("after {waited:?}: {actions:?}")
        };
        waited += time;
        assert_eq!(run.step(Input::WaitOver), [Action::ChooseContext]);
    }
}

#[test]
fn a_worker_that_refused_it_hears_when_another_one_has_it() {
    let full = |run: &mut Run, name| {
        run.step(Input::Chosen(Some(target(name))));
        run.step(busy_decode(20));
    };
    let told = |actions: &[Action]| -> Vec<String> {
        let told = |action: &Action| match action {
            Action::Abort { target, .. } => Some(target.worker.to_string()),
            _ => None,
        };
        actions.iter().filter_map(told).collect()
    };
    for overtaken in [false, true] {
        let mut run = Run::staged();
        for name in ["d", "e", "d", "c"] {
            full(&mut run, name);
        }
        run.step(Input::Chosen(Some(target("f"))));
        // `c` holds the KV, and hears of it by the release.
        let actions = match overtaken {
            true => run.step(item(4, 1, &[11], None)),
            false => run.step(admitted()),
        };
        assert_eq!(told(&actions), ["d", "e"]);
        let actions = run.step(Input::ClientLeft);
        assert!(!told(&actions).contains(&"d".to_owned()), "{actions:?}");
    }
    let mut run = Run::staged();
    full(&mut run, "d");
    let actions = run.step(Input::ClientLeft);
    assert_eq!(told(&actions), ["c", "d"], "nobody keeps a place for it");
}

#[test]
fn a_lease_that_ended_is_no_failed_try() {
    let mut run = Run::staged();
    let context = WorkerId::new("c").unwrap();
    for round in 0..3 * RETRIES_MAX {
        let actions = run.step(Input::LeaseLost);
        assert_eq!(aborts(&actions), ["c"], "round {round}");
        assert_eq!(actions.last(), Some(&Action::ChooseContext));
        assert!(!run.life.failed().contains(&context));
        run.step(Input::Chosen(Some(target("c"))));
        run.step(ready("c", 20 + round));
    }
    assert_eq!(run.life.output().len(), 1 + 3 * RETRIES_MAX as usize);
    // While it is pulled a release may have ended it, and its decode worker says what came of it.
    run.step(Input::Chosen(Some(target("d"))));
    assert_eq!(run.step(Input::LeaseLost), []);
}

#[test]
fn what_no_decode_worker_will_take_in_time_is_refused_before_its_first_token() {
    let overbooked = || Input::Overbooked {
        why: Overbooked::Decode,
        wait: Duration::from_secs(40),
        retry_after: Duration::from_secs(10),
    };
    let mut run = Run::new();
    let actions = run.step(overbooked());
    let [Action::Fail(error)] = actions.as_slice() else {
        panic!("{actions:?}")
    };
    assert_eq!(
        (error.kind, error.retry_after_ms),
        (ErrorKind::Busy, Some(10_000))
    );
    assert!(error.message.contains("40 s"), "{}", error.message);
    let mut run = Run::decoding();
    run.step(Input::WorkerLost(target("d")));
    assert_eq!(run.step(overbooked()), [], "it has its first token");
}

fn refused_prefill(refusal: Refusal) -> Input {
    Input::Prefill(Ok(PrefillReply::Refused { v: V, refusal }))
}

fn malformed() -> Refusal {
    Refusal::Malformed {
        detail: "no such field".to_owned(),
    }
}

#[test]
fn a_job_that_one_worker_does_not_understand_is_tried_elsewhere() {
    let mut run = Run::new();
    run.step(Input::Chosen(Some(target("c"))));
    let actions = run.step(refused_prefill(malformed()));
    assert_eq!(actions, [Action::ChooseContext]);
    let worker = WorkerId::new("c").unwrap();
    assert_eq!(run.life.refused(), std::slice::from_ref(&worker));
    assert_eq!(run.life.failed(), [worker], "it counts against it");
    run.step(Input::Chosen(Some(target("d"))));
    run.step(ready("d", 10));
    assert_eq!(run.life.output(), [10]);
    // Nor does the one decode worker that is asked; another one does.
    run.step(Input::Chosen(Some(target("e"))));
    let refusal = malformed();
    let reply = Input::Decode(Ok(DecodeReply::Refused { v: V, refusal }));
    assert_eq!(run.step(reply), [Action::ChooseDecode]);
    run.step(Input::Chosen(Some(target("f"))));
    run.step(admitted());
    run.step(item(1, 1, &[11], None));
    assert_eq!(run.life.output(), [10, 11]);
}

#[test]
fn a_job_that_no_worker_understands_is_our_fault_and_says_so() {
    let mut run = Run::new();
    for name in ["c", "d"] {
        run.step(Input::Chosen(Some(target(name))));
        run.step(refused_prefill(malformed()));
    }
    let actions = run.step(Input::Chosen(None));
    let [Action::Fail(error)] = actions.as_slice() else {
        panic!("{actions:?}")
    };
    assert_eq!(error.kind, ErrorKind::Internal);
    assert!(error.message.contains("d says: no such field"), "{error}");
    // After its first token too: a retry would be told the same.
    let mut run = Run::staged();
    run.step(Input::Chosen(Some(target("d"))));
    let refusal = malformed();
    run.step(Input::Decode(Ok(DecodeReply::Refused { v: V, refusal })));
    let actions = run.step(Input::Chosen(None));
    assert!(
        matches!(actions.last(), Some(Action::Fail(error)) if error.kind == ErrorKind::Internal),
        "{actions:?}"
    );
}

/// Two workers swap their roles: until their beats say so, each is sent the other's jobs.
#[test]
fn a_worker_that_has_another_role_now_is_gone_round_and_its_beat_waited_for() {
    let detail = || "its role is decode".to_owned();
    let mut run = Run::new();
    run.step(Input::Chosen(Some(target("c"))));
    let wrong_role = Refusal::WrongRole { detail: detail() };
    assert_eq!(
        run.step(refused_prefill(wrong_role)),
        [Action::ChooseContext]
    );
    let actions = run.step(Input::Chosen(None));
    assert!(matches!(actions[..], [Action::Wait(_)]), "{actions:?}");
    assert_eq!(run.step(Input::WaitOver), [Action::ChooseContext]);
    run.step(Input::Chosen(Some(target("d"))));
    run.step(ready("d", 10));
    run.step(Input::Chosen(Some(target("d"))));
    let refusal = Refusal::WrongRole { detail: detail() };
    let reply = Input::Decode(Ok(DecodeReply::Refused { v: V, refusal }));
    assert_eq!(run.step(reply), [Action::ChooseDecode]);
    let actions = run.step(Input::Chosen(None));
    assert!(matches!(actions[..], [Action::Wait(_)]), "{actions:?}");
}

#[test]
fn a_refusal_of_a_newer_release_goes_to_the_next_worker() {
    let mut run = Run::new();
    run.step(Input::Chosen(Some(target("c"))));
    let actions = run.step(refused_prefill(Refusal::Unknown));
    assert_eq!(actions, [Action::ChooseContext]);
    let actions = run.step(Input::Chosen(None));
    assert!(
        matches!(actions[..], [Action::Fail(ref error)] if error.kind == ErrorKind::NoWorker),
        "{actions:?}"
    );
}

#[test]
fn tokens_may_overtake_the_admission_and_duplicates_are_dropped() {
    let mut run = Run::new();
    run.step(Input::Chosen(Some(target("c"))));
    run.step(ready("c", 10));
    run.step(Input::Chosen(Some(target("d"))));
    run.step(item(0, 1, &[11, 12], None));
    assert!(run.step(admitted()).is_empty());
    assert!(run.step(item(0, 1, &[11, 12], None)).is_empty());
    let actions = run.step(item(0, 2, &[12, 13], None));
    let new = Action::Emit {
        tokens: vec![13],
        logprobs: Vec::new(),
        stop: false,
    };
    assert_eq!(actions, [new]);
}

#[test]
fn a_frame_of_the_last_try_that_numbers_can_name_is_nobodys() {
    let mut run = Run::decoding();
    assert_eq!(run.step(item(u32::MAX, 2, &[12], None)), []);
    assert_eq!(run.life.output(), [10, 11]);
}

#[test]
fn more_tokens_than_were_asked_for_are_not_believed() {
    let mut run = Run::decoding();
    let room = run.life.rules.max_tokens as usize - run.life.output().len();
    let actions = run.step(item(0, 2, &vec![12; room + 1], None));
    assert_eq!(aborts(&actions), ["d"]);
    assert_eq!(actions.last(), Some(&Action::ChooseContext));
    assert_eq!(run.life.output(), [10, 11]);
}

#[test]
fn a_gap_begins_anew_with_the_output_so_far() {
    let mut run = Run::decoding();
    let actions = run.step(item(0, 3, &[13], None));
    assert_eq!(aborts(&actions), ["d"]);
    assert_eq!(actions.last(), Some(&Action::ChooseContext));
    run.step(Input::Chosen(Some(target("c"))));
    assert_eq!(run.life.prefilled_output(), [10, 11]);
    run.step(ready("c", 12));
    let actions = run.step(Input::Chosen(Some(target("d"))));
    assert_eq!(
        actions,
        [Action::SendDecode {
            decode: target("d"),
            attempt: 1
        }]
    );
    assert!(
        run.step(item(0, 3, &[99], None)).is_empty(),
        "an old try's frame"
    );
    run.step(item(1, 3, &[13], None));
    assert_eq!(run.life.output(), [10, 11, 12, 13]);
}

#[test]
fn a_lost_worker_is_avoided() {
    let mut run = Run::decoding();
    assert!(
        run.step(Input::WorkerLost(target("c"))).is_empty(),
        "its part is done"
    );
    run.step(Input::WorkerLost(target("d")));
    assert_eq!(run.life.failed(), [WorkerId::new("d").unwrap()]);
    assert_eq!(run.life.phase(), &Phase::Queued);
}

#[test]
fn leaving_aborts_whoever_holds_something_in_every_phase() {
    let inputs = [
        Input::Chosen(Some(target("c"))),
        ready("c", 10),
        Input::Chosen(Some(target("d"))),
        item(0, 1, &[11], None),
    ];
    let expected: [&[&str]; 5] = [&[], &["c"], &["c"], &["c", "d"], &["d"]];
    for (steps, expected) in expected.iter().enumerate() {
        let mut run = Run::new();
        inputs[..steps]
            .iter()
            .cloned()
            .for_each(|input| drop(run.step(input)));
        let actions = run.step(Input::ClientLeft);
        assert_eq!(aborts(&actions), *expected, "after {steps} steps");
        assert_eq!(run.life.phase(), &Phase::Failed);
    }
}

#[test]
fn only_the_news_of_the_end_was_lost() {
    let mut run = Run::decoding();
    run.step(item(0, 2, &[2], None));
    let actions = run.step(Input::Stalled);
    assert_eq!(actions.last(), Some(&Action::Finish(FinishReason::Stop)));
}

#[test]
fn retries_end() {
    assert_eq!(
        prefills_until_the_end(FailureCode::Draining),
        RETRIES_MAX + 1
    );
}

#[test]
fn what_breaks_executors_does_not_meet_them_all() {
    assert_eq!(prefills_until_the_end(FailureCode::Executor), EXECUTORS_MAX);
}

#[test]
fn a_text_without_a_next_token_is_not_tried_again() {
    assert_eq!(prefills_until_the_end(FailureCode::NoToken), 1);
    let mut run = Run::decoding();
    let failure = Failure::new(FailureCode::NoToken, "no finite logit");
    let actions = run.step(item(0, 1, &[], Some(End::Failed(failure))));
    let Some(Action::Fail(error)) = actions.last() else {
        panic!("{actions:?}")
    };
    assert_eq!(error.kind.row().status, 500);
    assert!(error.message.contains("no finite logit"));
}

#[test]
fn an_answer_too_large_for_the_bus_is_not_computed_again() {
    assert_eq!(prefills_until_the_end(FailureCode::TooLarge), 1);
    let mut run = Run::decoding();
    let failure = Failure::new(FailureCode::TooLarge, "ask for fewer alternatives");
    let actions = run.step(item(0, 1, &[], Some(End::Failed(failure))));
    let Some(Action::Fail(error)) = actions.last() else {
        panic!("{actions:?}")
    };
    assert_eq!(error.kind.row().status, 400);
    assert_eq!(error.message, "ask for fewer alternatives");
    // A code of a newer release may be about anything: another worker may do.
    assert_eq!(
        prefills_until_the_end(FailureCode::Unknown),
        RETRIES_MAX + 1
    );
}

/// How often a prompt is sent that always fails so.
fn prefills_until_the_end(code: FailureCode) -> u32 {
    let mut run = Run::new();
    let mut sent = 0;
    let mut inputs = vec![Input::Chosen(Some(target("c")))];
    while let Some(input) = inputs.pop() {
        for action in run.step(input) {
            match action {
                Action::ChooseContext => inputs.push(Input::Chosen(Some(target("c")))),
                Action::Wait(_) => inputs.push(Input::WaitOver),
                Action::SendPrefill(_) => {
                    sent += 1;
                    let failure = Failure::new(code, "broken");
                    inputs.push(Input::Prefill(Ok(PrefillReply::Failed { v: V, failure })));
                }
                _ => {}
            }
        }
    }
    assert_eq!(run.life.phase(), &Phase::Failed);
    sent
}

fn any_input() -> impl Strategy<Value = Input> {
    let worker = prop_oneof![Just("c"), Just("d")];
    let failure = prop_oneof![
        Just(FailureCode::HandleInvalid),
        Just(FailureCode::Preempted),
        Just(FailureCode::Draining)
    ];
    let end = prop_oneof![
        8 => Just(None),
        1 => Just(Some(End::Finished(FinishReason::Length))),
        2 => failure.prop_map(|code| Some(End::Failed(Failure::new(code, "broken")))),
    ];
    let item = (0u32..4, 0u32..12, 0u32..4, end).prop_map(|(attempt, index, count, end)| {
        let tokens: Vec<u32> = (index..index + count).map(|i| 1000 + i).collect();
        item(attempt, index, &tokens, end)
    });
    prop_oneof![
        6 => worker.clone().prop_map(|name| Input::Chosen(Some(target(name)))),
        1 => Just(Input::Chosen(None)),
        4 => Just(Input::Prefill(Err(NoReply::TimedOut))),
        2 => Just(busy_prefill()),
        2 => Just(Input::Decode(Err(NoReply::NoResponders))),
        2 => Just(busy_decode(20)),
        1 => Just(Input::LeaseLost),
        1 => Just(Input::RoomMade),
        3 => Just(admitted()),
        12 => item,
        1 => worker.prop_map(|name| Input::WorkerLost(target(name))),
        1 => Just(Input::Stalled),
        1 => Just(Input::BusBack),
        1 => Just(Input::Leaving),
        3 => Just(Input::WaitOver),
        1 => Just(Input::StopFound),
        1 => Just(Input::ClientLeft),
    ]
}

proptest! {
    /// Whatever comes in whatever order: the output has no gap and no duplicate, whoever holds
    /// something is told when it is not needed, and the end is the end.
    #[test]
    fn nothing_breaks_it(inputs in prop::collection::vec((any_input(), any::<bool>()), 0..60)) {
        let mut run = Run::new();
        let mut emitted: Vec<u32> = Vec::new();
        let (mut prefills, count) = (0, inputs.len());
        for (input, prefill) in inputs {
            let was_ended = run.life.ended();
            let mut held = run.life.involved();
            for line in &run.life.lines {
                if held.iter().all(|target| target.worker != line.worker) {
                    held.push(line.clone());
                }
            }
            // Prefill answers continue the output as a worker would.
            let input = match run.life.phase() {
                Phase::Prefilling { context } if prefill => {
                    ready(context.worker.as_str(), 1000 + run.life.output().len() as u32)
                }
                _ => input,
            };
            let lost = matches!(input, Input::WorkerLost(_));
            let actions = run.step(input);
            prop_assert!(!was_ended || actions.is_empty());
            for action in &actions {
                match action {
                    Action::Emit { tokens, .. } => emitted.extend(tokens),
                    Action::SendPrefill(_) => prefills += 1,
                    _ => {}
                }
            }
            let failed = actions.iter().any(|a| matches!(a, Action::Fail(_) | Action::Retried(_)));
            // What brought tokens before it failed had left the lines by then.
            let moved = actions.iter().any(|a| matches!(a, Action::Emit { .. }));
            if failed && !lost && !moved && matches!(actions[0], Action::Abort { .. }) {
                let aborted = actions.iter().filter(|a| matches!(a, Action::Abort { .. })).count();
                prop_assert_eq!(aborted, held.len());
            }
        }
        prop_assert_eq!(&emitted, run.life.output());
        for (i, token) in emitted.iter().enumerate() {
            prop_assert_eq!(*token, 1000 + i as u32);
        }
        prop_assert!(prefills <= count);
    }
}

#[test]
fn a_prompt_is_asked_for_again_when_the_bus_is_back() {
    let mut run = Run::new();
    run.step(Input::Chosen(Some(target("c"))));
    let actions = run.step(Input::BusBack);
    assert_eq!(aborts(&actions), ["c"]);
    assert!(actions.contains(&Action::ChooseContext), "{actions:?}");
    assert!(
        run.life.failed().is_empty(),
        "it was not the worker's fault"
    );
    // Tokens are numbered: what is lost of them is noticed, and what is not need not be made again.
    let mut run = Run::decoding();
    assert_eq!(run.step(Input::BusBack), []);
}

#[test]
fn a_server_that_leaves_ends_what_is_left_and_frees_it() {
    let mut run = Run::decoding();
    let actions = run.step(Input::Leaving);
    assert_eq!(aborts(&actions), ["d"]);
    assert!(
        matches!(&actions[1], Action::Fail(error) if error.kind == ErrorKind::Leaving),
        "{actions:?}"
    );
    assert!(run.life.ended());
}

#[test]
fn giving_way_is_no_failure_while_tokens_come() {
    let gives_way = |attempt, index, tokens: &[u32]| {
        let failure = Failure::new(FailureCode::Preempted, "no block");
        item(attempt, index, tokens, Some(End::Failed(failure)))
    };
    let mut run = Run::new();
    let mut last = Vec::new();
    // Each try brings the prefill's token and one more.
    for attempt in 0..3 * RETRIES_MAX {
        let have = 2 * attempt;
        run.step(Input::WaitOver);
        run.step(Input::Chosen(Some(target("c"))));
        run.step(ready("c", 10 + have));
        run.step(Input::Chosen(Some(target("d"))));
        last = run.step(gives_way(attempt, have + 1, &[11 + have]));
        assert!(!run.life.ended(), "after {attempt}: {last:?}");
    }
    assert!(last.contains(&Action::Retried("preempted")), "{last:?}");
    // Tries that bring nothing but the prefill's token count.
    for attempt in 3 * RETRIES_MAX.. {
        run.step(Input::WaitOver);
        run.step(Input::Chosen(Some(target("c"))));
        run.step(ready("c", 7));
        run.step(Input::Chosen(Some(target("d"))));
        run.step(gives_way(attempt, run.life.output().len() as u32, &[]));
        if run.life.ended() {
            assert_eq!(attempt - 3 * RETRIES_MAX, RETRIES_MAX - 1);
            break;
        }
    }
}

fn begun(worker: &str) -> Input {
    let mut handle = handle(worker, 0);
    handle.first_token = None;
    Input::Prefill(Ok(PrefillReply::Begun { v: V, handle }))
}

fn done(first_token: u32, finish: Option<FinishReason>) -> Input {
    Input::Progress(Ok(ProgressReply::Done {
        v: V,
        first_token,
        first_logprobs: None,
        finish,
    }))
}

/// With KV on `c` of a prompt that runs there.
fn streamed() -> Run {
    let mut run = Run::new();
    run.step(Input::Chosen(Some(target("c"))));
    let actions = run.step(begun("c"));
    assert!(matches!(
        &actions[..],
        [
            Action::Prompt { .. },
            Action::AwaitPrompt,
            Action::ChooseDecode
        ]
    ));
    run
}

/// Which `d` pulls.
fn followed() -> Run {
    let mut run = streamed();
    run.step(Input::Chosen(Some(target("d"))));
    assert_eq!(run.step(admitted()), []);
    run
}

fn emitted(actions: &[Action]) -> Vec<u32> {
    let tokens = |action: &Action| match action {
        Action::Emit { tokens, .. } => tokens.clone(),
        _ => Vec::new(),
    };
    actions.iter().flat_map(tokens).collect()
}

#[test]
fn a_prompt_that_runs_is_pulled_and_its_first_token_is_told_when_it_comes() {
    let mut run = followed();
    let running = ProgressReply::Running { v: V, tokens: 2 };
    assert_eq!(
        run.step(Input::Progress(Ok(running))),
        [Action::AwaitPrompt]
    );
    let actions = run.step(done(10, None));
    assert_eq!((emitted(&actions), actions.len()), (vec![10], 1));
    assert_eq!(run.life.handle().unwrap().first_token, Some(10));
    // The decode worker brings it too.
    let actions = run.step(item(0, 0, &[10, 11], None));
    assert_eq!(emitted(&actions), [11]);
    assert_eq!(run.life.output(), [10, 11]);
}

#[test]
fn a_first_token_that_was_lost_comes_from_the_decode_worker() {
    let mut run = followed();
    assert_eq!(emitted(&run.step(item(0, 0, &[10, 11], None))), [10, 11]);
    // Late, it says nothing new.
    assert_eq!(run.step(done(10, None)), []);
    assert_eq!(run.life.output(), [10, 11]);
}

#[test]
fn a_decode_worker_that_is_at_it_while_the_prompt_runs_has_lost_nothing() {
    let mut run = followed();
    assert_eq!(run.step(item(0, 0, &[], None)), []);
    assert!(matches!(run.life.phase(), Phase::Pulling { .. }));
}

#[test]
fn a_first_token_that_ends_it_frees_the_decode_worker() {
    let mut run = followed();
    let actions = run.step(done(2, Some(FinishReason::Stop)));
    assert_eq!(emitted(&actions), [2]);
    assert!(aborts(&actions).contains(&"d"));
    assert_eq!(actions.last(), Some(&Action::Finish(FinishReason::Stop)));
}

#[test]
fn a_question_that_comes_after_the_release_costs_nothing() {
    let ended = || {
        let failure = Failure::new(FailureCode::HandleInvalid, "its lease has ended");
        Input::Progress(Ok(ProgressReply::Failed { v: V, failure }))
    };
    let mut run = followed();
    assert_eq!(
        run.step(ended()),
        [],
        "the decode worker says what came of it"
    );
    assert_eq!(emitted(&run.step(item(0, 0, &[10, 11], None))), [10, 11]);
    // Which may be that it came too late, too.
    let mut late = followed();
    late.step(ended());
    let failure = Failure::new(FailureCode::HandleInvalid, "its lease has ended");
    let actions = late.step(item(0, 0, &[], Some(End::Failed(failure))));
    assert_eq!(actions.last(), Some(&Action::ChooseContext));
    // Where nobody pulls it there was no release.
    let mut alone = streamed();
    assert_eq!(alone.step(ended()).last(), Some(&Action::ChooseContext));
}

#[test]
fn whatever_ends_a_prompt_that_is_streamed_frees_both_sides() {
    let failure = Failure::new(FailureCode::Internal, "it broke");
    let failed = ProgressReply::Failed { v: V, failure };
    let ends = [
        Input::Progress(Ok(failed)),
        Input::Progress(Err(NoReply::NoResponders)),
        Input::WorkerLost(target("c")),
        Input::WorkerLost(target("d")),
        Input::Stalled,
        Input::Deadline,
        Input::ClientLeft,
    ];
    for end in ends {
        let mut run = followed();
        let what = format!("{end:?}");
        let actions = run.step(end);
        let mut told = aborts(&actions);
        told.sort_unstable();
        assert_eq!(told, ["c", "d"], "{what}");
        assert!(run.life.output().is_empty(), "{what}");
    }
}

#[test]
fn a_question_without_an_answer_is_asked_again_and_not_for_ever() {
    let mut run = followed();
    for _ in 1..UNANSWERED_MAX {
        let again = run.step(Input::Progress(Err(NoReply::TimedOut)));
        assert_eq!(again, [Action::AwaitPrompt]);
    }
    let actions = run.step(Input::Progress(Err(NoReply::TimedOut)));
    assert!(actions.contains(&Action::Retried("context worker did not answer")));
}

/// The driver answers `ChooseDecode` with nothing where the best worker is to wait, or with none.
#[test]
fn a_prompt_that_nobody_follows_is_handed_over_when_it_is_done() {
    let mut waits = streamed();
    let mut alone = streamed();
    assert_eq!(alone.step(Input::Chosen(None)), [], "one may come");
    for run in [&mut waits, &mut alone] {
        let actions = run.step(done(10, None));
        assert_eq!(emitted(&actions), [10]);
        assert_eq!(actions.last(), Some(&Action::ChooseDecode));
    }
    // One that waits in a line goes on waiting there.
    let mut full = streamed();
    full.step(Input::Chosen(Some(target("d"))));
    full.step(busy_decode(100));
    let waits = full.step(Input::Chosen(None));
    assert!(matches!(waits[..], [Action::Wait(_)]), "{waits:?}");
    let actions = full.step(done(10, None));
    assert_eq!((emitted(&actions), actions.len()), (vec![10], 1));
    assert_eq!(full.step(Input::WaitOver), [Action::ChooseDecode]);
}
