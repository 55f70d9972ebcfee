//! `/healthz`, `/readyz` and `/metrics` on a port of their own: HTTP/1.1, GET only, every request bounded in size and time.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;

use crate::metrics::Metrics;

/// Longest request head that is read.
const MAX_HEAD: usize = 8 << 10;
/// Time for a whole request.
const DEADLINE: Duration = Duration::from_secs(5);
/// Requests at once.
const MAX_CONNECTIONS: usize = 16;

/// What the endpoint shows.
#[derive(Clone, Debug)]
pub struct Admin {
    /// Why the agent is not ready; None: it is.
    pub not_ready: watch::Receiver<Option<String>>,
    /// Metrics.
    pub metrics: Arc<Metrics>,
}

/// Listens on all addresses of the node.
///
/// # Errors
/// The port is taken.
pub async fn listen(port: u16) -> std::io::Result<TcpListener> {
    // IPv6 sockets take IPv4 as well; a node without IPv6 has only the other.
    match TcpListener::bind(SocketAddr::from(([0u16; 8], port))).await {
        Ok(listener) => Ok(listener),
        Err(_) => TcpListener::bind(SocketAddr::from(([0u8; 4], port))).await,
    }
}

/// Serves for ever.
pub async fn serve(listener: TcpListener, admin: Admin) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let admin = admin.clone();
                tokio::spawn(async move {
                    // A client that is slow or gone is no news.
                    let _ = timeout(DEADLINE, answer(stream, &admin)).await;
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "admin endpoint: failed to accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn answer(mut stream: TcpStream, admin: &Admin) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.windows(4).any(|w| w == b"\r\n\r\n") {
        if head.len() >= MAX_HEAD || stream.read_buf(&mut head).await? == 0 {
            return Ok(());
        }
    }
    let (status, kind, body) = response(&head, admin);
    let text = format!(
        "HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(text.as_bytes()).await?;
    stream.shutdown().await
}

fn response(head: &[u8], admin: &Admin) -> (&'static str, &'static str, String) {
    const TEXT: &str = "text/plain; charset=utf-8";
    let line = head.split(|b| *b == b'\r').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    let mut words = line.split(' ');
    if words.next() != Some("GET") {
        return ("405 Method Not Allowed", TEXT, "only GET\n".to_owned());
    }
    match words.next().unwrap_or_default().split('?').next() {
        Some("/healthz") => ("200 OK", TEXT, "ok\n".to_owned()),
        Some("/readyz") => match &*admin.not_ready.borrow() {
            None => ("200 OK", TEXT, "ok\n".to_owned()),
            Some(why) => ("503 Service Unavailable", TEXT, format!("{why}\n")),
        },
        Some("/metrics") => (
            "200 OK",
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
            admin.metrics.render(),
        ),
        _ => ("404 Not Found", TEXT, "see /healthz, /readyz, /metrics\n".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn get(request: &[u8], not_ready: Option<&str>) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let admin = Admin {
            not_ready: watch::Sender::new(not_ready.map(str::to_owned)).subscribe(),
            metrics: Arc::default(),
        };
        let server = tokio::spawn(serve(listener, admin));
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        server.abort();
        text
    }

    #[tokio::test]
    async fn readiness_says_why_not() {
        assert!(
            get(b"GET /readyz HTTP/1.1\r\n\r\n", None)
                .await
                .starts_with("HTTP/1.1 200")
        );
        let text = get(b"GET /readyz HTTP/1.1\r\n\r\n", Some("no certificate")).await;
        assert!(
            text.starts_with("HTTP/1.1 503") && text.contains("no certificate"),
            "{text}"
        );
    }

    #[tokio::test]
    async fn metrics_are_in_the_open_format_and_other_methods_are_refused() {
        let text = get(b"GET /metrics HTTP/1.1\r\n\r\n", None).await;
        assert!(
            text.contains("peregrine_agent_info") && text.ends_with("# EOF\n"),
            "{text}"
        );
        assert!(get(b"POST / HTTP/1.1\r\n\r\n", None).await.starts_with("HTTP/1.1 405"));
        assert!(get(b"GET /x HTTP/1.1\r\n\r\n", None).await.starts_with("HTTP/1.1 404"));
    }
}
