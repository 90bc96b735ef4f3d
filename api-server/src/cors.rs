//! Which web pages of others may ask: none, unless they are named (`--cors-origin`).
//!
//! A browser lets a page send to another server only what a form could send, and asks first for everything else. Bodies here must be
//! JSON, which no form sends, so that without an answer to that question no page gets anything.

/// Origins of pages that may ask.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origins {
    any: bool,
    named: Vec<String>,
}

impl Origins {
    /// The origins in these words: `https://host[:port]` each, or `*` for every page.
    ///
    /// # Errors
    /// A sentence, for what is none.
    pub fn parse<'a>(words: impl IntoIterator<Item = &'a str>) -> Result<Self, String> {
        let mut origins = Self::default();
        for word in words {
            match is_origin(word) {
                _ if word == "*" => origins.any = true,
                true => origins.named.push(word.to_ascii_lowercase()),
                false => {
                    return Err(format!(
                        "{word:?} is no origin: say https://host, https://host:port, or *"
                    ));
                }
            }
        }
        Ok(origins)
    }

    /// Whether a page of this origin may ask.
    pub fn allow(&self, origin: &str) -> bool {
        let same = |named: &String| named.eq_ignore_ascii_case(origin);
        self.any || self.named.iter().any(same)
    }
}

/// A scheme and a host, with nothing after it.
fn is_origin(word: &str) -> bool {
    let Some((scheme, host)) = word.split_once("://") else {
        return false;
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | ':' | '[' | ']');
    !scheme.is_empty()
        && scheme
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '+')
        && !host.is_empty()
        && host.chars().all(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_is_named_may_ask() {
        let origins = Origins::parse(["https://a.example", "http://localhost:3000"]).unwrap();
        assert!(origins.allow("https://a.example") && origins.allow("HTTP://LOCALHOST:3000"));
        for other in [
            "http://a.example",
            "https://a.example:8443",
            "https://b.example",
            "null",
            "",
        ] {
            assert!(!origins.allow(other), "{other}");
        }
        assert!(!Origins::default().allow("https://a.example"));
        assert!(Origins::parse(["*"]).unwrap().allow("https://b.example"));
    }

    #[test]
    fn what_is_no_origin_is_said() {
        for word in [
            "a.example",
            "https://",
            "https://a.example/",
            "https://a b",
            "://a",
            "",
        ] {
            let error = Origins::parse([word]).expect_err(word);
            assert!(error.contains("is no origin"), "{error}");
        }
    }
}
