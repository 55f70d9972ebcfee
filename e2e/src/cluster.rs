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

mod assemble;
pub(crate) mod cgroup;
mod control_plane;
mod enter;
mod faults;
mod forward;
mod init;
mod machine;
mod machine_root;
mod machine_spec;
mod netns;
mod network;
mod node;
mod pki;
mod preflight;
mod services;
mod state;
mod topology;
mod verbs;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};

use cgroup::Cgroup;
use machine::Machine;
use state::State;
pub use topology::{MAX_NODES, Member};
pub use verbs::{Verb, internal, run};

use crate::oci_image::{Entry, Image};
use crate::parts::{self, Parts};
use crate::progress;

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

    /// What there is of a cluster on this machine beside cached parts, in words: nothing after [`Cluster::down`].
    ///
    /// # Errors
    /// If the machine cannot be looked at.
    pub fn leftovers() -> Result<Vec<String>> {
        let home = parts::home()?;
        let mut left: Vec<String> = netns::ours()
            .into_iter()
            .map(|name| format!("network namespace {name}"))
            .collect();
        if let Some(cgroup) = cgroup::existing() {
            left.push(format!("cgroup {}", cgroup.display()));
        }
        let mounts = fs::read_to_string("/proc/self/mounts").context("cannot read /proc/self/mounts")?;
        let home_text = home.display().to_string();
        left.extend(
            mounts
                .lines()
                .filter(|line| line.contains(&home_text))
                .map(|line| format!("mount {line}")),
        );
        if state::folder(&home).exists() {
            left.push(format!("folder {}", state::folder(&home).display()));
        }
        Ok(left)
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
    machine::forget_settings()?;
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
