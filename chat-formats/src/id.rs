//! Ids of calls to which the model gave none.

use crate::format::Format;

/// An id for a call, as the family's templates want to read it back. `random` makes it one of its own.
pub fn call_id(format: Format, name: &str, index: usize, random: u128) -> String {
    match format {
        // Mistral's templates refuse any but nine letters and digits.
        Format::Mistral | Format::MistralArgs => {
            const LETTERS: &[u8] =
                b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
            let mut rest = random;
            let mut letter = || {
                let at = (rest % LETTERS.len() as u128) as usize;
                rest /= LETTERS.len() as u128;
                char::from(LETTERS[at])
            };
            (0..9).map(|_| letter()).collect()
        }
        Format::Kimi => format!("functions.{name}:{index}"),
        _ => format!("call_{random:032x}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_as_templates_want_them() {
        let mistral = call_id(Format::Mistral, "f", 0, u128::MAX - 5);
        assert!(
            mistral.len() == 9 && mistral.bytes().all(|b| b.is_ascii_alphanumeric()),
            "{mistral}"
        );
        assert_ne!(mistral, call_id(Format::Mistral, "f", 0, u128::MAX - 6));
        assert_eq!(call_id(Format::Kimi, "f", 2, 9), "functions.f:2");
        assert_eq!(
            call_id(Format::Hermes, "f", 0, 10),
            format!("call_{}a", "0".repeat(31))
        );
    }
}
