//! The cluster's certificates: one authority, and who is who by their names in it, as kubeadm does it.

use std::fs;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use base64::Engine as _;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use serde_json::json;

use super::topology::{API_SERVICE, Member};

/// The folder with all keys.
#[derive(Clone, Debug)]
pub(super) struct Pki {
    dir: PathBuf,
}

/// What a certificate is for.
struct Subject<'a> {
    /// Name of its files.
    file: &'a str,
    common_name: &'a str,
    /// The user's group.
    organisation: Option<&'a str>,
    names: &'a [&'a str],
    addresses: &'a [Ipv4Addr],
    server: bool,
}

impl<'a> Subject<'a> {
    fn user(file: &'a str, common_name: &'a str, organisation: Option<&'a str>) -> Self {
        Self {
            file,
            common_name,
            organisation,
            names: &[],
            addresses: &[],
            server: false,
        }
    }
}

impl Pki {
    pub(super) fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Makes authority, keys and certificates of the control plane.
    pub(super) fn create(&self) -> Result<()> {
        fs::create_dir_all(&self.dir).with_context(|| format!("cannot make the folder {}", self.dir.display()))?;
        for name in ["ca", "front-proxy-ca"] {
            self.create_authority(name)?;
        }
        // Tokens are signed with a key of their own, the same for ever: a new one would end every session.
        let key = KeyPair::generate().context("cannot make a key")?;
        self.write("sa.key", &key.serialize_pem())?;
        self.write("sa.pub", &key.public_key_pem())?;
        let api = Subject {
            file: "apiserver",
            common_name: "kube-apiserver",
            organisation: None,
            names: &[
                "kubernetes",
                "kubernetes.default",
                "kubernetes.default.svc",
                "kubernetes.default.svc.cluster.local",
                "localhost",
            ],
            addresses: &[API_SERVICE, Member::ControlPlane.address(), Ipv4Addr::LOCALHOST],
            server: true,
        };
        self.issue("ca", &api)?;
        for user in [
            Subject::user(
                "apiserver-kubelet-client",
                "kube-apiserver-kubelet-client",
                Some("system:masters"),
            ),
            Subject::user("admin", "kubernetes-admin", Some("system:masters")),
            Subject::user("controller-manager", "system:kube-controller-manager", None),
            Subject::user("scheduler", "system:kube-scheduler", None),
            Subject::user("proxy", "system:kube-proxy", None),
        ] {
            self.issue("ca", &user)?;
        }
        self.issue(
            "front-proxy-ca",
            &Subject::user("front-proxy-client", "front-proxy-client", None),
        )
    }

    /// Makes a node's two certificates: the user it is for the API server, and the server it is for it.
    pub(super) fn create_node(&self, node: Member) -> Result<()> {
        let name = node.name();
        let user = format!("system:node:{name}");
        self.issue("ca", &Subject::user(&name, &user, Some("system:nodes")))?;
        let (file, names, addresses) = (format!("{name}-serving"), [name.as_str()], [node.address()]);
        let server = Subject {
            file: &file,
            common_name: &user,
            organisation: Some("system:nodes"),
            names: &names,
            addresses: &addresses,
            server: true,
        };
        self.issue("ca", &server)
    }

    /// A kubeconfig with all in it, for whom it may be copied to.
    pub(super) fn kubeconfig(&self, user: &str, server: &str) -> Result<String> {
        let data = |file: String| -> Result<String> {
            let path = self.file(&file);
            Ok(base64::engine::general_purpose::STANDARD
                .encode(fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?))
        };
        // JSON is YAML.
        Ok(serde_json::to_string_pretty(&json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "peregrine-e2e", "cluster": {"server": server, "certificate-authority-data": data("ca.crt".to_owned())?}}],
            "users": [{"name": user, "user": {"client-certificate-data": data(format!("{user}.crt"))?, "client-key-data": data(format!("{user}.key"))?}}],
            "contexts": [{"name": "peregrine-e2e", "context": {"cluster": "peregrine-e2e", "user": user}}],
            "current-context": "peregrine-e2e",
        }))?)
    }

    fn create_authority(&self, name: &str) -> Result<()> {
        let mut params = params(&format!("peregrine-e2e-{name}"), None);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![
            KeyUsagePurpose::KeyCertSign,
            KeyUsagePurpose::CrlSign,
            KeyUsagePurpose::DigitalSignature,
        ];
        let key = KeyPair::generate().context("cannot make a key")?;
        let certificate = params
            .self_signed(&key)
            .with_context(|| format!("cannot make the authority {name}"))?;
        self.write(&format!("{name}.crt"), &certificate.pem())?;
        self.write(&format!("{name}.key"), &key.serialize_pem())
    }

    fn issue(&self, authority: &str, subject: &Subject<'_>) -> Result<()> {
        let read = |file: String| {
            let path = self.file(&file);
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
        };
        let authority_key = KeyPair::from_pem(&read(format!("{authority}.key"))?)
            .with_context(|| format!("cannot read the key of {authority}"))?;
        let issuer = Issuer::from_ca_cert_pem(&read(format!("{authority}.crt"))?, authority_key)
            .with_context(|| format!("cannot read the authority {authority}"))?;
        let mut params = params(subject.common_name, subject.organisation);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![if subject.server {
            ExtendedKeyUsagePurpose::ServerAuth
        } else {
            ExtendedKeyUsagePurpose::ClientAuth
        }];
        params.use_authority_key_identifier_extension = true;
        for name in subject.names {
            params.subject_alt_names.push(SanType::DnsName(
                (*name)
                    .try_into()
                    .with_context(|| format!("cannot use the name {name}"))?,
            ));
        }
        params.subject_alt_names.extend(
            subject
                .addresses
                .iter()
                .map(|address| SanType::IpAddress(IpAddr::V4(*address))),
        );
        let key = KeyPair::generate().context("cannot make a key")?;
        let certificate = params
            .signed_by(&key, &issuer)
            .with_context(|| format!("cannot sign the certificate {}", subject.file))?;
        self.write(&format!("{}.crt", subject.file), &certificate.pem())?;
        self.write(&format!("{}.key", subject.file), &key.serialize_pem())
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        write_private(&self.file(name), text)
    }
}

/// Writes a file that only root may read.
pub(super) fn write_private(path: &Path, text: &str) -> Result<()> {
    let mut file = fs::OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("cannot create {}", path.display()))?;
    file.write_all(text.as_bytes())
        .with_context(|| format!("cannot write {}", path.display()))
}

fn params(common_name: &str, organisation: Option<&str>) -> CertificateParams {
    let mut params = CertificateParams::default();
    let mut name = DistinguishedName::new();
    if let Some(organisation) = organisation {
        name.push(DnType::OrganizationName, organisation);
    }
    name.push(DnType::CommonName, common_name);
    params.distinguished_name = name;
    params
}

#[cfg(test)]
mod tests {
    use super::*;

    fn temporary(name: &str) -> Pki {
        Pki::new(std::env::temp_dir().join(format!("pg-pki-{name}-{}", std::process::id())))
    }

    #[test]
    fn a_node_is_of_the_group_of_nodes_only() {
        let pki = temporary("node");
        pki.create().unwrap();
        pki.create_node(Member::Node(1)).unwrap();
        let pem = fs::read_to_string(pki.file("node-a.crt")).unwrap();
        let body: String = pem.lines().filter(|line| !line.starts_with('-')).collect();
        let der = base64::engine::general_purpose::STANDARD.decode(body).unwrap();
        let has = |text: &str| der.windows(text.len()).any(|window| window == text.as_bytes());
        assert!(has("system:node:node-a") && has("system:nodes") && !has("system:masters"));
        fs::remove_dir_all(&pki.dir).unwrap();
    }

    #[test]
    fn keys_are_for_root_only_and_the_kubeconfig_holds_all() {
        use std::os::unix::fs::PermissionsExt as _;
        let pki = temporary("admin");
        pki.create().unwrap();
        assert_eq!(
            fs::metadata(pki.file("ca.key")).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let kubeconfig: serde_json::Value =
            serde_json::from_str(&pki.kubeconfig("admin", "https://127.0.0.1:6443").unwrap()).unwrap();
        assert_eq!(kubeconfig["clusters"][0]["cluster"]["server"], "https://127.0.0.1:6443");
        assert!(
            kubeconfig["users"][0]["user"]["client-key-data"]
                .as_str()
                .unwrap()
                .len()
                > 100
        );
        fs::remove_dir_all(&pki.dir).unwrap();
    }
}
