//! `baton chat`: talk to a running cluster from a terminal.

use std::io::{self, BufRead, IsTerminal, Write};
use std::time::Duration;

use clap::Args;
use futures::StreamExt;
use serde_json::{Value, json};

use crate::Failure;
use crate::api_client::{ApiClient, ApiServerArg};
use crate::shutdown::Shutdown;
use crate::sse::SseReader;

#[derive(Args, Debug)]
pub struct ChatArgs {
    #[command(flatten)]
    server: ApiServerArg,
    /// Model to ask for [default: the one that is served]
    #[arg(long)]
    model: Option<String>,
    /// What the model is told before the conversation
    #[arg(long)]
    system: Option<String>,
    /// Most tokens of an answer
    #[arg(long, default_value_t = 512)]
    max_tokens: u32,
    /// 0 always takes the most likely token
    #[arg(long)]
    temperature: Option<f32>,
    /// Makes a random answer repeatable
    #[arg(long)]
    seed: Option<u64>,
    /// One question to answer; without it, a conversation: a line each, end with Ctrl-D
    question: Vec<String>,
}

/// How long the server may be silent: it sends keep-alive comments far more often.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// Prints answers on standard output as they come, and nothing else there.
pub fn run(args: ChatArgs) -> Result<(), Failure> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(async {
            let mut shutdown = Shutdown::catch()?;
            tokio::select! {
                biased;
                _ = shutdown.requested() => Err("interrupted".into()),
                outcome = converse(args) => outcome,
            }
        })
}

async fn converse(args: ChatArgs) -> Result<(), Failure> {
    let client = args
        .server
        .client(|builder| builder.read_timeout(SILENCE_MAX))?;
    let model = match &args.model {
        Some(model) => model.clone(),
        None => served_model(&client).await?,
    };
    let mut messages = Vec::new();
    if let Some(system) = &args.system {
        messages.push(json!({"role": "system", "content": system}));
    }
    if !args.question.is_empty() {
        messages.push(json!({"role": "user", "content": args.question.join(" ")}));
        answer(&client, &args, &model, &messages).await?;
        return Ok(());
    }
    let terminal = io::stdin().is_terminal();
    loop {
        if terminal {
            // Nobody left to see it is no fault.
            let _ = io::stderr().write_all(b"> ");
        }
        // On a thread of its own, so that a signal is heard while a person thinks.
        let line = tokio::task::spawn_blocking(|| io::stdin().lock().lines().next()).await?;
        let Some(line) = line.transpose()? else { break };
        if line.trim().is_empty() {
            continue;
        }
        messages.push(json!({"role": "user", "content": line}));
        let text = answer(&client, &args, &model, &messages).await?;
        messages.push(json!({"role": "assistant", "content": text}));
    }
    // A thread may still wait for input that never comes; do not wait for it in turn.
    Ok(())
}

async fn served_model(client: &ApiClient) -> Result<String, Failure> {
    let body = client.get("/v1/models").await?;
    body["data"][0]["id"]
        .as_str()
        .map(str::to_owned)
        .ok_or_else(|| format!("{} serves no model", client.base()).into())
}

/// Streams one answer to standard output and returns it.
async fn answer(
    client: &ApiClient,
    args: &ChatArgs,
    model: &str,
    messages: &[Value],
) -> Result<String, Failure> {
    let mut body = json!({"model": model, "messages": messages, "stream": true, "max_tokens": args.max_tokens});
    if let Some(temperature) = args.temperature {
        body["temperature"] = temperature.into();
    }
    if let Some(seed) = args.seed {
        body["seed"] = seed.into();
    }
    let response = client.post("/v1/chat/completions", &body).await?;
    let mut stream = response.bytes_stream();
    let mut reader = SseReader::default();
    let mut state = Answer::default();
    while let Some(bytes) = stream.next().await {
        reader.push(
            &bytes.map_err(|error| format!("the answer broke off: {error}"))?,
            |data| state.take(data),
        );
        io::stdout().write_all(state.unprinted().as_bytes())?;
        io::stdout().flush()?;
        if let Some(error) = state.error.take() {
            return Err(format!("the answer broke off: {error}").into());
        }
    }
    writeln!(io::stdout())?;
    match state.done {
        true => Ok(state.text),
        false => Err("the answer broke off: the server closed the stream".into()),
    }
}

/// What came of an answer so far.
#[derive(Default)]
struct Answer {
    text: String,
    printed: usize,
    done: bool,
    error: Option<String>,
}

impl Answer {
    fn take(&mut self, data: &[u8]) {
        if data == b"[DONE]" {
            self.done = true;
            return;
        }
        let Ok(event) = serde_json::from_slice::<Value>(data) else {
            self.error = Some(format!(
                "an event that is no JSON: {}",
                String::from_utf8_lossy(data)
            ));
            return;
        };
        if let Some(message) = event["error"]["message"].as_str() {
            self.error = Some(message.to_owned());
        }
        if let Some(text) = event["choices"][0]["delta"]["content"].as_str() {
            self.text.push_str(text);
        }
    }

    fn unprinted(&mut self) -> &str {
        let from = std::mem::replace(&mut self.printed, self.text.len());
        &self.text[from..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_put_together_and_its_end_noticed() {
        let mut answer = Answer::default();
        answer.take(br#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#);
        answer.take(br#"{"choices":[{"delta":{"content":"Hel"}}]}"#);
        assert_eq!(answer.unprinted(), "Hel");
        answer.take(br#"{"choices":[{"delta":{"content":"lo"},"finish_reason":null}]}"#);
        assert_eq!(answer.unprinted(), "lo");
        assert!(!answer.done);
        answer.take(br#"{"choices":[],"usage":{"completion_tokens":2}}"#);
        answer.take(b"[DONE]");
        assert!(answer.done && answer.error.is_none());
        assert_eq!(answer.text, "Hello");
    }

    #[test]
    fn an_error_in_the_stream_is_an_error() {
        let mut answer = Answer::default();
        answer.take(br#"{"error":{"message":"decode worker lost"}}"#);
        assert_eq!(answer.error.as_deref(), Some("decode worker lost"));
    }
}
