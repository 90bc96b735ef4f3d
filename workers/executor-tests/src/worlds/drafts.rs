//! A drafter that knows what each sequence gets alone, and errs now and then.

use baton_engine::Drafter;

/// Prompts, and what each gets alone.
pub struct Guesses {
    pub texts: Vec<(Vec<u32>, Vec<u32>)>,
    pub vocab: u32,
    /// Drafts so far.
    pub drafts: u32,
}

impl Drafter for Guesses {
    fn draft(&mut self, tokens: &[u32], most: usize, drafts: &mut Vec<u32>) {
        let known = self.texts.iter().find_map(|(prompt, output)| {
            let so_far = tokens.strip_prefix(&prompt[..])?;
            output.strip_prefix(so_far)
        });
        for draft in known.unwrap_or_default().iter().take(most) {
            self.drafts += 1;
            // One in four is wrong.
            drafts.push((draft + u32::from(self.drafts.is_multiple_of(4))) % self.vocab);
        }
    }
}
