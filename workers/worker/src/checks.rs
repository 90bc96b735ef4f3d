//! Whether a job can be taken at all, before anything is begun for it.

use baton_protocol::limits::TOP_LOGPROBS_MAX;
use baton_protocol::{
    DecodeJob, KvGeometry, ModelFingerprint, ModelInfo, Refusal, Sampling, SequenceSpec,
};

/// What a worker can take, constant for its life.
pub struct Checks {
    /// What it serves.
    pub model: ModelInfo,
    /// How its KV is laid out.
    pub kv: KvGeometry,
    /// Blocks of the arena.
    pub blocks: u32,
}

impl Checks {
    /// Refuses a job that is meant for another model.
    pub fn model(&self, fingerprint: &ModelFingerprint) -> Result<(), Refusal> {
        if *fingerprint == self.model.fingerprint {
            return Ok(());
        }
        let short = |fingerprint: &ModelFingerprint| fingerprint.as_str()[..12].to_owned();
        Err(Refusal::WrongModel {
            detail: format!(
                "this worker serves {} {}…, the job is for {}…",
                self.model.name,
                short(&self.model.fingerprint),
                short(fingerprint)
            ),
        })
    }

    /// Refuses a handle whose KV is laid out otherwise.
    pub fn geometry(&self, kv: &KvGeometry) -> Result<(), Refusal> {
        match self.kv.difference(kv) {
            None => Ok(()),
            Some(detail) => Err(Refusal::WrongModel {
                detail: format!("KV geometry: {detail}"),
            }),
        }
    }

    /// Refuses a sequence that no executor could run, and drops stop ids that cannot be chosen.
    pub fn sequence(&self, sequence: &mut SequenceSpec) -> Result<(), Refusal> {
        sequence.check()?;
        let tokens_max = self.tokens_max();
        if sequence.tokens.0.len() >= tokens_max as usize {
            return Err(Refusal::TooLong { tokens_max });
        }
        self.token("a token", sequence.tokens.0.iter().copied())?;
        self.sampling(&sequence.generation.sampling)?;
        if let Some(rules) = &sequence.generation.token_rules {
            self.token("a token rule's", rules.tokens())?;
        }
        sequence
            .generation
            .stop_token_ids
            .retain(|token| *token < self.model.vocab);
        Ok(())
    }

    /// As [`Self::sequence`], for one whose next token is known already: there must be room for another.
    pub fn resumed(&self, sequence: &mut SequenceSpec) -> Result<(), Refusal> {
        self.sequence(sequence)?;
        let tokens_max = self.tokens_max();
        if sequence.tokens.0.len() + 1 >= tokens_max as usize {
            return Err(Refusal::TooLong { tokens_max });
        }
        if sequence.output_tokens() + 1 >= sequence.generation.max_tokens {
            return Err(Refusal::Malformed {
                detail: "the handle's first token is the last of max_tokens".to_owned(),
            });
        }
        Ok(())
    }

    /// Refuses a decode job that makes no sense whoever holds the KV of its handle.
    pub fn handle(&self, job: &mut DecodeJob) -> Result<(), Refusal> {
        let malformed = |detail: &str| {
            Err(Refusal::Malformed {
                detail: detail.to_owned(),
            })
        };
        self.model(&job.handle.model)?;
        self.geometry(&job.handle.kv)?;
        self.resumed(&mut job.sequence)?;
        self.token(
            "the handle's first token",
            job.handle.first_token.into_iter(),
        )?;
        if job.handle.finish.is_some() {
            return malformed("the handle's generation is over: there is nothing to decode");
        }
        if job.handle.valid_tokens as usize != job.sequence.tokens.0.len() {
            return malformed("the handle covers another number of tokens than the sequence has");
        }
        Ok(())
    }

    /// Refuses token ids outside the vocabulary.
    pub fn token(&self, what: &str, tokens: impl Iterator<Item = u32>) -> Result<(), Refusal> {
        let vocab = self.model.vocab;
        match tokens.max() {
            Some(token) if token >= vocab => Err(Refusal::Malformed {
                detail: format!("{what} id {token} is outside the vocabulary of {vocab}"),
            }),
            _ => Ok(()),
        }
    }

    /// Longest sequence: the model's, or what the whole arena holds.
    fn tokens_max(&self) -> u32 {
        self.model
            .tokens_max
            .min(self.blocks.saturating_mul(self.kv.block_tokens))
    }

    fn sampling(&self, sampling: &Sampling) -> Result<(), Refusal> {
        let Sampling {
            temperature,
            top_k: _,
            top_p,
            min_p,
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
            logit_bias,
            seed: _,
            logprobs,
        } = sampling;
        let malformed = |detail: String| Err(Refusal::Malformed { detail });
        let numbers = [
            ("temperature", *temperature, 0.0..=f32::MAX),
            ("top_p", *top_p, 0.0..=1.0),
            ("min_p", *min_p, 0.0..=1.0),
            (
                "repetition_penalty",
                *repetition_penalty,
                f32::MIN_POSITIVE..=f32::MAX,
            ),
            ("presence_penalty", *presence_penalty, f32::MIN..=f32::MAX),
            ("frequency_penalty", *frequency_penalty, f32::MIN..=f32::MAX),
        ];
        for (name, value, range) in numbers {
            if !range.contains(&value) {
                return malformed(format!("{name} is {value}, outside {range:?}"));
            }
        }
        if let Some((token, bias)) = logit_bias.iter().find(|(_, bias)| !bias.is_finite()) {
            return malformed(format!("logit_bias of token {token} is {bias}"));
        }
        if logprobs.is_some_and(|logprobs| logprobs > TOP_LOGPROBS_MAX) {
            return malformed(format!(
                "more than {TOP_LOGPROBS_MAX} log-probabilities are asked for"
            ));
        }
        self.token(
            "a logit_bias token",
            logit_bias.iter().map(|(token, _)| *token),
        )
    }
}

#[cfg(test)]
mod tests {
    use baton_protocol::{CacheSalt, Generation, KvGroup};

    use super::*;

    fn checks() -> Checks {
        Checks {
            model: ModelInfo {
                name: "m".into(),
                fingerprint: ModelFingerprint::new("a".repeat(64)).unwrap(),
                tokens_max: 100,
                vocab: 50,
            },
            kv: KvGeometry::bf16(
                8,
                vec![KvGroup {
                    layers: 1,
                    kv_heads: 1,
                    head_dim: 2,
                }],
            ),
            blocks: 10,
        }
    }

    fn sequence(tokens: usize) -> SequenceSpec {
        SequenceSpec {
            tokens: vec![1; tokens].into(),
            prompt_tokens: 1,
            generation: Generation {
                max_tokens: 1_000,
                stop_token_ids: vec![2, 50],
                ..Generation::default()
            },
            cache_salt: CacheSalt::NONE,
            service: baton_protocol::Service::default(),
        }
    }

    #[test]
    fn only_what_can_run_is_taken() {
        let checks = checks();
        let mut fits = sequence(79);
        assert_eq!(checks.sequence(&mut fits), Ok(()));
        assert_eq!(
            fits.generation.stop_token_ids,
            [2],
            "stop ids outside the vocabulary are dropped"
        );
        assert_eq!(
            checks.sequence(&mut sequence(80)),
            Err(Refusal::TooLong { tokens_max: 80 })
        );

        assert_eq!(checks.resumed(&mut sequence(78)), Ok(()));
        assert_eq!(
            checks.resumed(&mut sequence(79)),
            Err(Refusal::TooLong { tokens_max: 80 })
        );

        let bad = |change: fn(&mut SequenceSpec)| {
            let mut sequence = sequence(3);
            change(&mut sequence);
            matches!(
                checks.sequence(&mut sequence),
                Err(Refusal::Malformed { .. })
            )
        };
        assert!(bad(|s| s.prompt_tokens = 0));
        assert!(bad(|s| s.prompt_tokens = 4));
        assert!(bad(|s| s.tokens.0[1] = 50));
        assert!(bad(|s| s.generation.max_tokens = 0));
        assert!(bad(|s| s.generation.sampling.temperature = f32::INFINITY));
        assert!(bad(|s| s.generation.sampling.temperature = f32::NAN));
        assert!(bad(|s| s.generation.sampling.top_p = 1.5));
        assert!(bad(|s| s.generation.sampling.repetition_penalty = 0.0));
        assert!(bad(|s| s.generation.sampling.logit_bias = vec![(50, 1.0)]));
        assert!(bad(|s| s.generation.sampling.logprobs = Some(21)));
        assert!(!bad(|s| s.generation.sampling.logprobs = Some(20)));
    }

    #[test]
    fn other_models_and_layouts_are_told_apart() {
        let checks = checks();
        let other = ModelFingerprint::new("b".repeat(64)).unwrap();
        assert!(
            checks
                .model(&other)
                .unwrap_err()
                .to_string()
                .contains("bbbbbbbbbbbb…")
        );
        let mut kv = checks.kv.clone();
        kv.groups[0].head_dim = 4;
        let refusal = checks.geometry(&kv).unwrap_err().to_string();
        assert!(
            refusal.contains("head_dim is 2 here and 4 there"),
            "{refusal}"
        );
        assert_eq!(checks.geometry(&checks.kv), Ok(()));
    }
}
