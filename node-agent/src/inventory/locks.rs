//! Locks and leases on files, from `/proc/locks`.

/// A lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lock {
    /// Who holds it, as a pid on the node.
    pub pid: i32,
    /// `POSIX`, `FLOCK`, `OFDLCK`, `LEASE`, `DELEG`.
    pub kind: String,
    /// Whether it is mandatory.
    pub mandatory: bool,
    /// Inode of the file.
    pub inode: u64,
}

/// Reads `/proc/locks`. Who only waits for a lock holds none.
#[must_use]
pub fn parse(text: &str) -> Vec<Lock> {
    text.lines()
        .filter_map(|line| {
            // `1: POSIX  ADVISORY  WRITE 1234 fe:01:5678 0 EOF`; waiters have `->` after the number.
            let mut words = line.split_whitespace();
            words.next()?;
            let kind = words.next()?;
            if kind == "->" {
                return None;
            }
            let mandatory = words.next()? == "MANDATORY";
            let pid = words.nth(1)?.parse().ok()?;
            let inode = words.next()?.rsplit(':').next()?.parse().ok()?;
            Some(Lock {
                pid,
                kind: kind.to_owned(),
                mandatory,
                inode,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holders_are_read_and_waiters_are_not() {
        let text = "1: POSIX  ADVISORY  WRITE 1234 fe:01:5678 0 EOF\n1: -> POSIX  ADVISORY  WRITE 1235 fe:01:5678 0 EOF\n\
            2: LEASE  ACTIVE    READ 77 00:2f:9 0 EOF\n3: FLOCK  MANDATORY WRITE 78 00:2f:10 0 EOF\n4: OFDLCK ADVISORY READ -1 00:06:1 0 0\n";
        let locks = parse(text);
        assert_eq!(
            locks
                .iter()
                .map(|l| (l.pid, l.kind.as_str(), l.mandatory))
                .collect::<Vec<_>>(),
            [
                (1234, "POSIX", false),
                (77, "LEASE", false),
                (78, "FLOCK", true),
                (-1, "OFDLCK", false)
            ]
        );
        assert_eq!(locks[0].inode, 5678);
    }
}
