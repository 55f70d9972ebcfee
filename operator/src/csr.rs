//! Approves and signs the agents' certificates. A request is granted only to an agent that proves by its bound service
//! account token on which node its pod runs, for exactly that node's name; every other request to our signer is denied.

use futures::TryStreamExt;
use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{
    CertificateSigningRequest, CertificateSigningRequestCondition, CertificateSigningRequestSpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{OwnerReference, Time};
use kube::api::{Api, Patch, PatchParams};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, ResourceExt};
use rcgen::{
    CertificateSigningRequestParams, DnType, DnValue, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose, SanType,
};
use serde_json::json;
use time::OffsetDateTime;

use crate::certificates::{self, Ca};
use crate::error::{Class, chain, classify};

/// Where a token that is bound to a pod carries its node.
const NODE_OF_TOKEN: &str = "authentication.kubernetes.io/node-name";
/// Longest request that is looked at.
const LONGEST: usize = 16 * 1024;

/// Common name in the certificate of the agent of `node`.
#[must_use]
pub fn common_name(node: &str) -> String {
    format!("peregrine:node-agent:{node}")
}

/// Why a request is denied: for its author to read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denial {
    /// Not an agent.
    #[error("requested by {0} and not by the service account of the node-agents")]
    Requester(String),
    /// A token that is not bound to a pod on a node.
    #[error("the requester's token is not bound to a pod on a node")]
    Unbound,
    /// Not a request that can be read.
    #[error("the request cannot be read: {0}")]
    Unreadable(String),
    /// For someone else.
    #[error("the request is for {asked} and the requester runs on node {node}")]
    Name {
        /// What stands in the request.
        asked: String,
        /// The node that the token proves.
        node: String,
    },
    /// More than an agent needs.
    #[error("the request asks for usage {0}; client auth, server auth and digital signature are granted")]
    Usage(String),
    /// A CA.
    #[error("the request asks for a CA certificate")]
    Authority,
}

/// What is granted.
#[derive(Debug)]
pub struct Grant {
    /// The node whose agent asks.
    pub node: String,
    /// The request, its signature verified.
    pub request: CertificateSigningRequestParams,
}

/// The rule: who gets a certificate, for what.
pub fn judge(spec: &CertificateSigningRequestSpec, agent: &str) -> Result<Grant, Denial> {
    let username = spec.username.as_deref().unwrap_or_default();
    if username != agent {
        return Err(Denial::Requester(username.to_owned()));
    }
    let node = match spec
        .extra
        .as_ref()
        .and_then(|e| e.get(NODE_OF_TOKEN))
        .map(Vec::as_slice)
    {
        Some([node]) if !node.is_empty() => node.clone(),
        Some(_) | None => return Err(Denial::Unbound),
    };
    for usage in &spec.usages.clone().unwrap_or_default() {
        if !matches!(usage.as_str(), "client auth" | "server auth" | "digital signature") {
            return Err(Denial::Usage(usage.clone()));
        }
    }
    if spec.request.0.len() > LONGEST {
        return Err(Denial::Unreadable("it is too long".to_owned()));
    }
    let pem = std::str::from_utf8(&spec.request.0).map_err(|_| Denial::Unreadable("it is not PEM".to_owned()))?;
    let request = CertificateSigningRequestParams::from_pem(pem).map_err(|e| Denial::Unreadable(e.to_string()))?;
    let params = &request.params;
    if !matches!(params.is_ca, IsCa::NoCa | IsCa::ExplicitNoCa) {
        return Err(Denial::Authority);
    }
    let wrong = |asked: String| {
        Err(Denial::Name {
            asked,
            node: node.clone(),
        })
    };
    let names: Vec<String> = params
        .distinguished_name
        .iter()
        .map(|(type_, value)| part(type_, value))
        .collect();
    if names != [format!("CN={}", common_name(&node))] {
        return wrong(names.join(","));
    }
    match params.subject_alt_names.as_slice() {
        [SanType::DnsName(name)] if name.as_str() == crds::names::agent_dns_name(&node) => {}
        other => return wrong(format!("{other:?}")),
    }
    if let Some(usage) = params
        .key_usages
        .iter()
        .find(|u| **u != KeyUsagePurpose::DigitalSignature)
    {
        return Err(Denial::Usage(format!("{usage:?}")));
    }
    if let Some(usage) = params.extended_key_usages.iter().find(|u| {
        !matches!(
            u,
            ExtendedKeyUsagePurpose::ClientAuth | ExtendedKeyUsagePurpose::ServerAuth
        )
    }) {
        return Err(Denial::Usage(format!("{usage:?}")));
    }
    Ok(Grant { node, request })
}

fn part(type_: &DnType, value: &DnValue) -> String {
    let value = match value {
        DnValue::Utf8String(text) => text.clone(),
        DnValue::PrintableString(text) => text.to_string(),
        other => format!("{other:?}"),
    };
    match type_ {
        DnType::CommonName => format!("CN={value}"),
        other => format!("{other:?}={value}"),
    }
}

/// Makes the CA and serves requests until it is dropped. Errors are logged and tried again.
pub async fn run(client: Client, namespace: &str, owner: Option<OwnerReference>) {
    loop {
        let made = certificates::ensure(
            &Api::namespaced(client.clone(), namespace),
            &Api::namespaced(client.clone(), namespace),
            owner.clone(),
        )
        .await;
        match made {
            Ok(ca) => {
                // From time to time the Secret is read again: somebody may have replaced it.
                let hour = std::time::Duration::from_secs(3600);
                if let Ok(Err(error)) = tokio::time::timeout(hour, serve(&client, namespace, &ca)).await {
                    tracing::warn!(error = %chain(&error), "the watch of certificate requests failed");
                }
            }
            Err(error) => tracing::error!(error = %chain(&error), "there is no CA for the node-agents"),
        }
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    }
}

async fn serve(client: &Client, namespace: &str, ca: &Ca) -> Result<(), watcher::Error> {
    let api: Api<CertificateSigningRequest> = Api::all(client.clone());
    let agent = format!(
        "system:serviceaccount:{namespace}:{}",
        crds::names::SERVICE_ACCOUNT_AGENT
    );
    let config = watcher::Config::default().fields(&format!("spec.signerName={}", crds::names::SIGNER));
    let requests = watcher::watcher(api.clone(), config)
        .default_backoff()
        .applied_objects();
    let mut requests = std::pin::pin!(requests);
    while let Some(request) = requests.try_next().await? {
        handle(&api, &agent, ca, &request).await;
    }
    Ok(())
}

async fn handle(api: &Api<CertificateSigningRequest>, agent: &str, ca: &Ca, request: &CertificateSigningRequest) {
    let status = request.status.clone().unwrap_or_default();
    let decided = |type_: &str| status.conditions.iter().flatten().any(|c| c.type_ == type_);
    if status.certificate.is_some() || decided("Denied") || decided("Failed") {
        return;
    }
    let name = request.name_any();
    let written = match judge(&request.spec, agent) {
        Err(denial) => {
            tracing::warn!(request = %name, reason = %denial, "denied a certificate");
            condition(api, request, "Denied", "NotAnAgent", &denial.to_string()).await
        }
        Ok(_) if !decided("Approved") => {
            // The approval comes back through the watch; then it is signed.
            let why = "requested by the node-agent of this node";
            condition(api, request, "Approved", "NodeAgent", why).await
        }
        Ok(grant) => match ca.sign(grant.request, &grant.node, OffsetDateTime::now_utc()) {
            Ok(certificate) => {
                tracing::info!(request = %name, node = %grant.node, "signed a certificate");
                store(api, &name, certificate).await
            }
            Err(error) => {
                tracing::error!(request = %name, error = %chain(&error), "failed to sign a certificate");
                Ok(())
            }
        },
    };
    if let Err(error) = written
        && classify(&error) != Class::NotFound
    {
        tracing::warn!(request = %name, error = %chain(&error), "failed to answer a certificate request");
    }
}

async fn condition(
    api: &Api<CertificateSigningRequest>,
    request: &CertificateSigningRequest,
    type_: &str,
    reason: &str,
    message: &str,
) -> Result<(), kube::Error> {
    let mut conditions = request
        .status
        .as_ref()
        .and_then(|s| s.conditions.clone())
        .unwrap_or_default();
    let now = Timestamp::now();
    conditions.push(CertificateSigningRequestCondition {
        type_: type_.to_owned(),
        status: "True".to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message.to_owned()),
        last_update_time: Some(Time(now)),
        last_transition_time: Some(Time(now)),
    });
    let patch = json!({
        "metadata": {"resourceVersion": request.metadata.resource_version},
        "status": {"conditions": conditions},
    });
    api.patch_approval(&request.name_any(), &PatchParams::default(), &Patch::Merge(patch))
        .await
        .map(|_| ())
}

async fn store(api: &Api<CertificateSigningRequest>, name: &str, certificate: String) -> Result<(), kube::Error> {
    let patch = json!({"status": {"certificate": ByteString(certificate.into_bytes())}});
    api.patch_status(name, &PatchParams::default(), &Patch::Merge(patch))
        .await
        .map(|_| ())
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, KeyPair};

    use super::*;

    const AGENT: &str = "system:serviceaccount:peregrine-system:node-agent";

    fn params(node: &str) -> CertificateParams {
        let mut params = CertificateParams::new(vec![crds::names::agent_dns_name(node)]).unwrap();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, common_name(node));
        params
    }

    fn spec(params: &CertificateParams, node: &str) -> CertificateSigningRequestSpec {
        let key = KeyPair::generate().unwrap();
        CertificateSigningRequestSpec {
            request: ByteString(params.serialize_request(&key).unwrap().pem().unwrap().into_bytes()),
            signer_name: crds::names::SIGNER.to_owned(),
            username: Some(AGENT.to_owned()),
            extra: Some([(NODE_OF_TOKEN.to_owned(), vec![node.to_owned()])].into()),
            usages: Some(vec![
                "client auth".into(),
                "server auth".into(),
                "digital signature".into(),
            ]),
            ..Default::default()
        }
    }

    #[test]
    fn an_agent_gets_the_certificate_of_its_own_node() {
        let grant = judge(&spec(&params("node-a"), "node-a"), AGENT).unwrap();
        assert_eq!(grant.node, "node-a");
        let (ca, _) = Ca::make(OffsetDateTime::now_utc()).unwrap();
        let certificate = ca.sign(grant.request, &grant.node, OffsetDateTime::now_utc()).unwrap();
        assert!(certificate.starts_with("-----BEGIN CERTIFICATE-----"));
    }

    #[test]
    fn an_agent_does_not_get_the_certificate_of_another_node() {
        let denial = judge(&spec(&params("node-b"), "node-a"), AGENT).unwrap_err();
        assert!(matches!(denial, Denial::Name { .. }), "{denial}");
    }

    #[test]
    fn nobody_else_gets_a_certificate() {
        let mut other = spec(&params("node-a"), "node-a");
        other.username = Some("system:serviceaccount:default:node-agent".to_owned());
        assert!(matches!(judge(&other, AGENT).unwrap_err(), Denial::Requester(_)));
    }

    #[test]
    fn a_token_that_is_not_bound_to_a_node_is_not_enough() {
        let mut unbound = spec(&params("node-a"), "node-a");
        unbound.extra = None;
        assert_eq!(judge(&unbound, AGENT).unwrap_err(), Denial::Unbound);
        unbound.extra = Some([(NODE_OF_TOKEN.to_owned(), vec!["node-a".into(), "node-b".into()])].into());
        assert_eq!(judge(&unbound, AGENT).unwrap_err(), Denial::Unbound);
    }

    #[test]
    fn a_name_more_is_a_name_too_many() {
        let mut two = params("node-a");
        two.subject_alt_names
            .push(SanType::DnsName("node-b.node-agent.peregrine.dev".try_into().unwrap()));
        assert!(matches!(
            judge(&spec(&two, "node-a"), AGENT).unwrap_err(),
            Denial::Name { .. }
        ));
        let mut address = params("node-a");
        address.subject_alt_names.push(SanType::IpAddress([10, 0, 0, 1].into()));
        assert!(matches!(
            judge(&spec(&address, "node-a"), AGENT).unwrap_err(),
            Denial::Name { .. }
        ));
        let mut organisation = params("node-a");
        organisation
            .distinguished_name
            .push(DnType::OrganizationName, "system:masters");
        assert!(matches!(
            judge(&spec(&organisation, "node-a"), AGENT).unwrap_err(),
            Denial::Name { .. }
        ));
    }

    #[test]
    fn a_ca_or_other_usages_are_not_granted() {
        let mut ca = params("node-a");
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        assert_eq!(judge(&spec(&ca, "node-a"), AGENT).unwrap_err(), Denial::Authority);
        let mut usages = spec(&params("node-a"), "node-a");
        usages.usages = Some(vec!["cert sign".to_owned()]);
        assert!(matches!(judge(&usages, AGENT).unwrap_err(), Denial::Usage(_)));
        let mut signing = params("node-a");
        signing.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning];
        assert!(matches!(
            judge(&spec(&signing, "node-a"), AGENT).unwrap_err(),
            Denial::Usage(_)
        ));
    }

    #[test]
    fn garbage_is_denied() {
        let mut garbage = spec(&params("node-a"), "node-a");
        garbage.request =
            ByteString(b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n".to_vec());
        assert!(matches!(judge(&garbage, AGENT).unwrap_err(), Denial::Unreadable(_)));
        garbage.request = ByteString(vec![b'x'; LONGEST + 1]);
        assert!(matches!(judge(&garbage, AGENT).unwrap_err(), Denial::Unreadable(_)));
    }
}
