//! Conditions: built with a transition time that is kept while the status stays the same.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;

use crate::Reason;

/// The longest message of a condition or event note that we write, in bytes (the API allows 32,768 and 1,024).
pub const MAX_MESSAGE: usize = 1000;

/// A condition's status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// `True`
    True,
    /// `False`
    False,
    /// `Unknown`
    Unknown,
}

impl Status {
    /// As it stands in the API.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Status::True => "True",
            Status::False => "False",
            Status::Unknown => "Unknown",
        }
    }
}

impl From<bool> for Status {
    fn from(value: bool) -> Self {
        if value { Status::True } else { Status::False }
    }
}

/// Finds a condition by its type.
#[must_use]
pub fn find<'a>(conditions: &'a [Condition], type_: &str) -> Option<&'a Condition> {
    conditions.iter().find(|c| c.type_ == type_)
}

/// Whether the condition of this type is `True`.
#[must_use]
pub fn is_true(conditions: &[Condition], type_: &str) -> bool {
    find(conditions, type_).is_some_and(|c| c.status == "True")
}

/// Whether the condition of this type is `False`.
#[must_use]
pub fn is_false(conditions: &[Condition], type_: &str) -> bool {
    find(conditions, type_).is_some_and(|c| c.status == "False")
}

/// Builds a condition. `lastTransitionTime` is that of `old` where the status is the same, otherwise `now`.
#[must_use]
pub fn build(
    old: &[Condition],
    type_: &str,
    status: Status,
    reason: Reason,
    message: &str,
    generation: Option<i64>,
    now: Timestamp,
) -> Condition {
    let last_transition_time = match find(old, type_) {
        Some(c) if c.status == status.as_str() => c.last_transition_time.clone(),
        _ => Time(now),
    };
    Condition {
        type_: type_.to_owned(),
        status: status.as_str().to_owned(),
        reason: reason.as_str().to_owned(),
        message: cut(message, MAX_MESSAGE).to_owned(),
        observed_generation: generation,
        last_transition_time,
    }
}

/// Whether two conditions say the same, times aside. A write that changes nothing else is not worth making.
#[must_use]
pub fn same(a: &Condition, b: &Condition) -> bool {
    a.type_ == b.type_
        && a.status == b.status
        && a.reason == b.reason
        && a.message == b.message
        && a.observed_generation == b.observed_generation
}

/// Cuts a text to at most `max` bytes, never inside a character.
#[must_use]
pub fn cut(text: &str, max: usize) -> &str {
    if text.len() <= max {
        return text;
    }
    let mut end = max;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transition_time_is_kept_while_the_status_is_the_same() {
        let t1 = Timestamp::from_second(1).unwrap();
        let t2 = Timestamp::from_second(2).unwrap();
        let first = build(&[], "Accepted", Status::True, Reason::Accepted, "a", Some(1), t1);
        let again = build(
            std::slice::from_ref(&first),
            "Accepted",
            Status::True,
            Reason::Accepted,
            "b",
            Some(1),
            t2,
        );
        assert_eq!(again.last_transition_time.0, t1);
        let turned = build(
            &[first],
            "Accepted",
            Status::False,
            Reason::PodNotFound,
            "c",
            Some(1),
            t2,
        );
        assert_eq!(turned.last_transition_time.0, t2);
    }

    #[test]
    fn a_message_is_cut_at_a_character() {
        assert_eq!(cut("aé", 2), "a");
        assert_eq!(cut("aé", 3), "aé");
    }
}
