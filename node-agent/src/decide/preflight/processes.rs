//! Processes: state, tracer, namespaces, sessions, locks.

use crds::Reason;

use super::{Area, Findings};
use crate::inventory::{Container, Inventory, Process};

pub(super) fn judge(inventory: &Inventory, findings: &mut Findings) {
    for container in &inventory.containers {
        let Some(first) = container.processes.iter().find(|p| p.is_first) else {
            findings.refuse(
                Area::Processes,
                Some(&container.name),
                Reason::Unknown,
                format!("the first process of container {} was not found", container.name),
            );
            continue;
        };
        for process in &container.processes {
            if process.in_tree {
                state(container, process, findings);
                namespaces(container, process, first, findings);
                locks(container, process, findings);
            } else if process.state != 'Z' {
                findings.warn(
                    Area::Sessions,
                    Some(&container.name),
                    Reason::ExecSessionEnds,
                    format!(
                        "{} was started by kubectl exec in container {} and ends with the move",
                        process.label(),
                        container.name
                    ),
                );
            }
        }
    }
}

fn state(container: &Container, process: &Process, findings: &mut Findings) {
    let name = Some(container.name.as_str());
    let label = process.label();
    if let Some(tracer) = process.tracer {
        findings.refuse(
            Area::Processes,
            name,
            Reason::TracedProcess,
            format!("{label} is traced by process {tracer} of the node"),
        );
    }
    match process.state {
        'D' => findings.refuse(
            Area::Processes,
            name,
            Reason::ProcessState,
            format!("{label} has been in an uninterruptible wait for a while"),
        ),
        'Z' if process.threads > 1 => findings.refuse(
            Area::Processes,
            name,
            Reason::ProcessState,
            format!("the first thread of {label} has ended and others go on, which CRIU cannot rebuild"),
        ),
        'Z' if process.is_first => findings.refuse(
            Area::Processes,
            name,
            Reason::PodNotRunning,
            format!("{label} has ended"),
        ),
        'R' | 'S' | 'I' | 'T' | 't' | 'Z' => {}
        other => findings.refuse(
            Area::Processes,
            name,
            Reason::ProcessState,
            format!("{label} is in state {other}"),
        ),
    }
    if process.is_32_bit {
        findings.refuse(
            Area::Processes,
            name,
            Reason::ProcessState,
            format!("{label} is a 32-bit program, which is not carried by this version"),
        );
    }
    if !process.in_own_cgroup {
        findings.warn(
            Area::Processes,
            name,
            Reason::WillBeLost,
            format!("{label} is in a cgroup that the container made below its own; it comes back in the container's"),
        );
    }
}

fn namespaces(container: &Container, process: &Process, first: &Process, findings: &mut Findings) {
    let mut own: Vec<&str> = Vec::new();
    for (name, inode) in &process.namespaces {
        // What children will get is compared with what the process itself has.
        let (name, reference) = match *name {
            "pid_for_children" => ("pid", process.namespaces.get("pid")),
            "time_for_children" => ("time", process.namespaces.get("time")),
            name => (name, first.namespaces.get(name)),
        };
        if reference.is_some_and(|reference| reference != inode) && !own.contains(&name) {
            own.push(name);
        }
    }
    if !own.is_empty() {
        findings.refuse(
            Area::Namespaces,
            Some(&container.name),
            Reason::NestedNamespace,
            format!("{} has namespaces of its own ({})", process.label(), own.join(", ")),
        );
    }
}

fn locks(container: &Container, process: &Process, findings: &mut Findings) {
    for lock in &process.locks {
        let what = match lock.kind.as_str() {
            _ if lock.mandatory => "a mandatory lock",
            // Carried by CRIU.
            "POSIX" | "FLOCK" | "OFDLCK" => continue,
            "LEASE" => "a lease",
            "DELEG" => "a delegation",
            _ => "a lock of an unknown kind",
        };
        findings.refuse(
            Area::Locks,
            Some(&container.name),
            Reason::LockNotSupported,
            format!(
                "{} holds {what} ({}) on the file with inode {}",
                process.label(),
                lock.kind,
                lock.inode
            ),
        );
    }
}
