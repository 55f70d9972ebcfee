//! Mounts of a container, and those that the runtime's configuration explains.

use std::collections::BTreeSet;
use std::io;

use serde_json::Value;

/// A mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Where, as the container sees it.
    pub point: String,
    /// Type of the file system.
    pub kind: String,
    /// Device, as `st_dev` of the kernel: major << 20 | minor.
    pub device: u64,
    /// What is mounted.
    pub source: String,
}

/// Reads the mounts that a process sees.
///
/// # Errors
/// `/proc/PID/mountinfo` cannot be read.
pub fn of_process(pid: i32) -> io::Result<Vec<Mount>> {
    Ok(parse(&std::fs::read_to_string(format!("/proc/{pid}/mountinfo"))?))
}

/// Reads `mountinfo`.
#[must_use]
pub fn parse(text: &str) -> Vec<Mount> {
    text.lines()
        .filter_map(|line| {
            // `id parent major:minor root point options [fields] - type source options`
            let (head, tail) = line.split_once(" - ")?;
            let mut head = head.split(' ');
            let (major, minor) = head.nth(2)?.split_once(':')?;
            let point = head.nth(1)?;
            let mut tail = tail.split(' ');
            Some(Mount {
                point: unescape(point),
                kind: tail.next()?.to_owned(),
                source: unescape(tail.next()?),
                device: major.parse::<u64>().ok()? << 20 | minor.parse::<u64>().ok()?,
            })
        })
        .collect()
}

/// The kernel writes blanks and backslashes as `\040`.
fn unescape(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.as_bytes().iter();
    while let Some(&byte) = bytes.next() {
        let rest = bytes.as_slice();
        match rest.get(..3) {
            Some(digits) if byte == b'\\' && digits.iter().all(|d| (b'0'..=b'7').contains(d)) => {
                out.push(digits.iter().fold(0u8, |n, d| n.wrapping_mul(8).wrapping_add(d - b'0')));
                bytes.nth(2);
            }
            _ => out.push(byte),
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Mount points that the bundle's `config.json` explains: its mounts, and the paths that runc masks or makes read-only.
#[must_use]
pub fn expected(config: &Value) -> BTreeSet<String> {
    let strings = |list: &Value| -> Vec<String> {
        list.as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .map(str::to_owned)
            .collect()
    };
    let mut points: BTreeSet<String> = config
        .get("mounts")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(|mount| mount.get("destination")?.as_str())
        // The kernel shows no trailing slash, and /var/run where it is a link to /run; both forms are accepted.
        .flat_map(|point| {
            let point = point.trim_end_matches('/').to_owned();
            let run = point.strip_prefix("/var/run/").map(|rest| format!("/run/{rest}"));
            [Some(point), run]
        })
        .flatten()
        .collect();
    let linux = config.get("linux");
    for list in ["maskedPaths", "readonlyPaths"] {
        points.extend(linux.and_then(|l| l.get(list)).map(strings).unwrap_or_default());
    }
    points.insert("/".to_owned());
    if config.pointer("/process/terminal").and_then(Value::as_bool) == Some(true) {
        points.insert("/dev/console".to_owned());
    }
    points
}

/// Devices that the configuration adds to those that every container has.
#[must_use]
pub fn devices(config: &Value) -> Vec<String> {
    config
        .pointer("/linux/devices")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(|device| device.get("path")?.as_str())
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn mountinfo_is_read_with_blanks_and_optional_fields() {
        let text = "812 750 0:52 / / rw,relatime master:3 - overlay overlay rw,lowerdir=/a\n\
            813 812 0:55 / /proc rw,nosuid shared:1 master:2 - proc proc rw\n\
            814 812 254:1 /x /with\\040blank ro - ext4 /dev/vda1 rw\nbroken line\n";
        let mounts = parse(text);
        assert_eq!(mounts.len(), 3);
        assert_eq!(
            mounts[0],
            Mount {
                point: "/".into(),
                kind: "overlay".into(),
                device: 52,
                source: "overlay".into()
            }
        );
        assert_eq!(mounts[2].point, "/with blank");
        assert_eq!(mounts[2].device, 254 << 20 | 1);
    }

    #[test]
    fn the_configuration_explains_its_mounts() {
        let config = json!({
            "process": {"terminal": true},
            "mounts": [{"destination": "/proc"}, {"destination": "/var/run/secrets/x/"}],
            "linux": {"maskedPaths": ["/proc/kcore"], "readonlyPaths": ["/proc/sys"], "devices": [{"path": "/dev/fuse"}]},
        });
        let points = expected(&config);
        for point in [
            "/",
            "/proc",
            "/run/secrets/x",
            "/var/run/secrets/x",
            "/proc/kcore",
            "/proc/sys",
            "/dev/console",
        ] {
            assert!(points.contains(point), "{point}");
        }
        assert_eq!(devices(&config), ["/dev/fuse"]);
        assert_eq!(expected(&Value::Null).len(), 1);
    }
}
