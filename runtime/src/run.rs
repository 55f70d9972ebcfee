//! From the name and arguments of a call to its end.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use hostsys::program;
use protocol::hand_off::{COMMITTED_DIR, MOVED_AWAY_DIR, PARK, RuntimeConfig};

use crate::answer::Shepherded;
use crate::argv::Call;
use crate::complain::{self, sentence};
use crate::folder::Folder;
use crate::spec::Spec;
use crate::verdict::{self, CreateVerdict, Creation, Verdict};
use crate::{create, criu, hand_off, hold, multipath, pager, park, settings, shepherd, tar};

type Failure = Box<dyn std::error::Error>;

/// The program, with its arguments, told apart by the name under which it is called.
#[must_use]
pub fn run(arguments: Vec<OsString>) -> ExitCode {
    let name = arguments.first().cloned().unwrap_or_default();
    let rest = arguments.get(1..).unwrap_or_default();
    match Path::new(&name).file_name().and_then(OsStr::to_str) {
        Some("criu") => match settings::read() {
            Ok(settings) => told("criu", &sentence(&criu::become_criu(&settings, rest))),
            Err(error) => told("criu", &sentence(&error)),
        },
        Some("tar") => match settings::read() {
            Ok(settings) => told("tar", &sentence(&tar::become_tar(&settings, rest))),
            Err(error) => told("tar", &sentence(&error)),
        },
        Some("hold") => match hold::act(&name, std::env::var_os("CRTOOLS_SCRIPT_ACTION").as_deref()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                // Standard error is the container's: the reason goes where the shepherd's other files are.
                let folder = Folder::at(Path::new(&name).parent().map(PathBuf::from).unwrap_or_default());
                let _ = folder.write("hold-error", sentence(&error).as_bytes());
                ExitCode::FAILURE
            }
        },
        Some(PARK) => match park::act(&name, std::env::var_os("CRTOOLS_SCRIPT_ACTION").as_deref()) {
            Ok(()) => ExitCode::SUCCESS,
            // Its streams are the agent's, which knows why.
            Err(_) => ExitCode::FAILURE,
        },
        Some(create::SHEPHERD) => stand(rest),
        Some(pager::NAME) => pager::run(rest),
        _ => call(rest),
    }
}

fn told(who: &str, message: &str) -> ExitCode {
    eprintln!("peregrine {who}: {message}");
    ExitCode::FAILURE
}

fn stand(rest: &[OsString]) -> ExitCode {
    let Some(folder) = rest.first() else {
        return told("shepherd", "no folder is named");
    };
    let folder = Folder::at(folder.into());
    match shepherd::stand(folder.clone()) {
        Ok(shepherd::End::Status(status)) => ExitCode::from(u8::try_from(status).unwrap_or(u8::MAX)),
        Ok(shepherd::End::Signal(signal)) => program::end_by_signal(signal),
        Err(error) => {
            // Its streams are the container's.
            let _ = folder.write("shepherd-error", sentence(&error).as_bytes());
            ExitCode::from(125)
        }
    }
}

fn call(arguments: &[OsString]) -> ExitCode {
    let call = Call::parse(arguments);
    match act(&call, arguments) {
        Ok(code) => code,
        Err(error) => {
            complain::error(&call, &sentence(&*error));
            ExitCode::FAILURE
        }
    }
}

fn act(call: &Call, arguments: &[OsString]) -> Result<ExitCode, Failure> {
    let settings = settings::read()?;
    match call.verb.as_deref() {
        Some("create" | "run") => create_call(call, &settings, arguments),
        Some(verb) => {
            let shepherded = match call.id() {
                Some(id) => Shepherded::of(id)?,
                None => None,
            };
            other_call(call, verb, shepherded, &settings, arguments)
        }
        None => Err(pass(&settings, arguments)),
    }
}

fn other_call(
    call: &Call,
    verb: &str,
    shepherded: Option<Shepherded>,
    settings: &RuntimeConfig,
    arguments: &[OsString],
) -> Result<ExitCode, Failure> {
    let verdict = verdict::of_call(verb, shepherded.as_ref().map(|s| s.standing));
    let Some(shepherded) = shepherded else {
        return Err(pass(settings, arguments));
    };
    match verdict {
        Verdict::PassThrough => return Err(pass(settings, arguments)),
        Verdict::Started => shepherded.started()?,
        Verdict::State => shepherded.print_state()?,
        Verdict::End => shepherded.end()?,
        Verdict::Delete => shepherded.delete()?,
        Verdict::DeleteRunning => shepherded.delete_running(call, settings)?,
        Verdict::Processes => shepherded.print_processes(call)?,
        Verdict::NotYet => {
            return Err(
                "the container is being moved to this node and its processes are not here yet: try again when the \
                        ProcessMigration has finished"
                    .into(),
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn create_call(call: &Call, settings: &RuntimeConfig, arguments: &[OsString]) -> Result<ExitCode, Failure> {
    let spec = Spec::read(&call.bundle())?;
    let identity = spec.identity();
    let marked = |folder| hand_off::mark(folder, &identity.pod_uid).is_some_and(|path| path.exists());
    let verdict = verdict::of_create(Creation {
        role: spec.role(),
        target_of: spec.target_of(),
        moved_away: marked(MOVED_AWAY_DIR),
        committed: marked(COMMITTED_DIR),
    });
    match verdict {
        CreateVerdict::PassThrough => Err(pass(settings, arguments)),
        CreateVerdict::Sandbox => {
            if let Some(network) = spec.network_namespace()
                && let Err(error) = multipath::switch_off(network)
            {
                // The pod is of use without it: its Go servers cannot be moved, and preflight will say so.
                complain::warning(call, &sentence(&error));
            }
            Err(pass(settings, arguments))
        }
        CreateVerdict::MovedAway => Err(format!(
            "the processes of pod {}/{} were moved to another node: they are not started here again",
            identity.namespace, identity.pod_name
        )
        .into()),
        CreateVerdict::Target if call.verb.as_deref() == Some("run") => Err(
            "a container of a migration target cannot be run at once: it is created first and restored later".into(),
        ),
        CreateVerdict::Target => {
            create::create(call, &spec, settings, spec.target_of().unwrap_or_default())?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Becomes the runtime below. Returns only when that failed.
fn pass(settings: &RuntimeConfig, arguments: &[OsString]) -> Failure {
    program::replace_by(Path::new(&settings.oci_runtime), arguments, &[]).into()
}
