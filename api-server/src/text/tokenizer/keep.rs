//! Prompts cut to a number of tokens.

/// Which end of a prompt is taken away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Its beginning.
    Left,
    /// Its end.
    Right,
}

/// How much of a prompt is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keep {
    /// Most tokens.
    pub tokens: usize,
    /// What is taken away of more.
    pub side: Side,
}

impl Keep {
    /// The same with fewer tokens.
    #[must_use]
    pub fn less(self, tokens: usize) -> Self {
        Self {
            tokens: self.tokens.saturating_sub(tokens),
            ..self
        }
    }

    /// Takes away what is too much.
    pub fn cut(self, ids: &mut Vec<u32>) {
        match self.side {
            Side::Left => drop(ids.drain(..ids.len().saturating_sub(self.tokens))),
            Side::Right => ids.truncate(self.tokens),
        }
    }

    /// Whether nothing that follows so many tokens would be kept.
    pub fn is_full(self, tokens: usize) -> bool {
        self.side == Side::Right && tokens >= self.tokens
    }
}
