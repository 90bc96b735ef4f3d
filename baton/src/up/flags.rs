//! What the flags of `baton up` mean, as a [`Deployment`].

use baton_protocol::Role;

use super::UpArgs;
use crate::Failure;
use crate::deployment::{ApiServers, Deployment, Devices, Nats, WorkerGroup};

/// The deployment that the flags describe, checked.
///
/// # Errors
/// A sentence on what in it cannot work.
pub fn deployment(args: &UpArgs) -> Result<Deployment, Failure> {
    let model = args.model.clone().unwrap_or_default();
    let mut deployment = Deployment {
        model,
        cluster: args.cluster.clone(),
        worker_name: args.worker_name.clone(),
        nats: nats(args)?,
        api_server: api_servers(args)?,
        context: Vec::new(),
        decode: Vec::new(),
        both: Vec::new(),
        containers: Default::default(),
        slurm: Default::default(),
    };
    let split_default = usize::from(args.both_worker_count == 0);
    let counts = [
        (
            Role::Context,
            args.context_worker_count.unwrap_or(split_default),
        ),
        (
            Role::Decode,
            args.generate_worker_count.unwrap_or(split_default),
        ),
        (Role::Both, args.both_worker_count),
    ];
    let devices: Devices = args
        .device
        .parse()
        .map_err(|error| format!("--device: {error}"))?;
    let workers = counts
        .iter()
        .fold(0_usize, |all, (_, count)| all.saturating_add(*count));
    let mut gpus = devices.gpus();
    let one_for_all = gpus.len() == 1;
    let most = args.tp_size.max(args.context_tp_size).unwrap_or(1);
    if one_for_all && most > 1 {
        return Err(format!(
            "--device {devices} is one GPU, and a worker of {most} ranks takes as many: name all of them, as cuda:0-3"
        )
        .into());
    }
    for (role, count) in counts {
        if count == 0 {
            continue;
        }
        let mut group = group(args, role, count);
        // Context and decode workers are busy at the same time, so threads are divided over all of them.
        if let (Some(threads), "cpu") = (args.threads, args.device.as_str()) {
            group.threads = Some((threads / workers).max(1));
        }
        if gpus.is_empty() && matches!(devices, Devices::Host(_)) || one_for_all {
            group.devices = devices.clone();
            group.share_devices = one_for_all;
        } else {
            let each = group.tp_size.unwrap_or(1) as usize;
            let wanted = count.saturating_mul(each);
            let Some((own, rest)) = gpus.split_at_checked(wanted) else {
                return Err(format!(
                    "--device {devices} has {} GPUs left for {count} {} workers of {each}: give {wanted}",
                    gpus.len(),
                    role.label()
                )
                .into());
            };
            (group.devices, gpus) = (Devices::Cuda(own.to_vec()), rest);
        }
        match role {
            Role::Context => deployment.context.push(group),
            Role::Decode => deployment.decode.push(group),
            Role::Both => deployment.both.push(group),
        }
    }
    if !one_for_all && !gpus.is_empty() {
        let left = Devices::Cuda(gpus.to_vec());
        return Err(format!(
            "--device {devices} has more GPUs than the workers take, {left} is left over: name fewer, or raise --tp-size or a count"
        )
        .into());
    }
    deployment.check()?;
    Ok(deployment)
}

fn nats(args: &UpArgs) -> Result<Nats, Failure> {
    Ok(Nats {
        request_plane_uri: args.request_plane_uri.clone(),
        // Without an address one is started anyway.
        initialize_request_plane: args.initialize_request_plane && args.request_plane_uri.is_some(),
        nats_server: args.nats_server.as_deref().map(text).transpose()?,
        ..Nats::default()
    })
}

fn api_servers(args: &UpArgs) -> Result<ApiServers, Failure> {
    let (keys, content, answers) = (&args.keys, &args.content, &args.answers);
    Ok(ApiServers {
        api_server_host: args.api_server_host.clone(),
        api_server_port: args.api_server_port,
        model_name: args.model_name.clone(),
        api_keys_file: keys.api_keys_file.as_deref().map(text).transpose()?,
        api_key_in_flight_max: keys.api_key_in_flight_max,
        special_tokens_in_content: Some(content.special_tokens_in_content.label().to_owned()),
        tool_format: content.tool_format.map(|format| format.name().to_owned()),
        reasoning_format: content
            .reasoning_format
            .map(|format| format.name().to_owned()),
        generation_config: Some(answers.generation_config.label().to_owned()),
        cors_origin: answers.cors_origin.clone(),
        response_store_mib: answers.response_store_mib,
        drain_s: Some(args.drain_s),
        ..ApiServers::default()
    })
}

/// All of a group but its devices and threads.
fn group(args: &UpArgs, role: Role, count: usize) -> WorkerGroup {
    let tuning = &args.tuning;
    let context_tp_size = args.context_tp_size.filter(|_| role == Role::Context);
    WorkerGroup {
        count,
        tp_size: context_tp_size.or(args.tp_size),
        drain_s: Some(args.drain_s),
        kv_mib: tuning.kv_mib,
        kv_cache_free_gpu_memory_fraction: tuning.kv_cache_free_gpu_memory_fraction,
        block_tokens: tuning.block_tokens,
        step_tokens: tuning.step_tokens,
        batch: tuning.batch,
        queue: tuning.queue,
        no_prefix_cache: tuning.no_prefix_cache,
        ucx_tls: tuning.ucx_tls.clone(),
        ..WorkerGroup::default()
    }
}

fn text(path: &std::path::Path) -> Result<String, Failure> {
    path.to_str()
        .map(str::to_owned)
        .ok_or_else(|| format!("{} is no UTF-8: rename it", path.display()).into())
}
