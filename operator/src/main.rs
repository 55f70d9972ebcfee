//! The operator's program: arguments, log, run.

use std::process::ExitCode;

use clap::Parser;
use operator::args::{Args, Command, LogFormat};
use operator::error::chain;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let args = Args::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match args.run.log_format {
        LogFormat::Text => log.with_ansi(false).init(),
        LogFormat::Json => log.json().init(),
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(error = %error, "failed to start");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(async {
        match args.command {
            None => operator::run::run(args.run).await,
            Some(Command::Uninstall { timeout_seconds }) => operator::uninstall::run(args.run, timeout_seconds).await,
        }
    });
    // Watches and half-sent events do not hold up the end.
    runtime.shutdown_timeout(std::time::Duration::from_millis(500));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = %chain(&error), "ended");
            ExitCode::FAILURE
        }
    }
}
