//! Container images written as OCI archives, without a container engine: one layer, no timestamps, so that equal inputs give equal bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use sha2::{Digest as _, Sha256};

/// Where a file's bytes come from.
#[derive(Clone, Debug)]
pub enum Content {
    /// These bytes.
    Bytes(Vec<u8>),
    /// The bytes of a file of the host.
    File(PathBuf),
    /// A folder.
    Folder,
    /// A symbolic link to this path.
    Link(String),
}

/// One entry of the image's file system.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Path in the image; a leading slash is fine.
    pub path: String,
    /// What is there.
    pub content: Content,
    /// Permission bits.
    pub mode: u32,
    /// Owner and group.
    pub owner: (u32, u32),
}

impl Entry {
    /// An executable file of root's, copied from the host.
    pub fn program(path: &str, from: impl Into<PathBuf>) -> Self {
        Self {
            path: path.to_owned(),
            content: Content::File(from.into()),
            mode: 0o755,
            owner: (0, 0),
        }
    }

    /// A readable file of root's.
    pub fn file(path: &str, bytes: impl Into<Vec<u8>>) -> Self {
        Self {
            path: path.to_owned(),
            content: Content::Bytes(bytes.into()),
            mode: 0o644,
            owner: (0, 0),
        }
    }

    /// A folder.
    pub fn folder(path: &str, mode: u32, owner: (u32, u32)) -> Self {
        Self {
            path: path.to_owned(),
            content: Content::Folder,
            mode,
            owner,
        }
    }
}

/// An image: what its containers run and see.
#[derive(Clone, Debug, Default)]
pub struct Image {
    /// Full name, as a pod names it: `docker.io/local/pause:1`.
    pub name: String,
    /// The file system; missing parent folders are added, and a `/tmp`.
    pub entries: Vec<Entry>,
    /// What runs.
    pub entrypoint: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    /// `uid` or `uid:gid`; empty is root.
    pub user: String,
    /// Labels of the image.
    pub labels: BTreeMap<String, String>,
}

impl Image {
    /// The image as an OCI archive.
    ///
    /// # Errors
    /// If a file cannot be read, or two entries have the same path.
    pub fn to_archive(&self) -> Result<Vec<u8>> {
        ensure!(
            self.name.rsplit('/').next().is_some_and(|last| last.contains(':')),
            "an image needs a name with a tag, but is called {:?}",
            self.name
        );
        let layer = self.layer()?;
        let config = serde_json::to_vec(&json!({
            "architecture": architecture(),
            "os": "linux",
            "config": {"Entrypoint": self.entrypoint, "Env": self.env, "User": self.user, "Labels": self.labels, "WorkingDir": "/"},
            "rootfs": {"type": "layers", "diff_ids": [digest(&layer)]},
        }))?;
        let blob = |kind: &str, bytes: &[u8]| json!({"mediaType": format!("application/vnd.oci.image.{kind}"), "digest": digest(bytes), "size": bytes.len()});
        let manifest = serde_json::to_vec(&json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": blob("config.v1+json", &config),
            "layers": [blob("layer.v1.tar", &layer)],
        }))?;
        let mut described = blob("manifest.v1+json", &manifest);
        described["platform"] = json!({"architecture": architecture(), "os": "linux"});
        described["annotations"] = json!({
            "io.containerd.image.name": self.name,
            "org.opencontainers.image.ref.name": self.name.rsplit(':').next(),
        });
        let index = serde_json::to_vec(
            &json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [described]}),
        )?;

        let mut archive = tar::Builder::new(Vec::new());
        append(
            &mut archive,
            "oci-layout",
            br#"{"imageLayoutVersion":"1.0.0"}"#,
            0o644,
            (0, 0),
        )?;
        append(&mut archive, "index.json", &index, 0o644, (0, 0))?;
        for bytes in [&layer, &config, &manifest] {
            let path = format!("blobs/{}", digest(bytes).replace(':', "/"));
            append(&mut archive, &path, bytes, 0o644, (0, 0))?;
        }
        Ok(archive.into_inner()?)
    }

    /// Writes the archive to a file.
    ///
    /// # Errors
    /// As [`Image::to_archive`], or if the file cannot be written.
    pub fn write(&self, to: &Path) -> Result<()> {
        let bytes = self
            .to_archive()
            .with_context(|| format!("cannot make the image {}", self.name))?;
        let mut file = std::fs::File::create(to).with_context(|| format!("cannot create {}", to.display()))?;
        file.write_all(&bytes)
            .with_context(|| format!("cannot write {}", to.display()))
    }

    /// The file system alone, as a tar.
    ///
    /// # Errors
    /// As [`Image::to_archive`].
    pub fn layer(&self) -> Result<Vec<u8>> {
        let mut layer = tar::Builder::new(Vec::new());
        let mut folders = BTreeSet::new();
        let mut paths = BTreeSet::new();
        let tmp = Entry::folder("tmp", 0o1777, (0, 0));
        let has_tmp = self.entries.iter().any(|entry| plain(&entry.path) == "tmp");
        // Sorted, so that a folder comes before what is in it and its own mode counts.
        let mut entries: Vec<&Entry> = self.entries.iter().chain((!has_tmp).then_some(&tmp)).collect();
        entries.sort_by_key(|entry| plain(&entry.path));
        for entry in entries {
            let path = plain(&entry.path);
            ensure!(
                !path.is_empty() && !path.split('/').any(|part| part == ".."),
                "{:?} is not a path inside an image",
                entry.path
            );
            ensure!(
                paths.insert(path.clone()),
                "two entries of the image have the path {path}"
            );
            for (end, _) in path.match_indices('/') {
                if folders.insert(path[..end].to_owned()) {
                    append_kind(&mut layer, &path[..end], tar::EntryType::Directory, 0o755, (0, 0), None)?;
                }
            }
            match &entry.content {
                Content::Bytes(bytes) => append(&mut layer, &path, bytes, entry.mode, entry.owner)?,
                Content::File(from) => {
                    let bytes = std::fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
                    append(&mut layer, &path, &bytes, entry.mode, entry.owner)?;
                }
                Content::Folder => {
                    if folders.insert(path.clone()) {
                        append_kind(
                            &mut layer,
                            &path,
                            tar::EntryType::Directory,
                            entry.mode,
                            entry.owner,
                            None,
                        )?;
                    }
                }
                Content::Link(target) => append_kind(
                    &mut layer,
                    &path,
                    tar::EntryType::Symlink,
                    0o777,
                    entry.owner,
                    Some(target),
                )?,
            }
        }
        Ok(layer.into_inner()?)
    }
}

/// A path without slashes at its ends.
fn plain(path: &str) -> String {
    path.trim_matches('/').to_owned()
}

fn append(archive: &mut tar::Builder<Vec<u8>>, path: &str, bytes: &[u8], mode: u32, owner: (u32, u32)) -> Result<()> {
    let mut header = header(tar::EntryType::Regular, mode, owner);
    header.set_size(bytes.len() as u64);
    archive
        .append_data(&mut header, path, bytes)
        .with_context(|| format!("cannot add {path}"))
}

fn append_kind(
    archive: &mut tar::Builder<Vec<u8>>,
    path: &str,
    kind: tar::EntryType,
    mode: u32,
    owner: (u32, u32),
    target: Option<&str>,
) -> Result<()> {
    let mut header = header(kind, mode, owner);
    match target {
        Some(target) => archive.append_link(&mut header, path, target),
        None => archive.append_data(&mut header, path, std::io::empty()),
    }
    .with_context(|| format!("cannot add {path}"))
}

fn header(kind: tar::EntryType, mode: u32, (uid, gid): (u32, u32)) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(uid.into());
    header.set_gid(gid.into());
    header.set_mtime(0);
    header.set_size(0);
    header
}

fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// This machine's architecture in OCI's words.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "aarch64" => "arm64",
        _ => "amd64",
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    fn image() -> Image {
        Image {
            name: "docker.io/local/thing:1".to_owned(),
            entries: vec![
                Entry::file("/opt/thing/data", "x"),
                Entry::folder("/opt/thing", 0o700, (7, 8)),
                Entry {
                    path: "bin/l".to_owned(),
                    content: Content::Link("/opt".to_owned()),
                    mode: 0,
                    owner: (0, 0),
                },
            ],
            entrypoint: vec!["/thing".to_owned()],
            env: vec!["A=b".to_owned()],
            user: "1000".to_owned(),
            labels: BTreeMap::new(),
        }
    }

    fn read(archive: &[u8]) -> Vec<(String, u32, u64, Vec<u8>)> {
        let mut archive = tar::Archive::new(archive);
        let entries = archive.entries().unwrap();
        entries
            .map(|entry| {
                let mut entry = entry.unwrap();
                let mut bytes = Vec::new();
                entry.read_to_end(&mut bytes).unwrap();
                let header = entry.header();
                (
                    entry.path().unwrap().display().to_string(),
                    header.mode().unwrap(),
                    header.uid().unwrap(),
                    bytes,
                )
            })
            .collect()
    }

    #[test]
    fn every_digest_names_a_blob_that_is_there() {
        let files = read(&image().to_archive().unwrap());
        let blob = |digest: &serde_json::Value| {
            let path = format!("blobs/{}", digest.as_str().unwrap().replace(':', "/"));
            let bytes = files.iter().find(|file| file.0 == path).unwrap().3.clone();
            assert_eq!(super::digest(&bytes), digest.as_str().unwrap());
            bytes
        };
        let index: serde_json::Value =
            serde_json::from_slice(&files.iter().find(|file| file.0 == "index.json").unwrap().3).unwrap();
        assert_eq!(
            index["manifests"][0]["annotations"]["io.containerd.image.name"],
            "docker.io/local/thing:1"
        );
        let manifest: serde_json::Value = serde_json::from_slice(&blob(&index["manifests"][0]["digest"])).unwrap();
        let config: serde_json::Value = serde_json::from_slice(&blob(&manifest["config"]["digest"])).unwrap();
        assert_eq!(config["config"]["User"], "1000");
        assert_eq!(config["rootfs"]["diff_ids"][0], manifest["layers"][0]["digest"]);
        blob(&manifest["layers"][0]["digest"]);
    }

    #[test]
    fn parents_come_first_and_keep_their_own_mode() {
        let layer = read(&image().layer().unwrap());
        let story: Vec<(&str, u32, u64)> = layer
            .iter()
            .map(|(path, mode, uid, _)| (path.trim_end_matches('/'), *mode, *uid))
            .collect();
        assert_eq!(
            story,
            [
                ("bin", 0o755, 0),
                ("bin/l", 0o777, 0),
                ("opt", 0o755, 0),
                ("opt/thing", 0o700, 7),
                ("opt/thing/data", 0o644, 0),
                ("tmp", 0o1777, 0)
            ]
        );
    }

    #[test]
    fn equal_inputs_give_equal_bytes() {
        assert_eq!(image().to_archive().unwrap(), image().to_archive().unwrap());
    }

    #[test]
    fn bad_images_are_refused() {
        let mut twice = image();
        twice.entries.push(Entry::file("opt/thing/data", "y"));
        assert!(twice.to_archive().unwrap_err().to_string().contains("two entries"));
        let mut outside = image();
        outside.entries.push(Entry::file("../x", "y"));
        assert!(outside.to_archive().is_err());
        assert!(
            Image {
                name: "registry:5000/untagged".to_owned(),
                ..image()
            }
            .to_archive()
            .unwrap_err()
            .to_string()
            .contains("tag")
        );
    }
}
