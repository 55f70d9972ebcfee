//! Errors say what was being done to what; each has a class that tells what to do about it.

/// What an answer of the API means to the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The object changed meanwhile, or is another: look again.
    Conflict,
    /// There is no such object.
    NotFound,
    /// The request will not be accepted as it is.
    Refused,
    /// No answer, or the server is busy: the same again later. A write may have taken place.
    Transient,
}

/// Classifies an error of the client.
#[must_use]
pub fn classify(error: &kube::Error) -> Class {
    match error {
        kube::Error::Api(status) => match status.code {
            404 => Class::NotFound,
            409 => Class::Conflict,
            // A JSON patch whose test failed. An object that breaks a rule of its schema is named and called invalid.
            422 if !status.message.contains("is invalid") => Class::Conflict,
            400 | 401 | 403 | 405 | 413 | 415 | 422 => Class::Refused,
            _ => Class::Transient,
        },
        _ => Class::Transient,
    }
}

/// What people should read of an error: the server's message, or the whole chain.
#[must_use]
pub fn words(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if !status.message.is_empty() => status.message.clone(),
        other => chain(other),
    }
}

/// An error with its sources, each text once.
#[must_use]
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let next = error.to_string();
        if !text.contains(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        source = error.source();
    }
    text
}

/// A pass over a migration did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An effect failed.
    #[error("failed to {what}")]
    Effect {
        /// What was being done to what.
        what: String,
        /// The answer.
        #[source]
        source: kube::Error,
    },
    /// The status could not be written.
    #[error("failed to write the status of migration {migration}")]
    Report {
        /// `namespace/name`.
        migration: String,
        /// The answer.
        #[source]
        source: kube::Error,
    },
    /// The API did not answer in time.
    #[error("the API did not answer in time in a pass over migration {migration}")]
    Deadline {
        /// `namespace/name`.
        migration: String,
    },
    /// The migration could not be read again.
    #[error("failed to read migration {migration}")]
    Read {
        /// `namespace/name`.
        migration: String,
        /// The answer.
        #[source]
        source: kube::Error,
    },
}

/// The operator cannot run.
#[derive(Debug, thiserror::Error)]
pub enum Fatal {
    /// No configuration for the API.
    #[error(
        "failed to find out how to reach the Kubernetes API: set KUBECONFIG, or run in a pod with a service account"
    )]
    Config(#[source] kube::Error),
    /// The admin port cannot be used.
    #[error("failed to listen on port {port} for /healthz, /readyz and /metrics; choose another with --admin-port")]
    AdminPort {
        /// The port.
        port: u16,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The signal handlers cannot be set.
    #[error("failed to wait for signals")]
    Signals(#[source] std::io::Error),
    /// A part that never ends ended.
    #[error("the {0} ended, which it never should")]
    Ended(&'static str),
    /// The uninstall was not completed.
    #[error("{0}")]
    Uninstall(String),
}
