//! The command line of an OCI runtime, as containerd's shim and conmon write it.
//!
//! Only what is needed is understood: the flags before the verb, the verb, the container's id and a few options. The
//! arguments themselves are handed on exactly as they came.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

/// Flags before the verb that take a value of their own (runc and crun).
const GLOBAL_VALUES: &[&str] = &[
    "root",
    "log",
    "log-format",
    "log-level",
    "rootless",
    "criu",
    "cgroup-manager",
];

/// A call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Call {
    /// The flags before the verb, as they came.
    pub globals: Vec<OsString>,
    /// The verb.
    pub verb: Option<String>,
    /// All after the verb, as it came.
    pub rest: Vec<OsString>,
}

impl Call {
    /// Takes arguments without the program's name.
    #[must_use]
    pub fn parse(arguments: &[OsString]) -> Self {
        let mut at = 0;
        while let Some(argument) = arguments.get(at) {
            let Some((name, value)) = flag(argument) else { break };
            at += 1;
            if value.is_none() && GLOBAL_VALUES.contains(&name.as_str()) {
                at += 1;
            }
        }
        let (globals, rest) = arguments.split_at(at.min(arguments.len()));
        let (verb, rest) = match rest.split_first() {
            Some((verb, rest)) => (verb.to_str().map(str::to_owned), rest),
            None => (None, rest),
        };
        Self {
            globals: globals.to_vec(),
            verb,
            rest: rest.to_vec(),
        }
    }

    /// The value of a flag before the verb.
    #[must_use]
    pub fn global(&self, name: &str) -> Option<OsString> {
        find(&self.globals, &[name], GLOBAL_VALUES)
    }

    /// The flags before the verb without `--log` and `--log-format`.
    #[must_use]
    pub fn globals_without_log(&self) -> Vec<OsString> {
        let mut kept = Vec::new();
        let mut arguments = self.globals.iter();
        while let Some(argument) = arguments.next() {
            let parsed = flag(argument);
            let takes_next = parsed
                .as_ref()
                .is_some_and(|(n, v)| v.is_none() && GLOBAL_VALUES.contains(&n.as_str()));
            let value = if takes_next { arguments.next() } else { None };
            if !parsed.is_some_and(|(name, _)| name == "log" || name == "log-format") {
                kept.push(argument.clone());
                kept.extend(value.cloned());
            }
        }
        kept
    }

    /// Whether a flag without value stands before the verb.
    #[must_use]
    pub fn has_global(&self, name: &str) -> bool {
        self.globals
            .iter()
            .filter_map(|a| flag(a))
            .any(|(n, v)| n == name && v.as_deref() != Some(OsStr::new("false")))
    }

    /// The value of an option after the verb, by any of its names.
    #[must_use]
    pub fn option(&self, names: &[&str]) -> Option<OsString> {
        find(&self.rest, names, values_of(self.verb.as_deref().unwrap_or_default()))
    }

    /// The container's id: the first argument after the verb that is neither an option nor a value of one.
    #[must_use]
    pub fn id(&self) -> Option<&str> {
        let values = values_of(self.verb.as_deref()?);
        let mut arguments = self.rest.iter();
        while let Some(argument) = arguments.next() {
            if argument == "--" {
                return arguments.next()?.to_str();
            }
            match flag(argument) {
                Some((name, None)) if values.contains(&name.as_str()) => drop(arguments.next()),
                Some(_) => {}
                None => return argument.to_str(),
            }
        }
        None
    }

    /// The bundle of `create`: the working directory where none is named.
    #[must_use]
    pub fn bundle(&self) -> PathBuf {
        self.option(&["bundle", "b"])
            .map_or_else(|| PathBuf::from("."), PathBuf::from)
    }
}

/// Options of a verb that take a value of their own.
fn values_of(verb: &str) -> &'static [&'static str] {
    match verb {
        "create" | "run" => &[
            "bundle",
            "b",
            "console-socket",
            "pidfd-socket",
            "pid-file",
            "preserve-fds",
            "config",
            "f",
        ],
        "exec" => &[
            "console-socket",
            "pidfd-socket",
            "cwd",
            "env",
            "e",
            "user",
            "u",
            "additional-gids",
            "g",
            "process",
            "p",
            "pid-file",
            "process-label",
            "apparmor",
            "cap",
            "c",
            "preserve-fds",
            "cgroup",
        ],
        "ps" => &["format", "f"],
        "events" => &["interval"],
        "update" => &[
            "resources",
            "r",
            "blkio-weight",
            "cpu-period",
            "cpu-quota",
            "cpu-burst",
            "cpu-share",
            "cpu-rt-period",
            "cpu-rt-runtime",
            "cpuset-cpus",
            "cpuset-mems",
            "kernel-memory",
            "kernel-memory-tcp",
            "memory",
            "memory-reservation",
            "memory-swap",
            "pids-limit",
            "l3-cache-schema",
            "mem-bw-schema",
            "cpu-idle",
        ],
        _ => &[],
    }
}

/// Name and value of an option. Go's flag package takes one dash for two and `=` in both.
fn flag(argument: &OsStr) -> Option<(String, Option<OsString>)> {
    let text = argument.to_string_lossy();
    let name = text
        .strip_prefix("--")
        .or_else(|| text.strip_prefix('-'))
        .filter(|name| !name.is_empty())?;
    match name.split_once('=') {
        Some((name, value)) => Some((name.to_owned(), Some(value.into()))),
        None => Some((name.to_owned(), None)),
    }
}

fn find(arguments: &[OsString], names: &[&str], values: &[&str]) -> Option<OsString> {
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        if argument == "--" {
            return None;
        }
        if let Some((name, value)) = flag(argument) {
            let value = match value {
                None if values.contains(&name.as_str()) => arguments.next().cloned(),
                value => value,
            };
            if names.contains(&name.as_str()) {
                return value;
            }
        }
    }
    None
}
