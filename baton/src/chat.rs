//! `baton chat`: talk to a running cluster from a terminal, or from a script.

mod answer;
mod lines;
mod markdown;
mod show;

use std::collections::VecDeque;
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use futures::{FutureExt, StreamExt};
use serde_json::{Value, json};

use self::answer::{Answer, Call};
use self::lines::{Lines, history_file};
use self::show::Show;
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
    /// Tools that the model may call (a JSON list, as in OpenAI's requests); what is typed after a call is its result
    #[arg(long, value_name = "FILE")]
    tools: Option<PathBuf>,
    /// Print each answer as a JSON object on a line: content, reasoning, tool_calls, finish_reason, usage
    #[arg(long)]
    json: bool,
    /// Keep nothing of what is typed [default: in $XDG_STATE_HOME/baton/chat_history]
    #[arg(long)]
    no_history: bool,
    /// One question to answer; without it, a conversation: a line each, end with Ctrl-D
    question: Vec<String>,
}

/// How long the server may be silent: it sends keep-alive comments far more often.
const SILENCE_MAX: Duration = Duration::from_secs(60);

const HELP: &str = "\
/new            begin a new conversation
/system TEXT    tell the model TEXT before the conversation; without TEXT, nothing
/quit           end, as Ctrl-D and Ctrl-C do at an empty line
Ctrl-C stops an answer. A line that begins with a space is sent as it is, and not kept.
";

/// Prints answers on standard output as they come, and nothing else there.
pub fn run(args: ChatArgs) -> Result<(), Failure> {
    let tools = args.tools.as_deref().map(read_tools).transpose()?;
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(async {
            let mut shutdown = Shutdown::catch()?;
            let begun = Chat::begin(args, tools);
            let mut chat = tokio::select! {
                biased;
                _ = shutdown.requested() => return Err(interrupted()),
                chat = begun => chat?,
            };
            match chat.args.question.is_empty() {
                true => chat.converse(&mut shutdown).await,
                false => chat.one_question(&mut shutdown).await,
            }
        })
}

fn interrupted() -> Failure {
    "interrupted".into()
}

fn read_tools(file: &Path) -> Result<Value, Failure> {
    let wrong = |why: String| Failure::from(format!("--tools {}: {why}", file.display()));
    let text = std::fs::read(file).map_err(|error| wrong(error.to_string()))?;
    let tools = serde_json::from_slice::<Value>(&text);
    let tools = tools.map_err(|error| wrong(format!("it is no JSON: {error}")))?;
    match tools.is_array() {
        true => Ok(tools),
        false => Err(wrong("it is no list of tools".to_owned())),
    }
}

/// A conversation.
struct Chat {
    client: ApiClient,
    args: ChatArgs,
    model: String,
    tools: Option<Value>,
    system: Option<String>,
    /// Everything after the system's message.
    turns: Vec<Value>,
    /// Where in it the last question stands: an answer that fails takes it along.
    question: usize,
    /// Tool calls whose results are yet to be typed.
    owed: VecDeque<Call>,
    show: Show,
}

/// What became of an answer.
enum Outcome {
    Whole,
    /// Ctrl-C.
    Stopped,
    Failed(Failure),
}

impl Chat {
    async fn begin(args: ChatArgs, tools: Option<Value>) -> Result<Self, Failure> {
        let client = args
            .server
            .client(|builder| builder.read_timeout(SILENCE_MAX))?;
        let model = match &args.model {
            Some(model) => model.clone(),
            None => client.served_model().await?,
        };
        Ok(Self {
            show: Show::for_stdout(args.json),
            system: args.system.clone(),
            client,
            args,
            model,
            tools,
            turns: Vec::new(),
            question: 0,
            owed: VecDeque::new(),
        })
    }

    async fn one_question(&mut self, shutdown: &mut Shutdown) -> Result<(), Failure> {
        self.ask(self.args.question.join(" "));
        match self.answer(shutdown, false).await? {
            Outcome::Failed(failure) => Err(failure),
            Outcome::Whole | Outcome::Stopped => Ok(()),
        }
    }

    /// Line by line, to the end of standard input. A failed answer is told, and the conversation goes on.
    async fn converse(&mut self, shutdown: &mut Shutdown) -> Result<(), Failure> {
        let is_person = io::stdin().is_terminal();
        let history = history_file(|name| std::env::var_os(name));
        let mut lines = Lines::open(history.filter(|_| !self.args.no_history))?;
        let (mut asked, mut failed) = (0_usize, 0_usize);
        loop {
            let prompt = match self.owed.front() {
                Some(call) => format!("result of {}> ", call.name),
                None => "> ".to_owned(),
            };
            let line = tokio::select! {
                biased;
                _ = shutdown.requested() => return Err(interrupted()),
                line = lines.next(&prompt) => line?,
            };
            let Some(line) = line else { break };
            if line.trim().is_empty() {
                continue;
            }
            if is_person && line.starts_with('/') {
                match self.command(&line) {
                    true => continue,
                    false => break,
                }
            }
            if !self.takes(line) {
                continue;
            }
            asked += 1;
            if let Outcome::Failed(failure) = self.answer(shutdown, is_person).await? {
                failed += 1;
                say(&format!("baton: {failure}\n"));
            }
        }
        match failed {
            0 => Ok(()),
            // Who saw it at once needs no summary.
            _ if is_person => Ok(()),
            failed => Err(format!("{failed} of {asked} answers failed").into()),
        }
    }

    /// Takes a line in; true if the model is to answer now.
    fn takes(&mut self, line: String) -> bool {
        let Some(call) = self.owed.pop_front() else {
            self.ask(line);
            return true;
        };
        let result = json!({"role": "tool", "tool_call_id": call.id, "content": line});
        self.turns.push(result);
        self.owed.is_empty()
    }

    fn ask(&mut self, question: String) {
        self.question = self.turns.len();
        self.turns
            .push(json!({"role": "user", "content": question}));
    }

    /// Does what a line with a slash says; false if that is to end.
    fn command(&mut self, line: &str) -> bool {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        let rest = rest.trim();
        match word.trim_end() {
            "/new" => {
                self.turns.clear();
                self.owed.clear();
            }
            "/system" => self.system = (!rest.is_empty()).then(|| rest.to_owned()),
            "/help" => say(HELP),
            "/quit" => return false,
            word => say(&format!(
                "there is no {word}: /help names what there is; begin with a space to send the line\n"
            )),
        }
        true
    }

    /// Has the model answer, shows it, and remembers it.
    ///
    /// # Errors
    /// If the program is to end.
    async fn answer(
        &mut self,
        shutdown: &mut Shutdown,
        is_person: bool,
    ) -> Result<Outcome, Failure> {
        // A Ctrl-C that came too late for the last answer is not for this one.
        while let Some(signal) = shutdown.requested().now_or_never() {
            if !is_person || signal != "SIGINT" {
                return Err(interrupted());
            }
        }
        let mut answer = Answer::default();
        let body = self.body();
        let came = tokio::select! {
            biased;
            signal = shutdown.requested() => match is_person && signal == "SIGINT" {
                true => None,
                false => {
                    self.show.failed(&answer, &self.model, "interrupted")?;
                    return Err(interrupted());
                }
            },
            came = stream(&self.client, &body, &mut answer, &mut self.show) => Some(came),
        };
        let outcome = match came {
            None => {
                self.show.end(&answer, &self.model)?;
                // Calls that may be half there are not made.
                answer.calls.clear();
                Outcome::Stopped
            }
            Some(Ok(())) => {
                self.show.end(&answer, &self.model)?;
                Outcome::Whole
            }
            Some(Err(failure)) => {
                let sentence = failure.to_string();
                self.show.failed(&answer, &self.model, &sentence)?;
                Outcome::Failed(failure)
            }
        };
        let is_kept = match outcome {
            Outcome::Whole => true,
            Outcome::Stopped => !answer.content.is_empty(),
            Outcome::Failed(_) => false,
        };
        match is_kept {
            true => {
                self.turns.push(answer.message());
                self.owed.extend(answer.calls);
            }
            false => self.turns.truncate(self.question),
        }
        Ok(outcome)
    }

    fn body(&self) -> Value {
        let system = self.system.as_ref();
        let system = system.map(|text| json!({"role": "system", "content": text}));
        let messages: Vec<_> = system.iter().chain(&self.turns).collect();
        let mut body = json!({
            "model": self.model, "messages": messages, "stream": true, "stream_options": {"include_usage": true},
            "max_tokens": self.args.max_tokens,
        });
        if let Some(temperature) = self.args.temperature {
            body["temperature"] = temperature.into();
        }
        if let Some(seed) = self.args.seed {
            body["seed"] = seed.into();
        }
        if let Some(tools) = &self.tools {
            body["tools"] = tools.clone();
        }
        body
    }
}

/// Streams one answer, and shows what comes of it.
async fn stream(
    client: &ApiClient,
    body: &Value,
    answer: &mut Answer,
    show: &mut Show,
) -> Result<(), Failure> {
    let response = client.post("/v1/chat/completions", body).await?;
    let mut stream = response.bytes_stream();
    let mut reader = SseReader::default();
    while let Some(bytes) = stream.next().await {
        reader.push(
            &bytes.map_err(|error| format!("the answer broke off: {error}"))?,
            |data| answer.take(data),
        );
        show.more(answer)?;
        if let Some(error) = answer.error.take() {
            return Err(format!("the answer broke off: {error}").into());
        }
    }
    match answer.done {
        true => Ok(()),
        false => Err("the answer broke off: the server closed the stream".into()),
    }
}

/// To the person, beside the answers, and before what is printed next. Nobody left to see it is no fault.
fn say(text: &str) {
    let _ = io::Write::write_all(&mut io::stderr(), text.as_bytes());
}
