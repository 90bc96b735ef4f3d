//! Where costs come from: files, and the cluster at `--url`.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use baton_protocol::{Capacity, KvGeometry, ModelInfo, StepCost};
use serde::Deserialize;
use serde_json::Value;

use crate::Failure;
use crate::api_client::ApiServerArg;

/// A cluster's answer is waited for so long.
const ANSWER_WAIT: Duration = Duration::from_secs(5);

/// Costs of workers that differ by more than this part are told of.
const DIFFERENCE_TOLD: f32 = 0.1;

/// A value of `--cost`: a file, with the name by which groups of a mix say it, if it has one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CostFile {
    pub name: Option<String>,
    pub path: PathBuf,
}

/// Whether groups can say a cost by this name.
pub fn is_name(text: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    !text.is_empty() && text.bytes().all(is_plain)
}

impl FromStr for CostFile {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let named = text.split_once('=').filter(|(name, _)| is_name(name));
        let (name, path) = match named {
            Some((name, path)) => (Some(name.to_owned()), path),
            None => (None, text),
        };
        match path {
            "" => Err(format!("{text:?} names no file: FILE or NAME=FILE")),
            path => Ok(Self {
                name,
                path: path.into(),
            }),
        }
    }
}

impl fmt::Display for CostFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Some(name) => write!(f, "--cost {name}={}", self.path.display()),
            None => write!(f, "--cost {}", self.path.display()),
        }
    }
}

/// What a cluster tells of one of its workers, as far as a plan wants it.
#[derive(Clone, Debug, Deserialize)]
pub struct Row {
    pub worker: String,
    pub state: String,
    pub device: String,
    pub model: ModelInfo,
    pub kv: KvGeometry,
    pub capacity: Capacity,
    #[serde(default)]
    pub step_tokens: Option<u32>,
    #[serde(default)]
    pub itl_ms: Option<u32>,
    #[serde(default)]
    pub cost: Option<StepCost>,
    #[serde(default)]
    pub peers: Vec<Peer>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Peer {
    #[serde(default)]
    pub gigabytes_per_second: f64,
    #[serde(default)]
    pub pulled_gigabytes_per_second: f64,
}

/// What one source told.
pub struct Told {
    pub cost: StepCost,
    /// The worker whose cost it is, where a cluster tells.
    pub row: Option<Row>,
    pub rows: Vec<Row>,
}

impl Told {
    /// What a file says: what `baton status --json` printed, or one worker's cost of it alone.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(file: &CostFile) -> Result<Self, Failure> {
        Ok(from_file(&file.path).map_err(|error| format!("{file}: {error}"))?)
    }

    /// What the cluster at `--url` says.
    ///
    /// # Errors
    /// Why it says nothing, and what else there is to say.
    pub fn ask(server: &ApiServerArg) -> Result<Self, Failure> {
        let client = server.client(|builder| builder.timeout(ANSWER_WAIT))?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let cluster = runtime.block_on(client.get("/cluster"));
        let cluster = cluster.map_err(|error| {
            format!("{error}; without --cost FILE a plan is of what a running cluster measured")
        })?;
        Ok(of_cluster(&cluster).map_err(|error| format!("{}: {error}", client.base()))?)
    }

    /// What has to be said of it, as sentences.
    pub fn notes(&self) -> Vec<String> {
        let Some(row) = &self.row else {
            return Vec::new();
        };
        let costs = self.rows.iter().filter_map(|row| row.cost.as_ref());
        let all: Vec<f32> = costs.map(|cost| prompt_us(cost) / 1e3).collect();
        let least = all.iter().copied().fold(f32::INFINITY, f32::min);
        let most = all.iter().copied().fold(0.0, f32::max);
        let differ = match most > least * (1.0 + DIFFERENCE_TOLD) {
            true => {
                format!("; theirs take {least:.1} to {most:.1} ms for 2,048 tokens of a prompt")
            }
            false => String::new(),
        };
        vec![format!(
            "all workers are as {} is, of {} that tell what their steps cost{differ}",
            row.worker,
            all.len()
        )]
    }

    /// As pulls were measured, or where there were none yet as the first reads were.
    pub fn slowest_link_gbps(&self) -> Option<f64> {
        let peers = self.rows.iter().flat_map(|row| &row.peers);
        let rates = peers.filter_map(|peer| {
            [peer.pulled_gigabytes_per_second, peer.gigabytes_per_second]
                .into_iter()
                .find(|rate| *rate > 0.0)
        });
        rates.min_by(f64::total_cmp).map(|rate| rate * 8.0)
    }
}

fn from_file(path: &Path) -> Result<Told, String> {
    let text = std::fs::read(path).map_err(|error| error.to_string())?;
    let json: Value = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
    if json.get("workers").is_some() {
        return of_cluster(&json);
    }
    let cost = StepCost::deserialize(&json).map_err(|error| {
        format!("it is neither a step cost ({error}) nor what `baton status --json` prints")
    })?;
    cost.check()?;
    Ok(Told {
        cost,
        row: None,
        rows: Vec::new(),
    })
}

/// Of the workers that serve, the one whose cost is in the middle.
fn of_cluster(cluster: &Value) -> Result<Told, String> {
    let rows = Vec::<Row>::deserialize(&cluster["workers"])
        .map_err(|error| format!("what it says of its workers is not understood: {error}"))?;
    let serving = |row: &&Row| row.state == "serving";
    let costs = rows.iter().filter(serving).filter_map(|row| {
        let cost = row.cost.as_ref().filter(|cost| cost.check().is_ok())?;
        Some((row, cost))
    });
    let mut costs: Vec<_> = costs.collect();
    costs.sort_by(|(_, one), (_, other)| prompt_us(one).total_cmp(&prompt_us(other)));
    let Some((row, cost)) = costs.get(costs.len() / 2) else {
        return Err(
            "none of its workers serves and tells what its steps cost: workers and API server must be of this release, and a fake device \
             tells it only where it was told"
                .to_owned(),
        );
    };
    Ok(Told {
        cost: (*cost).clone(),
        row: Some((*row).clone()),
        rows,
    })
}

/// What tells costs apart: the time of a step with a large part of a prompt.
fn prompt_us(cost: &StepCost) -> f32 {
    cost.layers_us(2048)
}
