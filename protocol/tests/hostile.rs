//! Bytes that no program of ours would send: random, changed, cut, too long. Never a panic; always a named violation, or a
//! message that is legal.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
#![expect(clippy::unwrap_used, reason = "a test")]

use proptest::prelude::*;
use protocol::frame::{self, Kind};
use protocol::hand_off::{HandOff, ShepherdReport};
use protocol::migrate::message::{Entry, EntryKind, Manifest, Meta, Offer, PROTOCOL, Place, Stream};
use protocol::migrate::{FromSource, FromTarget, source, target};

fn kinds() -> impl Strategy<Value = Kind> {
    prop_oneof![Just(Kind::Control), Just(Kind::Large), Just(Kind::Data)]
}

fn session() -> Vec<(Kind, Vec<u8>)> {
    let messages = [
        FromSource::Offer(Offer {
            protocol: PROTOCOL.into(),
            versions: vec![1],
            stream: Stream::Session,
            namespace: "n".into(),
            name: "m".into(),
            uid: "u".into(),
            attempt: 1,
            source_pod_uid: "s".into(),
            target_pod_uid: "t".into(),
        }),
        FromSource::Manifest(Manifest {
            containers: vec!["main".into()],
            descriptors: Vec::new(),
            memory_bytes: 1 << 19,
            max_image_bytes: 1 << 20,
            max_file_bytes: 1 << 20,
            copied_before: false,
        }),
        FromSource::Frozen,
        FromSource::Entry(Entry {
            place: Place::Root(0),
            path: "etc/x".into(),
            kind: EntryKind::File { file: 0 },
            meta: Some(Meta::default()),
        }),
        FromSource::FileEnd { file: 0, size: 4 },
        FromSource::Complete { entries: 1, bytes: 4 },
    ];
    let mut frames: Vec<(Kind, Vec<u8>)> = messages
        .iter()
        .map(|m| (m.kind(), serde_json::to_vec(m).unwrap()))
        .collect();
    let mut data = frame::data_header(0, 0).to_vec();
    data.extend_from_slice(b"data");
    frames.insert(4, (Kind::Data, data));
    frames
}

/// Feeds frames as the target gets them, with its own answers between.
fn feed(frames: &[(Kind, Vec<u8>)]) -> Result<(), String> {
    let mut machine = target::Machine::default();
    for (kind, content) in frames {
        let (next, output) = machine
            .step(&target::Input::Frame(*kind, content))
            .map_err(|(_, v)| v.to_string())?;
        machine = next;
        let answer = match output {
            target::Output::Offer(_) => Some(FromTarget::Accept { version: 1 }),
            target::Output::Manifest(_) => Some(FromTarget::ManifestAccepted),
            _ => None,
        };
        if let Some(answer) = answer {
            machine = machine
                .step(&target::Input::Send(&answer))
                .map_err(|(_, v)| v.to_string())?
                .0;
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn random_frames_are_violations(frames in prop::collection::vec((kinds(), prop::collection::vec(any::<u8>(), 0..300)), 1..5)) {
        let violation = feed(&frames).unwrap_err();
        prop_assert!(violation.contains(" in state "), "{}", violation);
    }

    #[test]
    fn a_changed_session_is_a_violation_or_another_legal_one(at in 0usize..7, byte in any::<prop::sample::Index>(), value in any::<u8>()) {
        let mut frames = session();
        let content = &mut frames[at].1;
        let i = byte.index(content.len());
        content[i] = value;
        if let Err(violation) = feed(&frames) {
            prop_assert!(violation.contains(" in state "), "{}", violation);
        }
    }

    #[test]
    fn a_cut_message_is_a_violation(at in 0usize..7, cut in any::<prop::sample::Index>()) {
        let mut frames = session();
        let content = &mut frames[at].1;
        let n = cut.index(content.len());
        content.truncate(n);
        // A piece of a file may be shorter; that bytes are missing is seen at the end.
        prop_assert!(feed(&frames).is_err());
    }

    #[test]
    fn random_bytes_to_the_source_are_violations(content in prop::collection::vec(any::<u8>(), 0..300)) {
        let machine = source::Machine::default();
        prop_assert!(machine.step(&source::Input::Frame(Kind::Control, &content)).is_err());
    }

    #[test]
    fn headers_never_allow_more_than_their_kind(bytes in any::<[u8; 5]>()) {
        if let Ok((kind, len)) = frame::read_header(bytes) {
            prop_assert!(len <= kind.max());
        }
    }

    #[test]
    fn random_files_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..500)) {
        prop_assert!(HandOff::open(&bytes).is_err());
        prop_assert!(ShepherdReport::open(&bytes).is_err());
    }
}

#[test]
fn an_oversized_frame_is_refused_before_it_is_read() {
    for kind in [Kind::Control, Kind::Large, Kind::Data] {
        let content = vec![b' '; kind.max() + 1];
        assert!(feed(&[(kind, content)]).is_err());
    }
}

#[test]
fn deep_nesting_is_refused() {
    let content = [b"[".repeat(60_000), b"]".repeat(4)].concat();
    assert!(feed(&[(Kind::Control, content)]).is_err());
}
