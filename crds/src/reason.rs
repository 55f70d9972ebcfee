//! One vocabulary for conditions, events and metric labels; each reason with the remedy that a user can apply.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident => $remedy:expr,)*) => {
        /// Why a condition has its value, an event was published or a check was refused.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
        pub enum Reason { $($(#[$doc])* $name,)* }

        impl Reason {
            /// All reasons, for documentation and tests.
            pub const ALL: &[Reason] = &[$(Reason::$name,)*];

            /// The name as it stands in conditions and events.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Reason::$name => stringify!($name),)* }
            }

            /// The reason of this name.
            #[must_use]
            pub fn from_name(name: &str) -> Option<Reason> {
                Reason::ALL.iter().copied().find(|reason| reason.as_str() == name)
            }

            /// What a user can do about it; empty where nothing needs doing.
            #[must_use]
            pub fn remedy(self) -> &'static str {
                match self { $(Reason::$name => $remedy,)* }
            }
        }
    };
}

reasons! {
    // progress
    /// The spec is understood and the pod was found.
    Accepted => "",
    /// The checks passed; the move may begin.
    Eligible => "",
    /// The report of a dry run is complete; nothing was moved.
    DryRunComplete => "",
    /// The node's agent has what it needs.
    NodeReady => "",
    /// Waiting for the agent of the source node.
    WaitingForSourceAgent => "See the MigrationNode of the source node and the log of its node-agent.",
    /// Waiting for its turn: a limit of moves at once is reached.
    WaitingForSlot => "Wait, or raise maxInbound/maxOutbound of the MigrationNode or the operator's --max-moves.",
    /// Waiting for the scheduler to place the target pod.
    WaitingForScheduler => "See the events of the target pod.",
    /// Waiting for the target pod's sandbox and shepherds.
    WaitingForTarget => "See the events of the target pod and the log of the target's node-agent.",
    /// Waiting for the agents to freeze, copy and restore.
    WaitingForRestore => "See the logs of both node-agents.",
    /// Waiting for the source's kubelet to end the released source.
    WaitingForSourceEnd => "See the source node's kubelet; the source stays frozen and never runs again.",
    /// Aborted: waiting until the target is gone and the source is known to run.
    WaitingForRollback => "See the logs of both node-agents; the source's agent resumes the pod as soon as it can.",
    /// Waiting for the moved pod to become Ready.
    WaitingForReady => "See the moved pod's readiness probe.",
    /// Shepherds stand for every container of the target.
    ShepherdsReady => "",
    /// Every container of the target is restored and held by the freezer.
    AllContainersHeld => "",
    /// The decision is Committed: the target runs.
    DecisionCommitted => "",
    /// The source is gone.
    SourceGone => "",
    /// Nothing on the source node is needed any more.
    NothingLeft => "",
    /// The pod runs on the target; the source is gone.
    Migrated => "",
    /// A cold move: a new start on the target became Ready and the old pod was ended.
    StartedCold => "",
    // ends before a commit
    /// The user asked for it before the commit; the source goes on.
    CanceledByUser => "",
    /// Nothing was done: another reason stands beside it.
    NotAdmitted => "",
    // refusals by the operator
    /// There is no such pod.
    PodNotFound => "Name a pod of this namespace in spec.podRef.name.",
    /// The pod has this name but another uid.
    PodReplaced => "Create a new ProcessMigration without spec.podRef.uid, or with the uid of the present pod.",
    /// The pod is not running.
    PodNotRunning => "Wait until every container of the pod runs; use strategy Cold for a pod that has not started.",
    /// The pod is being deleted.
    PodTerminating => "",
    /// The pod has a controller that is not supported yet.
    OwnerNotSupported => "Only pods without a controller can be moved by this version.",
    /// The strategy is not available yet.
    StrategyNotAvailable => "Use StopAndCopy or Cold.",
    /// Another migration of the same pod is under way.
    AlreadyMigrating => "Wait for the other migration, or cancel it with spec.desiredState: Canceled.",
    /// The pod uses something that cannot be moved.
    PodNotMigratable => "See status.eligibility.checks: each refusal names the thing and its remedy.",
    /// No node may take the pod.
    NoTargetNode => "See status.eligibility.checks and `kubectl get migrationnodes`.",
    /// The target is the node on which the pod already runs.
    TargetIsSource => "Name another node in spec.target, or none.",
    /// A node's agent is not ready or lacks something.
    NodeNotReady => "See `kubectl describe migrationnode`.",
    /// The nodes differ in something that running processes depend on.
    NodesIncompatible => "Choose a target node whose MigrationNode has all that the source's has.",
    /// The scheduler found no node.
    Unschedulable => "Make room on a compatible node, or widen spec.target.",
    /// The API refused the target pod.
    TargetRefused => "See the message: a quota or an admission policy forbids the target pod.",
    /// The stored target pod differs from the source in something that matters.
    TargetSpecDrift => "An admission webhook or policy changes pods: exempt pods with the label peregrine.dev/migration.",
    /// The freeze would be longer than allowed.
    FreezeTooLong => "Raise spec.maxFreezeMilliseconds or the probes' periodSeconds x failureThreshold.",
    // failures
    /// The pod was deleted by someone.
    PodDeleted => "",
    /// No progress for spec.progressTimeoutSeconds.
    ProgressTimeout => "See status.conditions for what was waited for.",
    /// spec.activeDeadlineSeconds is over.
    DeadlineExceeded => "Raise spec.activeDeadlineSeconds.",
    /// The dump failed; the source runs on.
    CheckpointFailed => "See the message, which names CRIU's first error.",
    /// The restore failed; the source runs on.
    RestoreFailed => "See the message, which names CRIU's first error.",
    /// The copy failed; the source runs on.
    TransferFailed => "Check the network between the two nodes' agents (port 9632/tcp).",
    /// The peer sent something that is not allowed, or is not who it should be.
    PeerRefused => "See the logs of both node-agents; their versions may differ.",
    /// An agent was restarted in the middle of the attempt.
    AgentRestarted => "Create a new ProcessMigration.",
    /// The target pod ended before the commit.
    TargetLost => "See the events of the target pod.",
    /// The source pod ended before the commit.
    SourceLost => "",
    /// The node of the source is gone.
    SourceNodeLost => "",
    /// There is not enough memory for the checkpoint.
    NotEnoughMemory => "Free memory on the node, or raise the agent's checkpoint limit.",
    /// The reply to a write was lost: both sides stay stopped and read again.
    DecisionUnknown => "Restore the connection to the API server; both sides wait for it.",
    /// The API server cannot be reached.
    ApiUnavailable => "Restore the connection to the API server.",
    /// Behind the commit the pod's memory could not be made complete: it was killed rather than left to run with wrong memory.
    MemoryLost => "See the message; the kubelet starts the containers anew as spec.restartPolicy says. Find out what killed the pager.",
    /// A step of an agent failed.
    StepFailed => "See the message and the agent's log.",
    /// The agent has undone its installation on the node.
    Uninstalled => "Run `helm upgrade --install` again if the node is to take part in moves.",
    // checks of what the pod's processes hold
    /// A terminal is attached.
    TtyNotSupported => "Set tty: false in the container.",
    /// An ephemeral container runs.
    EphemeralContainer => "Delete and re-create the pod without the debug container; ephemeral containers cannot be removed.",
    /// A volume cannot be carried.
    VolumeNotSupported => "Use configMap, secret, downwardAPI, projected or a volume that both nodes share.",
    /// A mount that Kubernetes did not make.
    MountNotSupported => "Unmount it before the move; mounts made inside a container cannot be carried.",
    /// A device is open.
    DeviceNotSupported => "Close the device; only null, zero, full, random, urandom and tty can be carried.",
    /// A socket of a kind that cannot be carried.
    SocketNotSupported => "Close the socket before the move.",
    /// Multipath TCP.
    MptcpNotSupported => "Start the pod with runtimeClassName: peregrine, which turns MPTCP off in its sandbox, or set GODEBUG=multipathtcp=0.",
    /// A process is traced.
    TracedProcess => "Detach the debugger.",
    /// io_uring.
    IoUringNotSupported => "Use the RuntimeDefault seccomp profile, under which programs fall back to epoll.",
    /// userfaultfd.
    UserfaultfdNotSupported => "Turn off the feature that uses userfaultfd.",
    /// fanotify.
    FanotifyNotSupported => "Close the fanotify watch.",
    /// inotify watches on the root filesystem.
    InotifyNotSupported => "Turn off file watching in the program, or watch only files on tmpfs.",
    /// A huge page mapping.
    HugetlbNotSupported => "Use transparent huge pages instead of hugetlbfs.",
    /// A POSIX message queue.
    MessageQueueNotSupported => "Close the POSIX message queue.",
    /// A descriptor of an unknown kind.
    DescriptorNotSupported => "Close the descriptor before the move.",
    /// The pod shares a namespace of its node.
    HostNamespace => "Do not use hostNetwork, hostPID or hostIPC.",
    /// The containers of the pod share a pid namespace.
    SharedProcessNamespace => "Remove shareProcessNamespace from the pod.",
    /// The pod has a user namespace of its own.
    UserNamespaceNotSupported => "Remove hostUsers: false from the pod.",
    /// System V shared memory in a second container of the pod.
    SharedMemoryNotSupported => "Use System V shared memory in one container of the pod only, or POSIX shared memory (/dev/shm).",
    /// The container is privileged or has devices.
    PrivilegedContainer => "Privileged containers hold the node's devices and cannot be moved.",
    /// A namespace made inside the container.
    NestedNamespace => "Programs that make their own namespaces inside the container cannot be moved.",
    /// Something in the pod's network namespace that the runtime did not make.
    NetworkStateNotSupported => "Remove the interfaces, routes or rules that the container made in its network namespace.",
    /// An established connection that cannot be preserved.
    ConnectionNotPreservable => "Set spec.connections to BestEffort or Close.",
    /// A process is in a state in which it cannot be dumped.
    ProcessState => "Wait until the process can be stopped (it is a zombie of another parent, or in an uninterruptible wait).",
    /// A file lock that cannot be carried.
    LockNotSupported => "Release the lock or lease before the move.",
    /// What a process holds could not be read.
    Unknown => "See the node-agent's log; what is unknown is not moved.",
    /// A session of kubectl exec or attach will end.
    ExecSessionEnds => "",
    /// Something will be lost or different; the move is allowed.
    WillBeLost => "",
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_of_a_check_has_a_remedy() {
        for reason in Reason::ALL.iter().filter(|r| r.as_str().ends_with("NotSupported")) {
            assert!(!reason.remedy().is_empty(), "{reason} has no remedy");
        }
    }

    #[test]
    fn reasons_are_camel_case_as_the_api_conventions_ask() {
        for reason in Reason::ALL {
            assert!(reason.as_str().chars().all(|c| c.is_ascii_alphanumeric()));
            assert!(reason.as_str().starts_with(|c: char| c.is_ascii_uppercase()));
        }
    }
}
