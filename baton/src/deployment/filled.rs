//! A deployment with the values that hold where nothing is said, as far as they do not depend on the machine or the model.

use baton_api_server::Limits;
use baton_protocol::deadlines::{LEASE_MS, REQUEST_BUDGET_MS};
use baton_worker::{
    BLOCK_TOKENS_DEFAULT, DRAIN_MS_DEFAULT, Device, KV_FREE_GPU_MEMORY_FRACTION_DEFAULT,
    QUEUE_DEFAULT,
};

use super::{ApiServers, Deployment, Devices, WorkerGroup};
use crate::api_server::{ContentRule, DefaultsFrom, OverloadRule};

impl Deployment {
    /// The same, whole.
    pub fn filled(&self) -> Self {
        let mut whole = self.clone();
        fill_api_servers(&mut whole.api_server);
        let groups = [&mut whole.context, &mut whole.decode, &mut whole.both];
        for group in groups.into_iter().flatten() {
            fill_group(group);
        }
        whole
    }
}

/// Seconds that an API server's answers under way get at its end.
pub fn api_server_drain_s(servers: &ApiServers) -> u64 {
    servers.drain_s.unwrap_or(Limits::default().drain.as_secs())
}

/// The same of a worker.
pub fn worker_drain_s(group: &WorkerGroup) -> u64 {
    group.drain_s.unwrap_or(DRAIN_MS_DEFAULT / 1000)
}

fn fill_api_servers(servers: &mut ApiServers) {
    let limits = Limits::default();
    servers.drain_s = Some(api_server_drain_s(servers));
    let rule = || ContentRule::default().label().to_owned();
    servers.special_tokens_in_content.get_or_insert_with(rule);
    let from = || DefaultsFrom::default().label().to_owned();
    servers.generation_config.get_or_insert_with(from);
    let rule = || OverloadRule::default().label().to_owned();
    servers.overload.get_or_insert_with(rule);
    let budget_s = u64::from(REQUEST_BUDGET_MS / 1000);
    servers.request_budget_s.get_or_insert(budget_s);
    servers.in_flight_max.get_or_insert(limits.in_flight_max);
    servers.trace_sample.get_or_insert(1.0);
    let mib = limits.responses_bytes_max >> 20;
    servers.response_store_mib.get_or_insert(mib);
}

fn fill_group(group: &mut WorkerGroup) {
    group.drain_s = Some(worker_drain_s(group));
    group.lease_ms.get_or_insert(LEASE_MS);
    group.block_tokens.get_or_insert(BLOCK_TOKENS_DEFAULT);
    group.queue.get_or_insert(QUEUE_DEFAULT);
    let of_gpus = matches!(group.devices, Devices::Cuda(_));
    if of_gpus {
        let ranks = group.gpus_each().ok().and_then(|gpus| gpus.try_into().ok());
        group.tp_size = group.tp_size.or(ranks);
        if group.kv_mib.is_none() {
            let share = KV_FREE_GPU_MEMORY_FRACTION_DEFAULT;
            group.kv_cache_free_gpu_memory_fraction.get_or_insert(share);
        }
    }
    // Of all GPUs alike.
    let device = match &group.devices {
        Devices::Cuda(_) => "cuda:0".parse::<Device>(),
        Devices::Host(device) => device.parse(),
    };
    if let Ok(device) = device {
        let step_tokens = device.step_tokens_default();
        group.step_tokens.get_or_insert(step_tokens);
        group.itl_ms.get_or_insert(device.itl_ms_default());
        group.batch.get_or_insert(device.batch_default());
    }
}
