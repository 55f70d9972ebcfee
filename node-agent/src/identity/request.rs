//! Asking our signer for a certificate.

use std::time::{Duration, Instant};

use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec};
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};
use sha2::{Digest as _, Sha256};

use super::Error;

/// How long the signer may take. The operator may have to be elected first.
const DEADLINE: Duration = Duration::from_secs(60);
/// Life that is asked for, in seconds.
const LIFE_SECONDS: i32 = 24 * 3600;

/// Requests a certificate for the agent of `node` and waits until it is signed. Returns PEM.
///
/// # Errors
/// [`Error::Request`], [`Error::Denied`], [`Error::NotSigned`], [`Error::Invalid`].
pub(super) async fn certificate(client: &Client, node: &str, key: &KeyPair) -> Result<Vec<u8>, Error> {
    let requests: Api<CertificateSigningRequest> = Api::all(client.clone());
    let request = build(node, &pem(node, key)?);
    let name = request.metadata.name.clone().unwrap_or_default();
    requests
        .create(&PostParams::default(), &request)
        .await
        .map_err(|e| Error::Request("create", Box::new(e)))?;
    let begun = Instant::now();
    loop {
        let now = requests
            .get(&name)
            .await
            .map_err(|e| Error::Request("read", Box::new(e)))?;
        let status = now.status.unwrap_or_default();
        if let Some(refusal) = status
            .conditions
            .iter()
            .flatten()
            .find(|c| (c.type_ == "Denied" || c.type_ == "Failed") && c.status == "True")
        {
            return Err(Error::Denied(name, refusal.message.clone().unwrap_or_default()));
        }
        if let Some(certificate) = status.certificate.filter(|c| !c.0.is_empty()) {
            return Ok(certificate.0);
        }
        if begun.elapsed() > DEADLINE {
            return Err(Error::NotSigned(name, DEADLINE));
        }
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
}

/// The PKCS #10 request: exactly one DNS name and the common name, nothing else. The signer refuses more.
fn pem(node: &str, key: &KeyPair) -> Result<String, Error> {
    let invalid = |e: rcgen::Error| Error::Invalid("the certificate signing request", e.to_string());
    let mut params = CertificateParams::new([crds::names::agent_dns_name(node)]).map_err(invalid)?;
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::CommonName, format!("peregrine:node-agent:{node}"));
    params.serialize_request(key).and_then(|r| r.pem()).map_err(invalid)
}

fn build(node: &str, pem: &str) -> CertificateSigningRequest {
    let digest = protocol::sealed::hex(&Sha256::digest(pem));
    let short = digest.get(..10).unwrap_or_default();
    // Names of objects have at most 253 bytes; those of nodes too.
    let node_part = crds::condition::cut(node, 200);
    CertificateSigningRequest {
        metadata: ObjectMeta {
            name: Some(format!("peregrine-{node_part}-{short}")),
            ..Default::default()
        },
        spec: CertificateSigningRequestSpec {
            request: ByteString(pem.as_bytes().to_vec()),
            signer_name: crds::names::SIGNER.to_owned(),
            expiration_seconds: Some(LIFE_SECONDS),
            usages: Some(
                ["digital signature", "client auth", "server auth"]
                    .map(str::to_owned)
                    .to_vec(),
            ),
            ..Default::default()
        },
        status: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_names_its_node_and_nothing_else() {
        let key = KeyPair::generate().unwrap();
        let pem = pem("node-a", &key).unwrap();
        let parsed = rcgen::CertificateSigningRequestParams::from_pem(&pem).unwrap();
        assert_eq!(parsed.params.subject_alt_names.len(), 1);
        assert!(
            !parsed
                .params
                .is_ca
                .eq(&rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained))
        );
        let request = build("node-a", &pem);
        assert!(request.metadata.name.unwrap().starts_with("peregrine-node-a-"));
        assert_eq!(request.spec.signer_name, "peregrine.dev/node-agent");
    }
}
