//! Netlink messages by hand for the two families that need few of them: nf_tables and ethtool.
//!
//! Not the route family: that has its own batch writer. Invariant: a reader never trusts a length that the
//! kernel sent; what does not fit ends the iteration.

use std::io;

use netlink_sys::{Socket, SocketAddr};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

pub(super) const REQUEST: u16 = 0x1;
pub(super) const ACK: u16 = 0x4;
pub(super) const DUMP: u16 = 0x300;
pub(super) const CREATE: u16 = 0x400;
pub(super) const APPEND: u16 = 0x800;

const NESTED: u16 = 0x8000;
const TYPE_MASK: u16 = 0x3fff;
const ERROR: u16 = 2;
const DONE: u16 = 3;
const DUMP_INTERRUPTED: u16 = 0x10;
const HEADER: usize = 16;

/// How often a request is repeated that met another writer.
const ATTEMPTS: usize = 8;

/// A growing run of messages.
#[derive(Debug, Default)]
pub(super) struct Writer {
    pub(super) bytes: Vec<u8>,
}

impl Writer {
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// One message: `fixed` is the family's own header, `fill` writes the attributes.
    pub(super) fn message(
        &mut self,
        kind: u16,
        flags: u16,
        seq: u32,
        fixed: &[u8],
        fill: impl FnOnce(&mut Self),
    ) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&flags.to_ne_bytes());
        self.bytes.extend_from_slice(&seq.to_ne_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(fixed);
        self.pad();
        fill(self);
        let len = u32::try_from(self.bytes.len() - start).expect("a message is far below 4 GiB");
        self.bytes[start..start + 4].copy_from_slice(&len.to_ne_bytes());
    }

    /// An attribute. `value` is at most 65,531 bytes.
    pub(super) fn attr(&mut self, kind: u16, value: &[u8]) {
        let len = u16::try_from(value.len() + 4).expect("an attribute is below 64 KiB");
        self.bytes.extend_from_slice(&len.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.pad();
    }

    /// A text that ends in a zero byte.
    pub(super) fn text(&mut self, kind: u16, value: &str) {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.attr(kind, &bytes);
    }

    /// A number in network byte order.
    pub(super) fn be32(&mut self, kind: u16, value: u32) {
        self.attr(kind, &value.to_be_bytes());
    }

    /// A nest of attributes.
    pub(super) fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 2]);
        self.bytes.extend_from_slice(&(kind | NESTED).to_ne_bytes());
        fill(self);
        let len = u16::try_from(self.bytes.len() - start).expect("a nest is below 64 KiB");
        self.bytes[start..start + 2].copy_from_slice(&len.to_ne_bytes());
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// The attributes in `bytes`: kind without flags, and value.
pub(super) fn attrs(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & TYPE_MASK;
        let value = bytes.get(4..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The value of the first attribute of that kind.
pub(super) fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attrs(bytes).find(|(found, _)| *found == kind).map(|(_, value)| value)
}

/// A text attribute without the zero byte.
pub(super) fn find_text(bytes: &[u8], kind: u16) -> Option<String> {
    let value = find(bytes, kind)?;
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
    Some(String::from_utf8_lossy(&value[..end]).into_owned())
}

/// A number in network byte order.
pub(super) fn find_be32(bytes: &[u8], kind: u16) -> Option<u32> {
    Some(u32::from_be_bytes(find(bytes, kind)?.try_into().ok()?))
}

/// A message of the kernel: kind, and what follows the netlink header.
pub(super) type Message = (u16, Vec<u8>);

/// A socket that carries one conversation at a time, in the namespace of the thread that opened it.
#[derive(Debug)]
pub(super) struct Conversation {
    socket: Socket,
    seq: u32,
}

impl Conversation {
    pub(super) fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        // Without CAP_NET_ADMIN in the first namespace the forced sizes are refused: then the defaults do.
        let _ = setsockopt(&socket, sockopt::SndBufForce, &(8 << 20));
        let _ = setsockopt(&socket, sockopt::RcvBufForce, &(8 << 20));
        // The kernel answers within the send; the limit only keeps a lost answer from hanging the caller.
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(5))?;
        Ok(Self { socket, seq: 0 })
    }

    /// The next sequence number.
    pub(super) fn next_seq(&mut self) -> u32 {
        self.seq = self.seq.wrapping_add(1);
        self.seq
    }

    /// Sends one run of messages and reads until the acknowledgement of `last` or the first error of
    /// `first..=last`. Answers to earlier runs (a module that was loaded makes the kernel replay a batch and
    /// acknowledge twice) are passed over.
    pub(super) fn transact(&mut self, bytes: &[u8], first: u32, last: u32) -> io::Result<Vec<Message>> {
        self.socket.send_to(bytes, &SocketAddr::new(0, 0), 0)?;
        let mut out = Vec::new();
        loop {
            let (datagram, from) = self.socket.recv_from_full()?;
            if from.port_number() != 0 {
                continue;
            }
            if take(&datagram, first, last, &mut out)? {
                return Ok(out);
            }
        }
    }

    /// One request whose answer ends by an acknowledgement, or a dump. Repeated if another writer came between.
    pub(super) fn request(
        &mut self,
        kind: u16,
        flags: u16,
        fixed: &[u8],
        fill: impl Fn(&mut Writer),
    ) -> io::Result<Vec<Message>> {
        let mut attempt = 1;
        loop {
            let seq = self.next_seq();
            let mut writer = Writer::default();
            writer.message(kind, flags | REQUEST, seq, fixed, &fill);
            match self.transact(&writer.bytes, seq, seq) {
                Err(error) if busy(&error) && attempt < ATTEMPTS => attempt += 1,
                other => return other,
            }
        }
    }
}

/// Reads what a datagram says to the requests `first..=last`: appends its messages, and tells whether the last request is
/// done.
///
/// # Errors
/// What the kernel refused; EINTR where a dump met a change.
pub(super) fn take(mut datagram: &[u8], first: u32, last: u32, out: &mut Vec<Message>) -> io::Result<bool> {
    while let (Some(len), Some(kind), Some(flags), Some(seq)) =
        (u32_at(datagram, 0), u16_at(datagram, 4), u16_at(datagram, 6), u32_at(datagram, 8))
    {
        let len = len as usize;
        let Some(body) = datagram.get(HEADER..len) else { break };
        datagram = datagram.get(len.next_multiple_of(4)..).unwrap_or_default();
        if seq.wrapping_sub(first) > last.wrapping_sub(first) {
            continue;
        }
        if flags & DUMP_INTERRUPTED != 0 && kind != ERROR {
            return Err(io::Error::from_raw_os_error(libc::EINTR));
        }
        match kind {
            ERROR | DONE => {
                let code = u32_at(body, 0).map_or(0, u32::cast_signed);
                if code != 0 {
                    return Err(io::Error::from_raw_os_error(code.wrapping_neg()));
                }
                if seq == last {
                    return Ok(true);
                }
            }
            _ => out.push((kind, body.to_vec())),
        }
    }
    Ok(false)
}

/// Whether the same request may pass the next time.
pub(super) fn busy(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY))
}
