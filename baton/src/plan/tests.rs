use clap::Parser;
use serde_json::Value;

use super::mix::Mix;
use super::*;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    plan: PlanArgs,
}

fn plan(line: &str) -> PlanArgs {
    Line::parse_from(std::iter::once("plan").chain(line.split(' '))).plan
}

#[test]
fn a_mix_is_read_as_it_is_written() {
    for text in [
        "both*4",
        "context*3+decode*1",
        "context*1+both*2",
        "both@512*4",
        "context@8192*1+both*2",
        "both:fp8*2+both*1",
        "context:tp-2.x@512*1+decode:bf16*3",
    ] {
        assert_eq!(text.parse::<Mix>().unwrap().to_string(), text);
    }
    assert_eq!("both".parse::<Mix>().unwrap().to_string(), "both*1");
    for (wrong, part) in [
        ("", "no role"),
        ("prefill*2", "no role"),
        ("both*0", "no number"),
        ("both@0*2", "a step's tokens"),
        ("both@many*2", "a step's tokens"),
        ("both:*2", "no name of a cost"),
        ("both:a b*2", "no name of a cost"),
        ("both@512:fp8*2", "a step's tokens"),
        ("both*1001", "no number"),
        ("both*999+both*2", "more than"),
        ("context*2", "nobody in it generates"),
        ("decode*2", "nobody in it runs prompts"),
    ] {
        let error = wrong.parse::<Mix>().unwrap_err();
        assert!(error.contains(part), "{wrong}: {error}");
    }
    assert!("both@512*4".parse::<Mix>().unwrap().is_by_hand());
    assert!(!"both*4".parse::<Mix>().unwrap().is_by_hand());
    let all = Mix::all_of(3).into_iter().map(|mix| mix.to_string());
    let expected = ["both*3", "context*2+decode*1", "context*1+decode*2"];
    assert_eq!(all.collect::<Vec<_>>(), expected);
    assert_eq!(Mix::all_of(1).len(), 1);
}

#[test]
fn arrivals_have_the_rate_and_are_the_same_for_a_seed() {
    let load = |rate, seed| load::poisson(rate, 100.0, (16, 4), seed).unwrap();
    let count = load(50.0, 1).len();
    assert!((4_700..5_300).contains(&count), "{count}");
    assert_eq!(load(50.0, 1), load(50.0, 1));
    assert_ne!(load(50.0, 1), load(50.0, 2));
    for (rate, seconds) in [
        (0.0, 1.0),
        (-1.0, 1.0),
        (f64::NAN, 1.0),
        (1.0, 0.0),
        (1e6, 2.0),
    ] {
        assert!(load::poisson(rate, seconds, (16, 4), 1).is_err());
    }
}

const COST: &str = r#"{"layers": [{"tokens": 1, "us": 4000}, {"tokens": 128, "us": 4000}, {"tokens": 1024, "us": 20000}], "row_us": 0, "kv_token_us": 0, "pair_us": 0}"#;

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

#[test]
fn what_a_cluster_measured_is_what_a_plan_is_of() {
    let worker = |name: &str, us: f64, device: &str| {
        format!(
            r#"{{"worker": "{name}", "device": "{device}", "state": "serving", "model": {{"name": "m", "fingerprint": "{}", "tokens_max": 4096, "vocab": 10}},
            "kv": {{"layout": 1, "dtype": "bf16", "block_tokens": 16, "groups": [{{"layers": 2, "kv_heads": 3, "head_dim": 64}}]}},
            "capacity": {{"blocks": 500, "batch": 8, "queue": 9}}, "step_tokens": 512, "itl_ms": 7,
            "cost": {{"layers": [{{"tokens": 1, "us": {us}}}], "row_us": 1, "kv_token_us": 0, "pair_us": 0}},
            "peers": [{{"worker": "x", "gigabytes_per_second": 2.0, "pulled_gigabytes_per_second": 5.0}}, {{"gigabytes_per_second": 6.0}}]}}"#,
            "5a".repeat(32)
        )
    };
    let workers = [
        ("a", 100.0, "x"),
        ("b", 300.0, "x"),
        ("c", 200.0, "cpu avx2, 2 threads"),
    ];
    let workers = workers.map(|(name, us, device)| worker(name, us, device));
    let status = file(&format!("{{\"workers\": [{}]}}", workers.join(", ")));
    let args = plan(&format!(
        "--cost {} --rate 1 --ttft-ms 9",
        status.path().display()
    ));
    let measured = Measured::of(&args, 1_000).unwrap();
    // The one in the middle.
    let sizes = measured.plain.as_ref().unwrap();
    assert_eq!(sizes.cost.layers[0].us, 200.0);
    assert_eq!((sizes.blocks, sizes.batch, sizes.queue), (500, 8, 9));
    assert_eq!((sizes.step_tokens, measured.tokens_max), (512, 4096));
    assert_eq!(measured.kv.block_bytes(), 16 * 2 * 3 * 64 * 2 * 2);
    assert_eq!(
        (measured.itl, measured.workers),
        (Some(Duration::from_millis(7)), Some(3))
    );
    assert_eq!((measured.link_gbps, sizes.steps_in_flight), (40.0, 1));
    assert!(
        measured.notes[0].contains("as c is, of 3") && measured.notes[0].contains("0.1 to 0.3 ms"),
        "{:?}",
        measured.notes
    );
    // What is said goes before what is measured.
    let line = format!(
        "--cost {} --rate 1 --ttft-ms 9 --batch 3 --step-tokens 64 --link-gbps 10 --kv-mib 12",
        status.path().display()
    );
    let measured = Measured::of(&plan(&line), 1_000).unwrap();
    let sizes = measured.plain.as_ref().unwrap();
    assert_eq!((sizes.batch, sizes.step_tokens), (3, 64));
    assert_eq!(
        (sizes.blocks, measured.link_gbps),
        ((12 << 20) / 24_576, 10.0)
    );
    let too_long = Measured::of(&args, 5_000).unwrap_err().to_string();
    assert!(
        too_long.contains("5000 tokens") && too_long.contains("4096"),
        "{too_long}"
    );
}

#[test]
fn what_is_missing_is_named() {
    let cost = file(COST);
    let line = |flags: &str| {
        format!(
            "--cost {} --rate 1 --ttft-ms 9{flags}",
            cost.path().display()
        )
    };
    let error = |line: &str| Measured::of(&plan(line), 100).unwrap_err().to_string();
    assert!(error(&line("")).contains("--kv-bytes-per-token"));
    assert!(error(&line(" --kv-bytes-per-token 6")).contains("multiple of 4"));
    assert!(error(&line(" --kv-bytes-per-token 4096 --kv-mib 0")).contains("more --kv-mib"));
    let measured = Measured::of(&plan(&line(" --kv-bytes-per-token 4096")), 100).unwrap();
    assert_eq!(measured.plain.as_ref().unwrap().blocks, 256 * 4);
    assert!(
        measured
            .notes
            .iter()
            .any(|note| note.contains("no --link-gbps"))
    );
    for (text, part) in [
        ("{}", "neither a step cost"),
        ("[", "EOF"),
        (r#"{"workers": []}"#, "none of its workers"),
        (r#"{"workers": [3]}"#, "not understood"),
        (
            r#"{"layers": [], "row_us": 0, "kv_token_us": 0, "pair_us": 0}"#,
            "0 points",
        ),
    ] {
        let wrong = file(text);
        let line = format!("--cost {} --rate 1 --ttft-ms 9", wrong.path().display());
        let error = error(&line);
        assert!(
            error.contains(part) && error.contains("--cost"),
            "{text}: {error}"
        );
    }
}

#[test]
fn what_is_assumed_is_said_with_the_flag_that_sets_it() {
    let cost = file(COST);
    let line = format!(
        "--cost {} --kv-bytes-per-token 4096 --mix both*1 --rate 1 --ttft-ms 900",
        cost.path().display()
    );
    let (_, notes) = outlooks(&plan(&line)).unwrap();
    for expected in [
        "no --prompt-tokens: prompts of 1,024 tokens",
        "no --max-tokens: answers of 128 tokens",
        "no --seconds: requests come for 20 s at each rate",
        "no --model: the longest sequence has 1,152 tokens, as the longest request",
        "no --link-gbps: 100 Gbit/s",
        "no --batch: 256 sequences in a step",
        "no --kv-mib: each worker has room for 256 sequences of 1,152 tokens, 1.1 GiB",
        "no --step-tokens: up to 8,192 tokens in a step",
        "no --itl-ms: workers keep their steps to 25 ms",
    ] {
        assert_eq!(
            notes.iter().filter(|note| *note == expected).count(),
            1,
            "{expected}: {notes:?}"
        );
    }
    let said = " --prompt-tokens 64 --max-tokens 2 --seconds 5 --link-gbps 10 --batch 4 --kv-mib 64 --step-tokens 512 --itl-ms 9";
    let (_, notes) = outlooks(&plan(&format!("{line}{said}"))).unwrap();
    assert!(
        notes.iter().all(|note| note.starts_with("no --model")),
        "{notes:?}"
    );
    assert!(render(&[], &notes).contains("no --model"));
}

/// The cost of one that is half as fast.
const SLOW: &str = r#"{"layers": [{"tokens": 1, "us": 8000}, {"tokens": 128, "us": 8000}, {"tokens": 1024, "us": 40000}], "row_us": 0, "kv_token_us": 0, "pair_us": 0}"#;

#[test]
fn groups_name_what_their_steps_cost() {
    let (fast, slow) = (file(COST), file(SLOW));
    let [fast, slow] = [&fast, &slow].map(|file| file.path().display().to_string());
    let measured = |line: &str| {
        let line = format!("--rate 1 --ttft-ms 9 --kv-bytes-per-token 4096 {line}");
        Measured::of(&plan(&line), 100)
    };
    let first = |sizes: &measured::Sizes| sizes.cost.layers[0].us;
    let both = measured(&format!(
        "--cost {fast} --cost fp8={slow} --mix both*1+both:fp8*2"
    ));
    let both = both.unwrap();
    assert_eq!(both.plain.as_ref().map(first), Some(4_000.0));
    assert_eq!(both.named.get("fp8").map(first), Some(8_000.0));
    // Where all groups name theirs no cluster is asked.
    let named = measured(&format!(
        "--cost a={fast} --cost b={slow} --mix context:a*1+decode:b@512*1"
    ));
    let named = named.unwrap();
    assert!(named.plain.is_none() && named.named.len() == 2, "{named:?}");
    let error = |line: &str| measured(line).unwrap_err().to_string();
    let unknown = error(&format!("--cost {fast} --mix both:fp8*2"));
    assert!(
        unknown.contains("what fp8 costs") && unknown.contains("--cost fp8=FILE"),
        "{unknown}"
    );
    let unknown = error(&format!("--cost fp8={fast} --mix both:fp4*2"));
    assert!(unknown.contains("those with a name are fp8"), "{unknown}");
    for twice in [
        format!("--cost {fast} --cost {slow}"),
        format!("--cost a={fast} --cost a={slow} --mix both:a*1"),
    ] {
        let twice = error(&twice);
        assert!(twice.contains("one of them only"), "{twice}");
    }
    assert!("fp8=".parse::<CostFile>().is_err());
    let path: CostFile = "./a=b.json".parse().unwrap();
    assert_eq!((path.name, path.path), (None, "./a=b.json".into()));
}

/// What the router does with workers of which one takes twice as long for everything: it gets a third of the work, half of what the other one gets.
#[test]
fn a_worker_half_as_fast_gets_half_as_much_to_do() {
    let (fast, slow) = (file(COST), file(SLOW));
    let [fast, slow] = [&fast, &slow].map(|file| file.path().display().to_string());
    for (mix, parts) in [
        ("context*1+context:slow*1+decode*2", [0, 1]),
        ("both*1+both:slow*1", [0, 1]),
    ] {
        let line = format!(
            "--rate 66 --ttft-ms 2000 --prompt-tokens 1024 --max-tokens 16 --seconds 20 --kv-bytes-per-token 4096 --link-gbps 1000 --cost {fast} --cost slow={slow} --mix {mix}"
        );
        let all = outlooks(&plan(&line)).unwrap().0;
        let of = |at: usize| all[0].work[parts[at]].prompt_tokens as f64;
        let part = of(1) / of(0);
        println!("{mix}: {:?}", all[0]);
        assert!((0.4..0.6).contains(&part), "{mix}: {part}, {all:?}");
        assert!(all[0].attainment > 0.95, "{mix}: {all:?}");
    }
}

/// A prompt of 1,024 tokens takes 20 ms and four answers' tokens 4 ms each: two workers have some 60 such requests a second.
#[test]
fn a_plan_tells_the_knee_and_is_the_same_each_time() {
    let deployment = |mix: &Mix| Deployment {
        workers: mix
            .workers()
            .map(|kind| PlannedWorker {
                role: kind.role,
                cost: serde_json::from_str(COST).unwrap(),
                itl: Some(ITL_DEFAULT),
                step_tokens: 1024,
                batch: 64,
                steps_in_flight: 2,
                blocks: 4096,
                queue: 256,
            })
            .collect(),
        kv: baton_protocol::KvGeometry::bf16(
            32,
            vec![baton_protocol::KvGroup {
                layers: 1,
                kv_heads: 1,
                head_dim: 256,
            }],
        ),
        tokens_max: 4096,
        promises: Promises::default(),
        link_bytes_per_second: 1e10,
        budget: BUDGET,
    };
    let level = ServiceLevel {
        ttft_ms: Some(200),
        itl_ms: None,
    };
    let rows = |threads: usize| {
        let mixes = Mix::all_of(2);
        let pairs: Vec<_> = mixes
            .iter()
            .flat_map(|mix| [30.0, 45.0, 110.0].map(|rate| (mix, rate)))
            .collect();
        let row = |(mix, rate): &(&Mix, f64)| {
            let load = load::poisson(*rate, 5.0, (1024, 2), 3).unwrap();
            let prediction = predict(&deployment(mix), &load, 3).unwrap();
            Outlook::new(mix, Some(*rate), level, &prediction)
        };
        match threads {
            1 => pairs.iter().map(row).collect::<Vec<_>>(),
            _ => in_parallel(&pairs, row),
        }
    };
    let all = rows(2);
    assert_eq!(
        all,
        rows(1),
        "neither the run nor the thread changes a figure"
    );
    // Two that do both have 100 prompts a second between them, a split pair has 50: 45 is not kept for long, 110 by nobody.
    assert!(
        all[0].attainment > 0.99 && all[1].attainment > 0.99,
        "{all:?}"
    );
    assert!(
        all[2].attainment < 0.9 && all[5].attainment < 0.3,
        "{all:?}"
    );
    let kept = outlook::rates_kept(&all);
    assert_eq!((&*kept[0].mix, kept[0].rate_kept), ("both*2", Some(45.0)));
    assert!(kept[1].rate_kept.is_none_or(|rate| rate < 45.0), "{all:?}");
    let text = render(&all, &["a note".to_owned()]);
    assert!(
        text.contains("keeps 95% up to") && text.contains("a note"),
        "{text}"
    );
    let json: Value = serde_json::to_value(&all[0]).unwrap();
    assert_eq!(
        (&json["mix"], &json["rate"]),
        (&"both*2".into(), &30.0.into())
    );
}

#[test]
fn a_command_line_says_a_load_and_a_level() {
    let parses =
        |line: &str| Line::try_parse_from(std::iter::once("plan").chain(line.split(' '))).is_ok();
    assert!(parses("--rate 1,2 --ttft-ms 9"));
    assert!(parses("--trace x --itl-ms 9 --workers 4"));
    for wrong in [
        "--rate 1",
        "--ttft-ms 9",
        "--rate 1 --trace x --ttft-ms 9",
        "--rate 1 --ttft-ms 9 --mix both --workers 2",
        "--rate 1 --ttft-ms 9 --mix nobody",
    ] {
        assert!(!parses(wrong), "{wrong}");
    }
}
