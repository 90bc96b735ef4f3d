//! Certificates of the HTTPS door: read from files, and read again when the files change.
//!
//! A pair that cannot be used ends the start, and later is a line in the log: the pair before it stays in use. Clients' certificates
//! are asked for where there is an authority that they must come from. The handshake goes on without one, so that load balancers can
//! ask for the paths that are open to everybody; all others are refused in HTTP.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{
    ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier,
};
use rustls::sign::CertifiedKey;
use rustls::{
    DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme,
};

/// How often the files are looked at. A change counts when two looks have found the same: files are replaced one after another.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

/// What HTTP/2 is called in a handshake.
pub const HTTP_2: &[u8] = b"h2";

/// A chain, a key or a list of authorities takes some kilobytes.
const BYTES_MAX: usize = 1 << 20;

/// Where certificates are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The server's certificate and those between it and its authority, PEM.
    pub certificate: PathBuf,
    /// Its key, PEM.
    pub key: PathBuf,
    /// Authorities that clients' certificates must come from, PEM; `None` asks for none.
    pub client_ca: Option<PathBuf>,
}

/// What the files hold.
#[derive(PartialEq, Eq)]
struct Texts {
    certificate: Vec<u8>,
    key: Vec<u8>,
    client_ca: Option<Vec<u8>>,
}

/// What is made of it.
struct Loaded {
    pair: Arc<CertifiedKey>,
    clients: Option<Arc<dyn ClientCertVerifier>>,
}

impl TlsFiles {
    /// Whether they can be used.
    ///
    /// # Errors
    /// A sentence that names the file.
    pub fn check(&self) -> Result<(), String> {
        self.load(&self.read()?).map(drop)
    }

    fn read(&self) -> Result<Texts, String> {
        let read = |what: &str, path: &Path| {
            let bytes = std::fs::read(path).map_err(|error| error.to_string());
            let bytes = bytes.and_then(|bytes| match bytes.len() > BYTES_MAX {
                true => Err("it is larger than 1 MiB: is it the right file?".to_owned()),
                false => Ok(bytes),
            });
            bytes.map_err(|why| format!("{what} {}: {why}", path.display()))
        };
        let client_ca = self.client_ca.as_deref();
        Ok(Texts {
            certificate: read("TLS certificate", &self.certificate)?,
            key: read("TLS key", &self.key)?,
            client_ca: client_ca
                .map(|path| read("certificates of clients' authorities", path))
                .transpose()?,
        })
    }

    fn load(&self, texts: &Texts) -> Result<Loaded, String> {
        let provider = provider();
        let named = |what: &str, path: &Path, why: &dyn fmt::Display| {
            format!("{what} {}: {why}", path.display())
        };
        let of_certificate =
            |why: &dyn fmt::Display| named("TLS certificate", &self.certificate, why);
        let of_key = |why: &dyn fmt::Display| named("TLS key", &self.key, why);
        let chain = certificates(&texts.certificate).map_err(|why| of_certificate(&why))?;
        let key = PrivateKeyDer::from_pem_slice(&texts.key).map_err(|_| {
            of_key(&"it holds no private key in PEM (-----BEGIN PRIVATE KEY-----, not encrypted)")
        })?;
        let pair = CertifiedKey::from_der(chain, key, &provider).map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => {
                let other = format!(
                    "it is not the key of the certificate in {}",
                    self.certificate.display()
                );
                of_key(&other)
            }
            rustls::Error::InvalidCertificate(_) => of_certificate(&error),
            error => of_key(&error),
        })?;
        let clients = match (&self.client_ca, &texts.client_ca) {
            (Some(path), Some(text)) => Some(
                clients(text, &provider)
                    .map_err(|why| named("certificates of clients' authorities", path, &why))?,
            ),
            _ => None,
        };
        Ok(Loaded {
            pair: Arc::new(pair),
            clients,
        })
    }
}

/// The one that the bus has too: with two in one program rustls would take neither by itself.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match all {
        Ok(all) if !all.is_empty() => Ok(all),
        Ok(_) => Err("it holds no certificate in PEM (-----BEGIN CERTIFICATE-----)".to_owned()),
        Err(error) => Err(format!("it cannot be read as PEM: {error}")),
    }
}

fn clients(
    pem: &[u8],
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, String> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(pem)? {
        let added = roots.add(certificate);
        added.map_err(|error| format!("a certificate in it is of no use: {error}"))?;
    }
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider))
        .allow_unauthenticated()
        .build()
        .map_err(|error| error.to_string())
}

/// What handshakes take now.
pub struct Tls {
    files: TlsFiles,
    looks: Looks,
    current: Arc<Current>,
}

#[derive(Debug)]
struct Current(RwLock<Arc<Loaded>>);

impl Current {
    fn get(&self) -> Arc<Loaded> {
        let loaded = self.0.read().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&loaded)
    }

    fn set(&self, loaded: Loaded) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(loaded);
    }
}

/// What a look at the files found.
type Found = Result<Texts, String>;

/// Tells what is new once it was found twice: between the two, half of the files may be those of before.
struct Looks {
    last: Found,
    told: bool,
}

impl Looks {
    fn new(used: Texts) -> Self {
        Self {
            last: Ok(used),
            told: true,
        }
    }

    fn look(&mut self, found: Found) -> Option<&Found> {
        if self.last != found {
            (self.last, self.told) = (found, false);
            return None;
        }
        (!std::mem::replace(&mut self.told, true)).then_some(&self.last)
    }
}

impl Tls {
    /// From files that can be used.
    ///
    /// # Errors
    /// A sentence that names the file.
    pub fn open(files: TlsFiles) -> Result<Self, String> {
        let used = files.read()?;
        let loaded = files.load(&used)?;
        Ok(Self {
            files,
            looks: Looks::new(used),
            current: Arc::new(Current(RwLock::new(Arc::new(loaded)))),
        })
    }

    /// What the handshake is made with: TLS 1.2 and 1.3, HTTP/2 or HTTP/1.1 as the client likes.
    ///
    /// # Errors
    /// None that comes from a file.
    pub fn config(&self) -> Result<ServerConfig, String> {
        let builder =
            ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
        let builder = builder.map_err(|error| error.to_string())?;
        let builder = match self.asks_for_certificates() {
            true => builder.with_client_cert_verifier(Arc::new(Clients {
                current: Arc::clone(&self.current),
                algorithms: provider().signature_verification_algorithms,
            })),
            false => builder.with_no_client_auth(),
        };
        let mut config =
            builder.with_cert_resolver(Arc::clone(&self.current) as Arc<dyn ResolvesServerCert>);
        config.alpn_protocols = vec![HTTP_2.to_vec(), b"http/1.1".to_vec()];
        if self.asks_for_certificates() {
            // A session that is taken up again would pass over an authority that is trusted no more.
            config.session_storage = Arc::new(NoServerSessionStorage {});
            config.send_tls13_tickets = 0;
        }
        Ok(config)
    }

    /// Whether clients are asked for certificates.
    pub fn asks_for_certificates(&self) -> bool {
        self.files.client_ca.is_some()
    }

    /// Looks at the files for ever, and takes what they hold when it has changed and can be used. Connections that are there keep
    /// what they began with.
    pub async fn keep_up(mut self) {
        loop {
            tokio::time::sleep(LOOK_INTERVAL).await;
            let files = self.files.clone();
            let found = tokio::task::spawn_blocking(move || files.read()).await;
            let found =
                found.unwrap_or_else(|error| Err(format!("reading the TLS certificate: {error}")));
            let file = self.files.certificate.display().to_string();
            match self.take(found) {
                None => {}
                Some(Ok(())) => {
                    tracing::info!(
                        file,
                        "the TLS certificate has changed and is used from now on"
                    );
                }
                Some(Err(why)) => {
                    tracing::warn!("{why}. The TLS certificate of before stays in use");
                }
            }
        }
    }

    /// Whether what was found is new, and if so why it cannot be used, or that it is.
    fn take(&mut self, found: Found) -> Option<Result<(), String>> {
        let loaded = match self.looks.look(found)? {
            Ok(texts) => self.files.load(texts),
            Err(why) => Err(why.clone()),
        };
        Some(loaded.map(|loaded| self.current.set(loaded)))
    }
}

impl fmt::Debug for Loaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Loaded")
    }
}

impl ResolvesServerCert for Current {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.get().pair))
    }
}

/// Judges clients' certificates by the authorities that are trusted now.
#[derive(Debug)]
struct Clients {
    current: Arc<Current>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ClientCertVerifier for Clients {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    /// None: they may change, and clients that have one certificate show it anyway.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let loaded = self.current.get();
        let none = || rustls::Error::General("no authority is trusted".to_owned());
        let clients = loaded.clients.as_ref().ok_or_else(none)?;
        clients.verify_client_cert(certificate, intermediates, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, certificate, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(certificate: &str) -> Texts {
        Texts {
            certificate: certificate.into(),
            key: Vec::new(),
            client_ca: None,
        }
    }

    /// A certificate and its key.
    fn issue() -> (String, String) {
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = rcgen::CertificateParams::new(vec!["h".to_owned()]).unwrap();
        let certificate = certificate.self_signed(&key).unwrap();
        (certificate.pem(), key.serialize_pem())
    }

    #[test]
    fn what_is_new_counts_when_it_was_found_twice_and_once() {
        let mut looks = Looks::new(texts("a"));
        assert!(looks.look(Ok(texts("a"))).is_none());
        assert!(looks.look(Ok(texts("b"))).is_none());
        assert!(looks.look(Ok(texts("c"))).is_none(), "half of it was b's");
        assert!(looks.look(Ok(texts("c"))) == Some(&Ok(texts("c"))));
        assert!(looks.look(Ok(texts("c"))).is_none());
        let gone = || Err("gone".to_owned());
        assert!(looks.look(gone()).is_none());
        assert!(looks.look(gone()) == Some(&gone()));
        assert!(looks.look(gone()).is_none());
        assert!(looks.look(Ok(texts("c"))).is_none());
        assert!(looks.look(Ok(texts("c"))).is_some());
    }

    #[test]
    fn a_bad_pair_leaves_the_one_before_in_use() {
        let directory = tempfile::tempdir().unwrap();
        let files = TlsFiles {
            certificate: directory.path().join("cert.pem"),
            key: directory.path().join("key.pem"),
            client_ca: None,
        };
        let write = |(certificate, key): (&str, &str)| {
            std::fs::write(&files.certificate, certificate).unwrap();
            std::fs::write(&files.key, key).unwrap();
        };
        let [(old, old_key), (new, new_key)] = [issue(), issue()];
        write((&old, &old_key));
        let mut tls = Tls::open(files.clone()).unwrap();
        let used = |tls: &Tls| tls.current.get().pair.cert[0].clone();
        let mut look = |pair| {
            write(pair);
            assert_eq!(tls.take(files.read()), None);
            let said = tls.take(files.read());
            (said, used(&tls))
        };
        let [old_chain, new_chain] =
            [&old, &new].map(|pem| certificates(pem.as_bytes()).unwrap()[0].clone());
        let (said, chain) = look((&new, &old_key));
        assert!(said.unwrap().unwrap_err().contains("not the key"));
        assert_eq!(chain, old_chain);
        assert_eq!(look((&new, &new_key)), (Some(Ok(())), new_chain.clone()));
        let (said, chain) = look(("", ""));
        assert!(said.unwrap().is_err());
        assert_eq!(chain, new_chain);
    }

    #[test]
    fn files_that_cannot_be_used_are_named_with_what_is_wrong() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = directory.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let ((certificate, key), (_, other)) = (issue(), issue());
        let good = TlsFiles {
            certificate: write("cert.pem", &certificate),
            key: write("key.pem", &key),
            client_ca: Some(write("ca.pem", &certificate)),
        };
        assert_eq!(good.check(), Ok(()));
        let wrong = |change: &dyn Fn(&mut TlsFiles), words: [&str; 2]| {
            let mut files = good.clone();
            change(&mut files);
            let error = files.check().unwrap_err();
            for word in words {
                assert!(error.contains(word), "{word}: {error}");
            }
        };
        let nowhere = || directory.path().join("nowhere");
        wrong(
            &|files| files.certificate = nowhere(),
            ["TLS certificate", "nowhere"],
        );
        wrong(&|files| files.key = nowhere(), ["TLS key", "nowhere"]);
        wrong(
            &|files| files.client_ca = Some(nowhere()),
            ["authorities", "nowhere"],
        );
        wrong(
            &|files| files.key = write("other.pem", &other),
            ["other.pem", "not the key of the certificate"],
        );
        wrong(
            &|files| files.key = good.certificate.clone(),
            ["cert.pem", "no private key"],
        );
        wrong(
            &|files| files.certificate = good.key.clone(),
            ["key.pem", "no certificate"],
        );
        wrong(
            &|files| files.client_ca = Some(write("empty", "")),
            ["empty", "no certificate"],
        );
    }
}
