//! Every input of the corpus, and every finding among them, through its target: what fuzzing found stays mended.

use std::path::Path;
use std::time::{Duration, Instant};

use baton_fuzz_targets::TARGETS;

/// An input that takes longer is a finding. The slowest takes a hundredth of it in a debug build.
const PATIENCE: Duration = Duration::from_secs(10);

#[test]
fn every_input_of_the_corpus_is_dealt_with() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../corpus");
    for (name, target) in TARGETS {
        let inputs = std::fs::read_dir(corpus.join(name)).expect("each target has a corpus");
        let mut count = 0;
        for input in inputs {
            let path = input.expect("a directory entry").path();
            let bytes = std::fs::read(&path).expect("an input");
            eprintln!("{}", path.display());
            let begun = Instant::now();
            target(&bytes);
            assert!(
                begun.elapsed() < PATIENCE,
                "{} took {:?}",
                path.display(),
                begun.elapsed()
            );
            count += 1;
        }
        assert!(count > 0, "the corpus of {name} is empty");
    }
}
