//! Waiting until the cluster can serve, and saying what it still lacks.

use std::time::Duration;

use tokio::time::Instant;

use crate::Failure;

const ASK_EVERY: Duration = Duration::from_millis(100);
const ANSWER_WAIT: Duration = Duration::from_secs(2);

/// Waits until `GET /health` answers 200.
///
/// # Errors
/// After `wait`, what was missing at the last look.
pub async fn wait(url: &str, wait: Duration) -> Result<(), Failure> {
    let client = client()?;
    let deadline = Instant::now() + wait;
    let mut told = String::new();
    loop {
        let Some(missing) = missing(&client, url).await else {
            return Ok(());
        };
        if Instant::now() >= deadline {
            return Err(format!(
                "the cluster cannot serve after {} s: {missing}",
                wait.as_secs()
            )
            .into());
        }
        if missing != told {
            tracing::info!("not ready yet: {missing}");
            told = missing;
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
}

/// A client for our own API servers.
///
/// # Errors
/// If the system has no randomness or the like.
pub fn client() -> reqwest::Result<reqwest::Client> {
    reqwest::Client::builder()
        .timeout(ANSWER_WAIT)
        .no_proxy()
        // It is our own child, asked by the address that it was given: its certificate is for the name by which clients know it.
        .tls_danger_accept_invalid_certs(true)
        .build()
}

/// What the cluster lacks, or `None`.
async fn missing(client: &reqwest::Client, url: &str) -> Option<String> {
    let response = match client.get(format!("{url}/health")).send().await {
        Ok(response) => response,
        Err(error) if error.is_connect() => {
            return Some("the API server does not listen yet".to_owned());
        }
        Err(error) => return Some(format!("the API server does not answer: {error}")),
    };
    let status = response.status();
    if status.is_success() {
        return None;
    }
    let body: serde_json::Value = response.json().await.unwrap_or_default();
    let reasons: Vec<_> = body["reasons"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|r| r.as_str())
        .collect();
    Some(match reasons.is_empty() {
        true => format!("/health answers {status}"),
        false => reasons.join("; "),
    })
}
