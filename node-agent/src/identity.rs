//! Who this agent is to its peers: a key that never leaves the node, a certificate that the operator signs through the
//! CertificateSigningRequest API, and the TLS settings made of both.
//!
//! The node's name is proven to the signer by the agent's bound service account token (the API server puts the node into
//! the request's `spec.extra`), to the peers by the certificate's DNS name. Only our own CA is trusted, both sides show a
//! certificate, TLS 1.3 only. The certificate is renewed after two thirds of its life and when the CA changes; sessions
//! that are open go on with what they have.

mod certificate;
mod request;
mod tls;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Api, Client};
use tokio::sync::watch;

pub use certificate::{Certificate, names_of};
pub use tls::PeerTls;

use crate::install::files;

/// Folder of key and certificate.
const FOLDER: &str = "/var/lib/peregrine/agent";
/// How often the CA is looked at.
const CA_INTERVAL: Duration = Duration::from_secs(60);

/// Why there is no identity (yet).
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The ConfigMap of the CA.
    #[error("failed to read the CA from ConfigMap {0}")]
    Ca(&'static str, #[source] Box<kube::Error>),
    /// The operator has not made it yet.
    #[error("ConfigMap {0} has no key ca.crt yet: the operator makes it when it leads")]
    NoCa(&'static str),
    /// Not PEM, not X.509.
    #[error("{0} is not valid: {1}")]
    Invalid(&'static str, String),
    /// A file.
    #[error(transparent)]
    File(#[from] files::Error),
    /// The API.
    #[error("failed to {0} the certificate signing request")]
    Request(&'static str, #[source] Box<kube::Error>),
    /// The operator refused.
    #[error("the certificate signing request {0} was refused: {1}")]
    Denied(String, String),
    /// Nobody signs.
    #[error("the certificate signing request {0} was not signed within {1:?}: does the operator run?")]
    NotSigned(String, Duration),
    /// Key and certificate do not fit.
    #[error("key, certificate and CA do not make a TLS identity")]
    Tls(#[source] rustls::Error),
}

/// An identity in force.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Settings for both directions.
    pub tls: PeerTls,
    /// SHA-256 of the certificate, hexadecimal.
    pub fingerprint: String,
}

/// What is known of the identity now.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// In force.
    pub identity: Option<Identity>,
    /// Why there is none, or why it could not be renewed.
    pub problem: Option<String>,
}

/// Keeps the identity up to date for the life of the process.
pub struct Keeper {
    client: Client,
    node: String,
    namespace: String,
    folder: PathBuf,
    state: watch::Sender<State>,
    tls: watch::Sender<Option<PeerTls>>,
}

impl Keeper {
    /// For the agent of `node`; `namespace` is that of the release.
    #[must_use]
    pub fn new(client: Client, node: String, namespace: String) -> Self {
        Self {
            client,
            node,
            namespace,
            folder: FOLDER.into(),
            state: watch::Sender::new(State::default()),
            tls: watch::Sender::new(None),
        }
    }

    /// Follows the state.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }

    /// Follows the TLS settings alone, as sessions need them.
    #[must_use]
    pub fn tls(&self) -> watch::Receiver<Option<PeerTls>> {
        self.tls.subscribe()
    }

    /// Gets the identity and renews it. Never returns.
    pub async fn run(self) {
        let mut failures = 0;
        let mut in_force: Option<(Vec<u8>, Certificate)> = None;
        loop {
            let wait = match self.renew(&mut in_force).await {
                Ok(due) => {
                    failures = 0;
                    due.min(CA_INTERVAL)
                }
                Err(error) => {
                    let problem = crate::error::chain(&error);
                    failures += 1;
                    tracing::warn!(error = problem, failures, "no identity yet, or not renewed");
                    self.state.send_modify(|state| state.problem = Some(problem));
                    // The operator may be starting at the same moment: soon, then less often.
                    Duration::from_secs(1 << failures.min(5))
                }
            };
            tokio::time::sleep(wait).await;
        }
    }

    /// One look at CA and certificate; what is due is done. Returns the time until the next renewal.
    async fn renew(&self, in_force: &mut Option<(Vec<u8>, Certificate)>) -> Result<Duration, Error> {
        let ca = self.ca().await?;
        let now = Timestamp::now();
        if let Some((known, certificate)) = in_force
            && *known == ca
            && let Some(left) = certificate.until_renewal(now)
        {
            return Ok(left);
        }
        let key = self.key()?;
        let stored = self.stored(&key, &ca, now);
        let (certificate, tls) = match stored {
            Some(found) => found,
            None => {
                tracing::info!(node = self.node, "asking for a certificate");
                let pem = request::certificate(&self.client, &self.node, &key).await?;
                let certificate = Certificate::parse(&pem)?;
                let tls = tls::build(&key, &certificate, &ca, &self.node)?;
                files::write(&self.folder.join("certificate.pem"), &pem, 0o600)?;
                (certificate, tls)
            }
        };
        let left = certificate.until_renewal(now).unwrap_or_default();
        tracing::info!(
            fingerprint = certificate.fingerprint(),
            renewal_seconds = left.as_secs(),
            "identity in force"
        );
        self.tls.send_replace(Some(tls.clone()));
        self.state.send_replace(State {
            identity: Some(Identity {
                tls,
                fingerprint: certificate.fingerprint(),
            }),
            problem: None,
        });
        *in_force = Some((ca, certificate));
        Ok(left)
    }

    async fn ca(&self) -> Result<Vec<u8>, Error> {
        const NAME: &str = crds::names::CONFIG_MAP_CA;
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), &self.namespace);
        let map = maps.get_opt(NAME).await.map_err(|e| Error::Ca(NAME, Box::new(e)))?;
        map.and_then(|m| m.data)
            .and_then(|mut data| data.remove("ca.crt"))
            .map(String::into_bytes)
            .ok_or(Error::NoCa(NAME))
    }

    /// The key on the node's disk, made where there is none or it cannot be read.
    fn key(&self) -> Result<Arc<rcgen::KeyPair>, Error> {
        let file = self.folder.join("key.pem");
        private_folder(&self.folder)?;
        if let Some(pem) = files::read_optional(&file)?
            && let Ok(key) = rcgen::KeyPair::from_pem(&String::from_utf8_lossy(&pem))
        {
            return Ok(Arc::new(key));
        }
        let key = rcgen::KeyPair::generate().map_err(|e| Error::Invalid("a new key", e.to_string()))?;
        files::write(&file, key.serialize_pem().as_bytes(), 0o600)?;
        Ok(Arc::new(key))
    }

    /// The certificate on the node's disk, where it still serves.
    fn stored(&self, key: &rcgen::KeyPair, ca: &[u8], now: Timestamp) -> Option<(Certificate, PeerTls)> {
        let pem = files::read_optional(&self.folder.join("certificate.pem")).ok()??;
        let certificate = Certificate::parse(&pem).ok()?;
        certificate.until_renewal(now)?;
        let tls = tls::build(key, &certificate, ca, &self.node).ok()?;
        Some((certificate, tls))
    }
}

fn private_folder(folder: &Path) -> Result<(), Error> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(|e| files::Error("make the folder", folder.to_owned(), e).into())
}
