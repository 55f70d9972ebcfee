//! An API server and its etcd, alone on the loopback interface: for tests that need the real rules of the API (validation, server-side
//! apply, admission, watches) and no node. No root, no namespaces; it ends with the command that it was started for.

use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;

use crate::parts::{self, Parts};
use crate::progress;

/// How long it may take to be ready.
const READY: Duration = Duration::from_secs(60);
/// How often that is looked at.
const POLL: Duration = Duration::from_millis(200);

/// Runs a command with `KUBECONFIG` of such a server, our CRDs installed, and gives back its exit code.
///
/// # Errors
/// If a part is missing and cannot be had, the server does not get ready, or the command does not start.
pub fn run(argv: &[String]) -> Result<ExitCode> {
    let (program, arguments) = argv.split_first().context("name a command after --")?;
    let server = Server::start()?;
    let status = Command::new(program)
        .args(arguments)
        .env("KUBECONFIG", &server.kubeconfig)
        .env("PEREGRINE_LIVE_API", "1")
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("cannot start {program}"))?;
    drop(server);
    let code = status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
    Ok(ExitCode::from(code))
}

/// The two processes and their folder; all go when it is dropped.
#[derive(Debug)]
struct Server {
    processes: Vec<Child>,
    folder: PathBuf,
    kubeconfig: PathBuf,
}

impl Drop for Server {
    fn drop(&mut self) {
        for process in self.processes.iter_mut().rev() {
            drop(process.kill());
            drop(process.wait());
        }
        drop(std::fs::remove_dir_all(&self.folder));
    }
}

impl Server {
    fn start() -> Result<Self> {
        let home = parts::home()?;
        let parts = Parts::ensure(&home)?;
        let folder = home.join(format!("api-server-{}", std::process::id()));
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
        let mut server = Self {
            processes: Vec::new(),
            kubeconfig: folder.join("kubeconfig"),
            folder,
        };
        progress::step("etcd and API server on the loopback interface", || {
            server.bring_up(&parts)
        })?;
        Ok(server)
    }

    fn bring_up(&mut self, parts: &Parts) -> Result<()> {
        let [client, peer, secure] = [free_port()?, free_port()?, free_port()?];
        let local = |port: u16| format!("http://127.0.0.1:{port}");
        let mut etcd = parts.tool("etcd");
        etcd.arg("--data-dir").arg(self.folder.join("etcd")).args([
            "--unsafe-no-fsync",
            "--listen-client-urls",
            &local(client),
            "--advertise-client-urls",
            &local(client),
            "--listen-peer-urls",
            &local(peer),
            "--initial-advertise-peer-urls",
            &local(peer),
            "--initial-cluster",
            &format!("default={}", local(peer)),
        ]);
        self.spawn(etcd, "etcd")?;

        let key = rcgen::KeyPair::generate().context("cannot make a key for service accounts")?;
        let private = self.write("service-account.key", &key.serialize_pem())?;
        let public = self.write("service-account.pub", &key.public_key_pem())?;
        let token = token()?;
        let tokens = self.write("tokens.csv", &format!("{token},admin,admin,system:masters\n"))?;
        let mut api = Command::new(parts.kube.join("kube-apiserver"));
        api.args(["--etcd-servers", &local(client), "--secure-port", &secure.to_string()])
            .args([
                "--bind-address",
                "127.0.0.1",
                "--advertise-address",
                "127.0.0.1",
                "--endpoint-reconciler-type",
                "none",
            ])
            .args([
                "--service-account-issuer",
                "https://peregrine.invalid",
                "--service-cluster-ip-range",
                "10.96.0.0/16",
            ])
            .args(["--authorization-mode", "RBAC", "--allow-privileged"])
            // There is no controller that makes the default service accounts.
            .args(["--disable-admission-plugins", "ServiceAccount"])
            .arg("--service-account-key-file")
            .arg(&public)
            .arg("--service-account-signing-key-file")
            .arg(&private)
            .arg("--token-auth-file")
            .arg(&tokens)
            .arg("--cert-dir")
            .arg(self.folder.join("certificates"));
        self.spawn(api, "kube-apiserver")?;

        let kubeconfig = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": format!("https://127.0.0.1:{secure}"), "insecure-skip-tls-verify": true}}],
            "users": [{"name": "u", "user": {"token": token}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        });
        self.write("kubeconfig", &kubeconfig.to_string())?;
        self.wait_ready(parts)?;
        let crds = json!({"apiVersion": "v1", "kind": "List", "items": crds::all_crds()});
        let file = self.write("crds.json", &crds.to_string())?;
        self.kubectl(
            parts,
            &["apply", "--server-side", "--filename", &file.display().to_string()],
        )?;
        self.kubectl(
            parts,
            &["wait", "--for=condition=Established", "--timeout=30s", "crd", "--all"],
        )
        .map(drop)
    }

    fn spawn(&mut self, mut command: Command, name: &str) -> Result<()> {
        let path = self.folder.join(format!("{name}.log"));
        let log = std::fs::File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
        let both = log
            .try_clone()
            .with_context(|| format!("cannot open {} twice", path.display()))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(both)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        self.processes.push(child);
        Ok(())
    }

    fn write(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.folder.join(name);
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }

    fn wait_ready(&mut self, parts: &Parts) -> Result<()> {
        let deadline = Instant::now() + READY;
        loop {
            let Err(why) = self.kubectl(parts, &["get", "--raw", "/readyz"]) else {
                return Ok(());
            };
            for process in &mut self.processes {
                if let Some(status) = process.try_wait().context("cannot wait for a process")? {
                    bail!("a process ended ({status}): {}", self.last_words());
                }
            }
            ensure!(
                Instant::now() < deadline,
                "not ready after {} s ({why:#}): {}",
                READY.as_secs(),
                self.last_words()
            );
            std::thread::sleep(POLL);
        }
    }

    fn kubectl(&self, parts: &Parts, arguments: &[&str]) -> Result<String> {
        let mut command = parts.tool("kubectl");
        command
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            .arg("--request-timeout=10s")
            .args(arguments);
        crate::scenario::stage::output(command, "kubectl")
    }

    /// The end of the logs.
    fn last_words(&self) -> String {
        ["etcd", "kube-apiserver"]
            .map(|name| last_line(&self.folder.join(format!("{name}.log"))))
            .join("; ")
    }
}

fn last_line(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    text.lines().next_back().unwrap_or("no log").to_owned()
}

/// A port that is free now.
fn free_port() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no port of 127.0.0.1 is free")?;
    Ok(listener.local_addr().context("cannot read a socket's address")?.port())
}

/// Other users of the machine must not guess it.
fn token() -> Result<String> {
    use std::io::Read as _;
    let mut bytes = [0; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .context("cannot read /dev/urandom")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
