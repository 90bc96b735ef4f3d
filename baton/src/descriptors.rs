//! As many open files as the system allows: each client is one, and a shell or systemd grants 1,024 to who does not ask.

use rustix::process::{Resource, getrlimit, setrlimit};

/// Raises this process's own limit to what it may have. What cannot be raised stays.
pub fn allow_all() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::debug!(%error, "the limit of open files was not raised");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_raised_to_what_is_allowed() {
        let mut limit = getrlimit(Resource::Nofile);
        limit.current = Some(512);
        setrlimit(Resource::Nofile, limit).unwrap();
        allow_all();
        let raised = getrlimit(Resource::Nofile);
        assert_eq!(raised.current, raised.maximum);
        assert_ne!(raised.current, Some(512));
    }
}
