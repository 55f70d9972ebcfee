//! `cargo xtask demo`: from a machine with nothing to a pod that is seen moving there and back.

use std::io::Write as _;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use crds::ProcessMigration;
use serde_json::{Value, json};

use crate::cluster::{Cluster, Options};
use crate::invariants;
use crate::scenario::moves::{self, Move};
use crate::scenario::stage::{NAMESPACE, Stage};
use crate::scenario::subject::{Plan, Subject};
use crate::scenario::{install, sweep};
use crate::stock;

/// Settings of the demo.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct Settings {
    /// Leave the cluster up at the end (the default)
    #[arg(long, conflicts_with = "down")]
    keep: bool,
    /// Take the cluster down at the end
    #[arg(long)]
    down: bool,
    /// End with one line of JSON
    #[arg(long)]
    json: bool,
}

/// Memory of the workload.
const MIB: u32 = 64;
/// The workload's name.
const NAME: &str = "demo";

/// One move, ours or stock.
struct Row {
    what: String,
    freeze_ms: u64,
    total_ms: u64,
    bytes: Option<i64>,
    seen_ms: Option<u64>,
}

/// Plays it; the exit code is 0 only if the oracle agrees.
///
/// # Errors
/// What could not be set up, or what the oracle found.
pub fn run(settings: Settings) -> Result<ExitCode> {
    let began = Instant::now();
    let result = play(settings, began);
    if settings.down {
        Cluster::down()?;
    }
    result
}

fn play(settings: Settings, began: Instant) -> Result<ExitCode> {
    Cluster::up(&Options::default())?;
    let stage = Stage::on_own_cluster()?;
    sweep(&stage)?;
    crate::progress::step("helm install peregrine", || install::install(&stage, &[]))?;
    let [a, b, ..] = stage.nodes() else {
        bail!("the demo needs two nodes")
    };

    let mut subject = crate::progress::step("starting a workload that checks itself", || {
        Subject::start(
            &stage,
            &Plan {
                node: Some(a.clone()),
                mib: MIB,
                ..Plan::small(NAME)
            },
        )
    })?;
    let start = subject.node(&stage)?;
    let other = if start == *a { b.clone() } else { a.clone() };
    say("")?;
    say(&format!(
        "The pod {} runs on {start}. It keeps {MIB} MiB in memory, counts, and checks all it holds.",
        subject.pod
    ))?;

    let mut rows = Vec::new();
    for (from, to) in [(&start, &other), (&other, &start)] {
        rows.push(one_move(&stage, &mut subject, from, to)?);
    }
    let lives = subject.lives(&stage)?.unwrap_or_default();
    let restarts = lives.len().saturating_sub(1);
    let intact = subject
        .check(&stage)
        .and_then(|()| subject.check_access(&stage))
        .and_then(|()| invariants::one_life(&stage, &subject))
        .and_then(|()| invariants::exactly_one(&stage, &subject))
        .and_then(|()| invariants::nothing_left(&stage));

    say("")?;
    let times = crate::progress::step("the same move by stock runc", || {
        stock::run(&stage, &start, &other, MIB, 1)
    })?;
    let stock = Row {
        what: "stock runc checkpoint + copy + restore".to_owned(),
        freeze_ms: times.freeze,
        total_ms: times.total,
        bytes: None,
        seen_ms: None,
    };

    table(&rows, &stock, &intact, restarts)?;
    say(&format!(
        "From start to here: {} s. All nodes share one kernel and {} processors: the times are honest about CPU and system calls, not about a network.",
        began.elapsed().as_secs(),
        std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
    ))?;
    if !settings.down {
        what_next(&subject)?;
    }
    if settings.json {
        let figures = |rows: &[Row]| {
            rows.iter()
                .map(|row| json!({"freeze_ms": row.freeze_ms, "total_ms": row.total_ms}))
                .collect::<Vec<Value>>()
        };
        say(&json!({"intact": intact.is_ok(), "restarts": restarts, "moves": figures(&rows), "stock": figures(std::slice::from_ref(&stock))}).to_string())?;
    }
    if let Err(error) = intact {
        eprintln!("error: the oracle does not agree: {error:#}");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// Applies a migration as a user does, and shows what happens to it.
fn one_move(stage: &Stage, subject: &mut Subject, from: &str, to: &str) -> Result<Row> {
    let name = format!("demo-{from}-to-{to}");
    let object = moves::object(&name, &subject.pod, Some(to), &json!({}));
    say(&format!(
        "\n$ kubectl apply -f - <<< '{}'",
        serde_json::to_string(&object)?
    ))?;
    let before = stage.witnessed(NAME)?.map_or(0, |(now, _)| now);
    let began = Instant::now();
    stage.apply(&object)?;
    let migration = watch(stage, &Move { name }, began)?;
    moves::succeeded(&migration)?;
    moves::follow(subject, &migration)?;
    subject.check(stage)?;
    let result = migration
        .status
        .as_ref()
        .and_then(|status| status.result.clone())
        .context("the migration has no result")?;
    let seen_ms = stage
        .witnessed(NAME)?
        .and_then(|(_, lives)| lives.iter().map(|life| life.longest_gap(before)).max());
    Ok(Row {
        what: format!("{from} -> {to}"),
        freeze_ms: result.freeze_milliseconds.unwrap_or_default().into(),
        total_ms: result
            .total_milliseconds
            .and_then(|total| u64::try_from(total).ok())
            .unwrap_or_default(),
        bytes: result.bytes,
        seen_ms,
    })
}

/// A line for each change that a user would want to see.
fn watch(stage: &Stage, migration: &Move, began: Instant) -> Result<ProcessMigration> {
    let mut last = String::new();
    let deadline = began + moves::SETTLED;
    loop {
        let now = migration.get(stage)?;
        let line = line(&now);
        if line != last {
            say(&format!("  {:>6.2} s  {line}", began.elapsed().as_secs_f64()))?;
            last = line;
        }
        if moves::is_settled(&now) {
            return Ok(now);
        }
        ensure!(
            Instant::now() < deadline,
            "the move is not settled after {} s: {}",
            moves::SETTLED.as_secs(),
            moves::story(&now)
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn line(migration: &ProcessMigration) -> String {
    let Some(status) = &migration.status else {
        return "created".to_owned();
    };
    let mut line = format!("{:<10}", status.phase.map_or("", |phase| phase.as_str()));
    if let Some(active) = status.active_on {
        line.push_str(&format!("  runs on {active:?}"));
    }
    if let Some(bytes) = status.progress.as_ref().and_then(|progress| progress.transferred_bytes) {
        line.push_str(&format!("  {} sent", mib(bytes)));
    }
    if let Some(freeze) = status.result.as_ref().and_then(|result| result.freeze_milliseconds) {
        line.push_str(&format!("  frozen for {freeze} ms"));
    }
    line
}

fn mib(bytes: i64) -> String {
    format!("{} MiB", bytes >> 20)
}

fn table(rows: &[Row], stock: &Row, intact: &Result<()>, restarts: usize) -> Result<()> {
    say(&format!(
        "\n{:<40} {:>10} {:>14} {:>10} {:>10}",
        "move", "freeze", "seen outside", "total", "bytes"
    ))?;
    for row in rows.iter().chain([stock]) {
        let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        say(&format!(
            "{:<40} {:>10} {:>14} {:>10} {:>10}",
            row.what,
            format!("{} ms", row.freeze_ms),
            or_none(row.seen_ms.map(|seen| format!("{seen} ms"))),
            format!("{} ms", row.total_ms),
            or_none(row.bytes.map(mib))
        ))?;
    }
    say(&format!(
        "\nstate intact: {}; restarts: {restarts}",
        if intact.is_ok() { "yes" } else { "NO" }
    ))
}

fn what_next(subject: &Subject) -> Result<()> {
    say(&format!(
        "\nThe cluster is still up. Try:\n\
         \x20 cargo xtask cluster kubectl -- get pods,pmig -n {NAMESPACE} -o wide\n\
         \x20 cargo xtask cluster kubectl -- logs -n {NAMESPACE} {pod} -f      # the counter goes on through a move\n\
         \x20 cargo xtask cluster kubectl -- create -f -                      # a ProcessMigration as above, with another name\n\
         \x20 cargo xtask cluster kubectl -- get migrationnodes\n\
         \x20 cargo xtask cluster node crash node-b                           # while a move is under way\n\
         \x20 cargo xtask cluster down",
        pod = subject.pod
    ))
}

/// To stdout; a reader that had enough is no error.
fn say(text: &str) -> Result<()> {
    match writeln!(std::io::stdout().lock(), "{text}") {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error).context("cannot write to stdout"),
        _ => Ok(()),
    }
}
