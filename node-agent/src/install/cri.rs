//! Two questions to the container runtime over its CRI socket: who are you, and which handlers are in force?
//!
//! gRPC is HTTP/2 with a five-byte prefix before each message. The two requests are empty and the answers have a handful
//! of strings, so they are read here without generated code.

use std::path::Path;
use std::time::Duration;

use h2::client;
use http::{Method, Request};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// Longest answer that is read.
const MAX_ANSWER: usize = 4 << 20;

/// Why the runtime gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody listens.
    #[error("failed to connect to the CRI socket {0}")]
    Connect(String, #[source] std::io::Error),
    /// HTTP/2 went wrong.
    #[error("the CRI call {0} failed")]
    Http(&'static str, #[source] h2::Error),
    /// gRPC says no.
    #[error("the CRI call {0} was refused: {1}")]
    Refused(&'static str, String),
    /// The answer cannot be read.
    #[error("the answer to the CRI call {0} could not be read")]
    Malformed(&'static str),
    /// No answer in time.
    #[error("the CRI call {0} did not answer in time")]
    Deadline(&'static str),
}

/// What a runtime says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuntimeVersion {
    /// `containerd`, `cri-o`.
    pub name: String,
    /// Its version.
    pub version: String,
}

/// Asks for name and version.
///
/// # Errors
/// See [`Error`].
pub async fn version(socket: &Path) -> Result<RuntimeVersion, Error> {
    let answer = call(socket, "Version").await?;
    let mut found = RuntimeVersion::default();
    for (field, value) in Fields(&answer) {
        match field {
            2 => found.name = text(value),
            3 => found.version = text(value).trim_start_matches('v').to_owned(),
            _ => {}
        }
    }
    if found.name.is_empty() {
        return Err(Error::Malformed("Version"));
    }
    Ok(found)
}

/// Asks for the handlers that are in force. Empty where the runtime does not tell (containerd before 2.0).
///
/// # Errors
/// See [`Error`].
pub async fn handlers(socket: &Path) -> Result<Vec<String>, Error> {
    Ok(handlers_of(&call(socket, "Status").await?))
}

/// StatusResponse: field 3 is a list of handlers, whose field 1 is the name.
fn handlers_of(answer: &[u8]) -> Vec<String> {
    Fields(answer)
        .filter(|(field, _)| *field == 3)
        .filter_map(|(_, handler)| {
            Fields(handler)
                .find(|(field, _)| *field == 1)
                .map(|(_, name)| text(name))
        })
        .collect()
}

async fn call(socket: &Path, method: &'static str) -> Result<Vec<u8>, Error> {
    timeout(Duration::from_secs(5), call_without_deadline(socket, method))
        .await
        .map_err(|_| Error::Deadline(method))?
}

async fn call_without_deadline(socket: &Path, method: &'static str) -> Result<Vec<u8>, Error> {
    let http = |e| Error::Http(method, e);
    let stream = UnixStream::connect(socket)
        .await
        .map_err(|e| Error::Connect(socket.display().to_string(), e))?;
    let (requests, connection) = client::handshake(stream).await.map_err(http)?;
    // The connection ends with its last handle, at the end of this function; an error of it shows in the answer.
    let driver = tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "CRI connection ended");
        }
    });
    let mut requests = requests.ready().await.map_err(http)?;
    let request = Request::builder()
        .method(Method::POST)
        .uri(format!("http://localhost/runtime.v1.RuntimeService/{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .map_err(|_| Error::Malformed(method))?;
    let (answer, mut body) = requests.send_request(request, false).map_err(http)?;
    // Not compressed, zero bytes long: all fields have their default.
    body.send_data(vec![0; 5].into(), true).map_err(http)?;
    let answer = answer.await.map_err(http)?;
    let refused = |headers: &http::HeaderMap| {
        let status = headers.get("grpc-status")?.to_str().ok()?.to_owned();
        let message = headers
            .get("grpc-message")
            .and_then(|m| m.to_str().ok())
            .unwrap_or_default();
        (status != "0").then(|| Error::Refused(method, format!("status {status} {message}")))
    };
    if let Some(error) = refused(answer.headers()) {
        return Err(error);
    }
    let mut stream = answer.into_body();
    let mut bytes = Vec::new();
    while let Some(chunk) = stream.data().await {
        let chunk = chunk.map_err(http)?;
        if bytes.len() + chunk.len() > MAX_ANSWER {
            return Err(Error::Malformed(method));
        }
        bytes.extend_from_slice(&chunk);
        stream.flow_control().release_capacity(chunk.len()).map_err(http)?;
    }
    if let Some(error) = stream.trailers().await.map_err(http)?.as_ref().and_then(refused) {
        return Err(error);
    }
    drop(requests);
    driver.abort();
    match bytes.split_first_chunk::<5>() {
        Some(([0, a, b, c, d], message))
            if usize::try_from(u32::from_be_bytes([*a, *b, *c, *d])).is_ok_and(|len| len == message.len()) =>
        {
            Ok(message.to_vec())
        }
        _ => Err(Error::Malformed(method)),
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The length-delimited fields of a protobuf message; numbers are skipped, the first error ends the list.
struct Fields<'a>(&'a [u8]);

impl<'a> Iterator for Fields<'a> {
    type Item = (u64, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let key = varint(&mut self.0)?;
            match key & 7 {
                0 => {
                    varint(&mut self.0)?;
                }
                1 => self.0 = self.0.get(8..)?,
                5 => self.0 = self.0.get(4..)?,
                2 => {
                    let len = usize::try_from(varint(&mut self.0)?).ok()?;
                    let (value, rest) = self.0.split_at_checked(len)?;
                    self.0 = rest;
                    return Some((key >> 3, value));
                }
                _ => return None,
            }
        }
    }
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handlers_are_read_from_a_status() {
        // status {}, handlers {name: "runc", features {1: 1}}, {name: "peregrine"}
        let mut answer = vec![0x0a, 0x00];
        answer.extend_from_slice(b"\x1a\x0a\x0a\x04runc\x12\x02\x08\x01");
        answer.extend_from_slice(b"\x1a\x0b\x0a\x09peregrine");
        assert_eq!(handlers_of(&answer), ["runc", "peregrine"]);
    }

    #[test]
    fn what_is_cut_off_ends_the_list() {
        for cut in 0..12 {
            let answer = b"\x1a\x0b\x0a\x09peregrine";
            assert!(handlers_of(&answer[..cut]).iter().all(|name| name != "peregrine"));
        }
        assert!(handlers_of(&[0xff; 40]).is_empty());
    }
}
