//! Ways into a real nats-server, and what is said at a closed door.

use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use async_nats::ConnectOptions;
use baton_bus::{BusConfig, BusError};

const PATIENCE: Duration = Duration::from_secs(20);

/// A nats-server with these lines in its configuration.
struct Nats {
    child: Child,
    port: u16,
    directory: tempfile::TempDir,
}

impl Nats {
    fn start(lines: impl FnOnce(&Path) -> String) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let lines = lines(directory.path());
        let child = serve(directory.path(), port, &lines);
        Self {
            child,
            port,
            directory,
        }
    }

    fn config(&self, who: &str) -> BusConfig {
        BusConfig {
            url: format!("nats://{who}127.0.0.1:{}", self.port),
            connect_wait: Some(Duration::from_millis(300)),
            ..BusConfig::default()
        }
    }

    fn write(&self, name: &str, text: &str) -> Option<PathBuf> {
        let path = self.directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        Some(path)
    }
}

impl Drop for Nats {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn serve(directory: &Path, port: u16, lines: &str) -> Child {
    let file = directory.join("nats.conf");
    std::fs::write(&file, format!("listen: 127.0.0.1:{port}\n{lines}\n")).unwrap();
    let mut child = Command::new(baton_tests::command("nats-server"))
        .arg("-c")
        .arg(&file)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let begun = Instant::now();
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(begun.elapsed() < PATIENCE, "nats-server does not listen");
        assert!(child.try_wait().unwrap().is_none(), "nats-server ended");
        std::thread::sleep(Duration::from_millis(10));
    }
    child
}

/// Connects and has the server answer once.
async fn reach(config: &BusConfig) -> Result<(), BusError> {
    let client = config.connect(ConnectOptions::new).await?;
    client.flush().await.unwrap();
    Ok(())
}

async fn refused(config: &BusConfig) -> String {
    let error = reach(config).await.unwrap_err().to_string();
    assert!(error.contains(&config.url_without_secrets()), "{error}");
    error
}

#[tokio::test]
async fn a_user_comes_in_with_its_password() {
    let nats = Nats::start(|_| "authorization { user: ann, password: \"s3/cret\" }".to_owned());
    reach(&nats.config("ann:s3%2Fcret@")).await.unwrap();
    for who in ["", "ann:wrong@", "ann@"] {
        let error = refused(&nats.config(who)).await;
        assert!(error.contains("give the credentials it wants"), "{error}");
        assert!(!error.contains("wrong@"), "{error}");
    }
}

#[tokio::test]
async fn a_token_opens() {
    let nats = Nats::start(|_| "authorization { token: t0ken }".to_owned());
    reach(&nats.config("t0ken@")).await.unwrap();
    refused(&nats.config("other@")).await;
}

#[tokio::test]
async fn an_nkey_opens() {
    let key = nkeys::KeyPair::new_user();
    let public = key.public_key();
    let nats = Nats::start(|_| format!("authorization {{ users: [ {{ nkey: {public} }} ] }}"));
    let mut config = nats.config("");
    config.nkey = nats.write("seed", &format!("# of a worker\n{}\n", key.seed().unwrap()));
    reach(&config).await.unwrap();
    let other = nkeys::KeyPair::new_user();
    config.nkey = nats.write("other", &other.seed().unwrap());
    refused(&config).await;
    config.nkey = nats.write("empty", "");
    let error = reach(&config).await.unwrap_err().to_string();
    assert!(error.contains("holds no seed"), "{error}");
}

/// A claim about `subject`, signed as NATS wants it: https://docs.nats.io/running-a-nats-service/configuration/securing_nats/jwt
fn jwt(issuer: &nkeys::KeyPair, subject: &nkeys::KeyPair, claim: serde_json::Value) -> String {
    use base64::Engine as _;
    let encode = |bytes: &[u8]| base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(bytes);
    let header = serde_json::json!({"typ": "JWT", "alg": "ed25519-nkey"});
    let claims = serde_json::json!({
        "jti": "test", "iat": 1, "iss": issuer.public_key(), "sub": subject.public_key(), "name": "test", "nats": claim,
    });
    let signed = [header, claims]
        .map(|part| encode(part.to_string().as_bytes()))
        .join(".");
    let signature = issuer.sign(signed.as_bytes()).unwrap();
    format!("{signed}.{}", encode(&signature))
}

#[tokio::test]
async fn credentials_of_an_account_open() {
    use serde_json::json;
    let operator = nkeys::KeyPair::new_operator();
    let account = nkeys::KeyPair::new_account();
    let limits = json!({
        "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true, "conn": -1, "leaf": -1,
    });
    let operator_jwt = jwt(
        &operator,
        &operator,
        json!({"type": "operator", "version": 2}),
    );
    let account_claim = json!({"type": "account", "version": 2, "limits": limits});
    let account_jwt = jwt(&operator, &account, account_claim);
    let nats = Nats::start(|_| {
        let name = account.public_key();
        format!(
            "operator: {operator_jwt}\nresolver: MEMORY\nresolver_preload: {{ {name}: {account_jwt} }}"
        )
    });
    let user = nkeys::KeyPair::new_user();
    let claim = json!({"type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1});
    let credentials = |jwt: &str, key: &nkeys::KeyPair| {
        let seed = key.seed().unwrap();
        format!(
            "-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n\
             -----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
        )
    };
    let mut config = nats.config("");
    refused(&config).await;
    let user_jwt = jwt(&account, &user, claim.clone());
    config.credentials = nats.write("user.creds", &credentials(&user_jwt, &user));
    reach(&config).await.unwrap();
    // Another's key, and a user of an account that the operator does not know.
    let other = nkeys::KeyPair::new_user();
    config.credentials = nats.write("other.creds", &credentials(&user_jwt, &other));
    refused(&config).await;
    let foreign = jwt(&nkeys::KeyPair::new_account(), &user, claim);
    config.credentials = nats.write("foreign.creds", &credentials(&foreign, &user));
    refused(&config).await;
    config.credentials = nats.write("empty.creds", "nothing of the kind");
    let error = reach(&config).await.unwrap_err().to_string();
    assert!(error.contains("empty.creds"), "{error}");
}

#[tokio::test]
async fn tls_knows_both_sides() {
    let authority_key = rcgen::KeyPair::generate().unwrap();
    let mut authority = rcgen::CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca = authority.self_signed(&authority_key).unwrap();
    let issuer = rcgen::Issuer::new(authority, &authority_key);
    let issue = |name: &str| {
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        let certificate = certificate.signed_by(&key, &issuer).unwrap();
        (certificate.pem(), key.serialize_pem())
    };
    let nats = Nats::start(|directory| {
        let (certificate, key) = issue("127.0.0.1");
        let write = |name: &str, text: String| std::fs::write(directory.join(name), text).unwrap();
        write("server.pem", certificate);
        write("server.key", key);
        write("ca.pem", ca.pem());
        let at = directory.display();
        format!(
            "tls {{ cert_file: {at}/server.pem, key_file: {at}/server.key, ca_file: {at}/ca.pem, verify: true }}"
        )
    });
    let mut config = nats.config("");
    config.ca = nats.write("ca.pem", &ca.pem());
    let (certificate, key) = issue("worker");
    let ours = nats.write("worker.pem", &certificate);
    config.certificate = ours.zip(nats.write("worker.key", &key));
    reach(&config).await.unwrap();
    config.certificate = None;
    refused(&config).await;
    let (stranger, _) = issue("stranger");
    config.ca = nats.write("stranger.pem", &stranger);
    let error = refused(&config).await;
    assert!(error.contains("certificate"), "{error}");
}

#[tokio::test]
async fn a_server_that_comes_later_is_found() {
    let nats = Nats::start(|_| String::new());
    let (port, directory) = (nats.port, tempfile::tempdir().unwrap());
    drop(nats);
    let config = BusConfig {
        url: format!("nats://127.0.0.1:{port}"),
        connect_wait: None,
        ..BusConfig::default()
    };
    let (tried, mut tries) = tokio::sync::mpsc::unbounded_channel();
    let reached = tokio::spawn(async move {
        let options = || {
            let _ = tried.send(());
            ConnectOptions::new()
        };
        config.connect(options).await.map(drop)
    });
    // The second try has begun: the first has failed.
    for _ in 0..2 {
        tries.recv().await.unwrap();
    }
    let mut child = serve(directory.path(), port, "");
    let outcome = tokio::time::timeout(PATIENCE, reached).await;
    let _ = child.kill();
    let _ = child.wait();
    outcome.expect("it is found").unwrap().unwrap();
}
