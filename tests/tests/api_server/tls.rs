//! HTTPS: HTTP/2 and HTTP/1.1, certificates that change, clients' certificates, and what a client that leaves means on HTTP/2.

use std::path::{Path, PathBuf};
use std::time::Duration;

use baton_api_server::{ApiServerConfig, TlsFiles};
use baton_protocol::Role;
use reqwest::{Certificate, Client, Identity, Version};
use serde_json::{Value, json};

use crate::support::{Api, Nats, Script, TEXT, Worker, chat, within};

/// An authority, and what it issues.
struct Authority {
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
    pem: String,
}

impl Authority {
    fn new() -> Self {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        Self {
            issuer: rcgen::Issuer::new(params, key),
            pem,
        }
    }

    /// A certificate and its key.
    fn issue(&self, name: &str) -> (String, String) {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        (certificate.pem(), key.serialize_pem())
    }
}

fn write(directory: &Path, name: &str, text: &str) -> PathBuf {
    let path = directory.join(name);
    std::fs::write(&path, text).unwrap();
    path
}

/// A server that this authority vouches for; with `client_ca`, one that asks for certificates.
struct Guarded {
    api: Api,
    files: TlsFiles,
    _directory: tempfile::TempDir,
}

impl Guarded {
    async fn start(nats: &Nats, authority: &Authority, client_ca: Option<&Authority>) -> Self {
        Self::with(nats, authority, client_ca, |_| {}).await
    }

    async fn with(
        nats: &Nats,
        authority: &Authority,
        client_ca: Option<&Authority>,
        change: impl FnOnce(&mut ApiServerConfig),
    ) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (certificate, key) = authority.issue("127.0.0.1");
        let files = TlsFiles {
            certificate: write(directory.path(), "cert.pem", &certificate),
            key: write(directory.path(), "key.pem", &key),
            client_ca: client_ca.map(|ca| write(directory.path(), "clients.pem", &ca.pem)),
        };
        let tls = files.clone();
        let api = Api::with(nats, |config| {
            config.tls = Some(tls);
            change(config);
        })
        .await;
        Self {
            api,
            files,
            _directory: directory,
        }
    }

    fn url(&self, path: &str) -> String {
        format!("https://{}{path}", self.api.address)
    }

    async fn sees(&self, client: &Client, workers: usize) {
        within("workers join", async {
            loop {
                let answer = client.get(self.url("/cluster")).send().await.unwrap();
                let cluster: Value = answer.json().await.unwrap();
                if cluster["workers"].as_array().unwrap().len() == workers {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
    }
}

/// A client that trusts this authority and no other.
fn client(
    authority: &Authority,
    change: impl FnOnce(reqwest::ClientBuilder) -> reqwest::ClientBuilder,
) -> Client {
    let ca = Certificate::from_pem(authority.pem.as_bytes()).unwrap();
    let builder = Client::builder().no_proxy().tls_certs_only([ca]);
    change(builder).build().unwrap()
}

fn client_of(authority: &Authority) -> Client {
    client(authority, |builder| builder)
}

fn identity((certificate, key): (String, String)) -> Identity {
    Identity::from_pem(format!("{certificate}{key}").as_bytes()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_come_over_both_versions_of_http() {
    let nats = Nats::start().await;
    let _context = Worker::start(&nats, "c1", Role::Context, Script::default()).await;
    let _decode = Worker::start(&nats, "d1", Role::Decode, Script::default()).await;
    let authority = Authority::new();
    let server = Guarded::start(&nats, &authority, None).await;
    let url = server.url("/v1/chat/completions");
    for (client, version) in [
        (client_of(&authority), Version::HTTP_2),
        (
            client(&authority, |builder| builder.http1_only()),
            Version::HTTP_11,
        ),
    ] {
        server.sees(&client, 2).await;
        let answer = client
            .post(&url)
            .json(&chat(json!({})))
            .send()
            .await
            .unwrap();
        assert_eq!(answer.version(), version);
        assert!(answer.headers().contains_key("x-request-id"), "{answer:?}");
        assert!(answer.headers().contains_key("date"), "{answer:?}");
        let body: Value = answer.json().await.unwrap();
        assert_eq!(body["choices"][0]["message"]["content"], TEXT);

        let streamed = client.post(&url).json(&chat(json!({"stream": true})));
        let events = streamed.send().await.unwrap().text().await.unwrap();
        assert!(events.contains("\"finish_reason\":\"stop\""), "{events}");
        assert!(events.ends_with("data: [DONE]\n\n"), "{events}");

        // A body of some megabytes goes through the windows of the connection, and is refused in words.
        let long = chat(json!({"messages": [{"role": "user", "content": "x".repeat(5 << 20)}]}));
        let refused = client.post(&url).json(&long).send().await.unwrap();
        assert_eq!(refused.status(), 400);
        let head = client.head(server.url("/health")).send().await.unwrap();
        assert_eq!(head.status(), 200);
        assert_eq!(
            client
                .get(server.url("/nowhere"))
                .send()
                .await
                .unwrap()
                .status(),
            404
        );
        if version == Version::HTTP_2 {
            let much = client
                .get(server.url("/health"))
                .header("x-much", "y".repeat(200 << 10));
            if let Ok(answer) = much.send().await {
                assert_eq!(answer.status(), 431, "{answer:?}");
            }
        }
        assert_eq!(
            client
                .get(server.url("/health"))
                .send()
                .await
                .unwrap()
                .status(),
            200
        );
    }
    // Who speaks no TLS is told nothing, and holds nobody up.
    let plain = Client::builder().no_proxy().build().unwrap();
    let address = server.api.address;
    assert!(
        plain
            .get(format!("http://{address}/health"))
            .send()
            .await
            .is_err()
    );
    let stranger = client_of(&Authority::new());
    let error = stranger
        .get(server.url("/health"))
        .send()
        .await
        .unwrap_err();
    assert!(
        format!("{error:?}").contains("InvalidCertificate"),
        "{error:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn many_requests_share_one_connection() {
    let nats = Nats::start().await;
    let context = Worker::start(&nats, "c1", Role::Context, Script::default()).await;
    let _decode = Worker::start(&nats, "d1", Role::Decode, Script::default()).await;
    let authority = Authority::new();
    let server = Guarded::start(&nats, &authority, None).await;
    let client = client(&authority, |builder| builder.http2_prior_knowledge());
    server.sees(&client, 2).await;
    let url = server.url("/v1/chat/completions");
    let asked = (0..600).map(|index| {
        let body = chat(json!({"stream": index % 2 == 0}));
        let request = client.post(&url).json(&body);
        async move { request.send().await.unwrap().text().await.unwrap() }
    });
    let answers = within("all answers", futures::future::join_all(asked)).await;
    for answer in answers {
        assert!(
            answer.contains("\"stop\"") || answer.contains("too_many_requests"),
            "{answer}"
        );
    }
    drop(context);
}

/// On HTTP/2 the connection goes on: what was asked for on one stream of it does not.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_given_up_frees_the_workers() {
    let nats = Nats::start().await;
    let _context = Worker::start(&nats, "c1", Role::Context, Script::default()).await;
    let mut decode = Worker::start(&nats, "d1", Role::Decode, Script::default()).await;
    decode.script.lock().unwrap().waits_at = Some(5);
    let authority = Authority::new();
    let server = Guarded::start(&nats, &authority, None).await;
    let client = client_of(&authority);
    server.sees(&client, 2).await;
    for stream in [false, true] {
        let body = chat(json!({"stream": stream, "max_tokens": 20}));
        let request = client.post(server.url("/v1/chat/completions")).json(&body);
        let asked = tokio::spawn(async move {
            let mut answer = request.send().await.unwrap();
            while answer.chunk().await.unwrap().is_some() {}
        });
        within("the decode job", decode.decodes.recv())
            .await
            .unwrap();
        asked.abort();
        decode.aborted().await;
        let health = client.get(server.url("/live")).send().await.unwrap();
        assert_eq!(health.version(), Version::HTTP_2);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_leaves_ends_connections_that_are_idle() {
    let nats = Nats::start().await;
    let _context = Worker::start(&nats, "c1", Role::Context, Script::default()).await;
    let mut decode = Worker::start(&nats, "d1", Role::Decode, Script::default()).await;
    decode.script.lock().unwrap().waits_at = Some(5);
    let authority = Authority::new();
    // For an idle connection it would wait as long.
    let drain = Duration::from_secs(3600);
    let mut server = Guarded::with(&nats, &authority, None, |config| {
        config.limits.drain = drain
    })
    .await;
    let clients = [
        client_of(&authority),
        client(&authority, |builder| builder.http1_only()),
    ];
    for client in &clients {
        server.sees(client, 2).await;
    }
    // One stream is under way, which runs to its end.
    let body = chat(json!({"stream": true, "max_tokens": 20}));
    let request = clients[0]
        .post(server.url("/v1/chat/completions"))
        .json(&body);
    let asked = tokio::spawn(async move { request.send().await.unwrap().text().await.unwrap() });
    within("the decode job", decode.decodes.recv())
        .await
        .unwrap();
    server.api.begin_stop();
    decode.go_on.send_replace(true);
    let text = within("the answer", asked).await.unwrap();
    assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
    server.api.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_that_change_are_used_and_bad_ones_are_not() {
    let nats = Nats::start().await;
    let (old, new) = (Authority::new(), Authority::new());
    let server = Guarded::start(&nats, &old, None).await;
    let asks = async |authority: &Authority| {
        // A connection of its own each time: those that are there keep their certificate.
        let answer = client_of(authority).get(server.url("/live"));
        answer
            .send()
            .await
            .map(|answer| answer.status().as_u16())
            .map_err(|error| format!("{error:?}"))
    };
    assert_eq!(asks(&old).await, Ok(200));
    let until_taken = async |authority: &Authority| {
        within("the new certificate", async {
            while asks(authority).await != Ok(200) {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        })
        .await;
    };
    let (certificate, key) = new.issue("127.0.0.1");
    std::fs::write(&server.files.key, &key).unwrap();
    std::fs::write(&server.files.certificate, &certificate).unwrap();
    until_taken(&new).await;
    assert!(asks(&old).await.unwrap_err().contains("InvalidCertificate"));

    // Half of a pair is none: who is there stays in use until the other half has come.
    std::fs::write(&server.files.key, "nonsense").unwrap();
    assert_eq!(asks(&new).await, Ok(200));
    let (certificate, key) = old.issue("127.0.0.1");
    std::fs::write(&server.files.key, key).unwrap();
    std::fs::write(&server.files.certificate, certificate).unwrap();
    until_taken(&old).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_shows_no_certificate_is_refused_but_for_the_state_of_the_server() {
    let nats = Nats::start().await;
    let mut context = Worker::start(&nats, "c1", Role::Context, Script::default()).await;
    let _decode = Worker::start(&nats, "d1", Role::Decode, Script::default()).await;
    let (authority, clients) = (Authority::new(), Authority::new());
    let server = Guarded::start(&nats, &authority, Some(&clients)).await;
    let url = server.url("/v1/chat/completions");
    for version in [Version::HTTP_2, Version::HTTP_11] {
        let of_version = |builder: reqwest::ClientBuilder| match version {
            Version::HTTP_2 => builder,
            _ => builder.http1_only(),
        };
        let nobody = client(&authority, of_version);
        for path in ["/health", "/live", "/metrics", "/ping"] {
            let answer = nobody.get(server.url(path)).send().await.unwrap();
            assert_ne!(answer.status(), 401, "{path}");
            assert_eq!(answer.version(), version);
        }
        for path in ["/cluster", "/v1/models", "/", "/nowhere"] {
            let answer = nobody.get(server.url(path)).send().await.unwrap();
            assert_eq!(answer.status(), 401, "{path}");
            assert!(
                answer.text().await.unwrap().contains("client certificate"),
                "{path}"
            );
        }
        let answer = nobody
            .post(&url)
            .json(&chat(json!({})))
            .send()
            .await
            .unwrap();
        assert_eq!(answer.status(), 401);
        assert!(context.prefills.try_recv().is_err(), "nothing was begun");

        // One of another authority does not come in at all.
        let foreign = identity(authority.issue("anna"));
        let foreign = client(&authority, |builder| of_version(builder).identity(foreign));
        assert!(foreign.get(server.url("/live")).send().await.is_err());

        let anna = identity(clients.issue("anna"));
        let anna = client(&authority, |builder| of_version(builder).identity(anna));
        server.sees(&anna, 2).await;
        let answer = anna.post(&url).json(&chat(json!({}))).send().await.unwrap();
        assert_eq!(answer.version(), version);
        let body: Value = answer.json().await.unwrap();
        assert_eq!(body["choices"][0]["message"]["content"], TEXT);
        context.prefills.recv().await.unwrap();
    }
}

/// A client that reads nothing holds an answer for a while, and then no more; on HTTP/2 by the window of its stream.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_reads_nothing_is_given_up() {
    let nats = Nats::start().await;
    let _context = Worker::start(&nats, "c1", Role::Context, Script::default()).await;
    let script = Script {
        waits_at: Some(20),
        ..Script::default()
    };
    let mut decode = Worker::start(&nats, "d1", Role::Decode, script).await;
    let authority = Authority::new();
    let server = Guarded::with(&nats, &authority, None, |config| {
        config.limits.connection_stall = Duration::from_millis(500);
        config.limits.reader_stall = Duration::from_secs(3600);
    })
    .await;
    // Its window takes next to nothing, and is never opened again.
    let client = client(&authority, |builder| {
        builder.http2_initial_stream_window_size(64)
    });
    let other = client_of(&authority);
    server.sees(&other, 2).await;
    let body = chat(json!({"stream": true, "max_tokens": 900}));
    let unread = client.post(server.url("/v1/chat/completions")).json(&body);
    let unread = unread.send().await.unwrap();
    assert_eq!(unread.version(), Version::HTTP_2);
    decode.aborted().await;
    drop(unread);
}
