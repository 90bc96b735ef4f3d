//! A pull that follows a prompt which still runs: it asks how far the prompt is, and reads what is final while the rest is computed.

use baton_bus::RequestError;
use baton_engine::Sampled;
use baton_protocol::{Failure, FailureCode, ProgressReply, decode, encode};

use tokio::time::Instant;

use super::pulls::{CONTROL_TIMEOUT, Pull, PullFailure};
use super::reading::Reading;

/// Times that one question is asked whose answer does not come: it may be lost on the bus once.
const ASKS_MAX: u32 = 2;

impl Pull {
    /// Reads all of it, the last blocks when the prompt is done. The token that follows it.
    pub(super) async fn follow(&self, reading: &mut Reading<'_>) -> Result<Sampled, PullFailure> {
        let mut have = 0;
        loop {
            let asked = Instant::now();
            let answer = self.ask(have).await?;
            reading.progress += asked.elapsed();
            reading.part("progress", asked);
            match answer {
                ProgressReply::Running { tokens, .. } => {
                    have = tokens.max(have);
                    reading.read_full(have).await?;
                }
                ProgressReply::Done {
                    first_token,
                    first_logprobs,
                    finish: None,
                    ..
                } => {
                    reading.read_all().await?;
                    return Ok(Sampled {
                        token: first_token,
                        logprobs: first_logprobs,
                    });
                }
                ProgressReply::Done { .. } => {
                    let why = "its first token ended the generation".to_owned();
                    return Err(told(Failure::new(FailureCode::HandleInvalid, why)));
                }
                ProgressReply::Failed { failure, .. } => {
                    return Err(match failure.code {
                        FailureCode::HandleInvalid => self.invalid(failure.message),
                        _ => told(failure),
                    });
                }
            }
        }
    }

    async fn ask(&self, have: u32) -> Result<ProgressReply, PullFailure> {
        let unknown = |why: String| {
            let from = &self.handle.worker;
            let message = format!("{from} does not say how far the prompt is: {why}");
            PullFailure::new(FailureCode::PullFailed, message)
        };
        let payload = encode(&self.progress(have)).map_err(|error| unknown(error.to_string()))?;
        let mut asked = 0;
        loop {
            asked += 1;
            let subject = self.progress_subject.clone();
            let answer = self
                .wire
                .request_within(subject, payload.clone().into(), CONTROL_TIMEOUT);
            match answer.await {
                Ok(answer) => {
                    return decode(&answer.payload).map_err(|error| unknown(error.to_string()));
                }
                Err(RequestError::TimedOut) if asked < ASKS_MAX => {}
                Err(error) => return Err(unknown(error.to_string())),
            }
        }
    }
}

/// The context worker tells the API server the same, who asks too.
fn told(failure: Failure) -> PullFailure {
    PullFailure {
        failure,
        connection: None,
        is_told: true,
    }
}
