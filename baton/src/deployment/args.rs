//! What each process is told. From fields to flags there is one rule for all, since both have one name.

use baton_protocol::Role;
use serde::Serialize;
use serde_json::Value;

use super::{ApiServers, Deployment, Devices, Nats, WorkerGroup};

impl Deployment {
    /// The words after `baton` that start an API server. `bus` is told by flag where one is given, else by the environment.
    pub fn api_server_args(&self, bus: Option<&str>, port: u16, model: &str) -> Vec<String> {
        let mut words = vec!["api-server".to_owned()];
        words.extend(self.common_args(bus));
        words.extend(of_flags(&self.api_server, &ApiServers::NOT_PASSED_ON));
        words.extend(["--api-server-port".to_owned(), port.to_string()]);
        words.extend(["--tokenizer".to_owned(), model.to_owned()]);
        words
    }

    /// The words after `baton` that start a worker on these devices.
    pub fn worker_args(
        &self,
        bus: Option<&str>,
        role: Role,
        name: &str,
        group: &WorkerGroup,
        devices: &Devices,
        model: &str,
    ) -> Vec<String> {
        let mut words = vec!["worker".to_owned()];
        words.extend(self.common_args(bus));
        let devices = devices.to_string();
        let own = [
            ("--role", role.label()),
            ("--worker-name", name),
            ("--model", model),
            ("--device", &devices),
        ];
        words.extend(
            own.into_iter()
                .flat_map(|(flag, value)| [flag.to_owned(), value.to_owned()]),
        );
        words.extend(of_flags(group, &WorkerGroup::NOT_PASSED_ON));
        words
    }

    fn common_args(&self, bus: Option<&str>) -> Vec<String> {
        let mut words = vec!["--cluster".to_owned(), self.cluster.clone()];
        if let Some(bus) = bus {
            words.extend(["--request-plane-uri".to_owned(), bus.to_owned()]);
        }
        words.extend(of_flags(&self.nats, &Nats::NOT_PASSED_ON));
        words.extend(of_flags(&self.traces, &[]));
        words
    }
}

/// The command line that says what the fields of `part` say: `--name value` for each that has a value, `--name` for one that is
/// true, `--name value` again for each of a list. Fields named in `but` are left out.
fn of_flags(part: &impl Serialize, but: &[&str]) -> Vec<String> {
    let mut words = Vec::new();
    // Plain structures of strings, numbers and lists: nothing in them that JSON could not hold.
    let Ok(Value::Object(fields)) = serde_json::to_value(part) else {
        return words;
    };
    for (name, value) in fields {
        if but.contains(&name.as_str()) {
            continue;
        }
        let values = match value {
            Value::Array(values) => values,
            value => vec![value],
        };
        for value in values {
            let flag = format!("--{name}");
            match value {
                Value::Null | Value::Bool(false) => {}
                Value::Bool(true) => words.push(flag),
                // One word, so that a value that begins with a dash is no flag.
                Value::String(text) if text.starts_with('-') => {
                    words.push(format!("{flag}={text}"))
                }
                Value::String(text) => words.extend([flag, text]),
                value => words.extend([flag, value.to_string()]),
            }
        }
    }
    words
}
