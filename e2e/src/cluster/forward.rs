//! The API server on the host's loopback: connections are taken in the host's network namespace and made in the control plane's.

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::sched::{CloneFlags, setns};
use nix::unistd::setsid;

use super::cgroup::Cgroup;
use super::netns;
use super::topology::{API_PORT, Member};

/// The forwarder's cgroup.
pub(super) const NAME: &str = "forwarder";

/// A port of loopback that is free, the usual one if it can be had.
pub(super) fn free_port() -> Result<u16> {
    let bind = |port| TcpListener::bind((Ipv4Addr::LOCALHOST, port));
    let listener = bind(API_PORT)
        .or_else(|_| bind(0))
        .context("no port of 127.0.0.1 is free")?;
    Ok(listener.local_addr().context("cannot read a socket's address")?.port())
}

/// Forwards for ever.
///
/// # Errors
/// If the port is taken, or the control plane's namespace is not there.
pub(super) fn run(port: u16) -> Result<()> {
    Cgroup::named(NAME)?.enter()?;
    setsid().ok();
    // Bound here, in the host's network; the socket stays there when the process moves on.
    let listener =
        TcpListener::bind((Ipv4Addr::LOCALHOST, port)).with_context(|| format!("cannot listen on 127.0.0.1:{port}"))?;
    let netns = netns::path(&Member::ControlPlane.netns());
    let netns = File::open(&netns).with_context(|| format!("cannot open {}", netns.display()))?;
    setns(&netns, CloneFlags::CLONE_NEWNET).context("cannot enter the control plane's network")?;
    for stream in listener.incoming() {
        match stream {
            Ok(stream) => drop(
                std::thread::Builder::new()
                    .stack_size(64 << 10)
                    .spawn(move || forward(&stream)),
            ),
            // Out of descriptors or an aborted connection: the next one may succeed.
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
    Ok(())
}

/// Copies both ways until both ends are done. A refused connection is answered by closing.
fn forward(client: &TcpStream) {
    let to = SocketAddr::from((Member::ControlPlane.address(), API_PORT));
    let Ok(server) = TcpStream::connect_timeout(&to, Duration::from_secs(5)) else {
        return;
    };
    client.set_nodelay(true).and_then(|()| server.set_nodelay(true)).ok();
    let server = &server;
    std::thread::scope(|scope| {
        scope.spawn(move || copy(client, server));
        copy(server, client);
    });
}

fn copy(mut from: &TcpStream, mut to: &TcpStream) {
    let _ = match io::copy(&mut from, &mut to) {
        Ok(_) => to.shutdown(Shutdown::Write).ok(),
        // Broken: the other direction must not wait for it.
        Err(_) => from.shutdown(Shutdown::Both).and(to.shutdown(Shutdown::Both)).ok(),
    };
}
