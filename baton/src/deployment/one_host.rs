//! How the devices of one host are shared out: in the order of the file, to each worker as many as it has ranks.

use std::collections::BTreeMap;

use super::{Deployment, Devices, Refusal};

/// The devices of each worker, in the order of [`Deployment::workers`].
///
/// # Errors
/// If a group has more or fewer devices than its workers take, or a device of another group.
pub fn deal(deployment: &Deployment) -> Result<Vec<Devices>, Refusal> {
    let mut dealt = Vec::new();
    // By GPU: who has it first, and whether that group shares it.
    let mut owners: BTreeMap<u32, (String, bool)> = BTreeMap::new();
    for (path, _, group) in deployment.groups() {
        let refused = |why: String| Refusal::new(format!("{path}.devices"), why);
        let Devices::Cuda(gpus) = &group.devices else {
            dealt.extend((0..group.count).map(|_| group.devices.clone()));
            continue;
        };
        for gpu in gpus {
            match owners.get(gpu) {
                Some((owner, shared)) if !(*shared && group.share_devices) => {
                    return Err(refused(format!(
                        "cuda:{gpu} belongs to {owner} already: give each group GPUs of its own, or both of them share-devices: true"
                    )));
                }
                Some(_) => {}
                None => {
                    owners.insert(*gpu, (path.clone(), group.share_devices));
                }
            }
        }
        let each = group.gpus_each().map_err(refused)?;
        if group.share_devices {
            dealt.extend((0..group.count).map(|_| group.devices.clone()));
            continue;
        }
        let wanted = group.count.saturating_mul(each);
        if wanted != gpus.len() {
            return Err(refused(format!(
                "count {} × tp-size {each} take {wanted} GPUs, and {} has {}: change one of the three",
                group.count,
                group.devices,
                gpus.len()
            )));
        }
        dealt.extend(
            gpus.chunks(each.max(1))
                .map(|part| Devices::Cuda(part.to_vec())),
        );
    }
    Ok(dealt)
}
