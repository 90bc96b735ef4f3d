//! What the flags of `baton up` mean, as a [`Deployment`].

use baton_protocol::Role;

use super::UpArgs;
use crate::Failure;
use crate::deployment::{ApiServers, Deployment, Devices, Nats, Traces, WorkerGroup};

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
        traces: Traces {
            otlp_endpoint: args.otlp.endpoint().map(str::to_owned),
        },
        api_server: api_servers(args)?,
        context: Vec::new(),
        decode: Vec::new(),
        both: Vec::new(),
        containers: Default::default(),
        slurm: Default::default(),
    };
    let devices: Devices = args
        .device
        .parse()
        .map_err(|error| format!("--device: {error}"))?;
    let mut gpus = devices.gpus();
    let most = args.tp_size.max(args.context_tp_size).unwrap_or(1);
    if gpus.len() == 1 && most > 1 {
        return Err(format!(
            "--device {devices} is one GPU, and a worker of {most} ranks takes as many: name all of them, as cuda:0-3"
        )
        .into());
    }
    let counts = counts(args, &devices)?;
    let workers = counts
        .iter()
        .fold(0_usize, |all, (_, count)| all.saturating_add(*count));
    let one_for_all = gpus.len() == 1 && workers > 1;
    for (role, count) in counts {
        if count == 0 {
            continue;
        }
        let mut group = group(args, role, count);
        // Workers are busy at the same time, so threads are divided over all of them.
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

/// How many workers of each role there are.
///
/// Where no count is given all workers do both, and the router decides for each request who does what.
fn counts(args: &UpArgs, devices: &Devices) -> Result<[(Role, usize); 3], Failure> {
    let given = (
        args.context_worker_count,
        args.decode_worker_count,
        args.both_worker_count,
    );
    let (context, decode, both) = match given {
        (None, None, None) => (0, 0, both_default(args, devices)?),
        (context, decode, both) => {
            let both = both.unwrap_or(0);
            // Whoever runs prompts alone needs somebody who generates, and the other way round.
            let other = usize::from(both == 0);
            (context.unwrap_or(other), decode.unwrap_or(other), both)
        }
    };
    if let (0, Some(_)) = (context, args.context_tp_size) {
        return Err(
            "--context-tp-size is for context workers, and this cluster has none: give --context-worker-count and --decode-worker-count, or say --tp-size for all workers".into(),
        );
    }
    Ok([
        (Role::Context, context),
        (Role::Decode, decode),
        (Role::Both, both),
    ])
}

/// As many workers as the GPUs are enough for. On what is no GPU two: if one dies the other takes over until it is started again.
fn both_default(args: &UpArgs, devices: &Devices) -> Result<usize, Failure> {
    const ON_THE_HOST: usize = 2;
    let Devices::Cuda(gpus) = devices else {
        return Ok(ON_THE_HOST);
    };
    let each = args.tp_size.unwrap_or(1) as usize;
    if !gpus.len().is_multiple_of(each) {
        return Err(format!(
            "--device {devices} is {} GPUs, which workers of {each} ranks cannot share evenly: name a multiple of {each}, or another --tp-size",
            gpus.len()
        )
        .into());
    }
    Ok(gpus.len() / each)
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
    let (keys, tls) = (&args.keys, &args.tls);
    let (content, answers) = (&args.content, &args.answers);
    Ok(ApiServers {
        api_server_host: args.api_server_host.clone(),
        api_server_port: args.api_server_port,
        model_name: args.model_name.clone(),
        ttft_ms: args.promises.ttft_ms,
        // As workers are told, where they are; there 0 is no promise.
        itl_ms: args.tuning.itl_ms.filter(|ms| *ms > 0),
        overload: Some(args.promises.overload.label().to_owned()),
        api_keys_file: keys.api_keys_file.as_deref().map(text).transpose()?,
        api_key_in_flight_max: keys.api_key_in_flight_max,
        tls_cert: tls.tls_cert.as_deref().map(text).transpose()?,
        tls_key: tls.tls_key.as_deref().map(text).transpose()?,
        tls_client_ca: tls.tls_client_ca.as_deref().map(text).transpose()?,
        special_tokens_in_content: Some(content.special_tokens_in_content.label().to_owned()),
        tool_format: content.tool_format.map(|format| format.name().to_owned()),
        reasoning_format: content
            .reasoning_format
            .map(|format| format.name().to_owned()),
        generation_config: Some(answers.generation_config.label().to_owned()),
        default_max_tokens: answers.default_max_tokens,
        cors_origin: answers.cors_origin.clone(),
        response_store_mib: answers.response_store_mib,
        trace_sample: args.sample.trace_sample,
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
        itl_ms: tuning.itl_ms,
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
