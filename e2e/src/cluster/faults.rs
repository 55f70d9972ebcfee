//! Faults: what the scenarios do to a running cluster.

use anyhow::Result;

use super::machine::Machine;
use super::topology::Member;
use super::{Cluster, control_plane, network};

impl Cluster {
    /// Power loss of a node: processes, memory and network go, the disk stays.
    ///
    /// # Errors
    /// If its processes do not go.
    pub fn node_crash(&self, node: Member) -> Result<()> {
        Machine::named(&node.name())?.crash()?;
        network::unplug(&self.parts, node)
    }

    /// Power on, with the disk as it was; returns when kubelet reports the node Ready since this boot, or at once while the API server is
    /// stopped. A running node is left alone.
    ///
    /// # Errors
    /// If the machine does not start or does not become Ready in time.
    pub fn node_start(&self, node: Member) -> Result<()> {
        self.start_machine(node)?;
        if self.apiserver_stopped()? {
            Ok(())
        } else {
            self.wait_ready(&[node])
        }
    }

    /// Power loss, then power on.
    ///
    /// # Errors
    /// As the two.
    pub fn node_reboot(&self, node: Member) -> Result<()> {
        self.node_crash(node)?;
        self.node_start(node)
    }

    /// Drops every packet between two members, in both directions.
    ///
    /// # Errors
    /// If one of them is not plugged in.
    pub fn net_cut(&self, one: Member, other: Member) -> Result<()> {
        network::set_cut(&self.parts, one, other, true)
    }

    /// Ends a cut.
    ///
    /// # Errors
    /// If one of them is not plugged in.
    pub fn net_heal(&self, one: Member, other: Member) -> Result<()> {
        network::set_cut(&self.parts, one, other, false)
    }

    /// Whether the API server was stopped on purpose.
    ///
    /// # Errors
    /// If the control plane is not running.
    pub fn apiserver_stopped(&self) -> Result<bool> {
        let list = Machine::named(control_plane::name())?.order("list")?;
        Ok(list
            .lines()
            .any(|line| line == format!("{} stopped", control_plane::API_SERVER)))
    }

    /// Kills the API server and keeps it from coming back.
    ///
    /// # Errors
    /// If the control plane is not running.
    pub fn apiserver_stop(&self) -> Result<()> {
        Machine::named(control_plane::name())?
            .order(&format!("stop {}", control_plane::API_SERVER))
            .map(drop)
    }

    /// Starts the API server; returns when it is ready.
    ///
    /// # Errors
    /// If it does not become ready in time.
    pub fn apiserver_start(&self) -> Result<()> {
        Machine::named(control_plane::name())?.order(&format!("start {}", control_plane::API_SERVER))?;
        self.wait_api()
    }
}
