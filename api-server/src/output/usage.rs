//! Tokens used, of one choice and of a whole request.

/// Tokens used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Of the prompts.
    pub prompt: u64,
    /// Of the output.
    pub completion: u64,
    /// Of the prompts, those that a prefix index had.
    pub cached: u64,
    /// Of the output, those of its reasoning.
    pub reasoning: u64,
}

/// Adds up what the choices of one request used. A prompt counts once, however many choices follow it.
#[derive(Clone, Debug)]
pub struct Tally {
    prompt: u64,
    completion: u64,
    reasoning: u64,
    /// For each prompt the most that one of its choices found cached.
    cached: Vec<u64>,
    choices_each: usize,
}

impl Tally {
    /// Nothing yet, for this many prompts of `prompt_tokens` together, each with `choices_each` choices in a row.
    pub fn new(prompt_tokens: u64, prompts: usize, choices_each: usize) -> Self {
        Self {
            prompt: prompt_tokens,
            completion: 0,
            reasoning: 0,
            cached: vec![0; prompts],
            choices_each: choices_each.max(1),
        }
    }

    /// Adds what this choice used; its own prompt count is not asked.
    pub fn add(&mut self, choice: usize, usage: Usage) {
        self.completion += usage.completion;
        self.reasoning += usage.reasoning;
        if let Some(cached) = self.cached.get_mut(choice / self.choices_each) {
            *cached = usage.cached.max(*cached);
        }
    }

    /// The sums.
    pub fn usage(&self) -> Usage {
        Usage {
            prompt: self.prompt,
            completion: self.completion,
            cached: self.cached.iter().sum(),
            reasoning: self.reasoning,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_add_up_and_count_once() {
        let mut tally = Tally::new(50, 2, 2);
        for (choice, cached) in [(0, 3), (1, 16), (2, 0), (3, 5)] {
            let usage = Usage {
                prompt: 0,
                completion: 10,
                cached,
                reasoning: 4,
            };
            tally.add(choice, usage);
        }
        let usage = Usage {
            prompt: 50,
            completion: 40,
            cached: 16 + 5,
            reasoning: 16,
        };
        assert_eq!(tally.usage(), usage);
    }
}
