//! Which workers of which role: `context*3+decode*1`.

use std::fmt;
use std::str::FromStr;

use baton_protocol::Role;

use super::told::is_name;

/// Most workers of a mix.
const WORKERS_MAX: u32 = 1_000;

/// Most tokens of a step.
const STEP_TOKENS_MAX: u32 = 1 << 20;

/// Groups of workers: `context*3+decode*1`. `both:fp8*2` are workers whose steps cost what `--cost fp8=FILE` says; `both@512*4` have steps of up to 512 tokens,
/// however long they take; `both:fp8@512*2` is both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mix(Vec<(Kind, u32)>);

/// What workers of a group are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kind {
    pub role: Role,
    /// The name of what its steps cost, where it has one.
    pub cost: Option<String>,
    /// Tokens of a step where steps are sized by hand and not by time.
    pub step_tokens: Option<u32>,
}

impl Kind {
    /// A worker of the plain cost whose steps are sized by time.
    fn plain(role: Role) -> Self {
        Self {
            role,
            cost: None,
            step_tokens: None,
        }
    }
}

impl Mix {
    /// Every way in which so many workers can be shared out: all of them doing both, and every strict split.
    pub fn all_of(workers: u32) -> Vec<Self> {
        let split = |contexts| {
            Self(vec![
                (Kind::plain(Role::Context), contexts),
                (Kind::plain(Role::Decode), workers - contexts),
            ])
        };
        std::iter::once(Self(vec![(Kind::plain(Role::Both), workers)]))
            .chain((1..workers).rev().map(split))
            .collect()
    }

    /// What workers of each group are.
    pub fn kinds(&self) -> impl Iterator<Item = &Kind> {
        self.0.iter().map(|(kind, _)| kind)
    }

    /// What each of its workers is.
    pub fn workers(&self) -> impl Iterator<Item = &Kind> {
        self.0
            .iter()
            .flat_map(|(kind, count)| std::iter::repeat_n(kind, *count as usize))
    }

    /// The groups, as they are written, with what is said of each of their workers.
    pub fn groups<'a, T>(
        &'a self,
        mut of_workers: &'a [T],
    ) -> impl Iterator<Item = (String, &'a [T])> {
        self.0.iter().map(move |(kind, count)| {
            let (own, others) = of_workers.split_at((*count as usize).min(of_workers.len()));
            of_workers = others;
            (format!("{kind}*{count}"), own)
        })
    }

    /// Whether steps of some of it are sized by hand. Such a mix keeps no promise, and gives none.
    pub fn is_by_hand(&self) -> bool {
        self.kinds().any(|kind| kind.step_tokens.is_some())
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (text, step_tokens) = match text.split_once('@') {
            Some((text, tokens)) => match tokens.trim().parse() {
                Ok(tokens @ 1..=STEP_TOKENS_MAX) => (text, Some(tokens)),
                _ => {
                    return Err(format!(
                        "{tokens:?} is no number of a step's tokens, 1 to {STEP_TOKENS_MAX}"
                    ));
                }
            },
            None => (text, None),
        };
        let (role, cost) = match text.split_once(':') {
            Some((role, name)) if is_name(name.trim()) => (role, Some(name.trim().to_owned())),
            Some((_, name)) => {
                return Err(format!(
                    "{name:?} is no name of a cost: letters, digits, '-', '_' and '.'"
                ));
            }
            None => (text, None),
        };
        let role = [Role::Both, Role::Context, Role::Decode]
            .into_iter()
            .find(|known| known.label() == role.trim())
            .ok_or_else(|| format!("{role:?} is no role: both, context or decode"))?;
        Ok(Self {
            role,
            cost,
            step_tokens,
        })
    }
}

impl FromStr for Mix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let group = |group: &str| {
            let (kind, count) = group.split_once('*').unwrap_or((group, "1"));
            let kind = kind.parse()?;
            match count.trim().parse() {
                Ok(count @ 1..=WORKERS_MAX) => Ok((kind, count)),
                _ => Err(format!(
                    "{count:?} is no number of workers, 1 to {WORKERS_MAX}"
                )),
            }
        };
        let mix = Self(text.split('+').map(group).collect::<Result<_, String>>()?);
        match mix.workers().count() {
            workers if workers > WORKERS_MAX as usize => {
                Err(format!("{workers} workers are more than {WORKERS_MAX}"))
            }
            _ if !mix.kinds().any(|kind| kind.role.prefills()) => {
                Err("nobody in it runs prompts: both or context".to_owned())
            }
            _ if !mix.kinds().any(|kind| kind.role.decodes()) => {
                Err("nobody in it generates: both or decode".to_owned())
            }
            _ => Ok(mix),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.role.label())?;
        if let Some(name) = &self.cost {
            write!(f, ":{name}")?;
        }
        match self.step_tokens {
            Some(tokens) => write!(f, "@{tokens}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Mix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (kind, count)) in self.0.iter().enumerate() {
            let plus = if i == 0 { "" } else { "+" };
            write!(f, "{plus}{kind}*{count}")?;
        }
        Ok(())
    }
}
