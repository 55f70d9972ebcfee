//! Holds one thing that a preflight must find and name, until it is ended.

use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// Runs it.
pub(crate) fn main(args: &[String]) -> Result<(), String> {
    let [kind] = args else {
        return Err("hold needs one kind".to_owned());
    };
    let text = |error: nix::Error| format!("cannot hold {kind}: {error}");
    match kind.as_str() {
        "packet-socket" => keep(socket(AddressFamily::Packet, SockType::Raw, SockFlag::empty(), None).map_err(text)?),
        "vsock" => keep(socket(AddressFamily::Vsock, SockType::Stream, SockFlag::empty(), None).map_err(text)?),
        // A child that has its own user namespace; made here, it would be the first process's.
        "nested-namespace" => {
            let child = Command::new("/proc/self/exe")
                .args(["hold", "own-namespace"])
                .stdin(Stdio::null())
                .spawn();
            keep(child.map_err(|error| format!("cannot hold {kind}: {error}"))?)
        }
        "own-namespace" => {
            unshare(CloneFlags::CLONE_NEWUSER).map_err(text)?;
            keep(())
        }
        "nothing" => keep(()),
        _ => Err(format!(
            "{kind:?} is none of packet-socket, vsock, nested-namespace, nothing"
        )),
    }
}

fn keep<T>(held: T) -> ! {
    println!("holding");
    loop {
        std::thread::sleep(Duration::from_secs(3600));
        std::hint::black_box(&held);
    }
}
