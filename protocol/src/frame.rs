//! Frames on a connection: one byte kind, four bytes length (big endian), content.
//!
//! | kind | content | most bytes |
//! |---|---|---|
//! | 1 | a control message, JSON | 64 KiB |
//! | 2 | a large message, JSON: manifest, facts | 1 MiB |
//! | 3 | a piece of a file: file number (4), offset (8), bytes | 1 MiB |
//! | 16–31 | left for page streams | |

use crate::limits;

/// Bytes before a frame's content.
pub const HEADER: usize = 5;
/// Bytes before the bytes of a data frame.
pub const DATA_HEADER: usize = 12;

/// Kinds of frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A control message.
    Control,
    /// A large message.
    Large,
    /// A piece of a file.
    Data,
}

impl Kind {
    /// Most bytes of its content.
    #[must_use]
    pub fn max(self) -> usize {
        match self {
            Kind::Control => limits::CONTROL_BYTES,
            Kind::Large => limits::LARGE_BYTES,
            Kind::Data => limits::DATA_BYTES,
        }
    }

    fn byte(self) -> u8 {
        match self {
            Kind::Control => 1,
            Kind::Large => 2,
            Kind::Data => 3,
        }
    }
}

/// Why a frame was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The kind is not known.
    #[error("a frame of unknown kind {0}")]
    Kind(u8),
    /// Longer than its kind may be.
    #[error("a frame of {len} bytes where {max} are allowed")]
    TooLong {
        /// What it says.
        len: usize,
        /// What is allowed.
        max: usize,
    },
    /// A data frame without its own header, or without bytes.
    #[error("a data frame of {0} bytes, too short")]
    DataTooShort(usize),
}

/// The header of a frame.
///
/// # Errors
/// [`Error::TooLong`] where the content is longer than its kind may be.
pub fn header(kind: Kind, len: usize) -> Result<[u8; HEADER], Error> {
    let too_long = Error::TooLong { len, max: kind.max() };
    if len > kind.max() {
        return Err(too_long);
    }
    let [a, b, c, d] = u32::try_from(len).map_err(|_| too_long)?.to_be_bytes();
    Ok([kind.byte(), a, b, c, d])
}

/// Reads the header of a frame: what follows is safe to allocate.
///
/// # Errors
/// See [`Error`].
pub fn read_header(bytes: [u8; HEADER]) -> Result<(Kind, usize), Error> {
    let [kind, a, b, c, d] = bytes;
    let kind = match kind {
        1 => Kind::Control,
        2 => Kind::Large,
        3 => Kind::Data,
        other => return Err(Error::Kind(other)),
    };
    let len = usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap_or(usize::MAX);
    if len > kind.max() {
        return Err(Error::TooLong { len, max: kind.max() });
    }
    Ok((kind, len))
}

/// A data frame's own header.
#[must_use]
pub fn data_header(file: u32, offset: u64) -> [u8; DATA_HEADER] {
    let mut out = [0; DATA_HEADER];
    let (number, position) = out.split_at_mut(4);
    number.copy_from_slice(&file.to_be_bytes());
    position.copy_from_slice(&offset.to_be_bytes());
    out
}

/// Splits the content of a data frame: file, offset, bytes.
///
/// # Errors
/// [`Error::DataTooShort`].
pub fn read_data(content: &[u8]) -> Result<(u32, u64, &[u8]), Error> {
    let short = || Error::DataTooShort(content.len());
    let (file, rest) = content.split_first_chunk::<4>().ok_or_else(short)?;
    let (offset, bytes) = rest.split_first_chunk::<8>().ok_or_else(short)?;
    if bytes.is_empty() {
        return Err(short());
    }
    Ok((u32::from_be_bytes(*file), u64::from_be_bytes(*offset), bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_and_a_long_one_is_refused_on_both_sides() {
        for kind in [Kind::Control, Kind::Large, Kind::Data] {
            assert_eq!(
                read_header(header(kind, kind.max()).unwrap()).unwrap(),
                (kind, kind.max())
            );
            assert!(header(kind, kind.max() + 1).is_err());
            let [a, b, c, d] = u32::try_from(kind.max() + 1).unwrap().to_be_bytes();
            assert!(matches!(
                read_header([kind.byte(), a, b, c, d]),
                Err(Error::TooLong { .. })
            ));
        }
        assert_eq!(read_header([16, 0, 0, 0, 0]), Err(Error::Kind(16)));
    }

    #[test]
    fn data_survives_and_an_empty_piece_is_refused() {
        let mut content = data_header(7, 1 << 40).to_vec();
        assert!(read_data(&content).is_err());
        content.extend_from_slice(b"abc");
        assert_eq!(read_data(&content).unwrap(), (7, 1 << 40, &b"abc"[..]));
        for cut in 0..DATA_HEADER {
            assert!(read_data(&content[..cut]).is_err());
        }
    }
}
