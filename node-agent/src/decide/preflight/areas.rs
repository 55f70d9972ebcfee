//! What is looked at.

/// An area; its name stands in the check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Area {
    /// Namespaces and containers as the pod's spec has them.
    Pod,
    /// Volumes by the pod's spec.
    Volumes,
    /// Processes: state, tracer, program.
    Processes,
    /// Sessions of `kubectl exec` and `attach`.
    Sessions,
    /// Namespaces of the processes.
    Namespaces,
    /// Mounts.
    Mounts,
    /// Open files.
    Descriptors,
    /// Devices.
    Devices,
    /// Sockets.
    Sockets,
    /// Connections with peers outside of the pod.
    Connections,
    /// Memory and mappings.
    Memory,
    /// Locks and leases.
    Locks,
    /// Interfaces and rules of the pod's network namespace.
    Network,
    /// POSIX message queues and System V objects.
    Ipc,
    /// Whether everything could be read.
    Inventory,
}

impl Area {
    /// All of them.
    pub const ALL: &[Area] = &[
        Area::Pod,
        Area::Volumes,
        Area::Processes,
        Area::Sessions,
        Area::Namespaces,
        Area::Mounts,
        Area::Descriptors,
        Area::Devices,
        Area::Sockets,
        Area::Connections,
        Area::Memory,
        Area::Locks,
        Area::Network,
        Area::Ipc,
        Area::Inventory,
    ];

    /// As it stands in a check's name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Area::Pod => "pod",
            Area::Volumes => "volumes",
            Area::Processes => "processes",
            Area::Sessions => "sessions",
            Area::Namespaces => "namespaces",
            Area::Mounts => "mounts",
            Area::Descriptors => "descriptors",
            Area::Devices => "devices",
            Area::Sockets => "sockets",
            Area::Connections => "connections",
            Area::Memory => "memory",
            Area::Locks => "locks",
            Area::Network => "network",
            Area::Ipc => "ipc",
            Area::Inventory => "inventory",
        }
    }
}
