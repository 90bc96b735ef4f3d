//! Sequences with token rules and no grammar, on a worker that has no tokenizer.

use baton_protocol::{FinishReason, TokenRules};

use super::*;

const VOCAB: u32 = 16;
const TOKENS: u32 = 400;

/// The whole output of a sequence with these rules: its prompt and first token on one worker, the rest on another.
fn output(
    rules: &TokenRules,
    stop_token_ids: &[u32],
    steps_in_flight: usize,
) -> Result<(Vec<u32>, FinishReason), String> {
    let start = || {
        start(FakeExecutor::new(FakeConfig {
            vocab: VOCAB,
            steps_in_flight,
            ..FakeConfig::default()
        }))
    };
    let (mut context, mut decode) = (start(), start());
    let mut spec = spec(TOKENS);
    spec.generation.token_rules = Some(Arc::new(rules.clone()));
    spec.generation.stop_token_ids = stop_token_ids.to_vec();
    assert!(context.engine.send(Command::Prefill {
        key: 1,
        spec: spec.clone(),
        prompt_logprobs: None,
        stream: false,
    }));
    let first = match context.events.blocking_recv() {
        Some(EngineEvent::Prefilled(first)) => first,
        Some(EngineEvent::Left {
            refusal: Some(refusal),
            ..
        }) => return Err(refusal.to_string()),
        _ => panic!("no first token"),
    };
    let mut output = vec![first.sampled.token];
    let blocks = decode.pool.reserve(2).unwrap();
    assert!(decode.engine.send(Command::Decode {
        key: 1,
        route: route(1),
        spec,
        next: output[0],
        first: None,
        blocks,
        pulled: PullReport::default(),
        trace: None,
    }));
    let ended = decode.events.blocking_recv();
    let (_, items) = decode.tokens.try_take().unwrap().servers.pop().unwrap();
    output.extend(items.iter().flat_map(|item| &item.tokens.0));
    context.engine.shutdown();
    decode.engine.shutdown();
    match (ended, items.into_iter().find_map(|item| item.end)) {
        (Some(EngineEvent::Left { .. }), Some(End::Finished(finish))) => Ok((output, finish)),
        (Some(EngineEvent::Ended { failure, .. }), _) => Err(failure.message),
        (_, end) => panic!("{end:?}"),
    }
}

fn rules(allowed: Option<&[u32]>, bad_words: &[&[u32]]) -> TokenRules {
    TokenRules {
        allowed: allowed.map(|ids| ids.to_vec().into()),
        bad_words: bad_words.iter().map(|word| word.to_vec().into()).collect(),
    }
}

#[test]
fn an_output_keeps_to_its_token_rules_on_whatever_workers_it_is_made() {
    let free = output(&rules(None, &[]), &[], 1).unwrap().0;
    // Words that the output would hold: three pairs, one token, and a triple across the hand-over.
    let words: [&[u32]; 5] = [
        &free[0..3],
        &free[5..7],
        &free[9..11],
        &free[20..22],
        &free[30..31],
    ];
    for steps_in_flight in [1, 2] {
        let (made, finish) = output(&rules(None, &words), &[], steps_in_flight).unwrap();
        assert_eq!(
            (made.len(), finish),
            (TOKENS as usize, FinishReason::Length)
        );
        for word in words {
            assert!(
                !made.windows(word.len()).any(|window| window == word),
                "{word:?}"
            );
        }
        // The end is a token as others are: what is not allowed does not end it, though it is drawn often.
        let few = rules(Some(&[3, 5, 7]), &[&[3, 3], &[5, 5]]);
        let (made, finish) = output(&few, &[2], steps_in_flight).unwrap();
        assert_eq!(finish, FinishReason::Length);
        assert!(made.iter().all(|token| [3, 5, 7].contains(token)));
        assert!(
            !made
                .windows(2)
                .any(|pair| [[3, 3], [5, 5]].contains(&[pair[0], pair[1]]))
        );
        let (made, finish) = output(&rules(Some(&[2, 3]), &[]), &[2], steps_in_flight).unwrap();
        assert_eq!((made.last(), finish), (Some(&2), FinishReason::Stop));
    }
}

#[test]
fn an_output_that_has_no_token_left_ends() {
    let never = output(&rules(Some(&[3]), &[&[3]]), &[], 1).unwrap_err();
    assert!(never.contains("no token may ever come"), "{never}");
    for steps_in_flight in [1, 2] {
        let stuck = rules(Some(&[3]), &[&[3, 3, 3]]);
        let stuck = output(&stuck, &[], steps_in_flight).unwrap_err();
        assert!(stuck.contains("no token may come next"), "{stuck}");
    }
}
