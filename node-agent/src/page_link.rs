//! Connections for memory pages, beside a session's own: TLS as there, an offer that names the same attempt, then frames of
//! [`protocol::pages`] in one direction. Blocking, each on a thread of its own: nothing but copying happens on them.

use std::{
    io::{self, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpStream, ToSocketAddrs as _},
    sync::Arc,
    time::Duration,
};

use protocol::{
    frame::{self, Kind},
    migrate::{FromSource, FromTarget, message::Offer},
    pages,
};
use rustls::{ClientConnection, ServerConnection, StreamOwned, pki_types::ServerName};
use tokio_rustls::server::TlsStream;

use crate::identity::PeerTls;

/// For connecting and for the handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How long a peer may take nothing. Between two rounds nothing is sent for a while: only the session tells a lost source.
const SILENCE: Duration = Duration::from_secs(20);

/// Why a connection for pages could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The name of a node does not make a DNS name.
    #[error("{0:?} cannot stand in a certificate")]
    Name(String),
    /// It could not be reached.
    #[error("failed to connect to the agent at {0} for pages")]
    Connect(String, #[source] io::Error),
    /// TLS settings.
    #[error("failed to prepare TLS")]
    Tls(#[source] rustls::Error),
    /// It was lost.
    #[error("the connection for pages was lost")]
    Lost(#[source] io::Error),
    /// The other side does not want it.
    #[error("the target refused a connection for pages: {0}")]
    Refused(String),
    /// The other side said something else.
    #[error("the target did not answer an offer of pages as it must")]
    Answer,
}

/// Ends a connection on which a thread may be waiting.
#[derive(Clone, Debug)]
pub struct Breaker(Arc<TcpStream>);

impl Breaker {
    /// Ends it: whoever reads or writes on it gets an error.
    pub fn end(&self) {
        // One that has ended already is no error.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

/// The source's end.
pub type Outgoing = StreamOwned<ClientConnection, TcpStream>;
/// The target's end.
pub type Receiving = StreamOwned<ServerConnection, TcpStream>;

/// Dials the agent of a node and offers pages. Blocking.
///
/// # Errors
/// See [`Error`].
pub fn dial(tls: &PeerTls, endpoint: &str, node: &str, offer: Offer) -> Result<(Outgoing, Breaker), Error> {
    let name = crds::names::agent_dns_name(node);
    let server = ServerName::try_from(name.clone()).map_err(|_| Error::Name(name))?;
    let connect = |e| Error::Connect(endpoint.to_owned(), e);
    let addresses: Vec<SocketAddr> = endpoint.to_socket_addrs().map_err(connect)?.collect();
    let address = addresses
        .first()
        .ok_or_else(|| connect(io::ErrorKind::NotFound.into()))?;
    let tcp = TcpStream::connect_timeout(address, HANDSHAKE).map_err(connect)?;
    tcp.set_nodelay(true).map_err(Error::Lost)?;
    tcp.set_read_timeout(Some(HANDSHAKE)).map_err(Error::Lost)?;
    tcp.set_write_timeout(Some(SILENCE)).map_err(Error::Lost)?;
    let breaker = Breaker(Arc::new(tcp.try_clone().map_err(Error::Lost)?));
    let mut connection = ClientConnection::new(tls.client.clone(), server).map_err(Error::Tls)?;
    // A whole frame in few system calls; rustls keeps 64 KiB unless told otherwise.
    connection.set_buffer_limit(Some(pages::HEAD + pages::BATCH_BYTES));
    let mut stream = StreamOwned::new(connection, tcp);
    write_message(&mut stream, &FromSource::Offer(offer)).map_err(Error::Lost)?;
    match read_message(&mut stream).map_err(Error::Lost)? {
        FromTarget::Accept { .. } => Ok((stream, breaker)),
        FromTarget::Refuse { message, .. } => Err(Error::Refused(message)),
        _ => Err(Error::Answer),
    }
}

fn encode(message: &impl serde::Serialize) -> io::Result<Vec<u8>> {
    let content = serde_json::to_vec(message)?;
    let header = frame::header(Kind::Control, content.len()).map_err(io::Error::other)?;
    Ok([header.as_slice(), &content].concat())
}

fn write_message(stream: &mut Outgoing, message: &FromSource) -> io::Result<()> {
    stream.write_all(&encode(message)?)?;
    stream.flush()
}

fn read_message(stream: &mut Outgoing) -> io::Result<FromTarget> {
    let mut header = [0; frame::HEADER];
    stream.read_exact(&mut header)?;
    let (_, length) = frame::read_header(header).map_err(io::Error::other)?;
    let mut content = vec![0; length];
    stream.read_exact(&mut content)?;
    Ok(serde_json::from_slice(&content)?)
}

/// A peer that offers pages and has no answer yet.
#[derive(Debug)]
pub struct Incoming {
    stream: Box<TlsStream<tokio::net::TcpStream>>,
    offer: Offer,
    names: Vec<String>,
}

impl Incoming {
    pub(crate) fn new(stream: TlsStream<tokio::net::TcpStream>, offer: Offer, names: Vec<String>) -> Self {
        Self {
            stream: Box::new(stream),
            offer,
            names,
        }
    }

    /// What it says that it is. Compared with the session's own, never trusted.
    #[must_use]
    pub fn offer(&self) -> &Offer {
        &self.offer
    }

    /// Names in the peer's certificate.
    #[must_use]
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Refuses it.
    pub async fn refuse(mut self, message: &str) {
        let refuse = FromTarget::Refuse {
            reason: crds::Reason::PeerRefused.as_str().to_owned(),
            message: message.to_owned(),
        };
        if let Err(error) = self.answer(&refuse).await {
            tracing::debug!(%error, "the peer left before it was refused");
        }
    }

    /// Accepts it: from now on its frames can be read, blocking.
    ///
    /// # Errors
    /// The connection was lost.
    pub async fn accept(mut self, version: u32) -> io::Result<(Receiving, Breaker)> {
        self.answer(&FromTarget::Accept { version }).await?;
        let (tcp, connection) = self.stream.into_inner();
        let tcp = tcp.into_std()?;
        tcp.set_nonblocking(false)?;
        let breaker = Breaker(Arc::new(tcp.try_clone()?));
        Ok((StreamOwned::new(connection, tcp), breaker))
    }

    async fn answer(&mut self, message: &FromTarget) -> io::Result<()> {
        use tokio::io::AsyncWriteExt as _;
        let bytes = encode(message)?;
        let write = async {
            self.stream.write_all(&bytes).await?;
            self.stream.flush().await
        };
        tokio::time::timeout(HANDSHAKE, write)
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }
}
