//! The form of every small file of ours: a line with magic and version, one line of JSON, a line with the SHA-256 of all
//! that precedes it. Size is checked before parsing, the checksum before the JSON.

use serde::{Serialize, de::DeserializeOwned};
use sha2::{Digest, Sha256};

/// Why a sealed file was refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Larger than its kind may be.
    #[error("the file has {0} bytes, more than the {1} that its kind may have")]
    TooLarge(usize, usize),
    /// It does not start as its kind does.
    #[error("the file is not a {0}")]
    Magic(&'static str),
    /// Another version.
    #[error("the file is of version {0}, this program reads version {1}")]
    Version(String, u32),
    /// Cut off or changed.
    #[error("the file is cut off or its checksum is wrong")]
    Checksum,
    /// The JSON is not what it should be.
    #[error("the file's content is not valid: {0}")]
    Content(#[source] serde_json::Error),
}

/// Builds the file. Fails only where `body` cannot be written as JSON.
///
/// # Errors
/// [`Error::Content`] where `body` has, for example, a map with keys that are not strings.
pub fn seal<T: Serialize>(magic: &'static str, version: u32, body: &T) -> Result<Vec<u8>, Error> {
    let mut out = format!("{magic} {version}\n").into_bytes();
    serde_json::to_writer(&mut out, body).map_err(Error::Content)?;
    out.push(b'\n');
    let digest = hex(&Sha256::digest(&out));
    out.extend_from_slice(digest.as_bytes());
    out.push(b'\n');
    Ok(out)
}

/// Reads the file back.
///
/// # Errors
/// See [`Error`]; nothing of an invalid file is returned.
pub fn open<T: DeserializeOwned>(magic: &'static str, version: u32, max: usize, bytes: &[u8]) -> Result<T, Error> {
    if bytes.len() > max {
        return Err(Error::TooLarge(bytes.len(), max));
    }
    let head_end = bytes
        .iter()
        .take(256)
        .position(|b| *b == b'\n')
        .ok_or(Error::Magic(magic))?;
    let (head, rest) = bytes.split_at(head_end);
    let head = std::str::from_utf8(head).map_err(|_| Error::Magic(magic))?;
    let found = head
        .strip_prefix(magic)
        .and_then(|r| r.strip_prefix(' '))
        .ok_or(Error::Magic(magic))?;
    if found != version.to_string() {
        return Err(Error::Version(found.to_owned(), version));
    }
    // rest = "\n" JSON "\n" 64 hexadecimal digits "\n"
    let body_len = rest.len().checked_sub(1 + 1 + 64 + 1).ok_or(Error::Checksum)?;
    let (body, seal) = rest
        .get(1..)
        .and_then(|r| r.split_at_checked(body_len))
        .ok_or(Error::Checksum)?;
    let sealed_len = head_end + 1 + body_len + 1;
    let sealed = bytes.get(..sealed_len).ok_or(Error::Checksum)?;
    let expected = format!("\n{}\n", hex(&Sha256::digest(sealed)));
    if seal != expected.as_bytes() {
        return Err(Error::Checksum);
    }
    serde_json::from_slice(body).map_err(Error::Content)
}

/// Lower-case hexadecimal.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut out, b| {
        // Writing to a String cannot fail.
        let _ = write!(out, "{b:02x}");
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_opens() {
        let file = seal("test", 3, &vec!["a", "b"]).unwrap();
        assert_eq!(open::<Vec<String>>("test", 3, 1000, &file).unwrap(), ["a", "b"]);
    }

    #[test]
    fn every_changed_byte_and_every_cut_is_refused() {
        let file = seal("test", 1, &vec!["some", "words"]).unwrap();
        for i in 0..file.len() {
            let mut changed = file.clone();
            changed[i] ^= 1;
            assert!(open::<Vec<String>>("test", 1, 1000, &changed).is_err(), "byte {i}");
            assert!(open::<Vec<String>>("test", 1, 1000, &file[..i]).is_err(), "cut at {i}");
        }
    }

    #[test]
    fn size_is_checked_first() {
        let file = seal("test", 1, &"x".repeat(100)).unwrap();
        assert!(matches!(open::<String>("test", 1, 50, &file), Err(Error::TooLarge(..))));
    }
}
