//! Undisturbed answers: what one worker says to whom nothing happens.

use std::collections::HashMap;

use futures::StreamExt;
use futures::stream;
use serde_json::json;

use super::load::Ask;
use super::said::Said;
use crate::cluster::Cluster;
use crate::setup::Setup;
use crate::turn::Turn;

/// Requests asked at once.
const AT_ONCE: usize = 8;

/// A cluster of one worker, with all the room it wants and nothing cached, and what it said so far.
pub struct Reference {
    cluster: Cluster,
    model: String,
    known: HashMap<String, Said>,
}

impl Reference {
    /// Starts it.
    pub async fn start(turn: &Turn, device: &'static str) -> Self {
        let setup = Setup {
            device,
            worker_args: vec!["--no-prefix-cache".to_owned()],
            ..Setup::unsplit()
        };
        let cluster = Cluster::start(turn, setup).await;
        let model = cluster.model().await;
        Self {
            cluster,
            model,
            known: HashMap::new(),
        }
    }

    /// The model's name.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// The answers to these requests.
    ///
    /// # Panics
    /// If one is not answered: nothing was in its way.
    pub async fn answers(&mut self, asks: &[Ask]) -> Vec<Said> {
        let unknown = asks
            .iter()
            .filter(|ask| !self.known.contains_key(&key(ask)));
        let learned: Vec<(String, Said)> = stream::iter(unknown)
            .map(|ask| async {
                let mut body = ask.body.clone();
                body["model"] = json!(self.model);
                let answer = self.cluster.api.post(ask.path, &body).await.ok();
                let said = Said::of(&answer);
                (key(ask), said.unwrap_or_else(|e| panic!("{e}: {answer}")))
            })
            .buffer_unordered(AT_ONCE)
            .collect()
            .await;
        self.known.extend(learned);
        asks.iter()
            .map(|ask| self.known[&key(ask)].clone())
            .collect()
    }
}

fn key(ask: &Ask) -> String {
    format!("{} {}", ask.path, ask.body)
}
