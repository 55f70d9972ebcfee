//! `/healthz`, `/readyz` and `/metrics` over plain HTTP/1.1. A request is one line that is looked at and headers that are not.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::context::Context;
use crate::error::Fatal;

/// Longest request that is read.
const MOST: usize = 8 * 1024;
/// Longest time for a request.
const PATIENCE: Duration = Duration::from_secs(5);

/// Listens on the port.
pub async fn bind(port: u16) -> Result<TcpListener, Fatal> {
    // Both families where the host has both.
    match TcpListener::bind(("::", port)).await {
        Ok(listener) => Ok(listener),
        Err(_) => TcpListener::bind(("0.0.0.0", port))
            .await
            .map_err(|source| Fatal::AdminPort { port, source }),
    }
}

/// Serves for ever.
pub async fn serve(listener: TcpListener, ctx: Arc<Context>) {
    let slots = Arc::new(Semaphore::new(32));
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let ctx = ctx.clone();
                tokio::spawn(async move {
                    // A client that is slow or goes away is its own loss.
                    let _ended = tokio::time::timeout(PATIENCE, answer(stream, &ctx)).await;
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!(error = %error, "failed to accept a connection on the admin port");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn answer(mut stream: TcpStream, ctx: &Context) -> std::io::Result<()> {
    let mut request = Vec::with_capacity(512);
    let mut part = [0_u8; 512];
    while !request.windows(4).any(|w| w == b"\r\n\r\n") {
        let n = stream.read(&mut part).await?;
        if n == 0 || request.len() + n > MOST {
            return Ok(());
        }
        request.extend_from_slice(&part[..n]);
    }
    let (status, body) = route(&request, ctx);
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}

fn route(request: &[u8], ctx: &Context) -> (&'static str, String) {
    let line = request.split(|b| *b == b'\r').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    let mut words = line.split(' ');
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    if method != "GET" && method != "HEAD" {
        return ("405 Method Not Allowed", "only GET\n".to_owned());
    }
    match path.split('?').next().unwrap_or_default() {
        "/healthz" => ("200 OK", "ok\n".to_owned()),
        "/readyz" if ctx.is_synced() => ("200 OK", "ok\n".to_owned()),
        "/readyz" => (
            "503 Service Unavailable",
            "the watches have not delivered everything yet\n".to_owned(),
        ),
        "/metrics" => {
            ctx.count_phases();
            ("200 OK", ctx.metrics.render())
        }
        _ => ("404 Not Found", "try /healthz, /readyz, /metrics\n".to_owned()),
    }
}
