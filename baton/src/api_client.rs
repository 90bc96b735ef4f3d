//! How status, top, drain, chat and bench ask an API server: where it is, with which key, and what it says when it refuses.

use std::error::Error;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use reqwest::{Certificate, Client, ClientBuilder, Identity, RequestBuilder, Response};
use serde_json::Value;

use crate::Failure;
use crate::api_key::ApiKeyArg;

/// Where `baton up` listens if the port is free.
const URL_DEFAULT: &str = "http://127.0.0.1:8000";

#[derive(Args, Clone, Debug)]
pub struct ApiServerArg {
    /// Where the API server answers; without a scheme, over http
    #[arg(long, default_value = URL_DEFAULT, env = "BATON_URL")]
    url: String,
    /// Certificates (PEM) that an https server's must come from [default: the system's]
    #[arg(long, value_name = "FILE", env = "BATON_CACERT")]
    cacert: Option<PathBuf>,
    /// Our own certificate (PEM), if the server wants one
    #[arg(long, value_name = "FILE", env = "BATON_CERT", requires = "cert_key")]
    cert: Option<PathBuf>,
    /// Its key (PEM)
    #[arg(long, value_name = "FILE", env = "BATON_CERT_KEY", requires = "cert")]
    cert_key: Option<PathBuf>,
    #[command(flatten)]
    api_key: ApiKeyArg,
}

/// A client for one API server.
pub struct ApiClient {
    client: Client,
    /// Without a slash at its end.
    base: String,
}

impl ApiServerArg {
    /// Whether another server than the usual one is meant.
    pub fn is_named(&self) -> bool {
        self.url != URL_DEFAULT
    }

    /// A client for it, of which `limits` sets the time that may pass.
    ///
    /// # Errors
    /// If the address is none, or the key cannot be sent.
    pub fn client(
        &self,
        limits: impl FnOnce(ClientBuilder) -> ClientBuilder,
    ) -> Result<ApiClient, Failure> {
        let mut builder = Client::builder()
            .default_headers(self.api_key.headers()?)
            .no_proxy();
        if let Some(path) = &self.cacert {
            let certificates = Certificate::from_pem_bundle(&read("--cacert", path)?);
            let certificates =
                certificates.map_err(|error| unusable("--cacert", path, &causes(&error)))?;
            if certificates.is_empty() {
                return Err(unusable("--cacert", path, "it holds no certificate in PEM"));
            }
            builder = builder.tls_certs_only(certificates);
        }
        if let Some((certificate, key)) = self.cert.as_ref().zip(self.cert_key.as_ref()) {
            let mut pem = read("--cert", certificate)?;
            pem.push(b'\n');
            pem.extend(read("--cert-key", key)?);
            let identity = Identity::from_pem(&pem);
            builder = builder.identity(
                identity.map_err(|error| unusable("--cert", certificate, &causes(&error)))?,
            );
        }
        Ok(ApiClient {
            client: limits(builder).build()?,
            base: base(&self.url)?,
        })
    }
}

fn read(flag: &str, path: &Path) -> Result<Vec<u8>, Failure> {
    std::fs::read(path).map_err(|error| unusable(flag, path, &error.to_string()))
}

fn unusable(flag: &str, path: &Path, why: &str) -> Failure {
    format!("{flag} {}: {why}", path.display()).into()
}

/// An address as people write it: `localhost:8000` is `http://localhost:8000`.
///
/// # Errors
/// What is wrong with it, with an example.
pub fn base(url: &str) -> Result<String, Failure> {
    let wrong = |why: &str| {
        Failure::from(format!(
            "--url {url:?} {why}: an API server is at an address such as http://localhost:8000"
        ))
    };
    let with_scheme = match url.contains("://") {
        true => url.to_owned(),
        false => format!("http://{url}"),
    };
    let parsed = reqwest::Url::parse(&with_scheme)
        .map_err(|error| wrong(&format!("is no address ({error})")))?;
    if !["http", "https"].contains(&parsed.scheme()) {
        return Err(wrong(&format!("has the scheme {}", parsed.scheme())));
    }
    if parsed.host_str().is_none_or(str::is_empty) {
        return Err(wrong("names no host"));
    }
    // OpenAI's clients want it with /v1; who copies that from there means the same server.
    let plain = with_scheme.trim_end_matches('/');
    Ok(plain.strip_suffix("/v1").unwrap_or(plain).to_owned())
}

impl ApiClient {
    /// A client for the API server at this base ([`base`]), over HTTP or with the system's certificates.
    ///
    /// # Errors
    /// If the key cannot be sent.
    pub fn plain(base: String, key: &ApiKeyArg, wait: Duration) -> Result<Self, Failure> {
        let builder = Client::builder().default_headers(key.headers()?).no_proxy();
        let client = builder.timeout(wait).build()?;
        Ok(Self { client, base })
    }

    /// The model that the server names first.
    ///
    /// # Errors
    /// As [`Self::get`], or that it serves none.
    pub async fn served_model(&self) -> Result<String, Failure> {
        let body = self.get("/v1/models").await?;
        let name = body["data"][0]["id"].as_str().map(str::to_owned);
        name.ok_or_else(|| format!("{} serves no model", self.base).into())
    }

    /// Where it is.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// Asks for a JSON document.
    ///
    /// # Errors
    /// That nobody answers there, or the server's sentence.
    pub async fn get(&self, path: &str) -> Result<Value, Failure> {
        let response = self.send(self.client.get(self.url(path))).await?;
        let text = response.text().await;
        let text = text.map_err(|error| {
            format!("the answer of {} broke off: {}", self.base, causes(&error))
        })?;
        let json = serde_json::from_str(&text);
        json.map_err(|_| {
            format!(
                "{} is no API server of Baton: it does not answer {path} with JSON",
                self.base
            )
            .into()
        })
    }

    /// Posts a JSON document. The answer is a success, and its body is yet to come.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn post(&self, path: &str, body: &Value) -> Result<Response, Failure> {
        let request = self.client.post(self.url(path));
        let request = request.header("content-type", "application/json");
        self.send(request.body(body.to_string())).await
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    async fn send(&self, request: RequestBuilder) -> Result<Response, Failure> {
        let response = request.send().await;
        let response = response.map_err(|error| {
            let tip = tip(&error);
            format!(
                "no API server answers at {}: {}{tip}",
                self.base,
                causes(&error)
            )
        })?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        // What comes from a wrong address may have no end.
        let text = tokio::time::timeout(Duration::from_secs(5), response.text()).await;
        let text = text.ok().and_then(Result::ok).unwrap_or_default();
        Err(format!("{} answers {status}: {}", self.base, sentence(&text)).into())
    }
}

/// What to do about a server that is not reached.
fn tip(error: &reqwest::Error) -> &'static str {
    let mut cause: Option<&dyn Error> = Some(error);
    while let Some(error) = cause {
        let io = error.downcast_ref::<std::io::Error>();
        if io.is_some_and(|io| io.kind() == ErrorKind::ConnectionRefused) {
            return "; `baton up MODEL` starts a cluster, --url names another address";
        }
        cause = error.source();
    }
    let says = causes(error);
    match says.contains("InvalidContentType") {
        true => "; it speaks HTTP and no HTTPS: name it with http://",
        false => "",
    }
}

/// The last cause says what happened; those before it say where, which the caller knows better.
fn causes(error: &dyn Error) -> String {
    let mut last = error;
    while let Some(next) = last.source() {
        last = next;
    }
    last.to_string()
}

/// The server's sentence in an answer that is no success, else its beginning.
pub fn sentence(body: &str) -> String {
    let parsed: Option<Value> = serde_json::from_str(body).ok();
    let message = parsed
        .as_ref()
        .and_then(|value| value["error"]["message"].as_str());
    match message {
        Some(message) => message.to_owned(),
        None if body.trim_start().starts_with('<') => {
            "a page, as no API server of Baton sends it: another program has this address"
                .to_owned()
        }
        None => body.trim().chars().take(300).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_as_people_write_them() {
        for (written, meant) in [
            ("localhost:8000", "http://localhost:8000"),
            ("http://h:1/", "http://h:1"),
            ("10.0.0.7:80/v1", "http://10.0.0.7:80"),
            ("http://[::1]:8000", "http://[::1]:8000"),
        ] {
            assert_eq!(base(written).unwrap(), meant);
        }
        assert_eq!(base("https://h:8443/v1").unwrap(), "https://h:8443");
        for wrong in ["ftp://h", "http://", "", "a b"] {
            let error = base(wrong).unwrap_err().to_string();
            assert!(error.contains("http://localhost:8000"), "{error}");
        }
    }

    #[test]
    fn refusals_are_told_in_the_servers_words() {
        assert_eq!(
            sentence(r#"{"error":{"message":"no such model"}}"#),
            "no such model"
        );
        assert_eq!(sentence("  plain \n"), "plain");
        let page = sentence("<!DOCTYPE HTML>\n<html lang=\"en\">\n<h1>Error response</h1>");
        assert!(page.contains("another program") && !page.contains("<h1>"));
    }

    #[tokio::test]
    async fn who_does_not_answer_is_named_with_the_cause() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        drop(listener);
        let arg = ApiServerArg {
            url: address.clone(),
            cacert: None,
            cert: None,
            cert_key: None,
            api_key: ApiKeyArg::default(),
        };
        let client = arg.client(|builder| builder).unwrap();
        let error = client.get("/cluster").await.unwrap_err().to_string();
        assert!(error.contains(&address), "{error}");
        assert!(error.contains("refused"), "{error}");
        assert!(
            error.contains("`baton up MODEL`") && error.contains("--url"),
            "{error}"
        );
        assert!(!error.contains("builder"), "{error}");
    }
}
