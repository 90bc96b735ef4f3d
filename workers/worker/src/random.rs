//! Random numbers from the operating system, for what must not be guessed or drawn twice.

/// This many random bytes.
///
/// # Errors
/// The operating system's reason.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], String> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| error.to_string())?;
    Ok(bytes)
}
