//! What `baton up` says once the cluster serves: on standard output for people, in the ready file for programs.

use std::io::Write;
use std::path::Path;

use serde_json::Value;

use super::{Ready, health};
use crate::Failure;
use crate::served;

/// Says on standard output where the cluster is, what the model can do and how to talk to it.
pub async fn print(ready: &Ready) {
    let (url, name) = (&ready.url, &ready.model);
    // An authority of one's own has to be named to all of them.
    let ca = match url.starts_with("https://") {
        true => " --cacert CA.pem",
        false => "",
    };
    let model = match models(url).await.as_ref().and_then(served::summary) {
        Some(summary) => format!("model: {summary}\n"),
        None => String::new(),
    };
    // A closed standard output is no failure: the cluster serves.
    let _ = writeln!(
        std::io::stdout(),
        "\nBaton serves {name} at {url}\n{model}\n  page: {url}/\n  API: {url}/docs\n\n  \
         curl -N{ca} {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n    \
         -d '{{\"model\": \"{name}\", \"stream\": true, \"max_tokens\": 100, \"temperature\": 0.2,\n         \
         \"messages\": [{{\"role\": \"user\", \"content\": \"What is the capital of France?\"}}]}}'\n\n  \
         baton chat --url {url}{ca}\n  baton status --url {url}{ca}\n\nCtrl-C stops it.\n"
    );
}

/// What `/v1/models` answers. `None` where it wants an API key, or anything goes wrong: the cluster serves all the same.
async fn models(url: &str) -> Option<Value> {
    let request = health::client().ok()?.get(format!("{url}/v1/models"));
    let response = request.send().await.ok()?.error_for_status().ok()?;
    response.json().await.ok()
}

/// Written aside and renamed: a reader that sees the file sees all of it.
pub fn write_ready(file: &Path, ready: &Ready) -> Result<(), Failure> {
    let aside = file.with_extension("tmp");
    serde_json::to_vec_pretty(ready)
        .map_err(std::io::Error::from)
        .and_then(|text| std::fs::write(&aside, text))
        .and_then(|()| std::fs::rename(&aside, file))
        .map_err(|error| format!("cannot write {}: {error}", file.display()).into())
}
