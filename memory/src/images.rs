//! What a restore with pages from a store needs of CRIU's images.
//!
//! CRIU marks every page of a mapping that could be restored lazily as lazy, also where its content is in the images. A lazy
//! restore leaves all of those out and expects them from its pager, whose store has only what was tracked. So the mark goes:
//! what is in the images is put in place by CRIU itself, before the pager is asked for anything.

/// An image that is not what CRIU writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It does not begin as a page map.
    #[error("it is not a page map of CRIU")]
    Magic,
    /// It ends, or says something, where it must not.
    #[error("the page map cannot be understood at byte {0}")]
    Content(usize),
}

const MAGIC: [u8; 8] = [0x19, 0x43, 0x56, 0x54, 0x25, 0x40, 0x08, 0x56];
/// `pagemap_entry.flags`.
const FLAGS: u64 = 4;
const LAZY: u8 = 1 << 1;

/// Whether this is the name of a page map of a process.
#[must_use]
pub fn is_pagemap(name: &str) -> bool {
    name.strip_prefix("pagemap-")
        .and_then(|n| n.strip_suffix(".img"))
        .is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

/// Takes the mark from all pages; says in how many entries.
///
/// # Errors
/// See [`Error`]; the image must not be used then.
pub fn make_eager(image: &mut [u8]) -> Result<usize, Error> {
    if image.first_chunk::<8>() != Some(&MAGIC) {
        return Err(Error::Magic);
    }
    let mut at = MAGIC.len();
    let mut changed = 0;
    let mut is_head = true;
    while at < image.len() {
        let bad = Error::Content(at);
        let length = image
            .get(at..at + 4)
            .and_then(|b| b.try_into().ok())
            .map(u32::from_le_bytes);
        let length = length.and_then(|l| usize::try_from(l).ok()).ok_or(bad)?;
        let start = at + 4;
        let end = start.checked_add(length).filter(|e| *e <= image.len()).ok_or(bad)?;
        if !is_head {
            changed += usize::from(clear(image.get_mut(start..end).ok_or(bad)?).ok_or(bad)?);
        }
        is_head = false;
        at = end;
    }
    Ok(changed)
}

/// Clears the mark in one entry, all of whose fields are varints.
fn clear(entry: &mut [u8]) -> Option<bool> {
    let mut at = 0;
    let mut changed = false;
    while at < entry.len() {
        let (key, next) = varint(entry, at)?;
        let (_, end) = varint(entry, next)?;
        if key & 7 != 0 {
            return None;
        }
        if key >> 3 == FLAGS {
            // Its low bits are in the first byte.
            let byte = entry.get_mut(next)?;
            changed = *byte & LAZY != 0;
            *byte &= !LAZY;
        }
        at = end;
    }
    Some(changed)
}

fn varint(bytes: &[u8], at: usize) -> Option<(u64, usize)> {
    let mut value = 0;
    for (i, byte) in bytes.get(at..)?.iter().take(10).enumerate() {
        value |= u64::from(byte & 127) << (7 * i).min(63);
        if *byte < 128 {
            return Some((value, at + i + 1));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(entries: &[&[u8]]) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        for entry in [&[8, 1][..]].iter().chain(entries) {
            out.extend_from_slice(&u32::try_from(entry.len()).unwrap().to_le_bytes());
            out.extend_from_slice(entry);
        }
        out
    }

    #[test]
    fn the_mark_goes_and_nothing_else() {
        // vaddr 0x5596ee1b2000, 106 pages, PRESENT | LAZY; then one that is only PRESENT.
        let lazy = [8, 0x80, 0xc0, 0xec, 0xf0, 0xee, 0xb2, 0x15, 16, 106, 32, 6, 40, 106];
        let plain = [8, 1, 16, 1, 32, 4, 40, 1];
        let mut bytes = image(&[&lazy, &plain]);
        assert_eq!(make_eager(&mut bytes), Ok(1));
        let mut expected = lazy;
        expected[11] = 4;
        assert_eq!(bytes, image(&[&expected, &plain]));
        assert_eq!(make_eager(&mut bytes), Ok(0));
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        assert_eq!(make_eager(&mut []), Err(Error::Magic));
        let good = image(&[&[8, 1, 16, 1, 32, 6, 40, 1]]);
        for cut in 9..good.len() {
            let mut bytes = good[..cut].to_vec();
            assert!(make_eager(&mut bytes).is_err() || cut == 14, "cut at {cut}");
        }
        assert!(
            make_eager(&mut image(&[&[10, 1, 0]])).is_err(),
            "a field that is no number"
        );
    }

    #[test]
    fn only_page_maps_of_processes_are_meant() {
        assert!(is_pagemap("pagemap-17.img"));
        for name in ["pagemap-shmem-5.img", "pages-1.img", "pagemap-.img", "pagemap-1"] {
            assert!(!is_pagemap(name), "{name}");
        }
    }
}
