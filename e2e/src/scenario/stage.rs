//! Where scenarios play: a cluster with Peregrine installed, a client, a witness.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use kube::core::Request;
use nix::fcntl::{Flock, FlockArg};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::cluster::{Cluster, Member};
use crate::images::{self, Images};
use crate::parts;
use crate::progress;
use crate::witness::{self, Life};

/// Namespace of the workloads.
pub const NAMESPACE: &str = "peregrine-e2e";
/// Namespace of the release.
pub const RELEASE_NAMESPACE: &str = "peregrine-system";
/// How often a level is looked at: by somebody who hopes to see it pass, and by somebody who has waited for long.
const POLL: Duration = Duration::from_millis(50);
const POLL_LATER: Duration = Duration::from_millis(250);
/// When the one becomes the other.
const LONG: Duration = Duration::from_secs(4);
/// The longest a single request may take.
const REQUEST: Duration = Duration::from_secs(15);
/// Port of the witness.
const WITNESS_PORT: u16 = 7000;

/// The stage.
pub struct Stage {
    runtime: tokio::runtime::Runtime,
    client: kube::Client,
    cluster: Option<Cluster>,
    images: Images,
    witness: Option<Witness>,
    nodes: Vec<String>,
    /// Nodes that one of the scenarios that play side by side may have for itself.
    free: Mutex<Vec<String>>,
    freed: Condvar,
    /// One play at a time: they share a namespace, and some break nodes.
    _alone: Option<Flock<File>>,
}

impl std::fmt::Debug for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stage")
            .field("nodes", &self.nodes)
            .finish_non_exhaustive()
    }
}

/// A node that a scenario has for itself, until it is dropped.
#[derive(Debug)]
pub struct Lent<'a> {
    stage: &'a Stage,
    /// Its name.
    pub node: String,
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        let mut free = self.stage.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.push(std::mem::take(&mut self.node));
        self.stage.freed.notify_one();
    }
}

/// The witness's process, ended with the stage.
struct Witness {
    process: Child,
    socket: PathBuf,
}

impl Drop for Witness {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

impl Stage {
    /// On our own cluster, which is up.
    ///
    /// # Errors
    /// If it is not, an image cannot be made or loaded, or the witness does not start.
    pub fn on_own_cluster() -> Result<Self> {
        let cluster = Cluster::running()?;
        let alone = alone()?;
        let images = Images::build()?;
        images.load(&cluster)?;
        let nodes = cluster.nodes().into_iter().map(Member::name).collect();
        let witness = Some(Witness::start(&cluster)?);
        let stage = Self::new(Some(cluster.kubeconfig_path()), Some(cluster), images, witness, nodes)?;
        Ok(Self {
            _alone: Some(alone),
            ..stage
        })
    }

    /// On the cluster of `KUBECONFIG`. Its nodes must be able to pull our images; there is no witness and no fault of a node.
    ///
    /// # Errors
    /// If it cannot be reached.
    pub fn on_kubeconfig() -> Result<Self> {
        let stage = Self::new(None, None, Images::build()?, None, Vec::new())?;
        let list: Value = stage
            .get_path("/api/v1", "nodes")?
            .context("the cluster has no nodes")?;
        let nodes = list["items"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|node| node["metadata"]["name"].as_str().map(str::to_owned))
            .collect();
        Ok(Self { nodes, ..stage })
    }

    fn new(
        kubeconfig: Option<PathBuf>,
        cluster: Option<Cluster>,
        images: Images,
        witness: Option<Witness>,
        nodes: Vec<String>,
    ) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .context("cannot start the asynchronous runtime")?;
        let client = runtime.block_on(async {
            let config = match kubeconfig {
                Some(path) => {
                    let kubeconfig = kube::config::Kubeconfig::read_from(&path)
                        .with_context(|| format!("cannot read {}", path.display()))?;
                    kube::Config::from_custom_kubeconfig(kubeconfig, &kube::config::KubeConfigOptions::default())
                        .await
                        .context("the kubeconfig is not usable")?
                }
                None => kube::Config::infer()
                    .await
                    .context("no cluster is known: set KUBECONFIG")?,
            };
            kube::Client::try_from(config).context("cannot make a client")
        })?;
        let stage = Self {
            runtime,
            client,
            cluster,
            images,
            witness,
            free: Mutex::new(nodes.iter().skip(1).cloned().collect()),
            freed: Condvar::new(),
            nodes,
            _alone: None,
        };
        stage.apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}))?;
        Ok(stage)
    }

    // ---- what there is -----------------------------------------------------------------------------------------------------------------

    /// Our own cluster.
    ///
    /// # Errors
    /// If it is somebody else's.
    pub fn cluster(&self) -> Result<&Cluster> {
        self.cluster
            .as_ref()
            .context("this cluster is not ours: faults of nodes are not possible")
    }

    /// Whether the cluster is ours.
    #[must_use]
    pub fn is_own(&self) -> bool {
        self.cluster.is_some()
    }

    /// Our images.
    #[must_use]
    pub fn images(&self) -> &Images {
        &self.images
    }

    /// Names of the nodes.
    #[must_use]
    pub fn nodes(&self) -> &[String] {
        &self.nodes
    }

    /// A node that is none of these.
    ///
    /// # Errors
    /// If there is none.
    pub fn other_node(&self, not: &[&str]) -> Result<String> {
        self.nodes
            .iter()
            .find(|node| !not.contains(&node.as_str()))
            .cloned()
            .with_context(|| format!("there is no node beside {}", not.join(", ")))
    }

    /// A node that everybody may use: it is never lent.
    ///
    /// # Errors
    /// If there are no nodes.
    pub fn common_node(&self) -> Result<String> {
        self.nodes.first().cloned().context("the cluster has no nodes")
    }

    /// Lends one of the other nodes to a scenario that will break what runs there; waits until one is free.
    pub fn lend(&self) -> Lent<'_> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(node) = free.pop() {
                return Lent { stage: self, node };
            }
            free = self.freed.wait(free).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Where a node's file is in the file system of this machine.
    ///
    /// # Errors
    /// If the cluster is not ours, or the node is down.
    pub fn path_on_node(&self, node: &str, path: &str) -> Result<PathBuf> {
        let cluster = self.cluster()?;
        let init = cluster
            .init_of(cluster.node(node)?)
            .with_context(|| format!("{node} is down"))?;
        Ok(PathBuf::from(format!("/proc/{init}/root{path}")))
    }

    /// kubectl for the cluster.
    #[must_use]
    pub fn kubectl(&self) -> Command {
        self.cluster
            .as_ref()
            .map_or_else(|| Command::new("kubectl"), Cluster::kubectl)
    }

    /// helm for the cluster.
    #[must_use]
    pub fn helm(&self) -> Command {
        self.cluster
            .as_ref()
            .map_or_else(|| Command::new("helm"), Cluster::helm)
    }

    /// Runs a script in a node and gives back what it printed.
    ///
    /// # Errors
    /// If the cluster is not ours, or the script fails.
    pub fn on_node(&self, node: &str, script: &str) -> Result<String> {
        let cluster = self.cluster()?;
        let command = cluster.exec(cluster.node(node)?, &["sh", "-c", script])?;
        output(command, &format!("the script on {node}"))
    }

    /// The client, for what has no method here.
    #[must_use]
    pub fn client(&self) -> kube::Client {
        self.client.clone()
    }

    /// Waits for something asynchronous, not longer than a request may take.
    ///
    /// # Errors
    /// What it returns, or that it took too long.
    pub fn block<T, E: Into<anyhow::Error>>(&self, work: impl Future<Output = Result<T, E>>) -> Result<T> {
        self.runtime
            .block_on(async { tokio::time::timeout(REQUEST, work).await })
            .map_err(|_| anyhow!("the API server did not answer within {} s", REQUEST.as_secs()))?
            .map_err(Into::into)
    }

    // ---- objects -----------------------------------------------------------------------------------------------------------------------

    /// An object of a namespace, if it is there.
    ///
    /// # Errors
    /// If the API server does not say.
    pub fn find<K>(&self, namespace: &str, name: &str) -> Result<Option<K>>
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope> + Clone + DeserializeOwned + std::fmt::Debug,
        K::DynamicType: Default,
    {
        self.block(Api::<K>::namespaced(self.client(), namespace).get_opt(name))
            .with_context(|| format!("cannot read {name}"))
    }

    /// All objects of a namespace that have a label.
    ///
    /// # Errors
    /// If the API server does not say.
    pub fn list<K>(&self, namespace: &str, selector: &str) -> Result<Vec<K>>
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope> + Clone + DeserializeOwned + std::fmt::Debug,
        K::DynamicType: Default,
    {
        let parameters = kube::api::ListParams::default().labels(selector);
        Ok(self
            .block(Api::<K>::namespaced(self.client(), namespace).list(&parameters))
            .context("cannot list")?
            .items)
    }

    /// Makes an object in the workloads' namespace.
    ///
    /// # Errors
    /// If the API server refuses it.
    pub fn create<K>(&self, object: Value) -> Result<K>
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope>
            + Clone
            + DeserializeOwned
            + serde::Serialize
            + std::fmt::Debug,
        K::DynamicType: Default,
    {
        let object: K = serde_json::from_value(object).context("the object is not of its kind")?;
        self.block(Api::<K>::namespaced(self.client(), NAMESPACE).create(&PostParams::default(), &object))
    }

    /// Merges a change into an object of the workloads' namespace.
    ///
    /// # Errors
    /// If the API server refuses it.
    pub fn merge<K>(&self, name: &str, change: &Value) -> Result<K>
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope> + Clone + DeserializeOwned + std::fmt::Debug,
        K::DynamicType: Default,
    {
        self.block(Api::<K>::namespaced(self.client(), NAMESPACE).patch(
            name,
            &PatchParams::default(),
            &Patch::Merge(change),
        ))
    }

    /// Deletes an object of the workloads' namespace; not being there is fine.
    ///
    /// # Errors
    /// If the API server refuses.
    pub fn delete<K>(&self, name: &str, grace: Option<u32>) -> Result<()>
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope> + Clone + DeserializeOwned + std::fmt::Debug,
        K::DynamicType: Default,
    {
        let parameters = DeleteParams {
            grace_period_seconds: grace,
            ..DeleteParams::default()
        };
        match self.block(Api::<K>::namespaced(self.client(), NAMESPACE).delete(name, &parameters)) {
            Ok(_) => Ok(()),
            Err(error) if is_not_found(&error) => Ok(()),
            Err(error) => Err(error).with_context(|| format!("cannot delete {name}")),
        }
    }

    /// What the API server serves at a path; nothing, if there is nothing.
    ///
    /// # Errors
    /// If it does not say.
    pub fn get_path<T: DeserializeOwned>(&self, folder: &str, name: &str) -> Result<Option<T>> {
        let request = Request::new(folder)
            .get(name, &kube::api::GetParams::default())
            .context("not a path")?;
        match self.block(self.client.request::<T>(request)) {
            Ok(value) => Ok(Some(value)),
            Err(error) if is_not_found(&error) => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot read {folder}/{name}")),
        }
    }

    /// Applies an object as `kubectl apply` does.
    ///
    /// # Errors
    /// If the API server refuses it.
    pub fn apply(&self, object: &Value) -> Result<()> {
        let mut command = self.kubectl();
        command.args(["apply", "-f", "-"]);
        input(command, object.to_string().as_bytes(), "kubectl apply").map(drop)
    }

    /// Looks until a level is reached; what `look` gives with `Err` is why not yet.
    ///
    /// # Errors
    /// If it is not reached in time.
    pub fn wait<T>(&self, what: &str, limit: Duration, mut look: impl FnMut() -> Result<T>) -> Result<T> {
        let began = Instant::now();
        loop {
            match look() {
                Ok(value) => return Ok(value),
                Err(why) if began.elapsed() > limit => bail!("waited {} s for {what}: {why:#}", limit.as_secs()),
                Err(_) if began.elapsed() > LONG => std::thread::sleep(POLL_LATER),
                Err(_) => std::thread::sleep(POLL),
            }
        }
    }

    // ---- the witness -------------------------------------------------------------------------------------------------------------------

    /// Where workloads report to, if there is a witness.
    #[must_use]
    pub fn witness_address(&self) -> Option<String> {
        self.witness
            .as_ref()
            .map(|_| format!("{}:{WITNESS_PORT}", Member::Outside.address()))
    }

    /// What the witness knows of a workload; the time is its own, in milliseconds.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn witnessed(&self, name: &str) -> Result<Option<(u64, Vec<Life>)>> {
        let Some(witness) = &self.witness else { return Ok(None) };
        let answer = witness::ask(&witness.socket, name)?;
        Ok(Some((answer.now_ms, answer.lives)))
    }
}

/// Waits until nobody else plays on our cluster.
fn alone() -> Result<Flock<File>> {
    let path = parts::home()?.join("stage.lock");
    let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((file, _)) => {
            progress::say("waiting for another demo, bench or run of scenarios on this cluster to end");
            Flock::lock(file, FlockArg::LockExclusive)
                .map_err(|(_, error)| error)
                .with_context(|| format!("cannot lock {}", path.display()))
        }
    }
}

impl Witness {
    fn start(cluster: &Cluster) -> Result<Self> {
        let socket = parts::home()?.join("witness.sock");
        let program = images::program("peregrine-e2e")?;
        let listen = format!("{}:{WITNESS_PORT}", Member::Outside.address());
        let (program, path) = (program.display().to_string(), socket.display().to_string());
        let process = cluster
            .exec(Member::Outside, &[&program, "witness", &listen, &path])?
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .context("cannot start the witness")?;
        let mut witness = Self { process, socket };
        let deadline = Instant::now() + Duration::from_secs(10);
        while witness::ask(&witness.socket, "-").is_err() {
            if let Some(status) = witness.process.try_wait().context("cannot wait for the witness")? {
                bail!("the witness ended: {status}");
            }
            ensure!(Instant::now() < deadline, "the witness does not answer");
            std::thread::sleep(POLL);
        }
        Ok(witness)
    }
}

/// Whether a request failed because there is no such thing.
#[must_use]
pub fn is_not_found(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref::<kube::Error>(), Some(kube::Error::Api(status)) if status.code == 404)
}

/// Runs a program and gives back what it printed.
///
/// # Errors
/// If it fails, with what it said.
pub fn output(mut command: Command, what: &str) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {what}"))?;
    ensure!(
        output.status.success(),
        "{what} failed ({}): {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a program with an input and gives back what it printed.
///
/// # Errors
/// If it fails, with what it said.
pub fn input(mut command: Command, bytes: &[u8], what: &str) -> Result<String> {
    use std::io::Write as _;
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {what}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that has already failed reads no more: its status says so.
        drop(stdin.write_all(bytes));
    }
    let output = child
        .wait_with_output()
        .with_context(|| format!("cannot wait for {what}"))?;
    ensure!(
        output.status.success(),
        "{what} failed ({}): {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
