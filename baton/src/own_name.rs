//! The name of a process that was given none: says where to look for it, and nobody else has it.

use baton_protocol::NAME_BYTES_MAX;

use crate::Failure;

/// `<what>-<host>-<process id>-<random number>`. Host and process id alone do not tell two containers apart: each may be
/// process 1, and share the host's name.
pub fn own_name(what: &str) -> Result<String, Failure> {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let mut drawn = [0; 4];
    getrandom::fill(&mut drawn).map_err(|error| format!("no random numbers: {error}"))?;
    Ok(name_of(what, host.trim(), u32::from_le_bytes(drawn)))
}

fn name_of(what: &str, host: &str, drawn: u32) -> String {
    let tail = format!("-{}-{drawn:08x}", std::process::id());
    let room = NAME_BYTES_MAX.saturating_sub(what.len() + 1 + tail.len());
    let plain = |c: char| match c.is_ascii_alphanumeric() {
        true => c,
        false => '-',
    };
    let host: String = host.chars().map(plain).take(room).collect();
    format!("{what}-{host}{tail}")
}

#[cfg(test)]
mod tests {
    use baton_protocol::ApiServerId;

    use super::*;

    #[test]
    fn two_starts_never_share_a_name() {
        let names = [own_name("api"), own_name("api")].map(Result::unwrap);
        assert_ne!(names[0], names[1]);
        for name in names {
            ApiServerId::new(name).unwrap();
        }
    }

    #[test]
    fn whatever_the_host_is_called_it_makes_a_name() {
        for host in ["", "h\u{f6}st.example", &"x".repeat(64)] {
            let name = name_of("context", host, u32::MAX);
            assert!(name.ends_with("-ffffffff"), "{name}");
            ApiServerId::new(name).unwrap();
        }
    }
}
