//! Metrics of the agent. Labels are enums and names of steps, never names of pods or error texts.

use std::{sync::Mutex, time::Duration};

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use crate::decide::step::{Role, Step};

/// `(name, value)` pairs of a series.
pub type Labels = Vec<(&'static str, &'static str)>;

/// All of them. Cheap to share: every series is behind atomics.
#[derive(Debug)]
pub struct Metrics {
    registry: Mutex<Registry>,
    /// `peregrine_preflights_total{result}`
    pub preflights: Family<Labels, Counter>,
    /// `peregrine_preflight_refusals_total{reason}`
    pub refusals: Family<Labels, Counter>,
    /// `peregrine_preflight_seconds`
    pub preflight_seconds: Histogram,
    /// `peregrine_attempts_total{role,result}`
    pub attempts: Family<Labels, Counter>,
    /// `peregrine_step_seconds{role,step,outcome}`
    pub step_seconds: Family<Labels, Histogram>,
    /// `peregrine_transfer_bytes_total{direction}`
    pub transfer_bytes: Family<Labels, Counter>,
    /// `peregrine_node_ready`, `peregrine_node_compatible`
    pub ready: Gauge,
    /// See `ready`.
    pub compatible: Gauge,
    /// `peregrine_heartbeat_failures_total`
    pub heartbeat_failures: Counter,
}

/// From a millisecond to about a minute, as measured freezes and steps lie.
fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 17))
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("peregrine");
        let metrics = Self {
            preflights: Family::default(),
            refusals: Family::default(),
            preflight_seconds: seconds(),
            attempts: Family::default(),
            step_seconds: Family::new_with_constructor(seconds),
            transfer_bytes: Family::default(),
            ready: Gauge::default(),
            compatible: Gauge::default(),
            heartbeat_failures: Counter::default(),
            registry: Mutex::default(),
        };
        registry.register(
            "agent",
            "Version of the agent",
            Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]),
        );
        registry.register("preflights", "Preflights by result", metrics.preflights.clone());
        registry.register(
            "preflight_refusals",
            "Refusals found by preflights, by reason",
            metrics.refusals.clone(),
        );
        registry.register(
            "preflight_seconds",
            "Duration of a preflight",
            metrics.preflight_seconds.clone(),
        );
        registry.register("attempts", "Attempts by role and result", metrics.attempts.clone());
        registry.register(
            "step_seconds",
            "Duration of a step of an attempt",
            metrics.step_seconds.clone(),
        );
        registry.register(
            "transfer_bytes",
            "Bytes between agents, by direction",
            metrics.transfer_bytes.clone(),
        );
        registry.register(
            "node_ready",
            "1 when the node is ready for moves",
            metrics.ready.clone(),
        );
        registry.register(
            "node_compatible",
            "1 when the node has all that moves need",
            metrics.compatible.clone(),
        );
        registry.register(
            "heartbeat_failures",
            "Heartbeats that the API server did not take",
            metrics.heartbeat_failures.clone(),
        );
        Self {
            registry: Mutex::new(registry),
            ..metrics
        }
    }
}

impl Metrics {
    /// A step has ended.
    pub fn step(&self, step: Step, succeeded: bool, took: Duration) {
        let labels = vec![
            ("role", step.role().as_str()),
            ("step", step.name()),
            ("outcome", if succeeded { "succeeded" } else { "failed" }),
        ];
        self.step_seconds.get_or_create(&labels).observe(took.as_secs_f64());
    }

    /// An attempt has ended.
    pub fn attempt(&self, role: Role, committed: bool) {
        let result = if committed { "committed" } else { "aborted" };
        let labels = vec![("role", role.as_str()), ("result", result)];
        self.attempts.get_or_create(&labels).inc();
    }

    /// Bytes that went to another agent, or came from one.
    pub fn transferred(&self, direction: &'static str, bytes: u64) {
        let labels = vec![("direction", direction)];
        self.transfer_bytes.get_or_create(&labels).inc_by(bytes);
    }

    /// In the OpenMetrics text format.
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = String::new();
        let registry = self.registry.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // Writing to a String cannot fail.
        let _ = encode(&mut text, &registry);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_is_shown_by_role_step_and_result() {
        let metrics = Metrics::default();
        metrics.step(Step::SourceDump, true, Duration::from_millis(3));
        metrics.step(Step::TargetRestore, false, Duration::from_secs(2));
        metrics.attempt(Role::Source, true);
        metrics.attempt(Role::Target, false);
        metrics.transferred("sent", 7);
        metrics.transferred("sent", 5);
        let text = metrics.render();
        for line in [
            "peregrine_step_seconds_count{role=\"source\",step=\"source.dump\",outcome=\"succeeded\"} 1",
            "peregrine_step_seconds_sum{role=\"target\",step=\"target.restore\",outcome=\"failed\"} 2.0",
            "peregrine_attempts_total{role=\"source\",result=\"committed\"} 1",
            "peregrine_attempts_total{role=\"target\",result=\"aborted\"} 1",
            "peregrine_transfer_bytes_total{direction=\"sent\"} 12",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }
}
