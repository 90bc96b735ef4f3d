//! One seed, from the start of its cluster to its end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::attack::{Aftermath, Attack};
use super::audit::{Findings, pulse};
use super::client::Clients;
use super::judgement::Judgement;
use super::plan::Plan;
use super::reference::Reference;
use super::service::Promised;
use super::tally::Tally;
use crate::cluster::Cluster;
use crate::netns::Network;
use crate::turn::Turn;

/// Carries a plan out, prints what is amiss, and gives the numbers.
pub async fn run(turn: &Turn, plan: &Plan, reference: &mut Reference) -> Tally {
    let asks = &plan.load.asks;
    let expected = reference.answers(asks).await;
    let network = plan.shape.network.then(Network::new).flatten();
    if plan.shape.network && network.is_none() {
        println!(
            "seed {}: no network is cut: this process may not make one",
            plan.seed
        );
    }
    let mut cluster = start(turn, plan, network.clone()).await;
    let mut findings = Findings::default();
    findings
        .serves(&cluster, reference.model(), &asks[0], &expected[0])
        .await;
    let before = pulse(&cluster);

    let clients = Clients {
        epoch: Instant::now(),
        model: reference.model().to_owned(),
        bases: cluster
            .api_servers
            .iter()
            .map(|server| server.api.base().to_owned())
            .collect(),
        budgets: plan.shape.budgets(),
    };
    let arrivals = &plan.load.arrivals;
    let asked: Vec<_> = arrivals
        .iter()
        .map(|arrival| tokio::spawn(clients.client(arrival, &asks[arrival.ask])))
        .collect();
    let attack = Attack::on(
        &mut cluster,
        network.as_deref(),
        plan.shape.roles(),
        clients.epoch,
    );
    let Aftermath { windows, leaving } = attack.carry_out(&plan.schedule).await;
    let mut stories = Vec::new();
    for story in asked {
        stories.push(story.await.expect("a client does not panic"));
    }

    let lease = Duration::from_millis(plan.shape.lease_ms);
    findings.leaving(leaving).await;
    findings.settled(&mut cluster, lease).await;
    findings
        .serves(&cluster, reference.model(), &asks[0], &expected[0])
        .await;
    findings.same_tokens(&cluster).await;
    findings.grown(
        &before,
        &pulse(&cluster),
        plan.shape.kv_mib,
        &plan.shape.roles(),
    );
    findings.ended(&mut cluster).await;
    findings.logs(&cluster);

    let judgement = Judgement {
        seed: plan.seed,
        asks,
        expected: &expected,
        windows: &windows,
        roles: &plan.shape.roles(),
        budgets: &clients.budgets,
        promised: plan.shape.promised.is_some(),
    };
    let mut tally = Tally::default();
    for (arrival, story) in arrivals.iter().zip(&stories) {
        judgement.count(arrival, story, &mut tally);
    }
    findings.report(&format!("seed {}", plan.seed), &mut tally);
    if !tally.clean() {
        println!(
            "seed {}: logs are kept in {}",
            plan.seed,
            cluster.keep_files().display()
        );
    }
    tally
}

async fn start(turn: &Turn, plan: &Plan, network: Option<Arc<Network>>) -> Cluster {
    let mut setup = plan.shape.setup();
    setup.network = network;
    let args = |server: usize| {
        let mut args = vec![
            "--request-budget-s".to_owned(),
            plan.shape.budget_s[server].to_string(),
        ];
        args.extend(
            plan.shape
                .promised
                .map(Promised::api_args)
                .unwrap_or_default(),
        );
        if plan.shape.same_name {
            args.extend(["--api-server-name".to_owned(), format!("api-{server}")]);
        }
        args
    };
    setup.api_args = args(0);
    let mut cluster = Cluster::start(turn, setup).await;
    for server in 1..plan.shape.api_servers {
        let args = args(server);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        cluster.add_api_server(&args);
    }
    cluster.ready().await;
    cluster
}
