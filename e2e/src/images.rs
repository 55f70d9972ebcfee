//! Our own images, from what `cargo build` made: the operator's, the agent's, the workload's.
//!
//! An image's tag follows from its content: what is unchanged is neither loaded nor rolled out again, and what is changed always is.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use sha2::{Digest as _, Sha256};

use crate::cluster::{Cluster, Member};
use crate::oci_image::{Entry, Image};
use crate::parts;
use crate::progress;

/// An image and the file with its archive.
#[derive(Clone, Debug)]
pub struct Built {
    /// Name without its tag.
    pub repository: String,
    /// The tag, from the content.
    pub tag: String,
    /// The OCI archive.
    pub archive: PathBuf,
}

impl Built {
    /// As a pod names it.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}:{}", self.repository, self.tag)
    }
}

/// All images of ours.
#[derive(Clone, Debug)]
pub struct Images {
    /// The operator.
    pub operator: Built,
    /// The node-agent with the runtime wrapper.
    pub agent: Built,
    /// The workload of the scenarios.
    pub workload: Built,
}

impl Images {
    /// Builds the programs, where they are not, and makes all images from them.
    ///
    /// # Errors
    /// If a program does not build, or an archive cannot be written.
    pub fn build() -> Result<Self> {
        // Whoever has just built them saves the look at what cargo would do.
        if std::env::var_os("PEREGRINE_E2E_BUILT").is_none() {
            progress::step("building operator, node-agent, runtime and workload", build_programs)?;
        }
        let folder = parts::home()?.join("images");
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
        let work = Work { folder: &folder };
        let mut agent_files = vec![("/limits.so".to_owned(), limits_library()?)];
        agent_files.extend(criu(&folder.join("criu"))?);
        Ok(Self {
            operator: work.image("operator", &[("operator", "/operator")], &[], "65532:65532")?,
            agent: work.image(
                "node-agent",
                &[("node-agent", "/node-agent"), ("peregrine-runc", "/peregrine-runc")],
                &agent_files,
                "",
            )?,
            workload: work.image("workload", &[("workload", "/workload")], &[], "")?,
        })
    }

    /// Loads what a running node does not have yet.
    ///
    /// # Errors
    /// If a node refuses an image.
    pub fn load(&self, cluster: &Cluster) -> Result<()> {
        let all = [&self.operator, &self.agent, &self.workload];
        for image in all {
            let nodes: Vec<Member> = cluster
                .nodes()
                .into_iter()
                .filter(|node| cluster.init_of(*node).is_some())
                .collect();
            let lacking = nodes
                .iter()
                .any(|node| !has(cluster, *node, &image.name()).unwrap_or(false));
            if lacking {
                progress::step(&format!("loading {}", image.name()), || cluster.load(&image.archive))?;
            }
        }
        Ok(())
    }
}

/// Whether a node has an image of that name; the tag says which content it is.
fn has(cluster: &Cluster, node: Member, name: &str) -> Result<bool> {
    let output = cluster
        .exec(
            node,
            &["ctr", "-n", "k8s.io", "images", "ls", "-q", &format!("name=={name}")],
        )?
        .stdin(Stdio::null())
        .output()
        .context("cannot list images")?;
    Ok(output.status.success() && String::from_utf8_lossy(&output.stdout).trim() == name)
}

struct Work<'a> {
    folder: &'a Path,
}

impl Work<'_> {
    fn image(&self, name: &str, programs: &[(&str, &str)], files: &[(String, PathBuf)], user: &str) -> Result<Built> {
        let mut entries = Vec::new();
        for (program, to) in programs {
            entries.push(Entry::program(to, self.stripped(program)?));
        }
        for (to, from) in files {
            entries.push(Entry::program(to, from.clone()));
        }
        let entrypoint = programs.iter().map(|(_, to)| (*to).to_owned()).take(1).collect();
        let mut image = Image {
            name: format!("docker.io/peregrine/{name}:dev"),
            entries,
            entrypoint,
            user: user.to_owned(),
            ..Image::default()
        };
        let digest: String = Sha256::digest(image.to_archive()?)
            .iter()
            .take(8)
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let (repository, tag) = (format!("docker.io/peregrine/{name}"), format!("dev-{digest}"));
        image.name = format!("{repository}:{tag}");
        let archive = self.folder.join(format!("{name}.tar"));
        image.write(&archive)?;
        Ok(Built {
            repository,
            tag,
            archive,
        })
    }

    /// A copy without debug information, which is nine tenths of a program; as it is, where the machine has no `strip`.
    fn stripped(&self, program: &str) -> Result<PathBuf> {
        let from = self::program(program)?;
        let to = self.folder.join(program);
        let done = Command::new("strip")
            .arg("-o")
            .arg(&to)
            .arg(&from)
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success());
        Ok(if done { to } else { from })
    }
}

/// A program of this workspace: beside this one.
///
/// # Errors
/// If it has not been built.
pub fn program(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().context("cannot find this program's own path")?;
    own.ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
        .with_context(|| {
            format!(
                "the program {name} is not beside {}: `cargo xtask demo` builds all that is needed",
                own.display()
            )
        })
}

/// The folder of the checkout that this program was built from.
///
/// # Errors
/// If it is not there any more.
pub fn checkout() -> Result<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("the crate has no parent folder")?
        .to_path_buf();
    ensure!(
        folder.join("charts").is_dir(),
        "{} is not the checkout any more: build this program again",
        folder.display()
    );
    Ok(folder)
}

/// cargo in the checkout. What the cargo that started this program set for it would make packages look changed.
fn cargo(folder: &Path) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("CARGO_PKG_") || name == "CARGO_MANIFEST_DIR" {
            command.env_remove(name);
        }
    }
    command.current_dir(folder).stdin(Stdio::null());
    command
}

fn build_programs() -> Result<()> {
    let checkout = checkout()?;
    let mut build = cargo(&checkout);
    build.args([
        "build",
        "--quiet",
        "--package",
        "operator",
        "--package",
        "node-agent",
        "--package",
        "runtime",
        "--package",
        "e2e",
        "--bins",
    ]);
    let output = build.output().context("cannot start cargo")?;
    ensure!(
        output.status.success(),
        "the programs do not build: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

/// CRIU for nodes that have none, made as the Dockerfile makes it, from the nodes' Debian tree. Without one (a cluster that is
/// not ours) the agent's image has none.
fn criu(folder: &Path) -> Result<Vec<(String, PathBuf)>> {
    let tree = parts::Parts::expected(&parts::home()?)?.tree;
    if !tree.exists() {
        return Ok(Vec::new());
    }
    // What an earlier tree had and this one has not must not stay.
    if folder.exists() {
        std::fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    let script = checkout()?.join("node-agent/criu-bundle.sh");
    let output = Command::new("sh")
        .args([&script, &tree, &folder.to_path_buf()])
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {}", script.display()))?;
    ensure!(
        output.status.success(),
        "cannot take CRIU out of {}: {}",
        tree.display(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    let entries = std::fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    let mut files: Vec<(String, PathBuf)> = entries
        .flatten()
        .map(|entry| (format!("/criu/{}", entry.file_name().to_string_lossy()), entry.path()))
        .collect();
    files.sort();
    Ok(files)
}

/// The library for machines without CAP_SYS_RESOURCE. It is loaded into a dynamically linked CRIU: flags of its own, a target folder of its own.
fn limits_library() -> Result<PathBuf> {
    let checkout = checkout()?;
    let crate_folder = checkout.join("hostsys/criu-preload");
    let target = checkout.join("target/criu-preload");
    let output = cargo(&crate_folder)
        .args(["build", "--quiet", "--release", "--target-dir"])
        .arg(&target)
        .env("RUSTFLAGS", "-C target-feature=-crt-static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .output()
        .with_context(|| format!("cannot build {}", crate_folder.display()))?;
    ensure!(
        output.status.success(),
        "cannot build {}: {}",
        crate_folder.display(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    let folders = [
        target.join("release"),
        target.join(format!("{}-unknown-linux-gnu/release", std::env::consts::ARCH)),
    ];
    folders
        .iter()
        .flat_map(|folder| std::fs::read_dir(folder).into_iter().flatten().flatten())
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "so"))
        .with_context(|| format!("{} made no library", crate_folder.display()))
}
