//! Which GPUs a worker has: one a rank.

use std::fmt;

/// Most GPUs of one worker: as many as a host has that reach each other's memory.
pub const GPUS_MAX: usize = 8;

/// The GPUs of a worker, by rank, as this process numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gpus {
    ordinals: [u32; GPUS_MAX],
    count: usize,
}

impl Gpus {
    /// A list such as `0-3`, `0,2` or `1`: in the order of ranks.
    ///
    /// # Errors
    /// A sentence: it is no such list, or names a GPU twice, or not 1, 2, 4 or 8.
    pub fn parse(list: &str) -> Result<Self, String> {
        let mut gpus = Self {
            ordinals: [0; GPUS_MAX],
            count: 0,
        };
        for part in list.split(',') {
            let unknown =
                || format!("{part:?} is neither a GPU nor a range of GPUs: cuda:0-3, cuda:0,2");
            let number = |text: &str| match text.bytes().all(|byte| byte.is_ascii_digit()) {
                true => text.parse::<u32>().map_err(|_| unknown()),
                false => Err(unknown()),
            };
            let (first, last) = match part.split_once('-') {
                Some((first, last)) => (number(first)?, number(last)?),
                None => (number(part)?, number(part)?),
            };
            if last < first {
                return Err(format!("the range {part} ends before it begins"));
            }
            // Not more than can be of use: a range may be as long as it likes.
            for ordinal in (first..=last).take(GPUS_MAX + 1) {
                gpus.push(ordinal)?;
            }
        }
        match gpus.count {
            1 | 2 | 4 | 8 => Ok(gpus),
            count => Err(format!("a worker has 1, 2, 4 or 8 GPUs, not {count}")),
        }
    }

    fn push(&mut self, ordinal: u32) -> Result<(), String> {
        if self.ordinals().contains(&ordinal) {
            return Err(format!("GPU {ordinal} is named twice"));
        }
        let Some(place) = self.ordinals.get_mut(self.count) else {
            return Err(format!("a worker has at most {GPUS_MAX} GPUs"));
        };
        *place = ordinal;
        self.count += 1;
        Ok(())
    }

    /// By rank.
    pub fn ordinals(&self) -> &[u32] {
        &self.ordinals[..self.count]
    }

    /// How many, and so how many ranks.
    pub fn count(&self) -> u32 {
        self.count as u32
    }
}

/// As it is read: neighbours in order as a range.
impl fmt::Display for Gpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let runs = self
            .ordinals()
            .chunk_by(|a, b| a.checked_add(1) == Some(*b));
        for (index, run) in runs.enumerate() {
            let comma = if index == 0 { "" } else { "," };
            match run {
                [first, .., last] => write!(f, "{comma}{first}-{last}")?,
                [only] => write!(f, "{comma}{only}")?,
                [] => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_are_named_one_by_one_or_as_ranges_in_the_order_of_ranks() {
        for (list, ordinals, shown) in [
            ("1", &[1][..], "1"),
            ("0-3", &[0, 1, 2, 3], "0-3"),
            ("0,2", &[0, 2], "0,2"),
            ("1,0", &[1, 0], "1,0"),
            ("4-5,0-1", &[4, 5, 0, 1], "4-5,0-1"),
            ("0,1", &[0, 1], "0-1"),
            ("4294967295", &[u32::MAX], "4294967295"),
        ] {
            let gpus = Gpus::parse(list).unwrap();
            assert_eq!(gpus.ordinals(), ordinals);
            assert_eq!(gpus.to_string(), shown);
            assert_eq!(Gpus::parse(shown), Ok(gpus));
        }
    }

    #[test]
    fn what_no_worker_can_have_is_refused_with_a_sentence() {
        for (list, words) in [
            ("", "neither a GPU nor a range"),
            ("x", "neither a GPU nor a range"),
            ("0,", "neither a GPU nor a range"),
            ("0-", "neither a GPU nor a range"),
            ("+1", "neither a GPU nor a range"),
            ("0-1-2", "neither a GPU nor a range"),
            ("4294967296", "neither a GPU nor a range"),
            ("3-0", "ends before it begins"),
            ("0,1,0", "GPU 0 is named twice"),
            ("0-1,1-2", "GPU 1 is named twice"),
            ("0-2", "1, 2, 4 or 8 GPUs, not 3"),
            ("0-8", "at most 8 GPUs"),
            ("0-4294967295", "at most 8 GPUs"),
        ] {
            let told = Gpus::parse(list).unwrap_err();
            assert!(told.contains(words), "{list}: {told}");
        }
    }
}
