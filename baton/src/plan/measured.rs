//! What a plan is of: workers' costs and sizes, from files, from a running cluster, or from the command line.

use std::collections::BTreeMap;
use std::time::Duration;

use baton_engine::kv_geometry;
use baton_model::ModelDir;
use baton_protocol::{KvGeometry, KvGroup, StepCost};
use baton_worker::{BLOCK_TOKENS_DEFAULT, QUEUE_DEFAULT};

use super::PlanArgs;
use super::mix::Kind;
use super::told::{CostFile, Row, Told};
use crate::Failure;
use crate::served::grouped;

/// Where neither a flag nor a cluster says any. Each that is used is a note of the plan.
const LINK_GBPS_DEFAULT: f64 = 100.0;
const STEP_TOKENS_DEFAULT: u32 = 8192;
const BATCH_DEFAULT: u32 = 256;

/// What all workers of a plan have in common, and what each kind of them is.
#[derive(Debug)]
pub struct Measured {
    pub kv: KvGeometry,
    pub tokens_max: u32,
    pub itl: Option<Duration>,
    pub link_gbps: f64,
    /// How many the cluster has.
    pub workers: Option<u32>,
    /// Workers of groups that name no cost; none if no mix has any.
    pub plain: Option<Sizes>,
    /// Those of groups that do, by that name.
    pub named: BTreeMap<String, Sizes>,
    /// What was taken for granted, as sentences.
    pub notes: Vec<String>,
}

/// What steps of a worker cost, and how much it holds.
#[derive(Clone, Debug)]
pub struct Sizes {
    pub cost: StepCost,
    pub blocks: u32,
    pub step_tokens: u32,
    pub batch: u32,
    pub queue: u32,
    pub steps_in_flight: usize,
}

impl Measured {
    /// As the command line says; sequences are up to `longest` tokens long.
    ///
    /// # Errors
    /// What is missing or wrong, and how to say it.
    pub fn of(args: &PlanArgs, longest: usize) -> Result<Self, Failure> {
        let (plain, named) = costs(args)?;
        let is_plain = |kind: &Kind| kind.cost.is_none();
        let needs_plain =
            args.mix.is_empty() || args.mix.iter().any(|mix| mix.kinds().any(is_plain));
        let plain = match plain {
            Some(file) => Some(Told::read(file)?),
            None if needs_plain => Some(Told::ask(&args.server)?),
            None => None,
        };
        let named = named.into_iter().map(|(name, file)| {
            let told = Told::read(file)?;
            Ok((name, (file, told)))
        });
        let named: BTreeMap<&str, (&CostFile, Told)> = named.collect::<Result<_, Failure>>()?;
        let all = || plain.iter().chain(named.values().map(|(_, told)| told));
        // What no other source says is as this one's workers have it.
        let first = all().find(|told| told.row.is_some());
        let row = first.and_then(|told| told.row.as_ref());
        let mut notes = plain.as_ref().map_or_else(Vec::new, Told::notes);

        let (kv, model_tokens) = match row {
            Some(row) if args.model.is_none() && args.kv_bytes_per_token.is_none() => {
                (row.kv.clone(), Some(row.model.tokens_max))
            }
            _ => geometry(args)?,
        };
        let tokens_max = model_tokens.unwrap_or_else(|| {
            notes.push(format!(
                "no --model: the longest sequence has {} tokens, as the longest request",
                grouped(longest as u64)
            ));
            longest as u32
        });
        if longest > tokens_max as usize {
            return Err(format!(
                "requests of this load have {longest} tokens, and the model's sequences {tokens_max} at most: no answer would be whole"
            )
            .into());
        }
        let links = all().filter_map(Told::slowest_link_gbps);
        let link_gbps = args.link_gbps.or_else(|| links.min_by(f64::total_cmp));
        let link_gbps = link_gbps.unwrap_or_else(|| {
            notes.push(format!("no --link-gbps: {LINK_GBPS_DEFAULT} Gbit/s"));
            LINK_GBPS_DEFAULT
        });
        if !(link_gbps > 0.0 && link_gbps.is_finite()) {
            return Err("--link-gbps must be above 0".into());
        }
        let mut sizes = |told: &Told| Sizes::of(args, told, row, (&kv, longest), &mut notes);
        let plain_sizes = plain.as_ref().map(&mut sizes).transpose()?;
        let mut named_sizes = BTreeMap::new();
        for (name, (file, told)) in &named {
            if let Some(other) = told.row.as_ref().filter(|other| other.kv != kv) {
                return Err(format!(
                    "{file}: the KV of worker {} is laid out otherwise than the other workers': they could not hand any over",
                    other.worker
                )
                .into());
            }
            named_sizes.insert((*name).to_owned(), sizes(told)?);
        }
        let itl_ms = row.and_then(|row| row.itl_ms);
        let workers = plain.as_ref().map_or(0, |told| told.rows.len() as u32);
        Ok(Self {
            tokens_max,
            itl: itl_ms.map(|ms| Duration::from_millis(ms.into())),
            link_gbps,
            workers: (workers > 0).then_some(workers),
            plain: plain_sizes,
            named: named_sizes,
            kv,
            notes,
        })
    }

    /// What workers of this kind are. All that mixes name is there: [`Self::of`] has looked.
    pub fn sizes(&self, kind: &Kind) -> Option<&Sizes> {
        match &kind.cost {
            Some(name) => self.named.get(name),
            None => self.plain.as_ref(),
        }
    }
}

impl Sizes {
    /// What the command line says goes before what a worker told, and that before what `other` told, another worker.
    fn of(
        args: &PlanArgs,
        told: &Told,
        other: Option<&Row>,
        (kv, longest): (&KvGeometry, usize),
        notes: &mut Vec<String>,
    ) -> Result<Self, Failure> {
        let row = told.row.as_ref().or(other);
        let mut assumed = |note: String| {
            if !notes.contains(&note) {
                notes.push(note);
            }
        };
        let batch = args.batch.or(row.map(|row| row.capacity.batch));
        let batch = batch.unwrap_or_else(|| {
            assumed(format!("no --batch: {BATCH_DEFAULT} sequences in a step"));
            BATCH_DEFAULT
        });
        let block_bytes = kv.block_bytes() as u64;
        let blocks = match (args.kv_mib, row) {
            (Some(mib), _) => u32::try_from((mib << 20) / block_bytes)?,
            (None, Some(row)) => row.capacity.blocks,
            (None, None) => {
                let blocks = u64::from(batch) * kv.blocks_for(longest) as u64;
                let gib = (blocks * block_bytes) as f64 / f64::from(1 << 30);
                assumed(format!(
                    "no --kv-mib: each worker has room for {batch} sequences of {} tokens, {gib:.1} GiB",
                    grouped(longest as u64)
                ));
                u32::try_from(blocks)?
            }
        };
        if (blocks as usize) < kv.blocks_for(longest) {
            let holds = blocks as usize * kv.block_tokens as usize;
            return Err(format!(
                "a worker's KV holds {holds} tokens, and requests of this load have {longest}: more --kv-mib"
            )
            .into());
        }
        let step_tokens = args.step_tokens.or(row.and_then(|row| row.step_tokens));
        let step_tokens = step_tokens.unwrap_or_else(|| {
            let tokens = grouped(STEP_TOKENS_DEFAULT.into());
            assumed(format!("no --step-tokens: up to {tokens} tokens in a step"));
            STEP_TOKENS_DEFAULT
        });
        Ok(Self {
            cost: told.cost.clone(),
            blocks,
            step_tokens,
            batch,
            queue: row.map_or(QUEUE_DEFAULT as u32, |row| row.capacity.queue),
            steps_in_flight: steps_in_flight(row),
        })
    }
}

/// The one without a name, and those with one: each name is said once, and whatever a mix names is there.
fn costs(args: &PlanArgs) -> Result<(Option<&CostFile>, BTreeMap<&str, &CostFile>), Failure> {
    let mut plain = None;
    let mut named = BTreeMap::new();
    for file in &args.cost {
        let before = match &file.name {
            Some(name) => named.insert(name.as_str(), file),
            None => plain.replace(file),
        };
        if let Some(before) = before {
            return Err(format!(
                "{before} and {file}: one of them only; give each a name of its own, NAME=FILE, and name it in --mix, as in both:NAME*2"
            )
            .into());
        }
    }
    for mix in &args.mix {
        let names = mix.kinds().filter_map(|kind| kind.cost.as_deref());
        if let Some(unknown) = names.into_iter().find(|name| !named.contains_key(name)) {
            let known = match named.is_empty() {
                true => "no --cost has a name".to_owned(),
                false => {
                    let known: Vec<&str> = named.keys().copied().collect();
                    format!("those with a name are {}", known.join(", "))
                }
            };
            return Err(format!(
                "--mix {mix}: nothing says what {unknown} costs, and {known}; say --cost {unknown}=FILE"
            )
            .into());
        }
    }
    Ok((plain, named))
}

/// As executors have it: on a CPU the device is the host, others compute while it plans.
fn steps_in_flight(row: Option<&Row>) -> usize {
    match row {
        Some(row) if row.device.starts_with("cpu") => 1,
        _ => 2,
    }
}

/// A model's KV, and its longest sequence, where a directory tells that.
fn geometry(args: &PlanArgs) -> Result<(KvGeometry, Option<u32>), Failure> {
    if let Some(path) = &args.model {
        let model = ModelDir::open(path)?;
        let kv = kv_geometry(model.spec(), BLOCK_TOKENS_DEFAULT);
        return Ok((kv, Some(u32::try_from(model.spec().tokens_max)?)));
    }
    // Keys and values of two bytes a number.
    match args.kv_bytes_per_token {
        Some(bytes) if bytes > 0 && bytes % 4 == 0 => {
            let group = KvGroup {
                layers: 1,
                kv_heads: 1,
                head_dim: bytes / 4,
            };
            Ok((KvGeometry::bf16(BLOCK_TOKENS_DEFAULT, vec![group]), None))
        }
        Some(bytes) => Err(format!(
            "--kv-bytes-per-token {bytes}: it must be a multiple of 4, a key and a value of 2 bytes"
        )
        .into()),
        None => Err(
            "nothing says how large the model's KV is: say --model DIR or --kv-bytes-per-token, or take the cost from a running cluster"
                .into(),
        ),
    }
}
