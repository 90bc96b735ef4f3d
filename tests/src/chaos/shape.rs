//! The cluster of a seed: how many of what, with how much room.

use std::fmt;
use std::time::Duration;

use baton_protocol::Role;

use super::draw::Draw;
use super::service::Promised;
use crate::setup::Setup;

/// What the cluster under test is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// `cpu` or `fake`.
    pub device: &'static str,
    /// Tensor-parallel ranks of context workers, and of the others. Answers are the same whatever they are.
    pub ranks: [u32; 2],
    /// Context workers.
    pub context: usize,
    /// Decode workers.
    pub decode: usize,
    /// Workers that do both.
    pub both: usize,
    /// What they promise; else nothing.
    pub promised: Option<Promised>,
    /// API servers.
    pub api_servers: usize,
    /// Whether an API server that is started again has the name it had.
    pub same_name: bool,
    /// Seconds that a request may take at each API server.
    pub budget_s: Vec<u64>,
    /// Megabytes of KV of each worker.
    pub kv_mib: usize,
    /// Sequences of a step.
    pub batch: usize,
    /// Jobs that may wait.
    pub queue: usize,
    /// Token budget of a step.
    pub step_tokens: usize,
    /// How long staged KV waits for its release.
    pub lease_ms: u64,
    /// Whether prompts' blocks are kept for later prompts.
    pub prefix_cache: bool,
    /// Whether each worker has a host of its own, so that networks can be cut.
    pub network: bool,
    /// UCX transports; `None` leaves the choice to UCX.
    pub ucx_tls: Option<&'static str>,
}

impl Shape {
    /// The cluster of this seed.
    pub fn of(seed: u64, device: &'static str) -> Self {
        let mut draw = Draw::new(seed, "shape");
        let api_servers = draw.number(1, 2) as usize;
        // Without a draw: seeds keep the rest of their clusters. The model has three heads to share out, the fake device none.
        let ranks = match (device, seed % 4) {
            ("cpu", 1) => [3, 1],
            ("cpu", 2) => [1, 3],
            ("cpu", 3) => [3, 3],
            _ => [1, 1],
        };
        let both = usize::from(draw.percent(30));
        // Three do both sides in every third seed: KV moves among them. Without a draw too.
        let [context, decode, both] = match seed % 3 {
            0 => [0, 0, 3],
            _ => [2, 2, both],
        };
        Self {
            device,
            ranks,
            context,
            decode,
            both,
            promised: Promised::of(seed, device),
            api_servers,
            same_name: seed.is_multiple_of(2),
            budget_s: (0..api_servers)
                .map(|_| draw.weighed(&[(3, 60), (1, 12)]))
                .collect(),
            // 48 hold some six of the longest sequences
            kv_mib: draw.weighed(&[(1, 48), (2, 192)]),
            batch: draw.pick(&[4, 16, 32]),
            queue: draw.weighed(&[(1, 4), (2, 256)]),
            step_tokens: draw.pick(&[48, 128, 256]),
            lease_ms: draw.pick(&[2_000, 8_000, 30_000]),
            prefix_cache: draw.percent(75),
            ucx_tls: draw.pick(&[None, Some("tcp,self")]),
            // so that three seeds in a row have one, and one that is not
            network: seed % 3 != 1,
        }
    }

    /// Roles of the workers, by their numbers.
    pub fn roles(&self) -> Vec<Role> {
        let counts = [
            (Role::Context, self.context),
            (Role::Decode, self.decode),
            (Role::Both, self.both),
        ];
        counts
            .into_iter()
            .flat_map(|(role, count)| std::iter::repeat_n(role, count))
            .collect()
    }

    /// What a request may take at each API server.
    pub fn budgets(&self) -> Vec<Duration> {
        self.budget_s
            .iter()
            .copied()
            .map(Duration::from_secs)
            .collect()
    }

    /// The harness's word for it.
    pub fn setup(&self) -> Setup {
        let mut worker_args = vec!["--lease-ms".to_owned(), self.lease_ms.to_string()];
        if !self.prefix_cache {
            worker_args.push("--no-prefix-cache".to_owned());
        }
        if let Some(promised) = self.promised {
            worker_args.extend(promised.worker_args(self.device));
        }
        Setup {
            tp_sizes: self.ranks.map(|ranks| (ranks > 1).then_some(ranks)),
            context: self.context,
            decode: self.decode,
            both: self.both,
            device: self.device,
            step_tokens: self.step_tokens,
            batch: self.batch,
            queue: self.queue,
            kv_mib: self.kv_mib,
            ucx_tls: self.ucx_tls,
            worker_args,
            ..Setup::default()
        }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} context, {} decode, {} both on {}, {} and {} ranks; API servers with {} names and budgets of {:?} s; {} MiB of KV, batch {}, queue {}, \
             steps of {} tokens, leases of {} ms, prefix cache {}, UCX over {}, {}, {}",
            self.context,
            self.decode,
            self.both,
            self.device,
            self.ranks[0],
            self.ranks[1],
            if self.same_name { "lasting" } else { "new" },
            self.budget_s,
            self.kv_mib,
            self.batch,
            self.queue,
            self.step_tokens,
            self.lease_ms,
            if self.prefix_cache { "on" } else { "off" },
            match self.network {
                true => "tcp,self",
                false => self.ucx_tls.unwrap_or("what it likes"),
            },
            match self.network {
                true => "each worker on a host of its own",
                false => "all on one host",
            },
            self.promised.map_or_else(
                || "nothing promised".to_owned(),
                |promised| promised.to_string()
            ),
        )
    }
}
