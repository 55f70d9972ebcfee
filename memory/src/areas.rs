//! Which mappings of a process can be tracked: those that CRIU can restore lazily, so that their pages can come from a store
//! and need not be in its images. And what keeps a whole process from being tracked.

use std::{fs, io, ops::Range, path::Path};

use crate::ranges::Ranges;

/// Why a process is left to CRIU.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Untracked {
    /// Writes by a device are not noted: what it wrote after the copy would be missing.
    #[error("it reads files with O_DIRECT ({0}), and what a device writes is not noted")]
    DirectIo(String),
    /// Kernel AIO: the same.
    #[error("it uses asynchronous I/O of the kernel, and what a device writes is not noted")]
    Aio,
    /// CRIU restores shadow stacks itself.
    #[error("it has shadow stacks")]
    ShadowStack,
    /// Two processes have one address space (between vfork and exec, for a moment).
    #[error("it shares its memory with another process")]
    Shared,
    /// The userfaultfd could not be made.
    #[error("{0}")]
    Refused(String),
    /// It appeared too late, or its memory changed too fast to follow.
    #[error("it was not followed before the freeze")]
    Late,
}

/// What a look at a process found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Look {
    /// Areas that can be tracked: each mapping for itself.
    pub areas: Vec<Range<u64>>,
    /// Private anonymous mappings that must not be restored lazily: not to be tracked, even where they were. Locked ones, and
    /// those that a fork wipes (a child made while its parent is being filled would get the parent's pages).
    pub excluded: Vec<Range<u64>>,
    /// Of those, the ones that a fork wipes.
    pub wiped: Vec<Range<u64>>,
    /// All other mappings: files, shared memory, the kernel's own.
    pub others: Vec<Range<u64>>,
    /// The stacks that the kernel made.
    pub stacks: Vec<Range<u64>>,
    /// What keeps the whole process from being tracked.
    pub untracked: Option<Untracked>,
}

/// How a process is looked at. The flags of its mappings are only in smaps, for which the kernel goes through all pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth<'a> {
    /// With the flags of all mappings.
    All,
    /// Flags are read only where something is locked, which the process's status says. These mappings are known to be wiped.
    Quick(&'a Ranges),
}

/// Looks at a process.
///
/// # Errors
/// It has ended.
pub fn look(pid: i32, depth: Depth<'_>) -> io::Result<Look> {
    let of = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}"));
    let status = of("status")?;
    let none_locked = field(&status, "VmLck:").is_some_and(|v| v.trim() == "0 kB");
    let (locked, wiped) = match depth {
        Depth::Quick(known) if none_locked => (Ranges::new(), known.clone()),
        Depth::Quick(_) | Depth::All => flags_in(&of("smaps")?),
    };
    let mut look = parse(&of("maps")?, &locked.union(&wiped));
    look.wiped = wiped.into_vec();
    if field(&status, "x86_Thread_features:").is_some_and(|v| v.contains("shstk")) {
        look.untracked = Some(Untracked::ShadowStack);
    }
    Ok(look)
}

/// The number of a process in its own, innermost pid namespace: the one that CRIU names it by.
///
/// # Errors
/// It has ended.
pub fn vpid(pid: i32) -> io::Result<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    field(&status, "NSpid:")
        .and_then(|v| v.split_whitespace().next_back()?.parse().ok())
        .ok_or_else(|| io::Error::other(format!("/proc/{pid}/status has no NSpid")))
}

fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|l| l.strip_prefix(name))
}

/// One line of maps: range, permissions, device, inode, name.
fn line(text: &str) -> Option<(Range<u64>, &str, &str, &str, &str)> {
    let mut parts = text.splitn(6, ' ');
    let (start, end) = parts.next()?.split_once('-')?;
    let range = u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?;
    let permissions = parts.next()?;
    let device = parts.nth(1)?;
    let inode = parts.next()?;
    Some((
        range,
        permissions,
        device,
        inode,
        parts.next().unwrap_or_default().trim(),
    ))
}

fn parse(maps: &str, excluded: &Ranges) -> Look {
    let mut look = Look::default();
    for (range, permissions, device, inode, name) in maps.lines().filter_map(line) {
        if name == "/[aio] (deleted)" || name == "/[aio]" {
            look.untracked = Some(Untracked::Aio);
        }
        // Files, also of shared memory and of huge pages, have an inode.
        if !permissions.ends_with('p') || inode != "0" || device != "00:00" || !is_ordinary(name) {
            look.others.push(range);
            continue;
        }
        let one: Ranges = std::iter::once(range.clone()).collect();
        if !excluded.intersect(&one).is_empty() {
            look.excluded.push(range);
            continue;
        }
        if name == "[stack]" {
            look.stacks.push(range.clone());
        }
        look.areas.push(range);
    }
    look
}

/// Not one of the kernel's own mappings ([vdso], [vvar], [vsyscall], [uprobes], …).
fn is_ordinary(name: &str) -> bool {
    name.is_empty() || name == "[heap]" || name == "[stack]" || name.starts_with("[anon:")
}

/// Mappings that are locked (`lo`), and those that a fork wipes (`wf`).
fn flags_in(smaps: &str) -> (Ranges, Ranges) {
    let mut current = None;
    let (mut locked, mut wiped) = (Ranges::new(), Ranges::new());
    for text in smaps.lines() {
        if let Some(flags) = text.strip_prefix("VmFlags:") {
            let Some(range) = current.take() else { continue };
            let range: Range<u64> = range;
            for flag in flags.split_whitespace() {
                match flag {
                    "lo" => locked.push(range.clone()),
                    "wf" => wiped.push(range.clone()),
                    _ => {}
                }
            }
        } else if !text.starts_with(|c: char| c.is_ascii_uppercase())
            && let Some((range, ..)) = line(text)
        {
            current = Some(range);
        }
    }
    (locked, wiped)
}

/// The file that a process has open for direct I/O, if any.
#[must_use]
pub fn direct_io(pid: i32) -> Option<String> {
    #[cfg(target_arch = "x86_64")]
    const O_DIRECT: u32 = 0o40_000;
    #[cfg(not(target_arch = "x86_64"))]
    const O_DIRECT: u32 = 0o200_000;
    let folder = format!("/proc/{pid}/fdinfo");
    for entry in fs::read_dir(&folder).ok()?.flatten() {
        let Ok(text) = fs::read_to_string(entry.path()) else {
            continue;
        };
        let flags = field(&text, "flags:").and_then(|v| u32::from_str_radix(v.trim(), 8).ok());
        if flags.is_none_or(|f| f & O_DIRECT == 0) {
            continue;
        }
        let file = Path::new("/proc")
            .join(pid.to_string())
            .join("fd")
            .join(entry.file_name());
        // A pipe has the same flag for another thing.
        if let Ok(target) = fs::read_link(file)
            && target.starts_with("/")
        {
            return Some(target.display().to_string());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
555500000000-555500001000 r--p 00000000 fe:00 1234                       /usr/bin/x y
555500010000-555500020000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000001000 rw-p 00000000 00:00 0 
7f0000001000-7f0000002000 ---p 00000000 00:00 0                          [anon:guard of mine]
7f0000010000-7f0000020000 rw-s 00000000 00:01 77                         /dev/zero (deleted)
7f0000020000-7f0000030000 rw-p 00000000 00:0f 99                         /anon_hugepage (deleted)
7ffe00000000-7ffe00021000 rw-p 00000000 00:00 0                          [stack]
7ffe00030000-7ffe00034000 r--p 00000000 00:00 0                          [vvar]
7ffe00034000-7ffe00036000 r-xp 00000000 00:00 0                          [vdso]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
";

    #[test]
    fn private_anonymous_mappings_are_tracked_and_nothing_else() {
        let look = parse(MAPS, &Ranges::new());
        assert_eq!(
            look.areas,
            [
                0x5555_0001_0000..0x5555_0002_0000,
                0x7f00_0000_0000..0x7f00_0000_1000,
                0x7f00_0000_1000..0x7f00_0000_2000,
                0x7ffe_0000_0000..0x7ffe_0002_1000,
            ]
        );
        assert_eq!(look.stacks, [0x7ffe_0000_0000..0x7ffe_0002_1000]);
        assert!(look.excluded.is_empty() && look.untracked.is_none());
        assert_eq!(look.others.len(), 6);
    }

    #[test]
    fn locked_and_wiped_mappings_are_left_to_criu() {
        let smaps = "\
7f0000000000-7f0000001000 rw-p 00000000 00:00 0 
Size:                  4 kB
VmFlags: rd wr mr mw me lo ac sd 
7f0000001000-7f0000002000 ---p 00000000 00:00 0 
VmFlags: mr mw me sd wf 
";
        let (locked, wiped) = flags_in(smaps);
        assert_eq!(locked.as_slice(), [0x7f00_0000_0000..0x7f00_0000_1000]);
        assert_eq!(wiped.as_slice(), [0x7f00_0000_1000..0x7f00_0000_2000]);
        let look = parse(MAPS, &locked.union(&wiped));
        assert_eq!(
            look.excluded,
            [0x7f00_0000_0000..0x7f00_0000_1000, 0x7f00_0000_1000..0x7f00_0000_2000]
        );
        assert_eq!(look.areas.len(), 2);
    }

    #[test]
    fn asynchronous_io_is_not_tracked() {
        let maps = "7f0000000000-7f0000001000 rw-s 00000000 00:11 5              /[aio] (deleted)\n";
        assert_eq!(parse(maps, &Ranges::new()).untracked, Some(Untracked::Aio));
    }

    #[test]
    fn our_own_process_has_a_heap_and_a_stack_and_no_direct_io() {
        let own = std::process::id().cast_signed();
        let found = look(own, Depth::All).unwrap();
        assert!(!found.areas.is_empty() && found.stacks.len() == 1, "{found:?}");
        assert_eq!(direct_io(own), None);
        assert_eq!(vpid(own).unwrap(), std::process::id());
    }
}
