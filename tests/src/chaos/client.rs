//! One request of the load, and everything that came back.

use std::time::{Duration, Instant};

use reqwest::{Client, Response};
use serde_json::{Value, json};

use super::load::{Arrival, Ask, Reader};

/// Past its budget a request may need this long to be told so: an API server may be frozen for twelve seconds.
const PAST_BUDGET: Duration = Duration::from_secs(30);

/// What came back for one request.
#[derive(Clone, Debug)]
pub struct Story {
    /// When it was asked, from the beginning of the load.
    pub from: Duration,
    /// How long the first event of a stream took.
    pub first: Option<Duration>,
    /// When it was over.
    pub until: Duration,
    /// The status, if a head came.
    pub status: Option<u16>,
    /// `Retry-After`.
    pub retry_after: Option<String>,
    /// The body, as far as it came.
    pub body: Vec<u8>,
    /// How it ended.
    pub end: End,
}

/// How a connection ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The body is complete.
    Complete,
    /// The client closed it, as it was to.
    Left,
    /// It broke.
    Broken(String),
    /// Nothing ended it.
    Hung,
}

/// One client, with a connection of its own: nobody else's fate touches it.
pub struct Asking {
    /// `http://HOST:PORT`.
    pub base: String,
    /// The model's name.
    pub model: String,
    /// What is asked.
    pub ask: Ask,
    /// What the client does.
    pub reader: Reader,
    /// Longer than that is a hang.
    pub patience: Duration,
}

impl Asking {
    /// Asks, reads, and tells. `epoch` is the beginning of the load.
    pub async fn tell(self, epoch: Instant) -> Story {
        let mut story = Story {
            from: epoch.elapsed(),
            first: None,
            until: Duration::ZERO,
            status: None,
            retry_after: None,
            body: Vec::new(),
            end: End::Complete,
        };
        let leaves = match self.reader {
            Reader::LeavesAt { after, .. } => after,
            _ => Duration::MAX,
        };
        let time = leaves.min(self.patience);
        story.end = match tokio::time::timeout(time, self.read(&mut story)).await {
            Ok(Ok(end)) => end,
            Ok(Err(error)) => End::Broken(format!("{error:?}")),
            Err(_) if time == leaves => End::Left,
            Err(_) => End::Hung,
        };
        story.until = epoch.elapsed();
        story
    }

    async fn read(&self, story: &mut Story) -> Result<End, reqwest::Error> {
        let since = Instant::now();
        let mut response = self.send().await?;
        story.status = Some(response.status().as_u16());
        let retry_after = response.headers().get("retry-after");
        story.retry_after = retry_after
            .and_then(|value| value.to_str().ok())
            .map(str::to_owned);
        while let Some(piece) = response.chunk().await? {
            story.body.extend_from_slice(&piece);
            if story.first.is_none() && events_of(&story.body) > 0 {
                story.first = Some(since.elapsed());
            }
            match self.reader {
                Reader::LeavesAfter { events } if events_of(&story.body) >= events => {
                    return Ok(End::Left);
                }
                Reader::Slow { pause } => tokio::time::sleep(pause).await,
                _ => {}
            }
        }
        Ok(End::Complete)
    }

    async fn send(&self) -> Result<Response, reqwest::Error> {
        let mut body = self.ask.body.clone();
        body["model"] = json!(self.model);
        if self.reader.streams() {
            body["stream"] = json!(true);
        }
        if self.reader.wants_usage() {
            body["stream_options"] = json!({"include_usage": true});
        }
        let client = Client::builder()
            .no_proxy()
            .pool_max_idle_per_host(0)
            .build()?;
        let mut request = client.post(format!("{}{}", self.base, self.ask.path));
        for (name, value) in &self.ask.headers {
            request = request.header(*name, value);
        }
        request.json::<Value>(&body).send().await
    }
}

/// Where the clients of a load ask.
pub struct Clients {
    /// The beginning of the load.
    pub epoch: Instant,
    /// The model's name.
    pub model: String,
    /// Where the API servers are.
    pub bases: Vec<String>,
    /// What a request may take at each.
    pub budgets: Vec<Duration>,
}

impl Clients {
    /// One client, which waits for its time, asks, and tells.
    pub fn client(
        &self,
        arrival: &Arrival,
        ask: &Ask,
    ) -> impl Future<Output = Story> + Send + use<> {
        let asking = Asking {
            base: self.bases[arrival.server].clone(),
            model: self.model.clone(),
            ask: ask.clone(),
            reader: arrival.reader,
            patience: self.budgets[arrival.server] + PAST_BUDGET,
        };
        let (epoch, at) = (self.epoch, arrival.at);
        async move {
            tokio::time::sleep_until((epoch + at).into()).await;
            asking.tell(epoch).await
        }
    }
}

/// Events with data so far; what only keeps the connection alive is none.
fn events_of(body: &[u8]) -> usize {
    let text = String::from_utf8_lossy(body);
    text.lines()
        .filter(|line| line.starts_with("data:"))
        .count()
}
