//! What a group of workers computes on.

use std::fmt;
use std::str::FromStr;

use baton_worker::Device;
use serde::de::{Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Devices of a group, or of one worker: `cpu`, `fake`, `fake:MICROSECONDS_PER_STEP`, or GPUs: `cuda:0-3`, `cuda:0,2`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Devices {
    /// No GPU, and any number of workers on it: as `--device` takes it.
    Host(String),
    /// GPUs by their numbers, none twice, in order.
    Cuda(Vec<u32>),
}

/// Most GPUs of a host.
const GPUS_MAX: usize = 64;

impl Default for Devices {
    fn default() -> Self {
        Self::Host("cpu".to_owned())
    }
}

impl Devices {
    /// The GPUs; none where it is something else.
    pub fn gpus(&self) -> &[u32] {
        match self {
            Self::Host(_) => &[],
            Self::Cuda(gpus) => gpus,
        }
    }

    fn of(items: &[String]) -> Result<Self, String> {
        let mut parts = items.iter().map(|item| item.parse());
        let mut whole: Self = match parts.next() {
            Some(first) => first?,
            None => {
                return Err("there is no device: give cpu, or GPUs as [cuda:0, cuda:1]".to_owned());
            }
        };
        for part in parts {
            match (&mut whole, part?) {
                (Self::Cuda(gpus), Self::Cuda(more)) => gpus.extend(more),
                (whole, more) => {
                    return Err(format!(
                        "{whole} and {more} cannot be in one group: make two groups"
                    ));
                }
            }
        }
        match &whole {
            Self::Cuda(gpus) => check(gpus).map(|()| whole),
            Self::Host(_) => Ok(whole),
        }
    }
}

fn check(gpus: &[u32]) -> Result<(), String> {
    if gpus.len() > GPUS_MAX {
        return Err(format!("more than {GPUS_MAX} GPUs of one host"));
    }
    let twice = gpus
        .iter()
        .enumerate()
        .find(|(at, gpu)| gpus[..*at].contains(gpu));
    match twice {
        Some((_, gpu)) => Err(format!("cuda:{gpu} is named twice: name it once")),
        None => Ok(()),
    }
}

/// The one place that reads a list of devices.
impl FromStr for Devices {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "device {text:?} is not one of cpu, cuda:N, cuda:N-M, cuda:N,M, fake, fake:MICROSECONDS_PER_STEP"
            )
        };
        let Some(list) = text.strip_prefix("cuda:") else {
            return match text.parse::<Device>() {
                Ok(_) if text == "cuda" => Ok(Self::Cuda(vec![0])),
                Ok(_) => Ok(Self::Host(text.to_owned())),
                Err(_) => Err(wrong()),
            };
        };
        let mut gpus = Vec::new();
        for item in list.split(',') {
            let (first, last) = item.split_once('-').unwrap_or((item, item));
            let number = |text: &str| -> Result<u32, String> { text.parse().map_err(|_| wrong()) };
            let (first, last) = (number(first)?, number(last)?);
            if last < first || (last - first) as usize >= GPUS_MAX {
                return Err(wrong());
            }
            gpus.extend(first..=last);
            check(&gpus)?;
        }
        Ok(Self::Cuda(gpus))
    }
}

impl fmt::Display for Devices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gpus = match self {
            Self::Host(device) => return f.write_str(device),
            Self::Cuda(gpus) => gpus,
        };
        let is_run = gpus
            .windows(2)
            .all(|pair| pair[0].checked_add(1) == Some(pair[1]));
        match gpus.as_slice() {
            [first, .., last] if is_run => write!(f, "cuda:{first}-{last}"),
            gpus => {
                let gpus: Vec<_> = gpus.iter().map(u32::to_string).collect();
                write!(f, "cuda:{}", gpus.join(","))
            }
        }
    }
}

impl Serialize for Devices {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Devices {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TextOrList)
    }
}

struct TextOrList;

impl<'de> Visitor<'de> for TextOrList {
    type Value = Devices;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("devices as cpu, cuda:0-3 or [cuda:0, cuda:1]")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Devices, E> {
        text.parse().map_err(E::custom)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Devices, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = list.next_element::<String>()? {
            if items.len() == GPUS_MAX {
                return Err(A::Error::custom(format!(
                    "more than {GPUS_MAX} devices of one host"
                )));
            }
            items.push(item);
        }
        Devices::of(&items).map_err(A::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_have_one_spelling() {
        for (text, spelling) in [
            ("cpu", "cpu"),
            ("fake:250", "fake:250"),
            ("cuda", "cuda:0"),
            ("cuda:3", "cuda:3"),
            ("cuda:0,1,2", "cuda:0-2"),
            ("cuda:0-1,4,6-7", "cuda:0,1,4,6,7"),
            ("cuda:3,2,1", "cuda:3,2,1"),
        ] {
            let devices: Devices = text.parse().unwrap();
            assert_eq!(devices.to_string(), spelling);
            assert_eq!(spelling.parse::<Devices>().unwrap(), devices);
        }
        for text in [
            "",
            "gpu",
            "cuda:",
            "cuda:x",
            "cuda:3-1",
            "cuda:0,0",
            "cuda:0-2,1",
            "cuda:0-4294967295",
            "fake:",
            "cuda:0-64",
        ] {
            assert!(text.parse::<Devices>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_list_is_read_as_one_text_is() {
        let read = |json: &str| serde_json::from_str::<Devices>(json);
        assert_eq!(
            read(r#"["cuda:0", "cuda:2-3"]"#).unwrap(),
            read(r#""cuda:0,2-3""#).unwrap()
        );
        for wrong in [
            r#"[]"#,
            r#"["cpu", "cuda:0"]"#,
            r#"["cuda:0", "cuda:0-1"]"#,
            "3",
        ] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
