//! What UCX prints of itself, which is the only way in which it tells of its transports.

use std::ptr::null_mut;

use libc::FILE;

/// The `posix` of `… posix/memory …`.
pub(crate) fn transport_name(line: &str) -> Option<String> {
    let word = line.split_whitespace().find(|word| {
        word.split_once('/').is_some_and(|(name, device)| {
            !device.is_empty() && name.contains(|c: char| c.is_ascii_lowercase())
        })
    })?;
    let name = word.split('/').next()?;
    Some(name.rsplit(':').next()?.to_owned())
}

/// Each once, in their order: `posix,tcp`.
pub(crate) fn distinct(names: impl Iterator<Item = String>) -> String {
    let mut seen: Vec<String> = Vec::new();
    for name in names {
        if !seen.contains(&name) {
            seen.push(name);
        }
    }
    seen.join(",")
}

/// What a C function prints to a stream.
pub(crate) fn printed(print: impl FnOnce(*mut FILE)) -> String {
    let (mut text, mut length) = (null_mut(), 0);
    // SAFETY: both are places to write to and outlive the stream.
    let file = unsafe { libc::open_memstream(&mut text, &mut length) };
    if file.is_null() {
        return String::new();
    }
    print(file);
    // SAFETY: opened above; closing it completes `text` and `length`.
    unsafe { libc::fclose(file) };
    // SAFETY: the closed stream left `length` bytes at `text`.
    let bytes = unsafe { std::slice::from_raw_parts(text.cast::<u8>(), length) };
    let string = String::from_utf8_lossy(bytes).into_owned();
    // SAFETY: the stream's buffer is to be freed by us.
    unsafe { libc::free(text.cast()) };
    string
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resources_are_named() {
        assert_eq!(
            transport_name("#      resource 4  :  md 3  dev 3  flags -- posix/memory"),
            Some("posix".into())
        );
        assert_eq!(
            transport_name("#            md 0  :  component 0  self "),
            None
        );
    }
}
