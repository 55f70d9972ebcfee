//! Mappings and memory of a process.

/// A mapping that says more than "memory": huge pages, a device, System V, a file that is switched by renaming.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Path or name, as the kernel writes it.
    pub name: String,
    /// What it is.
    pub kind: MappingKind,
}

/// What a mapping is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MappingKind {
    /// Huge pages.
    Huge,
    /// A device.
    Device,
    /// System V shared memory.
    SystemV,
    /// A file.
    File,
    /// A file whose name is gone.
    DeletedFile,
    /// Something that only its maker knows.
    Other,
}

/// How much memory a process has, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Private pages, present or swapped.
    pub anonymous: u64,
    /// Its share of shared memory.
    pub shared: u64,
    /// Huge pages of hugetlbfs.
    pub huge: u64,
}

impl Memory {
    /// What has to be moved: what is not in files that both nodes have.
    #[must_use]
    pub fn to_move(self) -> u64 {
        self.anonymous + self.shared + self.huge
    }
}

/// Reads `/proc/PID/maps`; one entry per name.
#[must_use]
pub fn parse(maps: &str) -> Vec<Mapping> {
    let mut found: Vec<Mapping> = Vec::new();
    for line in maps.lines() {
        // `start-end perms offset dev inode   name`; the name may hold spaces.
        let mut rest = line;
        for _ in 0..5 {
            rest = rest.trim_start().split_once(' ').map_or("", |(_, rest)| rest);
        }
        let name = rest.trim_start();
        if let Some(kind) = kind(name)
            && !found.iter().any(|m| m.name == name)
        {
            found.push(Mapping {
                name: name.to_owned(),
                kind,
            });
        }
    }
    found
}

fn kind(name: &str) -> Option<MappingKind> {
    if name.is_empty() || (name.starts_with('[') && name.ends_with(']')) {
        // Anonymous, or the kernel's own: heap, stack, vdso, `[anon:name]`.
        return None;
    }
    let (path, deleted) = match name.strip_suffix(" (deleted)") {
        Some(path) => (path, true),
        None => (name, false),
    };
    Some(match path {
        "/anon_hugepage" => MappingKind::Huge,
        // Shared anonymous memory.
        "/dev/zero" => return None,
        _ if path.starts_with("/SYSV") && deleted => MappingKind::SystemV,
        _ if path.starts_with("/memfd:") => return None,
        _ if path.starts_with("/dev/hugepages/") => MappingKind::Huge,
        _ if path.starts_with("/dev/shm/") => return None,
        _ if path.starts_with("/dev/") => MappingKind::Device,
        _ if path.starts_with('/') && deleted => MappingKind::DeletedFile,
        _ if path.starts_with('/') => MappingKind::File,
        // `socket:[1]`, `anon_inode:[io_uring]`, …
        _ => MappingKind::Other,
    })
}

/// Reads `/proc/PID/smaps_rollup`.
#[must_use]
pub fn parse_rollup(text: &str) -> Memory {
    let field = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .and_then(|value| value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
            .unwrap_or(0)
            .saturating_mul(1024)
    };
    Memory {
        // Swap counts shared memory of tmpfs too; both must be moved.
        anonymous: field("Anonymous").saturating_add(field("Swap")),
        shared: field("Pss_Shmem"),
        huge: field("Shared_Hugetlb").saturating_add(field("Private_Hugetlb")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_that_matter_are_found_and_memory_is_not() {
        let maps = "\
55d0c0a00000-55d0c0a21000 r--p 00000000 fe:01 131 /usr/sbin/my server
55d0c0a21000-55d0c0a31000 r-xp 00021000 fe:01 131 /usr/sbin/my server
55d0c1c5a000-55d0c1c7b000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000200000 rw-p 00000000 00:0f 22                         /anon_hugepage (deleted)
7f0000200000-7f0000201000 rw-s 00000000 00:01 98305                      /SYSV00000000 (deleted)
7f0000201000-7f0000202000 rw-s 00000000 00:01 5                          /dev/zero (deleted)
7f0000202000-7f0000203000 rw-s 00000000 00:01 6                          /memfd:x (deleted)
7f0000203000-7f0000204000 rw-s 00000000 00:05 7                          /dev/kvm
7f0000204000-7f0000205000 rw-s 10000000 00:0e 8                          anon_inode:[io_uring]
7f0000205000-7f0000206000 r--p 00000000 00:2f 9                          /tmp/gone (deleted)
7f0000206000-7f0000207000 rw-s 00000000 00:2f 9                          /dev/shm/pg.1
7f0000207000-7f0000208000 rw-p 00000000 00:00 0
7fff0000f000-7fff00030000 rw-p 00000000 00:00 0                          [stack]
";
        let found: Vec<(String, MappingKind)> = parse(maps).into_iter().map(|m| (m.name, m.kind)).collect();
        let expected = [
            ("/usr/sbin/my server", MappingKind::File),
            ("/anon_hugepage (deleted)", MappingKind::Huge),
            ("/SYSV00000000 (deleted)", MappingKind::SystemV),
            ("/dev/kvm", MappingKind::Device),
            ("anon_inode:[io_uring]", MappingKind::Other),
            ("/tmp/gone (deleted)", MappingKind::DeletedFile),
        ];
        assert_eq!(found, expected.map(|(name, kind)| (name.to_owned(), kind)));
    }

    #[test]
    fn memory_is_what_no_file_has() {
        let rollup = "55d0c0a00000-7fff ---p 00000000 00:00 0 [rollup]\nRss:  9000 kB\nPss: 8000 kB\nPss_Shmem:  12 kB\nAnonymous:  100 kB\n\
            Shared_Hugetlb:  0 kB\nPrivate_Hugetlb:  2048 kB\nSwap:  8 kB\nSwapPss: 8 kB\n";
        let memory = parse_rollup(rollup);
        assert_eq!(
            memory,
            Memory {
                anonymous: 108 << 10,
                shared: 12 << 10,
                huge: 2 << 20
            }
        );
        assert_eq!(parse_rollup("").to_move(), 0);
    }
}
