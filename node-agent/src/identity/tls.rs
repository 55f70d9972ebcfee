//! TLS settings for both directions between agents.

use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier as _;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use super::{Certificate, Error};

/// TLS settings of this agent towards its peers.
#[derive(Clone, Debug)]
pub struct PeerTls {
    /// For peers that dial us: a certificate of our CA is demanded.
    pub server: Arc<ServerConfig>,
    /// For peers that we dial, by the name `crds::names::agent_dns_name(node)`: only our CA is trusted.
    pub client: Arc<ClientConfig>,
}

/// Makes the settings, and checks that they would be accepted: key and certificate belong together, the certificate is
/// signed by the CA, in force, and for the agent of `node`.
pub(super) fn build(key: &rcgen::KeyPair, certificate: &Certificate, ca: &[u8], node: &str) -> Result<PeerTls, Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(ca) {
        let root = root.map_err(|e| Error::Invalid("the CA", e.to_string()))?;
        roots.add(root).map_err(Error::Tls)?;
    }
    let roots = Arc::new(roots);
    let chain = certificate.chain().to_vec();
    let der = || PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));

    let peers = WebPkiServerVerifier::builder_with_provider(roots.clone(), provider.clone())
        .build()
        .map_err(|e| Error::Invalid("the CA", e.to_string()))?;
    let name = ServerName::try_from(crds::names::agent_dns_name(node))
        .map_err(|e| Error::Invalid("the node's name", e.to_string()))?;
    let (own, above) = chain
        .split_first()
        .ok_or_else(|| Error::Invalid("the certificate", "it is empty".to_owned()))?;
    peers
        .verify_server_cert(own, above, &name, &[], UnixTime::now())
        .map_err(Error::Tls)?;

    let clients = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
        .build()
        .map_err(|e| Error::Invalid("the CA", e.to_string()))?;
    let server = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])
        .map_err(Error::Tls)?
        .with_client_cert_verifier(clients)
        .with_single_cert(chain.clone(), der())
        .map_err(Error::Tls)?;
    let client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(Error::Tls)?
        .with_webpki_verifier(peers)
        .with_client_auth_cert(chain, der())
        .map_err(Error::Tls)?;
    Ok(PeerTls {
        server: Arc::new(server),
        client: Arc::new(client),
    })
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio_rustls::{TlsAcceptor, TlsConnector};

    use super::*;
    use crate::identity::names_of;

    type Ca = CertifiedIssuer<'static, KeyPair>;

    fn ca() -> Ca {
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
    }

    fn agent(ca: &Ca, node: &str) -> (KeyPair, Certificate) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new([crds::names::agent_dns_name(node)]).unwrap();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let signed = params.signed_by(&key, ca).unwrap();
        (key, Certificate::parse(signed.pem().as_bytes()).unwrap())
    }

    fn tls(ca: &Ca, node: &str) -> PeerTls {
        let (key, certificate) = agent(ca, node);
        build(&key, &certificate, ca.pem().as_bytes(), node).unwrap()
    }

    /// Both ends of a connection: what the server saw of its peer, or that it failed.
    async fn connect(server: &PeerTls, client: &PeerTls, name: &str) -> Result<Vec<String>, std::io::Error> {
        let (here, there) = tokio::io::duplex(64 * 1024);
        let acceptor = TlsAcceptor::from(server.server.clone());
        let accepted = tokio::spawn(async move {
            let mut stream = acceptor.accept(there).await?;
            stream.write_all(b"x").await?;
            stream.flush().await?;
            let names = stream
                .get_ref()
                .1
                .peer_certificates()
                .and_then(|c| c.first())
                .map(names_of);
            // Kept open until the peer has read.
            let mut end = [0];
            let _ = stream.read(&mut end).await;
            Ok::<_, std::io::Error>(names.unwrap_or_default())
        });
        let name = ServerName::try_from(crds::names::agent_dns_name(name)).unwrap();
        let mut stream = TlsConnector::from(client.client.clone()).connect(name, here).await?;
        let mut byte = [0];
        stream.read_exact(&mut byte).await?;
        stream.shutdown().await?;
        accepted.await.unwrap()
    }

    #[tokio::test]
    async fn agents_of_one_ca_know_each_other_by_name() {
        let ca = ca();
        let names = connect(&tls(&ca, "a"), &tls(&ca, "b"), "a").await.unwrap();
        assert_eq!(names, [crds::names::agent_dns_name("b")]);
    }

    #[tokio::test]
    async fn another_name_and_another_ca_are_refused_on_both_sides() {
        let (ours, theirs) = (ca(), ca());
        assert!(
            connect(&tls(&ours, "a"), &tls(&ours, "b"), "c").await.is_err(),
            "the wrong node answers"
        );
        assert!(
            connect(&tls(&theirs, "a"), &tls(&ours, "b"), "a").await.is_err(),
            "a foreign server"
        );
        assert!(
            connect(&tls(&ours, "a"), &tls(&theirs, "b"), "a").await.is_err(),
            "a foreign client"
        );
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn pages_travel_on_a_connection_of_their_own() {
        use memory::{copier::Sink as _, store::Store, wire};
        use protocol::migrate::message::{Offer, PROTOCOL, Stream};

        use crate::{page_link, peer};

        let ca = ca();
        let (here, there) = (tls(&ca, "a"), tls(&ca, "b"));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = listener.local_addr().unwrap().to_string();
        let offer = Offer {
            protocol: PROTOCOL.into(),
            versions: protocol::version::VERSIONS.to_vec(),
            stream: Stream::Pages { index: 1, count: 2 },
            namespace: "n".into(),
            name: "m".into(),
            uid: "u".into(),
            attempt: 1,
            source_pod_uid: "s".into(),
            target_pod_uid: "t".into(),
        };
        let expected = offer.clone();
        let space = protocol::pages::Space {
            space: 3,
            vpid: 9,
            areas: std::iter::once(0x1000..0x9000).collect(),
            ..protocol::pages::Space::default()
        };
        let said = space.clone();
        let source = tokio::task::spawn_blocking(move || {
            let refused = page_link::dial(&there, &endpoint, "a", offer.clone());
            assert!(matches!(refused, Err(page_link::Error::Refused(why)) if why == "not now"));
            let (link, _) = page_link::dial(&there, &endpoint, "a", offer).unwrap();
            let mut sender = wire::Sender::new(link, None);
            // Longer than any buffer on the way.
            let all: Vec<_> = (0..200_000u64).map(|i| i * 8192..i * 8192 + 4096).collect();
            sender.holes(3, &all).unwrap();
            sender.finish(&[said]).unwrap();
        });
        let accept = || async {
            let (tcp, from) = listener.accept().await.unwrap();
            match peer::accept(&here, tcp, from).await.unwrap() {
                peer::Accepted::Pages(incoming) => incoming,
                peer::Accepted::Session(..) => panic!("a session"),
            }
        };
        let incoming = accept().await;
        assert_eq!(*incoming.offer(), expected);
        assert_eq!(incoming.names(), [crds::names::agent_dns_name("b")]);
        incoming.refuse("not now").await;
        let (mut stream, _) = accept().await.accept(1).await.unwrap();
        let folder = std::env::temp_dir().join(format!("peregrine-pages-{}", std::process::id()));
        let store = Store::receive(&folder).unwrap();
        let received = tokio::task::spawn_blocking(move || wire::receive(&mut stream, &store))
            .await
            .unwrap();
        assert_eq!(received.unwrap(), [space]);
        source.await.unwrap();
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_certificate_that_peers_would_refuse_is_not_taken() {
        let (ours, theirs) = (ca(), ca());
        let (key, certificate) = agent(&ours, "a");
        let pem = ours.pem();
        assert!(build(&key, &certificate, pem.as_bytes(), "a").is_ok());
        assert!(
            build(&key, &certificate, pem.as_bytes(), "b").is_err(),
            "another node's"
        );
        assert!(
            build(&key, &certificate, theirs.pem().as_bytes(), "a").is_err(),
            "another CA's"
        );
        let other = KeyPair::generate().unwrap();
        assert!(
            build(&other, &certificate, pem.as_bytes(), "a").is_err(),
            "another key's"
        );
    }
}
