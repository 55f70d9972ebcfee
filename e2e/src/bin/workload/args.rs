//! What a container of the workload is told.

use std::net::SocketAddr;

/// Settings of `run`, each with a default.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// Name of the workload: the same before and after a move.
    pub(crate) name: String,
    /// Which container of the pod this is.
    pub(crate) container: String,
    /// Size of the pattern in memory.
    pub(crate) mib: usize,
    /// Memory rewritten each second.
    pub(crate) dirty_mib: usize,
    /// Port of HTTP.
    pub(crate) http: u16,
    /// Where reports go.
    pub(crate) witness: Option<SocketAddr>,
    /// Milliseconds between reports.
    pub(crate) interval: u64,
    /// Child processes.
    pub(crate) children: usize,
    /// Whether it talks to itself over an established TCP connection.
    pub(crate) loopback: bool,
    /// Whether it shares a segment in /dev/shm with its first child.
    pub(crate) shm: bool,
}

impl Settings {
    /// `--name x --mib 64 …`
    pub(crate) fn parse(args: &[String]) -> Result<Self, String> {
        let mut settings = Self {
            name: "workload".to_owned(),
            container: "main".to_owned(),
            mib: 64,
            dirty_mib: 1,
            http: 8080,
            witness: None,
            interval: 5,
            children: 2,
            loopback: true,
            shm: true,
        };
        for pair in args.chunks(2) {
            let [name, value] = pair else {
                return Err(format!("{} needs a value", pair.concat()));
            };
            let bad = |error: &dyn std::fmt::Display| format!("{name} {value}: {error}");
            match name.as_str() {
                "--name" => settings.name.clone_from(value),
                "--container" => settings.container.clone_from(value),
                "--mib" => settings.mib = value.parse().map_err(|e| bad(&e))?,
                "--dirty-mib" => settings.dirty_mib = value.parse().map_err(|e| bad(&e))?,
                "--http" => settings.http = value.parse().map_err(|e| bad(&e))?,
                "--witness" if value.is_empty() => settings.witness = None,
                "--witness" => settings.witness = Some(value.parse().map_err(|e| bad(&e))?),
                "--interval-ms" => settings.interval = value.parse().map_err(|e| bad(&e))?,
                "--children" => settings.children = value.parse().map_err(|e| bad(&e))?,
                "--loopback" => settings.loopback = value.parse().map_err(|e| bad(&e))?,
                "--shm" => settings.shm = value.parse().map_err(|e| bad(&e))?,
                _ => return Err(format!("{name} is not a setting")),
            }
        }
        Ok(settings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Settings, String> {
        Settings::parse(&text.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn settings_have_defaults_and_names() {
        assert_eq!(parse("").unwrap().mib, 64);
        let settings = parse("--mib 1024 --witness 10.99.0.3:7000 --loopback false").unwrap();
        assert_eq!((settings.mib, settings.loopback), (1024, false));
        assert_eq!(settings.witness.unwrap().port(), 7000);
        for bad in ["--mib", "--mib x", "--colour red"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
