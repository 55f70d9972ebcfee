//! Coming up: whatever of the cluster does not run is made and started; the rest is left alone.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::cgroup::Cgroup;
use super::machine::Machine;
use super::machine_spec::{Bind, MachineSpec};
use super::pki::{self, Pki};
use super::topology::{self, Member};
use super::{Cluster, control_plane, forward, netns, network, node, program, state};

/// How long a step of coming up may take, on a loaded machine.
const STEP: Duration = Duration::from_secs(120);
/// How often a level is looked at.
const POLL: Duration = Duration::from_millis(100);

impl Cluster {
    /// Starts what does not run yet, up to this many nodes, and waits until it is ready.
    pub(super) fn converge(&mut self, nodes: u8) -> Result<()> {
        let first = self.state.nodes + 1;
        self.state.nodes = self.state.nodes.max(nodes);
        if !netns::exists(topology::SWITCH) {
            network::create_switch(&self.parts)?;
        }
        let pki = Pki::new(state::folder(&self.home).join("pki"));
        for node in (first..=self.state.nodes).map(Member::Node) {
            pki.create_node(node)?;
        }
        if !netns::exists(&Member::Outside.netns()) {
            network::plug(&self.parts, Member::Outside)?;
        }
        let members: Vec<Member> = std::iter::once(Member::ControlPlane).chain(self.nodes()).collect();
        for member in members {
            self.start_machine(member)?;
        }
        self.start_forwarder()?;
        self.state.save(&self.home)?;
        // Stopped on purpose, perhaps by a scenario that was killed: up means up.
        Machine::named(control_plane::name())?.order(&format!("start {}", control_plane::API_SERVER))?;
        self.wait_api()?;
        self.wait_ready(&self.nodes())?;
        self.state.complete = true;
        self.state.save(&self.home)
    }

    pub(super) fn disk(&self, member: Member) -> PathBuf {
        state::folder(&self.home).join("machines").join(member.name())
    }

    /// Powers a machine on, unless it runs.
    pub(super) fn start_machine(&self, member: Member) -> Result<()> {
        let machine = Machine::named(&member.name())?;
        if machine.init().is_some() {
            return Ok(());
        }
        machine.crash()?;
        network::plug(&self.parts, member)?;
        self.write_files(member)?;
        machine.start(&self.spec(member)?)
    }

    fn spec(&self, member: Member) -> Result<MachineSpec> {
        let disk = self.disk(member);
        let (disks, services) = match member {
            Member::Node(_) => (node::disks(), node::services(member)),
            Member::ControlPlane | Member::Outside => (control_plane::disks(), control_plane::services()),
        };
        let mut binds: Vec<Bind> = disks
            .into_iter()
            .map(|(name, to)| Bind {
                from: disk.join(name),
                to,
                read_only: false,
            })
            .collect();
        binds.push(Bind {
            from: self.parts.kube.clone(),
            to: control_plane::KUBE.into(),
            read_only: true,
        });
        binds.push(Bind {
            from: state::folder(&self.home).join("images"),
            to: node::IMAGES.into(),
            read_only: true,
        });
        Ok(MachineSpec {
            name: member.name(),
            program: program("peregrine-e2e")?,
            tree: self.parts.tree.clone(),
            disk,
            clock_offset: member.clock_offset(),
            binds,
            services,
        })
    }

    /// Writes a machine's configuration onto its disk, while it is off.
    fn write_files(&self, member: Member) -> Result<()> {
        let upper = self.disk(member).join("upper");
        let pki = Pki::new(state::folder(&self.home).join("pki"));
        let write = |path: &str, text: &str| -> Result<()> {
            let path = upper.join(path.trim_start_matches('/'));
            if let Some(folder) = path.parent() {
                fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
            }
            pki::write_private(&path, text)
        };
        let copy = |from: &str, to: &str| -> Result<()> {
            let from = pki.file(from);
            write(
                &format!("{}/{to}", control_plane::CONFIG),
                &fs::read_to_string(&from).with_context(|| format!("cannot read {}", from.display()))?,
            )
        };
        let kubeconfig = |user: &str, to: &str| {
            write(
                &format!("{}/{to}", control_plane::CONFIG),
                &pki.kubeconfig(user, &control_plane::api_url())?,
            )
        };
        let name = member.name();
        write(
            &format!("{}/proxy.json", control_plane::CONFIG),
            &control_plane::proxy_config(&name).to_string(),
        )?;
        let Some(pod_network) = member.pod_network() else {
            for file in control_plane::files() {
                copy(file, file)?;
            }
            return control_plane::USERS
                .iter()
                .try_for_each(|user| kubeconfig(user, &format!("{user}.kubeconfig")));
        };
        kubeconfig("proxy", "proxy.kubeconfig")?;
        kubeconfig(&name, "kubelet.kubeconfig")?;
        copy("ca.crt", "ca.crt")?;
        copy(&format!("{name}-serving.crt"), "serving.crt")?;
        copy(&format!("{name}-serving.key"), "serving.key")?;
        write(
            &format!("{}/kubelet.json", control_plane::CONFIG),
            &node::kubelet_config().to_string(),
        )?;
        write("/etc/containerd/config.toml", &node::containerd_config())?;
        write(
            "/etc/cni/net.d/10-peregrine-e2e.conflist",
            &node::cni_config(&pod_network).to_string(),
        )?;
        fs::create_dir_all(upper.join("etc/containerd/conf.d"))
            .context("cannot make the folder for containerd's drop-ins")?;
        // A machine keeps its identity over reboots.
        if !upper.join("etc/machine-id").exists() {
            let id = fs::read_to_string("/proc/sys/kernel/random/uuid")
                .context("cannot make a machine id")?
                .replace('-', "");
            write("/etc/machine-id", &id)?;
        }
        let runc = upper.join(node::NODE_RUNC.trim_start_matches('/'));
        if let Some(folder) = runc.parent() {
            fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
        }
        fs::copy(program("node-runc")?, &runc)
            .with_context(|| format!("cannot copy node-runc to {}", runc.display()))?;
        Ok(())
    }

    fn start_forwarder(&self) -> Result<()> {
        let cgroup = Cgroup::named(forward::NAME)?;
        if cgroup.populated() {
            return Ok(());
        }
        cgroup.create()?;
        let log = state::folder(&self.home).join("forwarder.log");
        let log = fs::File::create(&log).with_context(|| format!("cannot create {}", log.display()))?;
        Command::new(program("peregrine-e2e")?)
            .args(["internal", "forward", &self.state.port.to_string()])
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context("cannot start the forwarder")?;
        Ok(())
    }

    /// Waits until the API server says that it is ready, through the forwarder.
    pub(super) fn wait_api(&self) -> Result<()> {
        await_level("the API server to be ready", STEP, || {
            let output = self
                .kubectl()
                .args(["get", "--raw", "/readyz", "--request-timeout=3s"])
                .output()
                .context("cannot run kubectl")?;
            Ok(if output.status.success() {
                Ok(())
            } else {
                Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
            })
        })
    }

    /// Waits until these nodes are Ready, each since its present boot.
    pub(super) fn wait_ready(&self, nodes: &[Member]) -> Result<()> {
        let expected: Vec<(String, String)> = nodes
            .iter()
            .map(|node| Ok((node.name(), self.boot_id(*node)?)))
            .collect::<Result<_>>()?;
        await_level("every node to be Ready", STEP, || {
            let template = "{range .items[*]}{.metadata.name} {.status.nodeInfo.bootID} {.status.conditions[?(@.type==\"Ready\")].status}{\"\\n\"}{end}";
            let output = self
                .kubectl()
                .args([
                    "get",
                    "nodes",
                    "--request-timeout=5s",
                    "-o",
                    &format!("jsonpath={template}"),
                ])
                .output()
                .context("cannot run kubectl")?;
            let listing = String::from_utf8_lossy(&output.stdout).into_owned();
            let waiting = not_ready(&listing, &expected);
            Ok(if output.status.success() && waiting.is_empty() {
                Ok(())
            } else {
                Err(format!("not Ready: {}", waiting.join(", ")))
            })
        })
    }

    /// The boot id that a running node has; kubelet reports it.
    fn boot_id(&self, node: Member) -> Result<String> {
        let init = self
            .init_of(node)
            .with_context(|| format!("{} is not running", node.name()))?;
        let path = format!("/proc/{init}/root/proc/sys/kernel/random/boot_id");
        Ok(fs::read_to_string(&path)
            .with_context(|| format!("cannot read the boot id of {}", node.name()))?
            .trim()
            .to_owned())
    }
}

/// Those of the expected nodes (name, boot id) that the listing (name, boot id, Ready) does not show as Ready.
fn not_ready(listing: &str, expected: &[(String, String)]) -> Vec<String> {
    let ready: Vec<(&str, &str)> = listing
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ');
            let (name, boot, ready) = (fields.next()?, fields.next()?, fields.next()?);
            (ready == "True").then_some((name, boot))
        })
        .collect();
    expected
        .iter()
        .filter(|(name, boot)| !ready.contains(&(name.as_str(), boot.as_str())))
        .map(|(name, _)| name.clone())
        .collect()
}

/// Looks until the level is reached; an inner error is why not yet.
fn await_level(what: &str, limit: Duration, mut look: impl FnMut() -> Result<Result<(), String>>) -> Result<()> {
    let deadline = Instant::now() + limit;
    loop {
        match look()? {
            Ok(()) => return Ok(()),
            Err(why) if Instant::now() > deadline => bail!("waited {} s for {what}: {why}", limit.as_secs()),
            Err(_) => std::thread::sleep(POLL),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_ready_only_since_its_present_boot() {
        let expected = |pairs: &[(&str, &str)]| {
            pairs
                .iter()
                .map(|(name, boot)| ((*name).to_owned(), (*boot).to_owned()))
                .collect::<Vec<_>>()
        };
        let listing = "node-a 1 True\nnode-b 1 False\nnode-c  \n";
        assert!(not_ready(listing, &expected(&[("node-a", "1")])).is_empty());
        assert_eq!(
            not_ready(
                listing,
                &expected(&[("node-a", "2"), ("node-b", "1"), ("node-c", "1"), ("node-d", "1")])
            ),
            ["node-a", "node-b", "node-c", "node-d"]
        );
    }

    #[test]
    fn a_level_that_never_comes_says_why() {
        let error = await_level("rain", Duration::ZERO, || Ok(Err("clear sky".to_owned()))).unwrap_err();
        assert_eq!(error.to_string(), "waited 0 s for rain: clear sky");
    }
}
