//! A cluster behind HTTPS, as `baton up` starts it and as the tools ask it.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use baton_tests::{PATIENCE, Process, Signal, Turn, baton, eventually, model_dir};
use serde_json::Value;
use tempfile::TempDir;

/// Writes an authority's certificate, and a certificate and key that it issued.
fn write_certificates(dir: &Path, who: &str, name: &str) {
    let key = rcgen::KeyPair::generate().expect("a key");
    let mut params = rcgen::CertificateParams::new(Vec::new()).expect("no names");
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca = params.self_signed(&key).expect("a certificate");
    let issuer = rcgen::Issuer::new(params, key);
    let own_key = rcgen::KeyPair::generate().expect("a key");
    let own = rcgen::CertificateParams::new(vec![name.to_owned()]).expect("a name");
    let own = own.signed_by(&own_key, &issuer).expect("a certificate");
    for (what, text) in [
        ("ca", ca.pem()),
        ("cert", own.pem()),
        ("key", own_key.serialize_pem()),
    ] {
        fs::write(dir.join(format!("{who}-{what}.pem")), text).expect("a file of the test");
    }
}

#[tokio::test]
async fn a_cluster_is_served_and_asked_over_https() {
    let _turn = Turn::take();
    let dir = TempDir::new().expect("a temporary directory");
    write_certificates(dir.path(), "server", "127.0.0.1");
    write_certificates(dir.path(), "client", "anna");
    let file = |name: &str| dir.path().join(name).to_str().expect("plain").to_owned();
    let ready = dir.path().join("ready.json");
    let mut command = Command::new(baton());
    command.args([
        "up",
        "--device",
        "fake",
        "--kv-mib",
        "64",
        "--api-server-port",
        "0",
        "--model",
    ]);
    command.arg(model_dir()).arg("--ready-file").arg(&ready);
    command.args([
        "--tls-cert",
        &file("server-cert.pem"),
        "--tls-key",
        &file("server-key.pem"),
    ]);
    command.args(["--tls-client-ca", &file("client-ca.pem")]);
    let mut process = Process::start("up", &command, dir.path());
    let ready: Value = eventually("baton up to serve", 2 * PATIENCE, async || {
        if let Some(status) = process.ended() {
            panic!("baton up ended: {status}");
        }
        let text = fs::read(&ready).map_err(|e| format!("{}: {e}", ready.display()))?;
        serde_json::from_slice(&text).map_err(|e| e.to_string())
    })
    .await;
    let url = ready["url"].as_str().expect("an address");
    assert!(url.starts_with("https://127.0.0.1:"), "{url}");

    let status = |more: &[&str]| -> Output {
        let mut command = Command::new(baton());
        let output = command.args(["status", "--url", url]).args(more).output();
        output.expect("the binary was just built")
    };
    let (ca, cert, key) = (
        file("server-ca.pem"),
        file("client-cert.pem"),
        file("client-key.pem"),
    );
    let own = ["--cacert", &ca, "--cert", &cert, "--cert-key", &key];
    let said = |output: &Output| String::from_utf8_lossy(&output.stderr).into_owned();
    let shown = status(&own);
    assert!(shown.status.success(), "{}", said(&shown));
    assert!(String::from_utf8_lossy(&shown.stdout).contains("both-0"));
    // Whom it does not trust, what it lacks, and a file that is none.
    for (more, word) in [
        (&own[2..], "certificate"),
        (&own[..2], "wants a client certificate"),
        (&["--cacert", "/nowhere/ca.pem"][..], "/nowhere/ca.pem"),
        (&["--cacert", &key][..], "no certificate"),
    ] {
        let refused = status(more);
        assert_eq!(refused.status.code(), Some(1));
        let said = said(&refused);
        assert!(said.contains(word), "{more:?}: {said}");
    }
    process.signal(Signal::Interrupt);
    assert!(process.end(PATIENCE).await.success());
}
