//! Carries a schedule out on a running cluster, and keeps the times at which it did.

use std::time::{Duration, Instant};

use baton_protocol::{Role, WorkerState};
use tokio::task::JoinHandle;

use super::excuse::Window;
use super::schedule::{Fault, Schedule, Target};
use crate::api::Api;
use crate::cluster::{Cluster, Worker};
use crate::netns::Network;
use crate::process::Signal;

/// A cluster under attack.
pub struct Attack<'a> {
    cluster: &'a mut Cluster,
    network: Option<&'a Network>,
    roles: Vec<Role>,
    /// Names of the workers that stand at each number now.
    names: Vec<String>,
    epoch: Instant,
    marks: Vec<Mark>,
    leaving: Vec<Worker>,
}

/// What was done, and how it shows that it is over.
struct Mark {
    target: Target,
    from: Duration,
    undone: Duration,
    over: Over,
}

/// The event that ends a fault.
enum Over {
    /// None: it is over when it is undone.
    Undone,
    /// This worker beats that it serves.
    Serves(String),
    /// The API server answers.
    Answers(JoinHandle<Duration>),
}

/// What an attack leaves behind.
pub struct Aftermath {
    /// When what was disturbed.
    pub windows: Vec<Window>,
    /// Workers that were told to leave.
    pub leaving: Vec<Worker>,
}

impl<'a> Attack<'a> {
    /// On this cluster, whose workers have these roles in their order. Without a network no way can be cut.
    pub fn on(
        cluster: &'a mut Cluster,
        network: Option<&'a Network>,
        roles: Vec<Role>,
        epoch: Instant,
    ) -> Self {
        let names = cluster
            .workers()
            .iter()
            .map(|worker| worker.name.clone())
            .collect();
        Self {
            cluster,
            network,
            roles,
            names,
            epoch,
            marks: Vec::new(),
            leaving: Vec::new(),
        }
    }

    /// Does everything in its time.
    pub async fn carry_out(mut self, schedule: &Schedule) -> Aftermath {
        let mut moments = Vec::new();
        for step in &schedule.0 {
            moments.push((step.at, step.fault, true));
            moments.push((step.at + step.fault.lasts(), step.fault, false));
        }
        // what ends comes before what begins at the same moment, but not before it began itself
        moments.sort_by_key(|(at, _, _)| *at);
        for (at, fault, begins) in moments {
            tokio::time::sleep_until((self.epoch + at).into()).await;
            match begins {
                true => self.begin(fault),
                false => self.undo(fault),
            }
        }
        let mut windows = Vec::new();
        for mark in std::mem::take(&mut self.marks) {
            windows.push(self.window(mark).await);
        }
        Aftermath {
            windows,
            leaving: self.leaving,
        }
    }

    fn begin(&mut self, fault: Fault) {
        // before it is done: what it breaks may break while it is being done
        let from = self.epoch.elapsed();
        let over = match fault {
            Fault::Cut {
                context, decode, ..
            } => {
                let Some(network) = self.network else { return };
                network.cut(&self.names[context], &self.names[decode]);
                Over::Undone
            }
            Fault::Unplug { worker, .. } => {
                let Some(network) = self.network else { return };
                network.unplug(&self.names[worker]);
                Over::Undone
            }
            Fault::Kill { worker, .. } => {
                self.cluster.kill(&self.names[worker]);
                Over::Serves(self.names[worker].clone())
            }
            Fault::Freeze { worker, .. } => {
                self.cluster.signal(&self.names[worker], Signal::Stop);
                Over::Undone
            }
            Fault::Replace { worker } => {
                let leaving = self.cluster.take(&self.names[worker]);
                leaving.process.signal(Signal::Terminate);
                self.leaving.push(leaving);
                self.names[worker] = self.cluster.add(self.roles[worker]);
                Over::Serves(self.names[worker].clone())
            }
            Fault::BusLost { .. } => {
                self.cluster.nats.kill();
                Over::Undone
            }
            Fault::ApiKill { server, .. } => {
                self.cluster.api_servers[server].process.kill();
                Over::Undone
            }
            Fault::ApiFreeze { server, .. } => {
                self.cluster.api_servers[server]
                    .process
                    .signal(Signal::Stop);
                Over::Undone
            }
        };
        self.marks.push(Mark {
            target: fault.target(),
            from,
            undone: from,
            over,
        });
    }

    fn undo(&mut self, fault: Fault) {
        match fault {
            Fault::Cut {
                context, decode, ..
            } => {
                let Some(network) = self.network else { return };
                network.heal(&self.names[context], &self.names[decode]);
            }
            Fault::Unplug { worker, .. } => {
                let Some(network) = self.network else { return };
                network.plug(&self.names[worker]);
            }
            Fault::Kill { worker, .. } => {
                self.cluster
                    .restart(&self.names[worker], self.roles[worker]);
            }
            Fault::Freeze { worker, .. } => {
                self.cluster.signal(&self.names[worker], Signal::Continue);
            }
            Fault::Replace { .. } => {}
            Fault::BusLost { .. } => self.cluster.nats.restart(),
            Fault::ApiKill { server, .. } => self.cluster.restart_api_server(server),
            Fault::ApiFreeze { server, .. } => {
                self.cluster.api_servers[server]
                    .process
                    .signal(Signal::Continue);
            }
        }
        let of = |mark: &&mut Mark| mark.target == fault.target();
        let Some(mark) = self.marks.iter_mut().rev().find(of) else {
            return;
        };
        mark.undone = self.epoch.elapsed();
        if let Target::Api(server) = mark.target {
            let api = self.cluster.api_servers[server].api.clone();
            mark.over = Over::Answers(tokio::spawn(answers(api, self.epoch)));
        }
    }

    async fn window(&self, mark: Mark) -> Window {
        let until = match mark.over {
            Over::Undone => mark.undone,
            Over::Answers(when) => when.await.unwrap_or(mark.undone),
            Over::Serves(name) => self
                .first_beat(&name, mark.undone)
                .unwrap_or(Duration::MAX / 2),
        };
        Window {
            target: mark.target,
            from: mark.from,
            until,
        }
    }

    /// When this worker first beat that it serves, after it was started.
    fn first_beat(&self, name: &str, started: Duration) -> Option<Duration> {
        let beats = self.cluster.tap.heard(0, |message| {
            let beat: baton_protocol::Beat = message.is("beat").then(|| message.read())?;
            let at = message.at.saturating_duration_since(self.epoch);
            let serves = beat.worker.as_str() == name && beat.state == WorkerState::Serving;
            (serves && at > started).then_some(at)
        });
        beats.first().copied()
    }
}

/// When it first answers.
async fn answers(api: Api, epoch: Instant) -> Duration {
    while api.look("/live").await.is_err() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    epoch.elapsed()
}
