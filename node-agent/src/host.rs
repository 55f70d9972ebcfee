//! The place where the agent works: in a pod the node's namespaces, joined before anything else; else where it stands.

use std::path::{Path, PathBuf};

use hostsys::node_namespaces;

/// Where things are.
#[derive(Clone, Debug)]
pub struct Host {
    /// Below it are the files of our own image and the volumes of our pod.
    image_root: PathBuf,
}

impl Host {
    /// Joins the node. To be called before any thread is started.
    ///
    /// # Errors
    /// See [`node_namespaces::Error`].
    pub fn enter(host_pid: bool) -> Result<Self, node_namespaces::Error> {
        node_namespaces::extend_path();
        let image_root = if host_pid {
            node_namespaces::join_node()?
        } else {
            PathBuf::from("/")
        };
        Ok(Self { image_root })
    }

    /// A file of our image or of a volume of our pod, by its absolute path in the container.
    #[must_use]
    pub fn in_image(&self, path: &str) -> PathBuf {
        self.image_root.join(path.trim_start_matches('/'))
    }

    /// Whether our image has this file.
    #[must_use]
    pub fn image_has(&self, path: &str) -> bool {
        self.in_image(path).exists()
    }

    /// A host that is the container itself, for tests.
    #[must_use]
    pub fn at(image_root: &Path) -> Self {
        Self {
            image_root: image_root.to_owned(),
        }
    }
}
