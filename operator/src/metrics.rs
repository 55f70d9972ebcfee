//! Metrics in the Prometheus text format. Labels are enums, never names or error texts.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};

/// Upper bounds of the buckets, in seconds: from a small pod's freeze to a long wait.
const BUCKETS: &[f64] = &[
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
];

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Counter,
    Gauge,
}

#[derive(Clone, Default)]
struct Histogram {
    counts: Vec<u64>,
    sum: f64,
    count: u64,
}

#[derive(Default)]
struct Inner {
    numbers: BTreeMap<(&'static str, String), (f64, Option<Kind>)>,
    histograms: BTreeMap<(&'static str, String), Histogram>,
}

/// All metrics of the process.
#[derive(Default)]
pub struct Metrics {
    inner: Mutex<Inner>,
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Metrics {
    /// Adds one to a counter.
    pub fn count(&self, name: &'static str, labels: &[(&str, &str)]) {
        self.with(|inner| {
            let entry = inner.numbers.entry((name, render(labels))).or_default();
            entry.0 += 1.0;
            entry.1 = Some(Kind::Counter);
        });
    }

    /// Sets a gauge.
    pub fn set(&self, name: &'static str, labels: &[(&str, &str)], value: f64) {
        self.with(|inner| {
            inner.numbers.insert((name, render(labels)), (value, Some(Kind::Gauge)));
        });
    }

    /// Adds an observation to a histogram.
    pub fn observe(&self, name: &'static str, labels: &[(&str, &str)], seconds: f64) {
        self.with(|inner| {
            let histogram = inner.histograms.entry((name, render(labels))).or_default();
            histogram.counts.resize(BUCKETS.len(), 0);
            for (count, bound) in histogram.counts.iter_mut().zip(BUCKETS) {
                if seconds <= *bound {
                    *count += 1;
                }
            }
            histogram.sum += seconds;
            histogram.count += 1;
        });
    }

    /// The text that a scrape gets.
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = String::new();
        self.with(|inner| {
            let mut last = "";
            for ((name, labels), (value, kind)) in &inner.numbers {
                if *name != last {
                    let kind = if *kind == Some(Kind::Counter) {
                        "counter"
                    } else {
                        "gauge"
                    };
                    writeln!(text, "# TYPE {name} {kind}").ok();
                    last = name;
                }
                writeln!(text, "{name}{} {value}", braces(labels, None)).ok();
            }
            last = "";
            for ((name, labels), histogram) in &inner.histograms {
                if *name != last {
                    writeln!(text, "# TYPE {name} histogram").ok();
                    last = name;
                }
                for (count, bound) in histogram.counts.iter().zip(BUCKETS) {
                    writeln!(
                        text,
                        "{name}_bucket{} {count}",
                        braces(labels, Some(&bound.to_string()))
                    )
                    .ok();
                }
                let count = histogram.count;
                writeln!(text, "{name}_bucket{} {count}", braces(labels, Some("+Inf"))).ok();
                writeln!(text, "{name}_sum{} {}", braces(labels, None), histogram.sum).ok();
                writeln!(text, "{name}_count{} {count}", braces(labels, None)).ok();
            }
        });
        text
    }

    fn with<T>(&self, f: impl FnOnce(&mut Inner) -> T) -> T {
        f(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn render(labels: &[(&str, &str)]) -> String {
    labels
        .iter()
        .map(|(key, value)| format!("{key}=\"{value}\""))
        .collect::<Vec<_>>()
        .join(",")
}

fn braces(labels: &str, le: Option<&str>) -> String {
    match (labels.is_empty(), le) {
        (true, None) => String::new(),
        (false, None) => format!("{{{labels}}}"),
        (true, Some(le)) => format!("{{le=\"{le}\"}}"),
        (false, Some(le)) => format!("{{{labels},le=\"{le}\"}}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scrape_reads_as_prometheus_expects() {
        let metrics = Metrics::default();
        metrics.count("peregrine_migrations_total", &[("result", "Succeeded")]);
        metrics.count("peregrine_migrations_total", &[("result", "Succeeded")]);
        metrics.set("peregrine_leader", &[], 1.0);
        metrics.observe("peregrine_freeze_seconds", &[("part", "total")], 0.2);
        let text = metrics.render();
        assert!(text.contains("# TYPE peregrine_migrations_total counter\n"));
        assert!(text.contains("peregrine_migrations_total{result=\"Succeeded\"} 2\n"));
        assert!(text.contains("peregrine_leader 1\n"));
        assert!(text.contains("peregrine_freeze_seconds_bucket{part=\"total\",le=\"0.1\"} 0\n"));
        assert!(text.contains("peregrine_freeze_seconds_bucket{part=\"total\",le=\"0.25\"} 1\n"));
        assert!(text.contains("peregrine_freeze_seconds_bucket{part=\"total\",le=\"+Inf\"} 1\n"));
        assert!(text.contains("peregrine_freeze_seconds_count{part=\"total\"} 1\n"));
    }
}
