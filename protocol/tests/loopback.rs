//! Source and target machines, joined: a whole session, and a fault at every message.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use protocol::frame::{self, Kind};
use protocol::migrate::message::{
    Entry, EntryKind, Facts, Manifest, Meta, Offer, PROTOCOL, Place, Stream, ThreadFacts,
};
use protocol::migrate::{FromSource, FromTarget, source, target};
use protocol::raw::Raw;

fn offer() -> Offer {
    Offer {
        protocol: PROTOCOL.into(),
        versions: vec![1],
        stream: Stream::Session,
        namespace: "n".into(),
        name: "m".into(),
        uid: "u".into(),
        attempt: 1,
        source_pod_uid: "s".into(),
        target_pod_uid: "t".into(),
    }
}

fn manifest() -> Manifest {
    Manifest {
        containers: vec!["main".into(), "side".into()],
        descriptors: Vec::new(),
        memory_bytes: 500,
        max_image_bytes: 1000,
        max_file_bytes: 100,
        copied_before: false,
    }
}

fn image(file: u32, name: &str) -> FromSource {
    FromSource::Entry(Entry {
        place: Place::Images(0),
        path: name.into(),
        kind: EntryKind::File { file },
        meta: None,
    })
}

fn rooted(path: &str, kind: EntryKind) -> FromSource {
    let meta = match kind {
        EntryKind::Removed | EntryKind::HardLink { .. } => None,
        EntryKind::File { .. }
        | EntryKind::Dir { .. }
        | EntryKind::Symlink { .. }
        | EntryKind::Fifo
        | EntryKind::Socket => Some(Meta::default()),
    };
    FromSource::Entry(Entry {
        place: Place::Root(1),
        path: path.into(),
        kind,
        meta,
    })
}

/// What goes over the wire, in both directions.
#[derive(Clone, Debug)]
enum Step {
    Source(FromSource),
    Data { file: u32, offset: u64, bytes: Vec<u8> },
    Target(FromTarget),
}

fn whole() -> Vec<Step> {
    use Step::{Data, Source, Target};
    let data = |file, offset, n: usize| Data {
        file,
        offset,
        bytes: vec![1; n],
    };
    vec![
        Source(FromSource::Offer(offer())),
        Target(FromTarget::Accept { version: 1 }),
        Source(FromSource::Manifest(manifest())),
        Target(FromTarget::ManifestAccepted),
        Source(FromSource::Frozen),
        Source(image(0, "pages-1.img")),
        data(0, 0, 300),
        Source(rooted("etc", EntryKind::Dir { opaque: false })),
        Source(rooted("etc/x", EntryKind::File { file: 1 })),
        data(0, 300, 300),
        data(1, 50, 20),
        Source(FromSource::FileEnd { file: 1, size: 100 }),
        Source(rooted("etc/y", EntryKind::HardLink { to: "etc/x".into() })),
        Source(rooted("etc/z", EntryKind::Symlink { target: "../a".into() })),
        Source(rooted("old", EntryKind::Removed)),
        Source(FromSource::Alive),
        Target(FromTarget::Alive),
        Source(FromSource::FileEnd { file: 0, size: 600 }),
        Source(FromSource::Facts(Facts {
            addresses: vec!["10.0.0.1".parse().unwrap()],
            connections_closed_by_criu: false,
            threads: vec![ThreadFacts {
                container: 1,
                tid: 7,
                slack: Some(1),
                processors: vec![0],
            }],
        })),
        Source(FromSource::Complete { entries: 6, bytes: 620 }),
        Target(FromTarget::Received),
        Target(FromTarget::Held),
        Target(FromTarget::Committed),
    ]
}

fn encode(message: &impl serde::Serialize) -> Vec<u8> {
    serde_json::to_vec(message).unwrap()
}

struct Both {
    source: Option<source::Machine>,
    target: Option<target::Machine>,
}

impl Both {
    fn new() -> Self {
        Self {
            source: Some(source::Machine::default()),
            target: Some(target::Machine::default()),
        }
    }

    fn source(&mut self, input: &source::Input<'_>) -> Result<source::Output, String> {
        match self.source.take().unwrap().step(input) {
            Ok((m, o)) => {
                self.source = Some(m);
                Ok(o)
            }
            Err((m, v)) => {
                self.source = Some(m);
                Err(v.to_string())
            }
        }
    }

    fn target(&mut self, input: &target::Input<'_>) -> Result<target::Output, String> {
        match self.target.take().unwrap().step(input) {
            Ok((m, o)) => {
                self.target = Some(m);
                Ok(o)
            }
            Err((m, v)) => {
                self.target = Some(*m);
                Err(v.to_string())
            }
        }
    }

    fn run(&mut self, step: &Step) -> Result<(), String> {
        match step {
            Step::Source(m) => {
                self.source(&source::Input::Send(m))?;
                self.target(&target::Input::Frame(m.kind(), &encode(m)))?;
            }
            Step::Data { file, offset, bytes } => {
                self.target(&target::Input::Frame(Kind::Data, &piece(*file, *offset, bytes)))?;
            }
            Step::Target(m) => {
                self.target(&target::Input::Send(m))?;
                self.source(&source::Input::Frame(Kind::Control, &encode(m)))?;
            }
        }
        Ok(())
    }
}

fn piece(file: u32, offset: u64, bytes: &[u8]) -> Vec<u8> {
    let mut out = frame::data_header(file, offset).to_vec();
    out.extend_from_slice(bytes);
    out
}

#[test]
fn a_whole_session_is_legal() {
    let mut both = Both::new();
    for step in whole() {
        both.run(&step).unwrap_or_else(|e| panic!("{step:?}: {e}"));
    }
    assert_eq!(both.source.unwrap().state(), source::State::Ended);
    assert_eq!(both.target.unwrap().state(), target::State::Ended);
}

/// Every message of a whole session, said at every other point of it: either it is legal there, or it is a violation that
/// names it, and never a panic.
#[test]
fn every_message_at_every_point_is_legal_or_a_violation() {
    let steps = whole();
    for at in 0..steps.len() {
        for said in &steps {
            let mut both = Both::new();
            for step in &steps[..at] {
                both.run(step).unwrap();
            }
            match said {
                Step::Source(m) => {
                    let result = both.target(&target::Input::Frame(m.kind(), &encode(m)));
                    if let Err(violation) = result {
                        assert!(violation.contains(" in state "), "{violation}");
                    }
                }
                Step::Data { file, offset, bytes } => {
                    both.target(&target::Input::Frame(Kind::Data, &piece(*file, *offset, bytes)))
                        .ok();
                }
                Step::Target(m) => {
                    let result = both.source(&source::Input::Frame(Kind::Control, &encode(m)));
                    if let Err(violation) = result {
                        assert!(violation.contains(m.name()), "{violation}");
                    }
                }
            }
        }
    }
}

/// A message that is lost: the session never ends as if nothing had happened, unless the message says nothing.
#[test]
fn a_session_with_a_lost_message_never_completes() {
    let steps = whole();
    for lost in 0..steps.len() {
        let says_nothing = matches!(
            &steps[lost],
            Step::Source(FromSource::Alive) | Step::Target(FromTarget::Alive | FromTarget::Committed)
        );
        if says_nothing {
            continue;
        }
        let mut both = Both::new();
        let result = steps
            .iter()
            .enumerate()
            .filter(|(i, _)| *i != lost)
            .try_for_each(|(_, step)| both.run(step));
        assert!(result.is_err(), "without {:?}", steps[lost]);
    }
}

/// A message that comes twice is a violation, unless it says nothing.
#[test]
fn a_repeated_message_is_refused() {
    let steps = whole();
    for twice in 0..steps.len() {
        let idempotent = matches!(
            &steps[twice],
            Step::Source(FromSource::Alive) | Step::Target(FromTarget::Alive)
        );
        // Entries without a number may come twice; that there are too many is seen at the end.
        let result = (0..=twice)
            .chain(twice..steps.len())
            .map(|i| &steps[i])
            .try_fold(Both::new(), |mut both, step| both.run(step).map(|()| both));
        assert_eq!(result.is_ok(), idempotent, "{:?} twice", steps[twice]);
    }
}

#[test]
fn the_source_may_abandon_at_every_point_and_hears_the_end() {
    let steps = whole();
    let abandon = FromSource::Abandon {
        reason: "CanceledByUser".into(),
        message: "m".into(),
    };
    let destroyed = FromTarget::Destroyed {
        reason: "CanceledByUser".into(),
        message: "m".into(),
    };
    for at in 2..steps.len() {
        let mut both = Both::new();
        for step in &steps[..at] {
            both.run(step).unwrap();
        }
        both.run(&Step::Source(abandon.clone()))
            .unwrap_or_else(|e| panic!("at {at}: {e}"));
        both.run(&Step::Target(destroyed.clone()))
            .unwrap_or_else(|e| panic!("at {at}: {e}"));
        assert_eq!(both.source.unwrap().state(), source::State::Ended);
    }
}

/// I1: a target commits only what it holds, and never what it has destroyed.
#[test]
fn committed_is_said_only_when_everything_is_held() {
    let steps = whole();
    for at in 0..steps.len() - 1 {
        let mut both = Both::new();
        for step in &steps[..at] {
            both.run(step).unwrap();
        }
        assert!(
            both.target(&target::Input::Send(&FromTarget::Committed)).is_err(),
            "at {at}"
        );
        assert!(
            both.source(&source::Input::Frame(Kind::Control, &encode(&FromTarget::Committed)))
                .is_err(),
            "at {at}"
        );
    }
}

fn receiving() -> Both {
    let mut both = Both::new();
    for step in &whole()[..5] {
        both.run(step).unwrap();
    }
    both
}

fn refused(messages: &[FromSource], why: &str) {
    let mut both = receiving();
    let mut result = Ok(target::Output::MaySend);
    for m in messages {
        result = both.target(&target::Input::Frame(m.kind(), &encode(m)));
    }
    let violation = result.expect_err(why);
    assert!(violation.contains(why), "{violation:?} does not say {why:?}");
}

#[test]
fn paths_that_lead_elsewhere_are_refused() {
    let long = "x/".repeat(3000) + "x";
    for path in [
        "/etc",
        "..",
        "a/../b",
        "a//b",
        "./a",
        "a/.",
        "a\0b",
        "",
        &long,
        &"n".repeat(256),
    ] {
        refused(&[rooted(path, EntryKind::File { file: 0 })], "path");
        refused(&[rooted("a", EntryKind::HardLink { to: path.into() })], "path");
    }
    for name in ["..", "a/b", ".hidden", "", "päges.img", "a\0"] {
        refused(&[image(0, name)], "is not the name of an image");
    }
    refused(
        &[rooted("a", EntryKind::Symlink { target: Raw(vec![0]) })],
        "symbolic link",
    );
}

#[test]
fn what_exceeds_the_manifest_is_refused() {
    let mut both = receiving();
    let file = image(0, "pages-1.img");
    both.target(&target::Input::Frame(Kind::Control, &encode(&file)))
        .unwrap();
    both.target(&target::Input::Frame(Kind::Data, &piece(0, 0, &[0; 1000])))
        .unwrap();
    let violation = both
        .target(&target::Input::Frame(Kind::Data, &piece(0, 1000, &[0; 1])))
        .unwrap_err();
    assert!(violation.contains("1000 bytes"), "{violation}");

    refused(&[FromSource::FileEnd { file: 3, size: 1 }], "not open");
    refused(&[image(1, "x.img")], "was expected");
    refused(
        &[FromSource::Entry(Entry {
            place: Place::Root(2),
            path: "a".into(),
            kind: EntryKind::Removed,
            meta: None,
        })],
        "no container 2",
    );
    let many: Vec<FromSource> = (0..=u32::try_from(protocol::limits::OPEN_FILES).unwrap())
        .map(|n| image(n, &format!("f{n}.img")))
        .collect();
    refused(&many, "open files");
    let facts = |f: Facts| FromSource::Facts(f);
    for bad in ["127.0.0.1", "0.0.0.0", "::", "ff02::1", "224.0.0.1"] {
        refused(
            &[facts(Facts {
                addresses: vec![bad.parse().unwrap()],
                ..Facts::default()
            })],
            "address",
        );
    }
}
