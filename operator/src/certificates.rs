//! Our own CA: one key pair in a Secret that only the operator reads, the certificate in a ConfigMap that agents trust.

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::api::{Api, Patch, PatchParams, PostParams};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};
use serde_json::json;
use time::{Duration, OffsetDateTime};

use crate::error::{Class, classify};

/// How long the CA lasts.
const CA_LIFE: Duration = Duration::days(3650);
/// How long an agent's certificate lasts; agents renew at two thirds.
pub const LEAF_LIFE: Duration = Duration::hours(24);
/// Clocks of nodes may be behind.
const SKEW: Duration = Duration::minutes(5);

/// Why there is no CA, or no certificate.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// The key pair could not be made or used.
    #[error("failed to {what}")]
    Crypto {
        /// What was being done.
        what: &'static str,
        /// Why not.
        #[source]
        source: rcgen::Error,
    },
    /// The Secret is not what it should be.
    #[error(
        "secret {} has no usable {key}: delete the secret, a new CA is made then",
        crds::names::SECRET_CA
    )]
    Broken {
        /// The key in the Secret.
        key: &'static str,
    },
    /// The API did not take or give an object.
    #[error("failed to {what}")]
    Api {
        /// What was being done.
        what: &'static str,
        /// Why not.
        #[source]
        source: kube::Error,
    },
}

fn crypto(what: &'static str) -> impl Fn(rcgen::Error) -> CaError {
    move |source| CaError::Crypto { what, source }
}

fn api(what: &'static str) -> impl Fn(kube::Error) -> CaError {
    move |source| CaError::Api { what, source }
}

/// The CA.
pub struct Ca {
    /// Its certificate.
    pub certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl std::fmt::Debug for Ca {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Never the key.
        f.debug_struct("Ca").finish_non_exhaustive()
    }
}

impl Ca {
    /// Makes a CA; returns it and its key.
    pub fn make(now: OffsetDateTime) -> Result<(Ca, String), CaError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(crypto("make the CA's key"))?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "peregrine:ca");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = now - SKEW;
        params.not_after = now + CA_LIFE;
        let certificate = params.self_signed(&key).map_err(crypto("sign the CA's certificate"))?;
        let pem = key.serialize_pem();
        let ca = Ca::from_pem(&certificate.pem(), &pem)?;
        Ok((ca, pem))
    }

    /// Takes up a CA.
    pub fn from_pem(certificate: &str, key: &str) -> Result<Ca, CaError> {
        let key = KeyPair::from_pem(key).map_err(crypto("read the CA's key"))?;
        let issuer = Issuer::from_ca_cert_pem(certificate, key).map_err(crypto("read the CA's certificate"))?;
        Ok(Ca {
            certificate: certificate.to_owned(),
            issuer,
        })
    }

    /// Signs the certificate of the agent of `node`. Of the request only the public key is taken; what stands in the
    /// certificate is ours to say.
    pub fn sign(
        &self,
        request: CertificateSigningRequestParams,
        node: &str,
        now: OffsetDateTime,
    ) -> Result<String, CaError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::CommonName, crate::csr::common_name(node));
        let name = crds::names::agent_dns_name(node)
            .try_into()
            .map_err(crypto("write the agent's name"))?;
        params.subject_alt_names = vec![SanType::DnsName(name)];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        params.not_before = now - SKEW;
        params.not_after = now + LEAF_LIFE;
        let certificate = CertificateSigningRequestParams {
            params,
            public_key: request.public_key,
        }
        .signed_by(&self.issuer)
        .map_err(crypto("sign an agent's certificate"))?;
        Ok(certificate.pem())
    }
}

/// Reads the CA, or makes it where there is none, and publishes its certificate.
pub async fn ensure(
    secrets: &Api<Secret>,
    config_maps: &Api<ConfigMap>,
    owner: Option<OwnerReference>,
) -> Result<Ca, CaError> {
    let ca = loop {
        let stored = secrets
            .get_opt(crds::names::SECRET_CA)
            .await
            .map_err(api("read the CA's secret"))?;
        if let Some(secret) = stored {
            let part = |key: &'static str| {
                secret
                    .data
                    .as_ref()
                    .and_then(|d| d.get(key))
                    .and_then(|bytes| String::from_utf8(bytes.0.clone()).ok())
                    .ok_or(CaError::Broken { key })
            };
            break Ca::from_pem(&part("tls.crt")?, &part("tls.key")?)?;
        }
        let (ca, key) = Ca::make(OffsetDateTime::now_utc())?;
        let secret = Secret {
            metadata: metadata(crds::names::SECRET_CA, owner.clone()),
            type_: Some("kubernetes.io/tls".to_owned()),
            data: Some(
                [
                    ("tls.crt".to_owned(), ByteString(ca.certificate.clone().into_bytes())),
                    ("tls.key".to_owned(), ByteString(key.into_bytes())),
                ]
                .into(),
            ),
            ..Default::default()
        };
        match secrets.create(&PostParams::default(), &secret).await {
            Ok(_) => {
                tracing::info!("made a CA for the node-agents");
                break ca;
            }
            // Another replica was faster: its CA is the one.
            Err(error) if classify(&error) == Class::Conflict => {}
            Err(source) => {
                return Err(CaError::Api {
                    what: "store the CA's secret",
                    source,
                });
            }
        }
    };
    publish(config_maps, &ca, owner).await?;
    Ok(ca)
}

async fn publish(config_maps: &Api<ConfigMap>, ca: &Ca, owner: Option<OwnerReference>) -> Result<(), CaError> {
    let stored = config_maps
        .get_opt(crds::names::CONFIG_MAP_CA)
        .await
        .map_err(api("read the CA's ConfigMap"))?;
    let Some(stored) = stored else {
        let map = ConfigMap {
            metadata: metadata(crds::names::CONFIG_MAP_CA, owner),
            data: Some([("ca.crt".to_owned(), ca.certificate.clone())].into()),
            ..Default::default()
        };
        return match config_maps.create(&PostParams::default(), &map).await {
            Ok(_) => Ok(()),
            Err(error) if classify(&error) == Class::Conflict => Ok(()),
            Err(source) => Err(CaError::Api {
                what: "publish the CA's certificate",
                source,
            }),
        };
    };
    if stored.data.as_ref().and_then(|d| d.get("ca.crt")) == Some(&ca.certificate) {
        return Ok(());
    }
    let patch = json!({"data": {"ca.crt": ca.certificate}});
    config_maps
        .patch(
            crds::names::CONFIG_MAP_CA,
            &PatchParams::default(),
            &Patch::Merge(patch),
        )
        .await
        .map(|_| ())
        .map_err(api("publish the CA's certificate"))
}

fn metadata(name: &str, owner: Option<OwnerReference>) -> ObjectMeta {
    ObjectMeta {
        name: Some(name.to_owned()),
        labels: Some(
            [(
                "app.kubernetes.io/managed-by".to_owned(),
                "peregrine-operator".to_owned(),
            )]
            .into(),
        ),
        owner_references: owner.map(|o| vec![o]),
        ..Default::default()
    }
}
