//! Connections between agents: TLS 1.3, both sides with a certificate of our CA, frames of the protocol, deadlines. The
//! machines of `protocol::migrate` judge every frame; a violation ends the connection.
//!
//! Each connection has two tasks, one that reads and one that writes. A side that is not heard for [`SILENCE`] is lost;
//! each says `Alive` when it has nothing else to say.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use protocol::{
    frame::{self, Kind},
    limits,
    migrate::{FromSource, FromTarget, Violation, message::Stream, source, target},
};
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpStream,
    sync::{mpsc, watch},
    task::AbortHandle,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::{
    identity::{PeerTls, names_of},
    outbox::{self, Outbox, Outgoing, Pool},
    page_link::Incoming,
};

/// How long a peer may be silent.
pub const SILENCE: Duration = Duration::from_secs(20);
/// How often a side speaks at least.
const ALIVE: Duration = Duration::from_secs(3);
/// For connecting and for the handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// Why a connection could not be made, or ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No certificate yet.
    #[error("this agent has no certificate yet")]
    NoIdentity,
    /// The name of a node does not make a DNS name.
    #[error("{0:?} cannot stand in a certificate")]
    Name(String),
    /// It could not be reached.
    #[error("failed to connect to the agent at {0}")]
    Connect(String, #[source] io::Error),
    /// TLS did not come about.
    #[error("failed to agree on TLS with the agent at {0}")]
    Tls(String, #[source] io::Error),
    /// Too slow.
    #[error("the agent at {0} did not answer within {1:?}")]
    Deadline(String, Duration),
    /// Sending or receiving failed.
    #[error("the connection was lost")]
    Lost(#[source] io::Error),
    /// Nothing was heard.
    #[error("nothing was heard of the peer for {0:?}")]
    Silent(Duration),
    /// It broke a rule.
    #[error("the peer broke the protocol: {0}")]
    Violation(Violation),
    /// We were about to break one.
    #[error("refused to send: {0}")]
    Own(Violation),
    /// A message could not be put into words.
    #[error("failed to encode a message")]
    Encode(#[source] serde_json::Error),
    /// We have nothing to say any more.
    #[error("the session has ended")]
    Ended,
}

/// Reads one frame into `buffer`, which grows only as far as the frame's kind allows.
async fn read_frame(
    reader: &mut (impl AsyncRead + Unpin),
    buffer: &mut Vec<u8>,
    state: &'static str,
) -> Result<(Kind, usize), Error> {
    let mut header = [0; frame::HEADER];
    let read = async {
        reader.read_exact(&mut header).await.map_err(Error::Lost)?;
        let (kind, len) =
            frame::read_header(header).map_err(|error| Error::Violation(Violation::Frame { state, error }))?;
        if buffer.len() < len {
            buffer.resize(len, 0);
        }
        let content = buffer.get_mut(..len).unwrap_or_default();
        reader.read_exact(content).await.map_err(Error::Lost)?;
        Ok((kind, len))
    };
    timeout(SILENCE, read).await.map_err(|_| Error::Silent(SILENCE))?
}

async fn write_json(
    writer: &mut (impl AsyncWrite + Unpin),
    kind: Kind,
    message: &impl serde::Serialize,
    state: &'static str,
) -> Result<(), Error> {
    let mut out = vec![0; frame::HEADER];
    serde_json::to_writer(&mut out, message).map_err(Error::Encode)?;
    let header = frame::header(kind, out.len() - frame::HEADER)
        .map_err(|error| Error::Own(Violation::Frame { state, error }))?;
    if let Some(room) = out.get_mut(..frame::HEADER) {
        room.copy_from_slice(&header);
    }
    timeout(SILENCE, writer.write_all(&out))
        .await
        .map_err(|_| Error::Silent(SILENCE))?
        .map_err(Error::Lost)
}

/// A machine that both tasks of a connection step.
#[derive(Clone, Debug)]
struct Shared<M>(Arc<Mutex<Option<M>>>);

impl<M> Shared<M> {
    fn new(machine: M) -> Self {
        Self(Arc::new(Mutex::new(Some(machine))))
    }

    fn with<R>(&self, step: impl FnOnce(M) -> (Option<M>, R)) -> Option<R> {
        let mut slot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (machine, result) = step(slot.take()?);
        *slot = machine;
        Some(result)
    }
}

/// The tasks of a connection; they end with it.
#[derive(Debug)]
struct Tasks(Vec<AbortHandle>);

impl Drop for Tasks {
    fn drop(&mut self) {
        for task in &self.0 {
            task.abort();
        }
    }
}

/// Why a connection ended, for whoever asks.
#[derive(Clone, Debug)]
pub struct End(watch::Receiver<Option<String>>);

impl End {
    /// The reason, once it has ended.
    #[must_use]
    pub fn reason(&self) -> Option<String> {
        self.0.borrow().clone()
    }

    /// Waits for the end.
    pub async fn wait(&mut self) -> String {
        match self.0.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_default(),
            Err(_) => "the connection was closed".to_owned(),
        }
    }
}

fn end_with(end: &watch::Sender<Option<String>>, error: &Error) {
    let text = crate::error::chain(error);
    end.send_if_modified(|slot| {
        let first = slot.is_none();
        if first {
            *slot = Some(text);
        }
        first
    });
}

/// The source's side of a connection.
#[derive(Debug)]
pub struct ToTarget {
    /// What is to be sent.
    pub outbox: Outbox,
    /// What the target says; closed when the connection has ended.
    pub heard: mpsc::Receiver<FromTarget>,
    /// Why it has ended.
    pub end: End,
    _tasks: Tasks,
}

/// Dials the agent of a node; its certificate must be that node's.
///
/// # Errors
/// See [`Error`].
pub async fn dial(tls: &PeerTls, endpoint: &str, node: &str) -> Result<ToTarget, Error> {
    let name = crds::names::agent_dns_name(node);
    let server = ServerName::try_from(name.clone()).map_err(|_| Error::Name(name))?;
    let slow = || Error::Deadline(endpoint.to_owned(), HANDSHAKE);
    let tcp = timeout(HANDSHAKE, TcpStream::connect(endpoint))
        .await
        .map_err(|_| slow())?
        .map_err(|e| Error::Connect(endpoint.to_owned(), e))?;
    tcp.set_nodelay(true).map_err(Error::Lost)?;
    let mut stream = timeout(HANDSHAKE, TlsConnector::from(tls.client.clone()).connect(server, tcp))
        .await
        .map_err(|_| slow())?
        .map_err(|e| Error::Tls(endpoint.to_owned(), e))?;
    // A whole piece in one system call; rustls keeps 64 KiB unless told otherwise.
    stream.get_mut().1.set_buffer_limit(Some(outbox::HEAD + outbox::PIECE));
    Ok(to_target(stream))
}

/// The source's side on any stream.
#[must_use]
pub fn to_target(stream: impl AsyncRead + AsyncWrite + Send + 'static) -> ToTarget {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let machine = Shared::new(source::Machine::default());
    let (outbox, mut queue, pool) = Outbox::new();
    let (say, heard) = mpsc::channel(16);
    let (end, ended) = watch::channel(None);
    let end = Arc::new(end);

    let (reading, read_end) = (machine.clone(), end.clone());
    let read = tokio::spawn(async move {
        let error = read_from_target(&mut reader, &reading, &say).await;
        end_with(&read_end, &error);
    });
    let write = tokio::spawn(async move {
        let error = write_to_target(&mut writer, &machine, &mut queue, &pool).await;
        end_with(&end, &error);
    });
    ToTarget {
        outbox,
        heard,
        end: End(ended),
        _tasks: Tasks(vec![read.abort_handle(), write.abort_handle()]),
    }
}

async fn read_from_target(
    reader: &mut (impl AsyncRead + Unpin),
    machine: &Shared<source::Machine>,
    say: &mpsc::Sender<FromTarget>,
) -> Error {
    let mut buffer = Vec::new();
    loop {
        let (kind, len) = match read_frame(reader, &mut buffer, "source").await {
            Ok(frame) => frame,
            Err(error) => return error,
        };
        let content = buffer.get(..len).unwrap_or_default();
        let stepped = machine.with(|m| match m.step(&source::Input::Frame(kind, content)) {
            Ok((m, output)) => (Some(m), Ok(output)),
            Err((m, violation)) => (Some(m), Err(violation)),
        });
        match stepped {
            Some(Ok(source::Output::Heard(FromTarget::Alive) | source::Output::MaySend)) => {}
            Some(Ok(source::Output::Heard(message))) => {
                if say.send(message).await.is_err() {
                    return Error::Ended;
                }
            }
            Some(Err(violation)) => return Error::Violation(violation),
            None => return Error::Ended,
        }
    }
}

async fn write_to_target(
    writer: &mut (impl AsyncWrite + Unpin),
    machine: &Shared<source::Machine>,
    queue: &mut mpsc::Receiver<Outgoing>,
    pool: &Pool,
) -> Error {
    loop {
        let next = match queue.try_recv() {
            Ok(next) => Some(next),
            Err(mpsc::error::TryRecvError::Disconnected) => None,
            Err(mpsc::error::TryRecvError::Empty) => {
                // Nothing waits: what lies in TLS's buffers goes out now.
                if let Err(error) = writer.flush().await {
                    return Error::Lost(error);
                }
                match timeout(ALIVE, queue.recv()).await {
                    Ok(next) => next,
                    Err(_) => {
                        let may = machine.with(|m| match m.step(&source::Input::Send(&FromSource::Alive)) {
                            Ok((m, _)) => (Some(m), true),
                            Err((m, _)) => (Some(m), false),
                        });
                        if may != Some(true) {
                            continue;
                        }
                        if let Err(error) = write_json(writer, Kind::Control, &FromSource::Alive, "source").await {
                            return error;
                        }
                        continue;
                    }
                }
            }
        };
        let Some(next) = next else {
            if let Err(error) = writer.shutdown().await {
                return Error::Lost(error);
            }
            return Error::Ended;
        };
        let sent = match next {
            Outgoing::Message(message) => {
                let may = machine.with(|m| match m.step(&source::Input::Send(&message)) {
                    Ok((m, _)) => (Some(m), Ok(())),
                    Err((m, violation)) => (Some(m), Err(violation)),
                });
                match may {
                    Some(Ok(())) => write_json(writer, message.kind(), &message, "source").await,
                    Some(Err(violation)) => Err(Error::Own(violation)),
                    None => Err(Error::Ended),
                }
            }
            Outgoing::Piece {
                file,
                offset,
                mut buffer,
                len,
            } => {
                let result = write_piece(writer, file, offset, &mut buffer, len).await;
                pool.give_back(buffer);
                result
            }
        };
        if let Err(error) = sent {
            return error;
        }
    }
}

async fn write_piece(
    writer: &mut (impl AsyncWrite + Unpin),
    file: u32,
    offset: u64,
    buffer: &mut [u8],
    len: usize,
) -> Result<(), Error> {
    let header = frame::header(Kind::Data, frame::DATA_HEADER + len)
        .map_err(|error| Error::Own(Violation::Frame { state: "source", error }))?;
    if let Some(room) = buffer.get_mut(..frame::HEADER) {
        room.copy_from_slice(&header);
    }
    if let Some(room) = buffer.get_mut(frame::HEADER..outbox::HEAD) {
        room.copy_from_slice(&frame::data_header(file, offset));
    }
    let all = buffer.get(..outbox::HEAD + len).unwrap_or_default();
    timeout(SILENCE, writer.write_all(all))
        .await
        .map_err(|_| Error::Silent(SILENCE))?
        .map_err(Error::Lost)
}

/// What the target's session gets.
#[derive(Debug)]
pub enum Event {
    /// A message, legal in its state.
    Message(target::Output),
    /// A piece of a file: behind [`frame::DATA_HEADER`] of the buffer, up to `len`.
    Piece {
        /// The file.
        file: u32,
        /// Where in it.
        offset: u64,
        /// The buffer; given back with [`Spare::give_back`].
        buffer: Vec<u8>,
        /// Length of the frame's content.
        len: usize,
    },
}

/// Buffers of received pieces, used again.
#[derive(Clone, Debug, Default)]
pub struct Spare(Arc<Mutex<Vec<Vec<u8>>>>);

impl Spare {
    fn take(&self) -> Vec<u8> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop()
            .unwrap_or_default()
    }

    /// Gives a buffer back.
    pub fn give_back(&self, buffer: Vec<u8>) {
        let mut spare = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if spare.len() < 32 && buffer.capacity() <= limits::DATA_BYTES {
            spare.push(buffer);
        }
    }
}

/// The target's side of a connection.
#[derive(Debug)]
pub struct FromSourceSide {
    /// What the source sends; closed when the connection has ended.
    pub events: mpsc::Receiver<Event>,
    /// What is to be said to it.
    pub say: mpsc::Sender<FromTarget>,
    /// For buffers of pieces.
    pub spare: Spare,
    /// Why it has ended.
    pub end: End,
    _tasks: Tasks,
}

/// What a peer has come for.
#[derive(Debug)]
pub enum Accepted {
    /// A session, whose first message is not judged yet; with the names in the peer's certificate.
    Session(FromSourceSide, Vec<String>),
    /// To send memory pages.
    Pages(Incoming),
}

/// Takes a connection: TLS, and a look at what the peer has come for.
///
/// # Errors
/// See [`Error`].
pub async fn accept(tls: &PeerTls, tcp: TcpStream, from: SocketAddr) -> Result<Accepted, Error> {
    tcp.set_nodelay(true).map_err(Error::Lost)?;
    let mut stream = timeout(HANDSHAKE, TlsAcceptor::from(tls.server.clone()).accept(tcp))
        .await
        .map_err(|_| Error::Deadline(from.to_string(), HANDSHAKE))?
        .map_err(|e| Error::Tls(from.to_string(), e))?;
    let names = stream
        .get_ref()
        .1
        .peer_certificates()
        .and_then(|c| c.first())
        .map(names_of)
        .unwrap_or_default();
    let mut content = Vec::new();
    let (kind, len) = read_frame(&mut stream, &mut content, "target").await?;
    content.truncate(len);
    if kind == Kind::Control
        && let Ok(FromSource::Offer(offer)) = serde_json::from_slice(&content)
        && matches!(offer.stream, Stream::Pages { .. })
    {
        return Ok(Accepted::Pages(Incoming::new(stream, offer, names)));
    }
    // The machine of a session sees all of it, this frame too.
    let header =
        frame::header(kind, len).map_err(|error| Error::Violation(Violation::Frame { state: "target", error }))?;
    let first = [header.as_slice(), &content].concat();
    Ok(Accepted::Session(from_source_after(first, stream), names))
}

/// The target's side on any stream.
#[must_use]
pub fn from_source(stream: impl AsyncRead + AsyncWrite + Send + 'static) -> FromSourceSide {
    from_source_after(Vec::new(), stream)
}

/// The target's side on a stream of which something was read already.
fn from_source_after(first: Vec<u8>, stream: impl AsyncRead + AsyncWrite + Send + 'static) -> FromSourceSide {
    let (reader, mut writer) = tokio::io::split(stream);
    let mut reader = io::Cursor::new(first).chain(reader);
    let machine = Shared::new(target::Machine::default());
    let (send_event, events) = mpsc::channel(16);
    let (say, mut queue) = mpsc::channel::<FromTarget>(16);
    let (end, ended) = watch::channel(None);
    let end = Arc::new(end);
    let spare = Spare::default();

    let (reading, read_end, buffers) = (machine.clone(), end.clone(), spare.clone());
    let read = tokio::spawn(async move {
        let error = read_from_source(&mut reader, &reading, &send_event, &buffers).await;
        end_with(&read_end, &error);
    });
    let write = tokio::spawn(async move {
        let error = write_to_source(&mut writer, &machine, &mut queue).await;
        end_with(&end, &error);
    });
    FromSourceSide {
        events,
        say,
        spare,
        end: End(ended),
        _tasks: Tasks(vec![read.abort_handle(), write.abort_handle()]),
    }
}

async fn read_from_source(
    reader: &mut (impl AsyncRead + Unpin),
    machine: &Shared<target::Machine>,
    events: &mpsc::Sender<Event>,
    spare: &Spare,
) -> Error {
    loop {
        let mut buffer = spare.take();
        let (kind, len) = match read_frame(reader, &mut buffer, "target").await {
            Ok(frame) => frame,
            Err(error) => return error,
        };
        let content = buffer.get(..len).unwrap_or_default();
        let stepped = machine.with(|m| match m.step(&target::Input::Frame(kind, content)) {
            Ok((m, output)) => (Some(m), Ok(output)),
            Err((m, violation)) => (Some(*m), Err(violation)),
        });
        let event = match stepped {
            Some(Ok(target::Output::Alive | target::Output::MaySend)) => {
                spare.give_back(buffer);
                continue;
            }
            Some(Ok(target::Output::Data { file, offset })) => Event::Piece {
                file,
                offset,
                buffer,
                len,
            },
            Some(Ok(output)) => {
                spare.give_back(buffer);
                Event::Message(output)
            }
            Some(Err(violation)) => return Error::Violation(violation),
            None => return Error::Ended,
        };
        if events.send(event).await.is_err() {
            return Error::Ended;
        }
    }
}

async fn write_to_source(
    writer: &mut (impl AsyncWrite + Unpin),
    machine: &Shared<target::Machine>,
    queue: &mut mpsc::Receiver<FromTarget>,
) -> Error {
    loop {
        let (message, wanted) = match timeout(ALIVE, queue.recv()).await {
            Ok(Some(message)) => (message, true),
            Ok(None) => {
                if let Err(error) = writer.shutdown().await {
                    return Error::Lost(error);
                }
                return Error::Ended;
            }
            Err(_) => (FromTarget::Alive, false),
        };
        let may = machine.with(|m| match m.step(&target::Input::Send(&message)) {
            Ok((m, _)) => (Some(m), Ok(())),
            Err((m, violation)) => (Some(*m), Err(violation)),
        });
        match may {
            Some(Ok(())) => {}
            // Not yet, or no more, a time to say that we live.
            Some(Err(_)) if !wanted => continue,
            Some(Err(violation)) => return Error::Own(violation),
            None => return Error::Ended,
        }
        let sent = async {
            write_json(writer, Kind::Control, &message, "target").await?;
            writer.flush().await.map_err(Error::Lost)
        };
        if let Err(error) = sent.await {
            return error;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::migrate::message::{Facts, Manifest, Offer, PROTOCOL, Place};

    fn offer() -> FromSource {
        FromSource::Offer(Offer {
            protocol: PROTOCOL.into(),
            versions: protocol::version::VERSIONS.to_vec(),
            stream: Stream::Session,
            namespace: "n".into(),
            name: "m".into(),
            uid: "u".into(),
            attempt: 1,
            source_pod_uid: "s".into(),
            target_pod_uid: "t".into(),
        })
    }

    /// Runs a session over a pipe that is cut after `limit` bytes; says how far each side came.
    async fn session(limit: usize, size: usize) -> (Result<Vec<u8>, String>, Result<(), String>) {
        let (a, b) = tokio::io::duplex(64 * 1024);
        // What the source sends goes through a middle that counts, and hangs up.
        let (source_end, mut near) = tokio::io::duplex(64 * 1024);
        let (mut from_target, mut to_target_half) = tokio::io::split(a);
        let (mut from_source, mut to_source_half) = tokio::io::split(&mut near);
        let cut = async {
            let mut left = limit;
            let mut buffer = vec![0; 16 * 1024];
            while left > 0 {
                let n = from_source.read(&mut buffer).await.unwrap_or(0).min(left);
                if n == 0 || to_target_half.write_all(&buffer[..n]).await.is_err() {
                    break;
                }
                left -= n;
            }
        };
        let back = tokio::io::copy(&mut from_target, &mut to_source_half);

        let source = async {
            let mut link = to_target(source_end);
            let fail = |link: &ToTarget| link.end.reason().unwrap_or_else(|| "ended".into());
            let outbox = link.outbox.clone();
            let say = |m| {
                let outbox = outbox.clone();
                async move { outbox.message(m).await.map_err(|e| e.to_string()) }
            };
            say(offer()).await?;
            link.heard.recv().await.ok_or_else(|| fail(&link))?;
            say(FromSource::Manifest(Manifest {
                containers: vec!["c".into()],
                descriptors: Vec::new(),
                memory_bytes: 1 << 20,
                max_image_bytes: 1 << 30,
                max_file_bytes: 0,
                copied_before: false,
            }))
            .await?;
            link.heard.recv().await.ok_or_else(|| fail(&link))?;
            say(FromSource::Frozen).await?;
            say(FromSource::Facts(Facts::default())).await?;
            let queue = outbox.clone();
            let bytes: Vec<u8> = (0..size).map(|n| u8::try_from(n % 251).unwrap()).collect();
            tokio::task::spawn_blocking(move || queue.content(Place::Images(0), b"pages-1.img", &bytes))
                .await
                .unwrap()
                .map_err(|e| e.to_string())?;
            let complete = FromSource::Complete {
                entries: outbox.entries(),
                bytes: outbox.bytes(),
            };
            say(complete).await?;
            match link.heard.recv().await {
                Some(FromTarget::Received) => Ok(()),
                other => Err(format!("{other:?}: {}", fail(&link))),
            }
        };
        let target = async {
            let mut link = super::from_source(b);
            let mut got = Vec::new();
            loop {
                let Some(event) = link.events.recv().await else {
                    return Err(link.end.wait().await);
                };
                let answer = match event {
                    Event::Piece {
                        buffer, len, offset, ..
                    } => {
                        assert_eq!(usize::try_from(offset).unwrap(), got.len());
                        got.extend_from_slice(&buffer[frame::DATA_HEADER..len]);
                        link.spare.give_back(buffer);
                        None
                    }
                    Event::Message(target::Output::Offer(_)) => Some(FromTarget::Accept { version: 1 }),
                    Event::Message(target::Output::Manifest(_)) => Some(FromTarget::ManifestAccepted),
                    Event::Message(target::Output::Complete) => {
                        link.say.send(FromTarget::Received).await.ok();
                        let FromSourceSide { say, mut end, .. } = link;
                        drop(say);
                        tokio::time::timeout(Duration::from_secs(2), end.wait()).await.ok();
                        return Ok(got);
                    }
                    Event::Message(_) => None,
                };
                if let Some(answer) = answer {
                    link.say.send(answer).await.ok();
                }
            }
        };
        let middle = async {
            tokio::select! { () = cut => {}, _ = back => {} }
        };
        let both = async { tokio::join!(target, source) };
        tokio::select! {
            both = both => both,
            () = async { middle.await; tokio::time::sleep(Duration::from_secs(30)).await } => {
                (Err("cut".into()), Err("cut".into()))
            }
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_file_arrives_as_it_was_sent() {
        let size = 3 * outbox::PIECE + 17;
        let (got, said) = session(usize::MAX, size).await;
        let got = got.unwrap();
        assert_eq!(got.len(), size);
        assert!(got.iter().enumerate().all(|(n, b)| usize::from(*b) == n % 251));
        said.unwrap();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn noise_ends_the_connection_and_nothing_else() {
        let (mut near, far) = tokio::io::duplex(1024);
        let mut link = from_source(far);
        near.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        assert!(link.events.recv().await.is_none());
        assert!(link.end.wait().await.contains("protocol"));
    }
}
