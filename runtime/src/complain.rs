//! Errors as containerd and users read them: one sentence on standard error, and the same as the last JSON line of the file
//! named by `--log`, from which containerd's shim takes the message for the kubelet's event.

use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::argv::Call;

/// An error with all its causes, as one sentence.
#[must_use]
pub fn sentence(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// Says why a call has failed.
pub fn error(call: &Call, message: &str) {
    log(call, "error", message);
    // Nobody listens to a closed stream; the log has it.
    let _ = writeln!(std::io::stderr(), "peregrine-runc: {message}");
}

/// Says what went wrong in a call that goes on. Not on standard error: conmon takes what is written there for a failure.
pub fn warning(call: &Call, message: &str) {
    log(call, "warning", message);
}

fn log(call: &Call, level: &str, message: &str) {
    let Some(path) = call.global("log").map(PathBuf::from) else {
        return;
    };
    let json = call.global("log-format").is_some_and(|format| format == "json");
    let line = line(json, level, message, SystemTime::now());
    // A log that cannot be written must not hide the error itself.
    let _ = File::options()
        .append(true)
        .create(true)
        .open(path)
        .and_then(|mut file| file.write_all(line.as_bytes()));
}

fn line(json: bool, level: &str, message: &str, now: SystemTime) -> String {
    let time = rfc3339(now.duration_since(UNIX_EPOCH).unwrap_or_default());
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    if json {
        format!(
            "{{\"level\":{},\"msg\":{},\"time\":{}}}\n",
            quoted(level),
            quoted(message),
            quoted(&time)
        )
    } else {
        format!("time={} level={level} msg={}\n", quoted(&time), quoted(message))
    }
}

/// Seconds since 1970 as UTC, by the civil calendar.
#[must_use]
pub fn rfc3339(since_epoch: Duration) -> String {
    let seconds = since_epoch.as_secs();
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Days since 0000-03-01: years then begin in March, so that the leap day is the last of a year.
    let day = days + 719_468;
    let (era, of_era) = (day / 146_097, day % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let date = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{date:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_is_what_containerd_parses() {
        let now = UNIX_EPOCH + Duration::from_secs(1_772_323_199);
        let text = line(true, "error", "a \"b\"", now);
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            value,
            serde_json::json!({"level": "error", "msg": "a \"b\"", "time": "2026-02-28T23:59:59Z"})
        );
        assert_eq!(rfc3339(Duration::from_secs(951_782_400)), "2000-02-29T00:00:00Z");
        assert_eq!(rfc3339(Duration::ZERO), "1970-01-01T00:00:00Z");
    }
}
