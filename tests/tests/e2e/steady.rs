//! A load that goes on while a cluster is changed under it: every answer is compared with the undisturbed one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use baton_tests::{Answer, Api, Cluster, PATIENCE, eventually};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

const PATH: &str = "/v1/completions";

/// A request and the choices that are right for it.
#[derive(Clone, Debug)]
pub struct Question {
    pub request: Value,
    pub choices: Value,
}

/// Questions whose answers would show the smallest difference, answered by the cluster while nothing disturbs it.
pub async fn questions(cluster: &Cluster, tokens: usize) -> Vec<Question> {
    let model = cluster.model().await;
    let long: Vec<usize> = (1000..1400).collect();
    let short = "My grandmother told me about the winter in which the river froze, and";
    let requests = [
        json!({"model": model, "prompt": short, "max_tokens": tokens, "ignore_eos": true, "temperature": 0}),
        json!({"model": model, "prompt": long, "max_tokens": tokens / 2, "ignore_eos": true, "temperature": 1,
               "seed": 42, "logprobs": 0, "frequency_penalty": 0.5}),
        json!({"model": model, "prompt": "Three friends", "max_tokens": tokens / 2, "ignore_eos": true,
               "temperature": 1, "seed": 7, "n": 2}),
    ];
    let mut questions = Vec::new();
    for request in requests {
        let choices = cluster.api.complete(&request).await["choices"].clone();
        questions.push(Question { request, choices });
    }
    questions
}

/// Clients that ask one question after the other until they are told to stop.
pub struct Steady {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicUsize>,
    clients: Vec<JoinHandle<()>>,
}

impl Steady {
    /// `clients` of them, divided over these API servers. One whose server refuses the connection goes to the next; any
    /// other error, and any answer that is not right, fails the test.
    pub fn start(apis: &[Api], questions: &[Question], clients: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let answered = Arc::new(AtomicUsize::new(0));
        let clients = (0..clients).map(|client| {
            let (stop, answered) = (Arc::clone(&stop), Arc::clone(&answered));
            let (apis, questions) = (apis.to_vec(), questions.to_vec());
            tokio::spawn(async move {
                for number in client.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let question = &questions[number % questions.len()];
                    let streamed = number / questions.len() % 2 == 1;
                    ask_someone(&apis, client, question, streamed).await;
                    answered.fetch_add(1, Ordering::Relaxed);
                }
            })
        });
        Self {
            clients: clients.collect(),
            stop,
            answered,
        }
    }

    /// Waits until each client has been answered about twice more.
    pub async fn goes_on(&self) {
        let until = self.answered.load(Ordering::Relaxed) + 2 * self.clients.len();
        eventually("more answers", PATIENCE, async || {
            let broken = self.clients.iter().any(JoinHandle::is_finished);
            match self.answered.load(Ordering::Relaxed) {
                answered if answered >= until || broken => Ok(()),
                answered => Err(format!("{answered} of {until}")),
            }
        })
        .await;
    }

    /// Stops, and gives the number of answers: all there were were right.
    pub async fn stop(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        for client in self.clients {
            client.await.expect("a client saw an error");
        }
        self.answered.load(Ordering::Relaxed)
    }
}

async fn ask_someone(apis: &[Api], first: usize, question: &Question, streamed: bool) {
    let mut refusal = String::new();
    for i in 0..apis.len() {
        let api = &apis[(first + i) % apis.len()];
        match ask_until_there_is_room(api, question, streamed).await {
            Ok(()) => return,
            Err(error) if error.contains("ConnectionRefused") => refusal = error,
            Err(error) => panic!("{}: {error}", api.base()),
        }
    }
    panic!("nobody is there: {refusal}");
}

/// On a slow machine the decode workers may be full for long, which is said before the first token: a client comes back.
async fn ask_until_there_is_room(
    api: &Api,
    question: &Question,
    streamed: bool,
) -> Result<(), String> {
    let until = Instant::now() + PATIENCE;
    loop {
        match ask(api, question, streamed).await {
            Err(error)
                if error.contains("the decode workers are full") && Instant::now() < until =>
            {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            outcome => return outcome,
        }
    }
}

async fn ask(api: &Api, question: &Question, streamed: bool) -> Result<(), String> {
    if !streamed {
        let body = question.request.to_string().into_bytes();
        let answer = api.send(reqwest::Method::POST, PATH, Some(body)).await?;
        let Answer { status, body, .. } = answer;
        if status != 200 {
            return Err(format!("{status} {body}"));
        }
        assert_eq!(body["choices"], question.choices);
        return Ok(());
    }
    let events = api.try_stream(PATH, &question.request).await?.rest().await;
    let right = question.choices.as_array().expect("choices");
    for (index, right) in right.iter().enumerate() {
        let mine = events
            .iter()
            .filter_map(|event| event["choices"].get(0))
            .filter(|choice| choice["index"] == index);
        let (mut text, mut finish) = (String::new(), Vec::new());
        for choice in mine {
            text.push_str(choice["text"].as_str().unwrap_or_default());
            finish.extend(choice["finish_reason"].as_str());
        }
        assert_eq!(text, right["text"], "choice {index} of {events:?}");
        assert_eq!(finish, ["length"]);
    }
    Ok(())
}
