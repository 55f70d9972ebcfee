//! A connection between two agents: the real machines of both sides, real messages, a modelled network below them.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

use protocol::frame::Kind;
use protocol::migrate::{FromSource, FromTarget, source, target};

use super::cluster::Cluster;

/// As in node-agent/src/peer.rs.
const SILENCE: u64 = 20_000;

#[derive(Default)]
struct Way {
    /// When each frame arrives, its kind and its content.
    frames: RefCell<VecDeque<(u64, Kind, Vec<u8>)>>,
    last: Cell<u64>,
}

/// What both ends share.
pub(crate) struct Wire {
    c: Cluster,
    to_target: Way,
    to_source: Way,
    source: RefCell<source::Machine>,
    target: RefCell<target::Machine>,
    /// When an end was closed, and whether the other is told at once (a node without power says nothing).
    closed: Cell<Option<u64>>,
    /// Broken for good: a violation, or nothing was heard for too long.
    broken: RefCell<Option<String>>,
}

pub(crate) struct SourceEnd(Rc<Wire>);
pub(crate) struct TargetEnd(Rc<Wire>);

/// Opens a connection.
pub(crate) fn open(c: &Cluster) -> (SourceEnd, TargetEnd) {
    let wire = Rc::new(Wire {
        c: c.clone(),
        to_target: Way::default(),
        to_source: Way::default(),
        source: RefCell::default(),
        target: RefCell::default(),
        closed: Cell::new(None),
        broken: RefCell::default(),
    });
    (SourceEnd(wire.clone()), TargetEnd(wire))
}

impl Wire {
    fn ended(&self) -> Option<String> {
        if let Some(why) = &*self.broken.borrow() {
            return Some(why.clone());
        }
        let now = self.c.clock.now();
        if let Some(since) = self.c.cut_since() {
            self.c.clock.wake_at(since + SILENCE);
            if now >= since + SILENCE {
                *self.broken.borrow_mut() = Some("nothing was heard of the peer for 20 s".to_owned());
                return self.broken.borrow().clone();
            }
            return None;
        }
        let at = self.closed.get()?;
        self.c.clock.wake_at(at);
        (now >= at).then(|| "the connection was lost".to_owned())
    }

    fn violation(&self, what: &impl std::fmt::Display) -> String {
        let why = format!("the peer broke the protocol: {what}");
        self.c.say(&why);
        *self.c.violation.borrow_mut() = Some(why.clone());
        *self.broken.borrow_mut() = Some(why.clone());
        why
    }

    fn push(&self, way: &Way, kind: Kind, content: Vec<u8>) {
        let arrives = way.last.get().max(self.c.clock.now() + self.c.clock.between(1, 6));
        way.last.set(arrives);
        way.frames.borrow_mut().push_back((arrives, kind, content));
    }

    /// The next frame that has arrived; `Err`: there will be none any more.
    fn pop(&self, way: &Way) -> Option<Result<(Kind, Vec<u8>), String>> {
        let now = self.c.clock.now();
        if self.c.cut_since().is_none() && self.broken.borrow().is_none() {
            let mut frames = way.frames.borrow_mut();
            if let Some((at, ..)) = frames.front() {
                self.c.clock.wake_at(*at);
                if now >= *at {
                    return frames.pop_front().map(|(_, kind, content)| Ok((kind, content)));
                }
                // What was sent before the end is read before the end.
                return None;
            }
        }
        self.ended().map(Err)
    }

    fn close(&self, powered: bool) {
        let pause = if powered { self.c.clock.between(1, 6) } else { SILENCE };
        let at = self.c.clock.now() + pause;
        self.closed
            .set(Some(self.closed.get().map_or(at, |before| before.min(at))));
    }

    async fn lost(&self) -> String {
        self.c.clock.until(|| self.ended()).await
    }
}

fn json(message: &impl serde::Serialize) -> Vec<u8> {
    serde_json::to_vec(message).unwrap()
}

impl SourceEnd {
    pub(crate) fn send(&self, message: &FromSource) -> Result<(), String> {
        if let Some(why) = self.0.ended() {
            return Err(why);
        }
        let machine = self.0.source.borrow().clone();
        match machine.step(&source::Input::Send(message)) {
            Ok((machine, _)) => {
                *self.0.source.borrow_mut() = machine;
                self.0.push(&self.0.to_target, message.kind(), json(message));
                Ok(())
            }
            // Ended on both sides already: that is how a session is told, not a fault.
            Err((machine, why)) if machine.state() == source::State::Ended => Err(why.to_string()),
            Err((_, why)) => Err(self.0.violation(&why)),
        }
    }

    /// A piece of file 0.
    pub(crate) fn send_piece(&self, bytes: &[u8]) -> Result<(), String> {
        if let Some(why) = self.0.ended() {
            return Err(why);
        }
        let mut content = protocol::frame::data_header(0, 0).to_vec();
        content.extend_from_slice(bytes);
        self.0.push(&self.0.to_target, Kind::Data, content);
        Ok(())
    }

    /// What the target says next.
    pub(crate) async fn hear(&self) -> Result<FromTarget, String> {
        let (kind, content) = self.0.c.clock.until(|| self.0.pop(&self.0.to_source)).await?;
        let machine = self.0.source.borrow().clone();
        match machine.step(&source::Input::Frame(kind, &content)) {
            Ok((machine, source::Output::Heard(message))) => {
                *self.0.source.borrow_mut() = machine;
                Ok(message)
            }
            Ok((_, source::Output::MaySend)) => Err("impossible".to_owned()),
            Err((_, why)) => Err(self.0.violation(&why)),
        }
    }

    pub(crate) fn close(&self, powered: bool) {
        self.0.close(powered);
    }
}

impl TargetEnd {
    pub(crate) fn send(&self, message: &FromTarget) -> Result<(), String> {
        if let Some(why) = self.0.ended() {
            return Err(why);
        }
        let machine = self.0.target.borrow().clone();
        match machine.step(&target::Input::Send(message)) {
            Ok((machine, _)) => {
                *self.0.target.borrow_mut() = machine;
                self.0.push(&self.0.to_source, Kind::Control, json(message));
                Ok(())
            }
            Err((machine, why)) if machine.state() == target::State::Ended => Err(why.to_string()),
            Err((_, why)) => Err(self.0.violation(&why)),
        }
    }

    /// What the source says next; a piece comes with its bytes.
    pub(crate) async fn hear(&self) -> Result<(target::Output, Vec<u8>), String> {
        let (kind, content) = self.0.c.clock.until(|| self.0.pop(&self.0.to_target)).await?;
        let machine = self.0.target.borrow().clone();
        match machine.step(&target::Input::Frame(kind, &content)) {
            Ok((machine, output)) => {
                *self.0.target.borrow_mut() = machine;
                Ok((output, content))
            }
            Err((_, why)) => Err(self.0.violation(&why)),
        }
    }

    pub(crate) async fn lost(&self) -> String {
        self.0.lost().await
    }

    pub(crate) fn close(&self, powered: bool) {
        self.0.close(powered);
    }
}

impl Drop for SourceEnd {
    fn drop(&mut self) {
        // Node a dials in the first move, node b in a move back: power is what counts.
        let powered = self.0.c.nodes.iter().all(|n| n.try_borrow().is_ok_and(|n| n.up));
        self.0.close(powered);
    }
}

impl Drop for TargetEnd {
    fn drop(&mut self) {
        let powered = self.0.c.nodes.iter().all(|n| n.try_borrow().is_ok_and(|n| n.up));
        self.0.close(powered);
    }
}
