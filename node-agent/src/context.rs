//! What everything else needs: the API client, the node's name.

use std::path::Path;

use http::Uri;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

use crate::args::RunArgs;
use crate::host::Host;

/// Folder of the service account's token and the API server's CA in the pod. It is read through the descriptor that
/// was kept of the container's root; tokens rotate, so their file is read again and again.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No node name.
    #[error("the node's name is not set: use --node-name or NODE_NAME")]
    NoNodeName,
    /// Not in a pod.
    #[error("{0} is not set: the agent runs in a pod, or with --kubeconfig")]
    NotInPod(&'static str),
    /// The address of the API server makes no sense.
    #[error("the API server's address {0:?} is not valid")]
    Address(String),
    /// The kubeconfig.
    #[error("failed to read the kubeconfig")]
    Kubeconfig(#[source] Box<kube::config::KubeconfigError>),
    /// The client.
    #[error("failed to make the API client")]
    Client(#[source] Box<kube::Error>),
}

/// Makes the API client.
///
/// # Errors
/// See [`Error`].
pub async fn client(args: &RunArgs, host: &Host) -> Result<Client, Error> {
    if args.node_name.is_empty() {
        return Err(Error::NoNodeName);
    }
    let config = match &args.kubeconfig {
        Some(file) => from_file(&host.in_image(&file.display().to_string())).await?,
        None => of_the_pod(host)?,
    };
    Client::try_from(config).map_err(|e| Error::Client(Box::new(e)))
}

async fn from_file(file: &Path) -> Result<Config, Error> {
    let error = |e| Error::Kubeconfig(Box::new(e));
    let kubeconfig = Kubeconfig::read_from(file).map_err(error)?;
    Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
        .await
        .map_err(error)
}

fn of_the_pod(host: &Host) -> Result<Config, Error> {
    let variable = |name: &'static str| std::env::var(name).map_err(|_| Error::NotInPod(name));
    let address = variable("KUBERNETES_SERVICE_HOST")?;
    let port = variable("KUBERNETES_SERVICE_PORT")?;
    let text = if address.contains(':') {
        format!("https://[{address}]:{port}")
    } else {
        format!("https://{address}:{port}")
    };
    let uri: Uri = text.parse().map_err(|_| Error::Address(text.clone()))?;
    let mut config = Config::new(uri);
    let file = |name: &str| host.in_image(&format!("{SERVICE_ACCOUNT}/{name}"));
    config.root_cert_file = Some(file("ca.crt"));
    config.auth_info.token_file = Some(file("token").display().to_string());
    Ok(config)
}
