//! `fetch http://host:port/path`: prints the body, fails unless the answer is 200.

use std::io::{Read as _, Write as _};
use std::net::{TcpStream, ToSocketAddrs as _};
use std::time::Duration;

/// Runs it.
pub(crate) fn main(args: &[String]) -> Result<(), String> {
    let [url] = args else {
        return Err("fetch needs one URL".to_owned());
    };
    let rest = url
        .strip_prefix("http://")
        .ok_or_else(|| format!("{url}: only http:// is known"))?;
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    let body = get(host, path).map_err(|error| format!("{url}: {error}"))?;
    println!("{body}");
    Ok(())
}

fn get(host: &str, path: &str) -> Result<String, String> {
    let text = |error: std::io::Error| error.to_string();
    let address = host.to_socket_addrs().map_err(text)?.next().ok_or("no address")?;
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2)).map_err(text)?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).map_err(text)?;
    write!(
        stream,
        "GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    )
    .map_err(text)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).map_err(text)?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or("no answer")?;
    if head.split(' ').nth(1) == Some("200") {
        Ok(body.trim_end().to_owned())
    } else {
        Err(head.lines().next().unwrap_or("no status").to_owned())
    }
}
