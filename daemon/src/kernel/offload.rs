//! TX checksum offload of a device, by ethtool's generic netlink family (linux/ethtool_netlink.h).

use std::io;

use super::tlv::{ACK, Conversation, Writer, attrs, find, find_text};

const NETLINK_GENERIC: isize = 16;
const CONTROLLER: u16 = 16;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;

const FEATURES_GET: u8 = 11;
const FEATURES_SET: u8 = 12;
const FEATURES_HEADER: u16 = 1;
const FEATURES_WANTED: u16 = 3;
const FEATURES_ACTIVE: u16 = 4;
const HEADER_DEVICE_NAME: u16 = 2;
const BITSET_BITS: u16 = 3;
const BITSET_BIT: u16 = 1;
const BIT_NAME: u16 = 2;
const BIT_VALUE: u16 = 3;
const TX_CHECKSUM: &str = "tx-checksum-ip-generic";

/// A socket to ethtool, in the network namespace of the thread that opened it.
#[derive(Debug)]
pub(super) struct Ethtool {
    conversation: Conversation,
    family: u16,
}

fn command(command: u8) -> [u8; 4] {
    [command, 1, 0, 0]
}

impl Ethtool {
    /// Opens the socket and resolves the family.
    pub(super) fn open() -> io::Result<Self> {
        let mut conversation = Conversation::open(NETLINK_GENERIC)?;
        let answers = conversation
            .request(CONTROLLER, ACK, &command(GET_FAMILY), |writer| writer.text(FAMILY_NAME, "ethtool"))?;
        let family = answers.iter().find_map(|(_, body)| find(body.get(4..)?, FAMILY_ID)?.try_into().ok());
        let family = family.map(u16::from_ne_bytes).ok_or(io::ErrorKind::Unsupported)?;
        Ok(Self { conversation, family })
    }

    /// Reads whether the device leaves checksums to what is below it.
    pub(super) fn tx_checksum(&mut self, device: &str) -> io::Result<bool> {
        let answers = self.conversation.request(self.family, ACK, &command(FEATURES_GET), |writer| {
            writer.nest(FEATURES_HEADER, |header| header.text(HEADER_DEVICE_NAME, device));
        })?;
        let active = |body: &[u8]| -> Option<bool> {
            let bits = find(find(body.get(4..)?, FEATURES_ACTIVE)?, BITSET_BITS)?;
            Some(attrs(bits).any(|(_, bit)| find_text(bit, BIT_NAME).as_deref() == Some(TX_CHECKSUM)))
        };
        answers.iter().find_map(|(_, body)| active(body)).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// Switches it.
    pub(super) fn set_tx_checksum(&mut self, device: &str, on: bool) -> io::Result<()> {
        let fill = |writer: &mut Writer| {
            writer.nest(FEATURES_HEADER, |header| header.text(HEADER_DEVICE_NAME, device));
            writer.nest(FEATURES_WANTED, |wanted| {
                wanted.nest(BITSET_BITS, |bits| {
                    bits.nest(BITSET_BIT, |bit| {
                        bit.text(BIT_NAME, TX_CHECKSUM);
                        if on {
                            bit.attr(BIT_VALUE, &[]);
                        }
                    });
                });
            });
        };
        self.conversation.request(self.family, ACK, &command(FEATURES_SET), fill).map(drop)
    }
}
