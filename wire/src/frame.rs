//! How messages follow one another on the local socket: a protobuf varint with the length, then the message.
//!
//! Pure: the caller reads and writes. A length above the caller's limit is refused before anything is
//! allocated for it.

use prost::Message;

/// The longest request that a daemon reads, in bytes.
pub const MAX_REQUEST_BYTES: usize = 1 << 20;
/// The longest reply that a client reads, in bytes.
pub const MAX_REPLY_BYTES: usize = 4 << 20;

/// A frame that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The length is not a varint of at most ten bytes.
    #[error("the frame's length is not a varint")]
    Length,
    /// The message is longer than the reader accepts.
    #[error("the frame of {length} bytes exceeds the limit of {limit}")]
    TooLong {
        /// The announced length in bytes.
        length: u64,
        /// The reader's limit in bytes.
        limit: usize,
    },
}

/// Writes one message with its length in front.
pub fn encode(message: &impl Message) -> Vec<u8> {
    message.encode_length_delimited_to_vec()
}

/// Reads the length in front of a message: `(bytes of the length itself, bytes of the message)`, or `None`
/// where `received` does not hold the whole length yet.
///
/// # Errors
/// [`FrameError`]; the connection is of no use afterwards.
pub fn length(received: &[u8], limit: usize) -> Result<Option<(usize, usize)>, FrameError> {
    let mut length = 0_u64;
    for (index, byte) in received.iter().take(10).enumerate() {
        if index == 9 && *byte > 1 {
            return Err(FrameError::Length);
        }
        length |= u64::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            return match usize::try_from(length) {
                Ok(bytes) if bytes <= limit => Ok(Some((index + 1, bytes))),
                _ => Err(FrameError::TooLong { length, limit }),
            };
        }
    }
    if received.len() >= 10 { Err(FrameError::Length) } else { Ok(None) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_of_more_than_64_bits_is_refused() {
        let mut long = [0x80; 10];
        long[9] = 2;
        assert!(matches!(length(&long, usize::MAX), Err(FrameError::Length)));
        long[9] = 1;
        assert!(matches!(length(&long, usize::MAX), Ok(Some((10, _)))));
    }
}
