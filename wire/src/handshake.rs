//! What WireGuard's messages show on their outside (whitepaper s5.4): kind, indices, and the first MAC of handshakes.
//!
//! It opens nothing. Who carries messages for others tells by it whose they are.

use blake2::digest::{Digest, FixedOutput, KeyInit, Update, consts::U16};
use blake2::{Blake2s256, Blake2sMac};

use crate::types::TunnelKey;

/// The bytes of an initiation.
pub const INITIATION: usize = 148;
/// The bytes of the answer to it.
pub const RESPONSE: usize = 92;
/// The bytes of a cookie.
pub const COOKIE: usize = 64;
/// The fewest bytes of what carries packets: an empty one.
pub const LEAST_DATA: usize = 32;
const MAC: usize = 16;
const LABEL: &[u8] = b"mac1----";

/// The outside of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outside {
    /// Asks for a session: the sender's index of it.
    Initiation {
        /// What an answer will name.
        sender: u32,
    },
    /// The answer.
    Response {
        /// What data to the one who answers will name.
        sender: u32,
        /// The index in the initiation.
        receiver: u32,
    },
    /// Sent instead of an answer by who is under load.
    Cookie {
        /// The index in the initiation.
        receiver: u32,
    },
    /// Carries a packet.
    Data {
        /// The index that its receiver gave out.
        receiver: u32,
    },
}

impl Outside {
    /// Reads it; nothing where the bytes are no message of WireGuard.
    pub fn read(message: &[u8]) -> Option<Self> {
        let index = |at: usize| {
            let bytes = message.get(at..at + 4)?;
            Some(u32::from_le_bytes(bytes.try_into().ok()?))
        };
        match (message.first_chunk()?, message.len()) {
            ([1, 0, 0, 0], INITIATION) => Some(Self::Initiation { sender: index(4)? }),
            ([2, 0, 0, 0], RESPONSE) => Some(Self::Response { sender: index(4)?, receiver: index(8)? }),
            ([3, 0, 0, 0], COOKIE) => Some(Self::Cookie { receiver: index(4)? }),
            ([4, 0, 0, 0], length) if length >= LEAST_DATA => Some(Self::Data { receiver: index(4)? }),
            _ => None,
        }
    }
}

/// The key of the first MACs of handshakes that are meant for one receiver (whitepaper s5.4.4).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mac1Key([u8; 32]);

impl Mac1Key {
    /// Makes the key from a receiver's public key.
    pub fn of(receiver: &TunnelKey) -> Self {
        Self(Blake2s256::new().chain_update(LABEL).chain_update(receiver.0).finalize().into())
    }

    /// Returns whether a handshake is meant for the receiver.
    pub fn holds(&self, message: &[u8]) -> bool {
        let Some(at) = message.len().checked_sub(2 * MAC) else { return false };
        message[at..at + MAC] == self.mac(&message[..at])
    }

    /// Returns the MAC over what comes before it.
    pub fn mac(&self, before: &[u8]) -> [u8; MAC] {
        let mut mac =
            <Blake2sMac<U16> as KeyInit>::new_from_slice(&self.0).expect("32 bytes are a key of BLAKE2s");
        Update::update(&mut mac, before);
        mac.finalize_fixed().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_mac_is_of_one_receiver_and_of_every_byte_before_it() {
        let (one, other) = (Mac1Key::of(&TunnelKey([1; 32])), Mac1Key::of(&TunnelKey([2; 32])));
        let mut message = [7; INITIATION];
        let mac = one.mac(&message[..INITIATION - 32]);
        message[INITIATION - 32..INITIATION - 16].copy_from_slice(&mac);
        assert!(one.holds(&message) && !other.holds(&message));
        message[3] ^= 1;
        assert!(!one.holds(&message));
        assert!(!one.holds(&[]) && !one.holds(&[0; 31]));
    }

    #[test]
    fn only_messages_of_wireguard_have_an_outside() {
        let mut bytes = vec![0; INITIATION];
        bytes[0] = 1;
        bytes[4] = 9;
        assert_eq!(Outside::read(&bytes), Some(Outside::Initiation { sender: 9 }));
        assert_eq!(Outside::read(&bytes[..INITIATION - 1]), None);
        bytes[0] = 4;
        assert_eq!(Outside::read(&bytes[..LEAST_DATA]), Some(Outside::Data { receiver: 9 }));
        assert_eq!(Outside::read(&bytes[..LEAST_DATA - 1]), None);
        bytes[1] = 1;
        assert_eq!(Outside::read(&bytes), None);
        assert_eq!(Outside::read(&[]), None);
    }
}
