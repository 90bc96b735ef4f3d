//! Which known name an unknown one is a typing error of.

/// Names longer than this are nobody's typing error.
const CHARS_MAX: usize = 40;

/// The nearest of these names, if it is so near that it is meant: one error in four characters, three at most.
pub fn nearest(name: &str, known: impl Iterator<Item = &'static str>) -> Option<&'static str> {
    if name.chars().nth(CHARS_MAX).is_some() {
        return None;
    }
    let plain = |text: &str| -> Vec<char> {
        let text = text.chars().filter(|c| !matches!(c, '_' | '-'));
        text.flat_map(char::to_lowercase).collect()
    };
    let written = plain(name);
    let most = (written.len() / 4).min(3);
    known
        .map(|known| (distance(&written, &plain(known)), known))
        .filter(|(errors, _)| *errors <= most)
        .min()
        .map(|(_, known)| known)
}

/// How many characters are to be added, taken away, changed, or swapped with their neighbour, to make one of the other: the optimal
/// string alignment distance.
fn distance(one: &[char], other: &[char]) -> usize {
    let mut before: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=other.len()).collect();
    for (i, a) in one.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, b) in other.iter().enumerate() {
            let changed = last[j] + usize::from(a != b);
            let mut least = changed.min(last[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && one[i - 1] == *b && other[j - 1] == *a {
                least = least.min(before[j - 1] + 1);
            }
            row.push(least);
        }
        before = std::mem::replace(&mut last, row);
    }
    last[other.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn meant(name: &str) -> Option<&'static str> {
        let known = [
            "max_tokens",
            "min_tokens",
            "temperature",
            "stop",
            "n",
            "top_p",
            "top_k",
        ];
        nearest(name, known.into_iter())
    }

    #[test]
    fn typing_errors_are_known_and_other_words_are_not() {
        for (name, expected) in [
            ("max_token", Some("max_tokens")),
            ("maxTokens", Some("max_tokens")),
            ("temprature", Some("temperature")),
            ("tempertaure", Some("temperature")),
            ("stpo", Some("stop")),
            ("top-p", Some("top_p")),
            ("model", None),
            ("m", None),
            ("", None),
            ("provider", None),
        ] {
            assert_eq!(meant(name), expected, "{name}");
        }
        assert_eq!(meant(&"max_tokens".repeat(1 << 20)), None);
    }

    proptest! {
        #[test]
        fn the_distance_is_one_of_a_metric(a in "[ab]{0,8}", b in "[ab]{0,8}") {
            let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
            let errors = distance(&a, &b);
            prop_assert_eq!(errors, distance(&b, &a));
            prop_assert_eq!(errors == 0, a == b);
            prop_assert!(errors >= a.len().abs_diff(b.len()) && errors <= a.len().max(b.len()));
        }
    }
}
