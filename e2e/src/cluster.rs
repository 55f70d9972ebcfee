//! The cluster: up, down, faults, and ways in.
//!
//! ```text
//! host ── 127.0.0.1:PORT ── forwarder ──┐
//!                                       │ pg-cp   etcd, API server, controllers, scheduler, kube-proxy
//!        pg-sw (switch) ────────────────┼ pg-out  witnesses, outside clients (the host's file system)
//!                                       └ pg-node-a …  containerd, kubelet, kube-proxy; each a machine of its own
//! ```
//! What exists is found by looking, never by remembering: processes by their cgroup, namespaces by the prefix of their names; mounts live in
//! the machines' own mount namespaces and go with them. That is why `down` works after any crash of `up`.

pub(crate) mod cgroup;
mod control_plane;
mod enter;
mod forward;
mod init;
mod machine;
mod machine_spec;
mod netns;
mod network;
mod node;
mod pki;
mod preflight;
mod state;
mod topology;
mod verbs;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use cgroup::Cgroup;
use machine::Machine;
use machine_spec::{Bind, MachineSpec};
use pki::Pki;
use state::State;
pub use topology::{MAX_NODES, Member};
pub use verbs::{Verb, internal, run};

use crate::oci_image::{Entry, Image};
use crate::parts::{self, Parts};
use crate::progress;

/// How long a step of coming up may take, on a loaded machine.
const STEP: Duration = Duration::from_secs(120);
/// How often a level is looked at.
const POLL: Duration = Duration::from_millis(100);

/// How to bring a cluster up.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How many workers.
    pub nodes: u8,
}

impl Default for Options {
    fn default() -> Self {
        Self { nodes: 3 }
    }
}

/// A cluster on this machine.
#[derive(Debug)]
pub struct Cluster {
    home: PathBuf,
    parts: Parts,
    state: State,
}

impl Cluster {
    /// Brings the cluster up, or finds it running: what is missing of it is started, nothing that runs is touched.
    ///
    /// # Errors
    /// What the machine lacks, what could not be had, or what did not become ready in time.
    pub fn up(options: &Options) -> Result<Self> {
        Member::node(options.nodes)?;
        let home = parts::home()?;
        preflight::check(&home)?;
        let _lock = state::lock(&home)?;
        let known = State::load(&home)?;
        if known.is_none() {
            // No process of ours runs before the state is written.
            if let Some(init) = Machine::named(control_plane::name())?.init() {
                bail!(
                    "a cluster that was started with another PEREGRINE_HOME is running (process {init}): take it down first, with `cargo xtask cluster down`"
                );
            }
            Parts::sweep(&home)?;
        }
        let parts = Parts::ensure(&home)?;
        network::probe(&parts)?;
        let state = match known {
            Some(state) if state.complete && whole(&state) => state,
            _ => {
                // What a killed `up` or a restarted machine left goes first.
                remove_all(&home)?;
                State::create(&home, &parts)?
            }
        };
        let mut cluster = Self { home, parts, state };
        progress::step(
            &format!("cluster with {} nodes", options.nodes.max(cluster.state.nodes)),
            || cluster.converge(options.nodes),
        )?;
        Ok(cluster)
    }

    /// The cluster that is up.
    ///
    /// # Errors
    /// If none is.
    pub fn running() -> Result<Self> {
        preflight::root()?;
        let home = parts::home()?;
        let state = State::load(&home)?
            .filter(|state| state.complete)
            .context("no cluster is up: `cargo xtask cluster up` brings one up")?;
        let parts = state.parts();
        Ok(Self { home, parts, state })
    }

    /// Removes everything of the cluster, whoever brought it up and however far that got.
    ///
    /// # Errors
    /// If something resists; a second call goes on where this one stopped.
    pub fn down() -> Result<()> {
        preflight::root()?;
        let home = parts::home()?;
        let _lock = state::lock(&home)?;
        remove_all(&home)
    }

    /// The file with which `kubectl` and other programs of this machine reach the cluster.
    pub fn kubeconfig_path(&self) -> PathBuf {
        state::folder(&self.home).join("admin.kubeconfig")
    }

    /// Where the parts of the cluster are.
    pub fn parts(&self) -> &Parts {
        &self.parts
    }

    /// The workers.
    pub fn nodes(&self) -> Vec<Member> {
        (1..=self.state.nodes).map(Member::Node).collect()
    }

    /// The member of that name.
    ///
    /// # Errors
    /// If this cluster has none.
    pub fn member(&self, name: &str) -> Result<Member> {
        let known = self.nodes().into_iter().chain([Member::ControlPlane, Member::Outside]);
        let names: Vec<String> = known.clone().map(Member::name).collect();
        Member::parse(name)
            .filter(|member| known.clone().any(|known| known == *member))
            .with_context(|| format!("{name} is nobody of this cluster: say one of {}", names.join(", ")))
    }

    /// The worker of that name.
    ///
    /// # Errors
    /// If this cluster has none.
    pub fn node(&self, name: &str) -> Result<Member> {
        let names: Vec<String> = self.nodes().into_iter().map(Member::name).collect();
        self.member(name)
            .ok()
            .filter(|member| matches!(member, Member::Node(_)))
            .with_context(|| format!("{name} is no node of this cluster: say one of {}", names.join(", ")))
    }

    // ---- ways in -----------------------------------------------------------------------------------------------------------------------

    /// kubectl for this cluster; arguments are the caller's.
    pub fn kubectl(&self) -> Command {
        let mut command = self.parts.tool("kubectl");
        command.env("KUBECONFIG", self.kubeconfig_path());
        command
    }

    /// helm for this cluster; arguments are the caller's.
    pub fn helm(&self) -> Command {
        let mut command = Command::new(&self.parts.helm);
        command.env("KUBECONFIG", self.kubeconfig_path());
        command
    }

    /// A command in a member, as a command of the host: in all namespaces of a node; with the host's file system in `cp` and `out`.
    ///
    /// # Errors
    /// If the program that enters is not beside this one.
    pub fn exec(&self, member: Member, argv: &[&str]) -> Result<Command> {
        let mut command = Command::new(program("peregrine-e2e")?);
        command.args(["cluster", "exec", &member.name(), "--"]).args(argv);
        Ok(command)
    }

    /// PID 1 of a node or of the control plane, as the host counts; none if it is not running.
    pub fn init_of(&self, member: Member) -> Option<u32> {
        Machine::named(&member.name()).ok()?.init()
    }

    /// The folder of the host that is a member's `/var/log`.
    pub fn log_folder(&self, member: Member) -> PathBuf {
        self.disk(member).join("log")
    }

    /// Imports an image archive into every running node, at the same time.
    ///
    /// # Errors
    /// If the file cannot be read, or a node refuses it.
    pub fn load(&self, archive: &Path) -> Result<()> {
        ensure!(
            archive.is_file(),
            "{} is no image archive: name a file as `docker save` or an OCI tool writes it",
            archive.display()
        );
        let running: Vec<Member> = self
            .nodes()
            .into_iter()
            .filter(|node| self.init_of(*node).is_some())
            .collect();
        ensure!(
            !running.is_empty(),
            "no node is running: there is nothing to load an image into"
        );
        let imports = running
            .into_iter()
            .map(|node| {
                let file = fs::File::open(archive).with_context(|| format!("cannot open {}", archive.display()))?;
                let mut command = self.exec(node, &["ctr", "-n", "k8s.io", "images", "import", "-"])?;
                let child = command
                    .stdin(file)
                    .stdout(Stdio::null())
                    .stderr(Stdio::piped())
                    .spawn()
                    .with_context(|| format!("cannot start the import into {}", node.name()))?;
                Ok((node, child))
            })
            .collect::<Result<Vec<_>>>()?;
        for (node, child) in imports {
            let output = child
                .wait_with_output()
                .with_context(|| format!("cannot wait for the import into {}", node.name()))?;
            ensure!(
                output.status.success(),
                "{} did not import {}: {}",
                node.name(),
                archive.display(),
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(())
    }

    // ---- faults ------------------------------------------------------------------------------------------------------------------------

    /// Power loss of a node: processes, memory and network go, the disk stays.
    ///
    /// # Errors
    /// If its processes do not go.
    pub fn node_crash(&self, node: Member) -> Result<()> {
        Machine::named(&node.name())?.crash()?;
        network::unplug(&self.parts, node)
    }

    /// Power on, with the disk as it was; returns when kubelet reports the node Ready since this boot. A running node is left alone.
    ///
    /// # Errors
    /// If the machine does not start or does not become Ready in time.
    pub fn node_start(&self, node: Member) -> Result<()> {
        self.start_machine(node)?;
        self.wait_ready(&[node])
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

    // ---- coming up ---------------------------------------------------------------------------------------------------------------------

    /// Starts what does not run yet, up to this many nodes, and waits until it is ready.
    fn converge(&mut self, nodes: u8) -> Result<()> {
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
        self.wait_api()?;
        self.wait_ready(&self.nodes())?;
        self.state.complete = true;
        self.state.save(&self.home)
    }

    fn disk(&self, member: Member) -> PathBuf {
        state::folder(&self.home).join("machines").join(member.name())
    }

    /// Powers a machine on, unless it runs.
    fn start_machine(&self, member: Member) -> Result<()> {
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
    fn wait_api(&self) -> Result<()> {
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
    fn wait_ready(&self, nodes: &[Member]) -> Result<()> {
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

/// Whether what a complete cluster always has is there: not after the machine was restarted, or another home's `down`.
fn whole(state: &State) -> bool {
    Machine::named(control_plane::name()).is_ok_and(|machine| machine.init().is_some())
        && netns::exists(topology::SWITCH)
        && state.parts().missing().is_empty()
}

/// Takes everything away, in an order in which nothing comes back.
fn remove_all(home: &Path) -> Result<()> {
    Cgroup::all()?.destroy()?;
    for name in netns::ours() {
        netns::delete(&name)?;
    }
    netns::tidy();
    cgroup::unmount();
    state::remove(home)
}

/// One of our programs: they lie beside this one, or one folder up from a test.
pub(crate) fn program(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().context("cannot find this program's own path")?;
    own.ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
        .with_context(|| {
            format!(
                "the program {name} is not beside {}: build it with `cargo build -p e2e`",
                own.display()
            )
        })
}

/// The sandbox image of the nodes.
fn pause_image() -> Result<Image> {
    Ok(Image {
        name: node::PAUSE_IMAGE.to_owned(),
        entries: vec![Entry::program("/pause", program("pause")?)],
        entrypoint: vec!["/pause".to_owned()],
        ..Image::default()
    })
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
