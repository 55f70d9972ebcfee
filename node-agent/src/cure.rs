//! Two defects of CRIU 4.2 cured in its images, between dump and restore; and what two containers of a pod share.
//!
//! 1. A system call that was blocked when the container was frozen would return EINTR though no handler ran: CRIU turns
//!    `-ERESTART_RESTARTBLOCK` into `-EINTR`. Programs die of it. Here the call begins again, as CRIU itself does for
//!    `-ERESTARTSYS`. Relative timeouts start anew. A thread for which a signal waits keeps its EINTR.
//! 2. A periodic timerfd that had expired unread at the dump (always, when its period is shorter than the freeze) has an
//!    `it_value` of 0, with which CRIU disarms it for ever. Here it is armed with its interval.
//! 3. Each dump of a container holds the System V objects of the whole IPC namespace; the second restore would say
//!    `File exists`. They are cut from all images but the first container's.
//!
//! Images are protobuf behind two magic numbers. Only the fields that are changed are known here: all else is copied as it
//! is, so that another CRIU's additional fields survive.

use std::collections::HashSet;

/// System calls that begin again, by their number on this architecture.
#[cfg(target_arch = "x86_64")]
pub const AGAIN: &[u64] = &[
    7,   // poll
    23,  // select
    35,  // nanosleep
    45,  // recvfrom
    47,  // recvmsg
    65,  // semop
    128, // rt_sigtimedwait
    202, // futex
    220, // semtimedop
    230, // clock_nanosleep
    232, // epoll_wait
    270, // pselect6
    271, // ppoll
    281, // epoll_pwait
    441, // epoll_pwait2
];
/// System calls that begin again, by their number on this architecture.
#[cfg(target_arch = "aarch64")]
pub const AGAIN: &[u64] = &[
    22,  // epoll_pwait
    72,  // pselect6
    73,  // ppoll
    98,  // futex
    101, // nanosleep
    115, // clock_nanosleep
    137, // rt_sigtimedwait
    192, // semtimedop
    193, // semop
    207, // recvfrom
    212, // recvmsg
    441, // epoll_pwait2
];

/// `-EINTR`.
pub const EINTR: i64 = -4;
/// `-ERESTART_RESTARTBLOCK`: what the kernel itself would begin again, where CRIU has not been.
pub const RESTART_BLOCK: i64 = -516;

/// Bytes of the two magic numbers at the start of an image.
const HEADER: usize = 8;
/// How deep nothing is ever nested that is looked at here.
const MAX_IMAGE: usize = 64 * 1024 * 1024;

/// Why an image could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It ends in the middle of something.
    #[error("the image is cut off")]
    CutOff,
    /// A field of a kind that protobuf does not have (any more).
    #[error("the image has a field of wire type {0}")]
    WireType(u8),
    /// It is larger than such an image ever is.
    #[error("the image has {0} bytes, too many")]
    TooLarge(usize),
}

/// What a thread is known to have been doing when it was frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KnownCall {
    /// Number of the call.
    pub number: u64,
    /// Its first argument (arm64: the result has overwritten it).
    pub first: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Value {
    Varint(u64),
    Fixed64([u8; 8]),
    Bytes(Vec<u8>),
    Fixed32([u8; 4]),
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Field {
    number: u64,
    value: Value,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Message(Vec<Field>);

fn varint(bytes: &mut &[u8]) -> Result<u64, Error> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first().ok_or(Error::CutOff)?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(Error::CutOff)
}

fn put_varint(mut value: u64, out: &mut Vec<u8>) {
    while value > 0x7f {
        out.push(u8::try_from(value & 0x7f).unwrap_or(0) | 0x80);
        value >>= 7;
    }
    out.push(u8::try_from(value).unwrap_or(0));
}

fn take<'a>(bytes: &mut &'a [u8], n: usize) -> Result<&'a [u8], Error> {
    let (head, rest) = bytes.split_at_checked(n).ok_or(Error::CutOff)?;
    *bytes = rest;
    Ok(head)
}

fn take_array<const N: usize>(bytes: &mut &[u8]) -> Result<[u8; N], Error> {
    let (head, rest) = bytes.split_first_chunk::<N>().ok_or(Error::CutOff)?;
    *bytes = rest;
    Ok(*head)
}

impl Message {
    fn parse(mut bytes: &[u8]) -> Result<Self, Error> {
        let mut fields = Vec::new();
        while !bytes.is_empty() {
            let key = varint(&mut bytes)?;
            let value = match key & 7 {
                0 => Value::Varint(varint(&mut bytes)?),
                1 => Value::Fixed64(take_array(&mut bytes)?),
                2 => {
                    let len = usize::try_from(varint(&mut bytes)?).map_err(|_| Error::CutOff)?;
                    Value::Bytes(take(&mut bytes, len)?.to_vec())
                }
                5 => Value::Fixed32(take_array(&mut bytes)?),
                other => return Err(Error::WireType(u8::try_from(other).unwrap_or(u8::MAX))),
            };
            fields.push(Field {
                number: key >> 3,
                value,
            });
        }
        Ok(Self(fields))
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for field in &self.0 {
            let kind = match field.value {
                Value::Varint(_) => 0,
                Value::Fixed64(_) => 1,
                Value::Bytes(_) => 2,
                Value::Fixed32(_) => 5,
            };
            put_varint(field.number << 3 | kind, &mut out);
            match &field.value {
                Value::Varint(v) => put_varint(*v, &mut out),
                Value::Fixed64(b) => out.extend_from_slice(b),
                Value::Fixed32(b) => out.extend_from_slice(b),
                Value::Bytes(b) => {
                    put_varint(u64::try_from(b.len()).unwrap_or(0), &mut out);
                    out.extend_from_slice(b);
                }
            }
        }
        out
    }

    pub(crate) fn number(&self, number: u64) -> Option<u64> {
        self.0.iter().rev().find_map(|f| match f.value {
            Value::Varint(v) if f.number == number => Some(v),
            _ => None,
        })
    }

    fn set_number(&mut self, number: u64, value: u64) {
        match self.0.iter_mut().rev().find(|f| f.number == number) {
            Some(field) => field.value = Value::Varint(value),
            None => self.0.push(Field {
                number,
                value: Value::Varint(value),
            }),
        }
    }

    pub(crate) fn bytes_mut(&mut self, number: u64) -> Option<&mut Vec<u8>> {
        self.0.iter_mut().find_map(|f| match &mut f.value {
            Value::Bytes(b) if f.number == number => Some(b),
            _ => None,
        })
    }

    /// Changes a message inside this one; says whether it did.
    pub(crate) fn edit(
        &mut self,
        number: u64,
        change: impl FnOnce(&mut Message) -> Result<bool, Error>,
    ) -> Result<bool, Error> {
        let Some(bytes) = self.bytes_mut(number) else {
            return Ok(false);
        };
        let mut inner = Message::parse(bytes)?;
        let changed = change(&mut inner)?;
        if changed {
            *bytes = inner.encode();
        }
        Ok(changed)
    }
}

/// Changes each entry of an image; `None` where nothing changed.
pub(crate) fn each_entry(
    image: &[u8],
    mut change: impl FnMut(&mut Message) -> Result<bool, Error>,
) -> Result<Option<Vec<u8>>, Error> {
    if image.len() > MAX_IMAGE {
        return Err(Error::TooLarge(image.len()));
    }
    let mut rest = image;
    let mut out = take(&mut rest, HEADER)?.to_vec();
    let mut any = false;
    while !rest.is_empty() {
        let len = u32::from_le_bytes(take_array(&mut rest)?);
        let entry = take(&mut rest, usize::try_from(len).map_err(|_| Error::CutOff)?)?;
        let mut message = Message::parse(entry)?;
        let changed = change(&mut message)?;
        any |= changed;
        let encoded = if changed { message.encode() } else { entry.to_vec() };
        out.extend_from_slice(
            &u32::try_from(encoded.len())
                .map_err(|_| Error::TooLarge(encoded.len()))?
                .to_le_bytes(),
        );
        out.extend_from_slice(&encoded);
    }
    Ok(any.then_some(out))
}

/// `core-N.img`: lets an interrupted call of the thread begin again. `known`: what the thread was seen to be in when it
/// was frozen. `None` where nothing needs to change.
///
/// # Errors
/// See [`Error`].
pub fn cure_core(image: &[u8], known: Option<KnownCall>) -> Result<Option<Vec<u8>>, Error> {
    each_entry(image, |core| {
        if cfg!(target_arch = "x86_64") {
            core_x86(core)
        } else {
            core_arm(core, known)
        }
    })
}

/// thread_info (2) . gpregs (2): ax (11), orig_ax (16), ip (17). The image still has the number of the call.
fn core_x86(core: &mut Message) -> Result<bool, Error> {
    core.edit(2, |thread| {
        thread.edit(2, |registers| {
            let (Some(result), Some(number), Some(next)) =
                (registers.number(11), registers.number(16), registers.number(17))
            else {
                return Ok(false);
            };
            if result.cast_signed() != EINTR || !AGAIN.contains(&number) {
                return Ok(false);
            }
            registers.set_number(11, number);
            registers.set_number(17, next.wrapping_sub(2));
            Ok(true)
        })
    })
}

/// ti_aarch64 (8) . gpregs (3): regs (1, repeated), pc (3). The first argument was overwritten by the result, so only a
/// thread that was seen before can be cured.
fn core_arm(core: &mut Message, known: Option<KnownCall>) -> Result<bool, Error> {
    let Some(known) = known.filter(|k| AGAIN.contains(&k.number)) else {
        return Ok(false);
    };
    core.edit(8, |thread| {
        thread.edit(3, |registers| {
            let Some(next) = registers.number(3) else {
                return Ok(false);
            };
            let mut x: Vec<&mut Field> = registers.0.iter_mut().filter(|f| f.number == 1).collect();
            let interrupted = x
                .first()
                .is_some_and(|f| f.value == Value::Varint(EINTR.cast_unsigned()));
            if !interrupted || x.len() < 9 {
                return Ok(false);
            }
            for (register, value) in [(0, known.first), (8, known.number)] {
                if let Some(field) = x.get_mut(register) {
                    field.value = Value::Varint(value);
                }
            }
            registers.set_number(3, next.wrapping_sub(4));
            Ok(true)
        })
    })
}

/// `files.img`: arms periodic timerfds that had expired unread. `None` where nothing needs to change.
///
/// # Errors
/// See [`Error`].
pub fn cure_files(image: &[u8]) -> Result<Option<Vec<u8>>, Error> {
    /// tfd of a file entry.
    const TIMERFD: u64 = 12;
    const TICKS: u64 = 5;
    const VALUE: [u64; 2] = [7, 8];
    const INTERVAL: [u64; 2] = [9, 10];
    each_entry(image, |file| {
        file.edit(TIMERFD, |timer| {
            let get = |n: u64| timer.number(n).unwrap_or(0);
            let interval = INTERVAL.map(get);
            if VALUE.map(get) != [0, 0] || get(TICKS) == 0 || interval == [0, 0] {
                return Ok(false);
            }
            for (field, value) in VALUE.into_iter().zip(interval) {
                timer.set_number(field, value);
            }
            Ok(true)
        })
    })
}

/// Whether an image holds System V objects of the pod's IPC namespace.
#[must_use]
pub fn is_system_v(name: &str) -> bool {
    ["ipcns-shm-", "ipcns-sem-", "ipcns-msg-"]
        .iter()
        .any(|p| name.starts_with(p))
}

/// Such an image without its objects: the header alone.
///
/// # Errors
/// [`Error::CutOff`].
pub fn without_objects(image: &[u8]) -> Result<Vec<u8>, Error> {
    image.get(..HEADER).map(<[u8]>::to_vec).ok_or(Error::CutOff)
}

/// The thread of a `core-N.img`, in the container's pid namespace.
#[must_use]
pub fn thread_of_core(name: &str) -> Option<u32> {
    name.strip_prefix("core-")?.strip_suffix(".img")?.parse().ok()
}

/// Whether an image may be changed by a cure, so that it must not be sent before.
#[must_use]
pub fn is_cured(name: &str) -> bool {
    thread_of_core(name).is_some() || name == "files.img" || is_system_v(name)
}

/// Threads (by their id in the container) whose EINTR is right, because a signal waits for them.
pub type Pending = HashSet<u32>;

#[cfg(test)]
mod tests {
    use super::*;

    fn message(fields: &[(u64, Value)]) -> Message {
        Message(
            fields
                .iter()
                .map(|(number, value)| Field {
                    number: *number,
                    value: value.clone(),
                })
                .collect(),
        )
    }

    fn image(entries: &[Message]) -> Vec<u8> {
        let mut out = vec![0x19, 0x43, 0x56, 0x54, 1, 2, 3, 4];
        for e in entries {
            let bytes = e.encode();
            out.extend_from_slice(&u32::try_from(bytes.len()).unwrap().to_le_bytes());
            out.extend_from_slice(&bytes);
        }
        out
    }

    fn nested(number: u64, inner: &Message) -> (u64, Value) {
        (number, Value::Bytes(inner.encode()))
    }

    fn core(result: i64, call: u64) -> Vec<u8> {
        let registers = message(&[
            (1, Value::Varint(7)),
            (11, Value::Varint(result.cast_unsigned())),
            (16, Value::Varint(call)),
            (17, Value::Varint(0x401_002)),
            (99, Value::Fixed64([9; 8])),
        ]);
        let thread = message(&[
            (1, Value::Varint(5)),
            nested(2, &registers),
            (7, Value::Fixed32([1; 4])),
        ]);
        image(&[message(&[
            (1, Value::Varint(1)),
            nested(2, &thread),
            (9, Value::Bytes(vec![1, 2])),
        ])])
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn an_interrupted_call_begins_again_and_everything_else_stays() {
        for call in AGAIN {
            let cured = cure_core(&core(EINTR, *call), None).unwrap().unwrap();
            let mut rest = cured.get(HEADER + 4..).unwrap();
            let before = Message::parse(core(EINTR, *call).get(HEADER + 4..).unwrap()).unwrap();
            let after = Message::parse(rest).unwrap();
            assert_eq!(before.0.len(), after.0.len());
            let inner = |m: &Message| {
                let mut m = m.clone();
                let thread = Message::parse(m.bytes_mut(2).unwrap()).unwrap();
                let mut t = thread.clone();
                (Message::parse(t.bytes_mut(2).unwrap()).unwrap(), thread.0.len())
            };
            let (registers, fields) = inner(&after);
            assert_eq!(fields, 3);
            assert_eq!(registers.number(11), Some(*call));
            assert_eq!(registers.number(17), Some(0x401_000));
            assert_eq!(registers.number(16), Some(*call));
            assert_eq!(registers.0.last().unwrap().value, Value::Fixed64([9; 8]));
            rest = &[];
            assert!(rest.is_empty());
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn other_results_and_other_calls_stay_as_they_are() {
        assert_eq!(cure_core(&core(-11, 7), None).unwrap(), None);
        assert_eq!(cure_core(&core(0, 7), None).unwrap(), None);
        // connect: POSIX forbids to begin it again.
        assert_eq!(cure_core(&core(EINTR, 42), None).unwrap(), None);
    }

    #[test]
    fn an_arm_thread_that_was_seen_begins_again() {
        let mut fields: Vec<(u64, Value)> = (0..31u64).map(|n| (1, Value::Varint(n + 100))).collect();
        fields[0].1 = Value::Varint(EINTR.cast_unsigned());
        fields.push((3, Value::Varint(0x1004)));
        let thread = message(&[nested(3, &message(&fields))]);
        let mut core = message(&[nested(8, &thread)]);
        assert!(!core_arm(&mut core, None).unwrap());
        let known = KnownCall {
            number: AGAIN[0],
            first: 55,
        };
        assert!(core_arm(&mut core, Some(known)).unwrap());
        let mut thread = Message::parse(core.bytes_mut(8).unwrap()).unwrap();
        let registers = Message::parse(thread.bytes_mut(3).unwrap()).unwrap();
        assert_eq!(registers.0[0].value, Value::Varint(55));
        assert_eq!(registers.0[8].value, Value::Varint(AGAIN[0]));
        assert_eq!(registers.0[9].value, Value::Varint(109));
        assert_eq!(registers.number(3), Some(0x1000));
    }

    #[test]
    fn an_expired_periodic_timer_is_armed_and_others_are_left() {
        let timer = |ticks, value, interval| {
            let t = message(&[
                (1, Value::Varint(3)),
                (5, Value::Varint(ticks)),
                (7, Value::Varint(0)),
                (8, Value::Varint(value)),
                (9, Value::Varint(0)),
                (10, Value::Varint(interval)),
            ]);
            message(&[(1, Value::Varint(14)), nested(12, &t)])
        };
        let other = message(&[(1, Value::Varint(1)), (3, Value::Bytes(vec![8, 1]))]);
        let all = image(&[
            other.clone(),
            timer(4, 0, 250),
            timer(4, 9, 250),
            timer(0, 0, 250),
            timer(4, 0, 0),
        ]);
        let cured = cure_files(&all).unwrap().unwrap();
        let expected = image(&[
            other.clone(),
            timer(4, 250, 250),
            timer(4, 9, 250),
            timer(0, 0, 250),
            timer(4, 0, 0),
        ]);
        assert_eq!(cured, expected);
        assert_eq!(cure_files(&image(&[other])).unwrap(), None);
    }

    #[test]
    fn damaged_images_are_errors_and_never_panics() {
        let good = core(EINTR, 7);
        for cut in 0..good.len() {
            let _ = cure_core(&good[..cut], None);
        }
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                let _ = cure_core(&bad, None);
                let _ = cure_files(&bad);
            }
        }
        assert_eq!(cure_core(&good[..7], None), Err(Error::CutOff));
    }

    #[test]
    fn names() {
        assert_eq!(thread_of_core("core-17.img"), Some(17));
        assert_eq!(thread_of_core("core-x.img"), None);
        assert!(is_cured("files.img") && is_cured("ipcns-shm-11.img") && !is_cured("pages-1.img"));
        assert_eq!(without_objects(&[1; 20]).unwrap(), [1; 8]);
    }
}
