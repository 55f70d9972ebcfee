//! One beat of a workload, as a line of text.

/// What a workload says of itself every few milliseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Name of the workload: the same before and after a move, and after a restart.
    pub name: String,
    /// Its container.
    pub container: String,
    /// Random token made when the process started.
    pub token: String,
    /// The main counter.
    pub counter: u64,
}

const MAGIC: &str = "beat1";

impl Report {
    /// As it is sent.
    #[must_use]
    pub fn to_line(&self) -> String {
        format!(
            "{MAGIC} {} {} {} {}",
            self.name, self.container, self.token, self.counter
        )
    }

    /// As it was received; nothing, if it is not a report.
    #[must_use]
    pub fn parse(line: &[u8]) -> Option<Self> {
        let mut words = std::str::from_utf8(line).ok()?.split(' ');
        if words.next()? != MAGIC {
            return None;
        }
        let mut word = || words.next().filter(|word| !word.is_empty()).map(str::to_owned);
        let report = Self {
            name: word()?,
            container: word()?,
            token: word()?,
            counter: word()?.parse().ok()?,
        };
        words.next().is_none().then_some(report)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_survives_its_line() {
        let report = Report {
            name: "n".into(),
            container: "c".into(),
            token: "t".into(),
            counter: 7,
        };
        assert_eq!(Report::parse(report.to_line().as_bytes()), Some(report));
        for bad in [
            "",
            "beat1 n c t",
            "beat1 n c t x",
            "beat1 n c t 7 8",
            "beat2 n c t 7",
            "beat1  c t 7",
        ] {
            assert_eq!(Report::parse(bad.as_bytes()), None, "{bad}");
        }
    }
}
