//! `cargo xtask bench`: the freeze and its parts, beside stock runc in the same run.

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use serde::Serialize;
use serde_json::json;

use crate::cluster::{Cluster, Options};
use crate::images;
use crate::progress;
use crate::scenario::moves::move_with;
use crate::scenario::stage::Stage;
use crate::scenario::subject::{Plan, Subject};
use crate::scenario::{install, sweep};
use crate::stock;

/// Settings of the bench.
#[derive(Args, Clone, Copy, Debug)]
pub struct Settings {
    /// One object a line
    #[arg(long)]
    json: bool,
    /// Write docs/measurements.md
    #[arg(long)]
    write: bool,
    /// How many moves of each kind
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
}

/// Median and spread of a figure.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figure {
    /// Its name, stable.
    pub name: String,
    /// `ms`, `KiB`, or `ratio`.
    pub unit: &'static str,
    /// The middle one.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The most.
    pub max: f64,
    /// Of how many.
    pub n: usize,
}

impl Figure {
    /// From samples; there must be one.
    ///
    /// # Errors
    /// If there is none.
    pub fn of(name: &str, unit: &'static str, samples: &[f64]) -> Result<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        let (Some(min), Some(max), Some(upper)) = (sorted.first(), sorted.last(), sorted.get(middle)) else {
            anyhow::bail!("{name} was never measured")
        };
        let median = if sorted.len().is_multiple_of(2) {
            (sorted[middle - 1] + upper) / 2.0
        } else {
            *upper
        };
        Ok(Self {
            name: name.to_owned(),
            unit,
            median,
            min: *min,
            max: *max,
            n: sorted.len(),
        })
    }
}

/// A kind of pod that is moved.
struct Kind {
    name: &'static str,
    mib: u32,
    containers: u16,
}

const KINDS: [Kind; 4] = [
    Kind {
        name: "64mib",
        mib: 64,
        containers: 1,
    },
    Kind {
        name: "1gib",
        mib: 1024,
        containers: 1,
    },
    Kind {
        name: "64mib_three_containers",
        mib: 64,
        containers: 3,
    },
    Kind {
        name: "1gib_three_containers",
        mib: 342,
        containers: 3,
    },
];

type Samples = BTreeMap<String, Vec<f64>>;

/// Measures and prints.
///
/// # Errors
/// If a move does not succeed, or the oracle finds something wrong: a figure of a broken move is worth nothing.
pub fn run(settings: &Settings) -> Result<ExitCode> {
    Cluster::up(&Options::default())?;
    let stage = Stage::on_own_cluster()?;
    sweep(&stage)?;
    install::install(&stage, &[])?;
    let mut figures = Vec::new();
    for kind in &KINDS {
        let samples = progress::step(&format!("{} moves of {}", settings.runs, kind.name), || {
            measure(&stage, kind, settings.runs)
        })?;
        for (name, values) in &samples {
            figures.push(Figure::of(name, "ms", values)?);
        }
        for (strategy, ratio) in [("stop_and_copy", ""), ("precopy", "_precopy")] {
            if let (Some(ours), Some(theirs)) = (
                samples.get(&format!("freeze_{}_{strategy}", kind.name)),
                samples.get(&format!("stock_{}", kind.name)),
            ) {
                let ratios: Vec<f64> = ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs).collect();
                figures.push(Figure::of(&format!("ratio_{}{ratio}", kind.name), "ratio", &ratios)?);
            }
        }
    }
    figures.extend(memory(&stage)?);
    for figure in &figures {
        if settings.json {
            println!("{}", serde_json::to_string(figure)?);
        } else {
            println!(
                "{:<44} {:>9.2} {:<5} ({:.2} to {:.2}, n = {})",
                figure.name, figure.median, figure.unit, figure.min, figure.max, figure.n
            );
        }
    }
    if settings.write {
        let path = images::checkout()?.join("docs/measurements.md");
        std::fs::write(&path, page(&figures)).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn measure(stage: &Stage, kind: &Kind, runs: u32) -> Result<Samples> {
    let [a, b, ..] = stage.nodes() else {
        anyhow::bail!("the bench needs two nodes")
    };
    let mut samples = Samples::new();
    let mut add = |name: String, value: f64| samples.entry(name).or_default().push(value);
    let name = format!("bench-{}", kind.name.replace('_', "-"));
    let mut subject = Subject::start(
        stage,
        &Plan {
            node: Some(a.clone()),
            mib: kind.mib,
            containers: kind.containers,
            ..Plan::small(&name)
        },
    )?;
    // By turns, so that what the machine does meanwhile touches both alike.
    for run in 0..2 * runs {
        let (strategy, suffix) = if run.is_multiple_of(2) {
            ("StopAndCopy", "stop_and_copy")
        } else {
            ("PreCopy", "precopy")
        };
        let target = if subject.node(stage)? == *a { b } else { a };
        let spec = json!({"strategy": {"type": strategy}});
        let migration = move_with(stage, &mut subject, Some(target), &spec)?;
        let result = migration
            .status
            .and_then(|status| status.result)
            .context("the move has no result")?;
        let parts = [
            ("freeze", result.freeze_milliseconds),
            ("dump", result.dump_milliseconds),
            ("transfer", result.transfer_milliseconds),
            ("restore", result.restore_milliseconds),
            ("commit", result.commit_milliseconds),
            (
                "total",
                result.total_milliseconds.and_then(|total| u32::try_from(total).ok()),
            ),
        ];
        for (part, value) in parts {
            if let Some(value) = value {
                add(format!("{part}_{}_{suffix}", kind.name), value.into());
            }
        }
    }
    crate::invariants::one_life(stage, &subject)?;
    subject.remove(stage)?;
    // Alone on the machine, as ours was.
    crate::invariants::none(stage, &subject)?;
    for run in 0..runs {
        let (from, to) = if run.is_multiple_of(2) { (a, b) } else { (b, a) };
        let times = stock::run(stage, from, to, kind.mib, kind.containers)?;
        for (part, value) in [
            ("stock", times.freeze),
            ("stock_dump", times.dump),
            ("stock_copy", times.copy),
            ("stock_restore", times.restore),
            ("stock_total", times.total),
        ] {
            add(format!("{part}_{}", kind.name), value as f64);
        }
    }
    Ok(samples)
}

/// Memory of our programs at rest.
fn memory(stage: &Stage) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for (name, program) in [("agent_rss", "node-agent"), ("operator_rss", "operator")] {
        let mut samples = Vec::new();
        for node in stage.nodes() {
            let script = format!(
                "for p in /proc/[0-9]*; do [ \"$(cat $p/comm 2>/dev/null)\" = {program} ] && sed -n 's/^VmRSS:[[:space:]]*\\([0-9]*\\) kB/\\1/p' $p/status; done; true"
            );
            for line in stage.on_node(node, &script)?.lines() {
                samples.push(
                    line.trim()
                        .parse::<f64>()
                        .with_context(|| format!("not a size: {line}"))?,
                );
            }
        }
        ensure!(!samples.is_empty(), "no {program} runs");
        figures.push(Figure::of(name, "KiB", &samples)?);
    }
    Ok(figures)
}

/// The page for people.
fn page(figures: &[Figure]) -> String {
    let mut page = String::from(
        "# Measurements\n\n\
         Written by `cargo xtask bench --write`. Every figure is of a real cluster on one machine (`cargo xtask cluster up`): its nodes share one kernel,\n\
         one page cache and the processors below. The figures are honest about CPU and system calls, and say nothing about a network between machines:\n\
         the copy between two nodes runs at memory speed here.\n\n\
         `freeze` is the time in which no instruction of the pod ran; `dump`, `transfer`, `restore`, `commit` are its parts. `total` is from the creation\n\
         of the ProcessMigration until it was settled. `stock` is `runc checkpoint`, a copy through a pipe and `runc restore` of the same program with the\n\
         same memory, in the same run. `ratio` is our freeze (of StopAndCopy, and of PreCopy) divided by stock's. Of three containers, each has a third of the memory that `1gib` says;\n\
         stock runc takes them one after the other.\n\n",
    );
    let model = std::fs::read_to_string("/proc/cpuinfo").ok().and_then(|text| {
        text.lines().find_map(|line| {
            line.strip_prefix("model name")?
                .split_once(": ")
                .map(|(_, model)| model.to_owned())
        })
    });
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    page.push_str(&format!(
        "Machine: {} processors ({}), kernel {}, on {}.\n\n| figure | median | least | most | n | unit |\n|---|---|---|---|---|---|\n",
        std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        model.unwrap_or_else(|| "unknown".to_owned()),
        kernel.trim(),
        k8s_openapi::jiff::Timestamp::now().strftime("%Y-%m-%d")
    ));
    for figure in figures {
        let digits = if figure.unit == "ratio" { 2 } else { 0 };
        page.push_str(&format!(
            "| `{}` | {:.digits$} | {:.digits$} | {:.digits$} | {} | {} |\n",
            figure.name, figure.median, figure.min, figure.max, figure.n, figure.unit
        ));
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_the_middle_one() {
        let figure = Figure::of("x", "ms", &[3.0, 1.0, 2.0]).unwrap();
        assert_eq!((figure.median, figure.min, figure.max, figure.n), (2.0, 1.0, 3.0, 3));
        assert_eq!(Figure::of("x", "ms", &[4.0, 1.0, 2.0, 3.0]).unwrap().median, 2.5);
        assert!(Figure::of("x", "ms", &[]).is_err());
    }
}
