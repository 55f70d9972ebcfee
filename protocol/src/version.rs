//! Which version two programs speak. The one that dials offers all it knows, the other selects the newest that both know.
//!
//! Rule: a release speaks the current and the previous version, so that agents can be upgraded node by node. There is only
//! one version so far. A change that an older program would misread is a new version; adding a message that only answers
//! to an offered version is not.

/// Versions that this program speaks, newest first.
pub const VERSIONS: &[u32] = &[1];

/// Most versions that an offer may hold.
pub const MAX_OFFERED: usize = 16;

/// The newest version that both speak.
#[must_use]
pub fn select(offered: &[u32]) -> Option<u32> {
    VERSIONS.iter().copied().find(|v| offered.contains(v))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_common_version_is_selected() {
        assert_eq!(select(&[1]), Some(1));
        assert_eq!(select(&[7, 1, 3]), Some(1));
        assert_eq!(select(&[2, 3]), None);
        assert_eq!(select(&[]), None);
    }
}
