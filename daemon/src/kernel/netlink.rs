//! A blocking rtnetlink connection: dumps, single objects, and changes in batches with an answer for each.
//!
//! Why not netlink-proto: docs/decisions/0004-own-netlink-batch-writer.md. Invariant: after a call no answer
//! of it is left in the socket.

use std::fmt;
use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, protocols::NETLINK_ROUTE};
use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

/// The most messages of one send: were each refused, the answers must fit the receive buffer, of which the
/// kernel charges about 1 KiB for each (net.core.rmem_default is 212,992).
const BATCH: usize = 128;
/// The bytes of a message's header (linux/netlink.h, `nlmsghdr`).
const HEADER: usize = 16;

/// A socket in the namespace of the thread that opened it.
#[derive(Debug)]
pub struct Conn {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

/// What the kernel said to a request that it refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The error number.
    pub errno: Errno,
    /// The kernel's own words (NETLINK_EXT_ACK), or nothing.
    pub words: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.errno.desc())?;
        if self.words.is_empty() { Ok(()) } else { write!(f, " ({})", self.words) }
    }
}

impl std::error::Error for Refusal {}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)).into()
    }
}

impl From<Errno> for Refusal {
    fn from(errno: Errno) -> Self {
        Self { errno, words: String::new() }
    }
}

impl Conn {
    /// Opens a socket in the network namespace of the calling thread.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.set_ext_ack(true)?;
        socket.set_cap_ack(true)?;
        // The kernel answers within the send; the limit only keeps a lost answer from hanging the caller.
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(5)).map_err(io::Error::from)?;
        Ok(Self { socket, sequence: 0, buffer: Vec::with_capacity(64 * 1024) })
    }

    /// Asks for all objects that match `message`.
    pub fn dump(&mut self, message: RouteNetlinkMessage) -> Result<Vec<RouteNetlinkMessage>, Refusal> {
        let mut bytes = Vec::new();
        let sequence = self.emit(message, NLM_F_DUMP, &mut bytes);
        self.socket.send(&bytes, 0)?;
        let mut found = Vec::new();
        loop {
            for answer in self.receive()? {
                if answer.header.sequence_number != sequence {
                    continue;
                }
                match answer.payload {
                    NetlinkPayload::InnerMessage(message) => found.push(message),
                    NetlinkPayload::Done(_) => return Ok(found),
                    NetlinkPayload::Error(error) => {
                        return Err(Errno::from_raw(error.raw_code().wrapping_neg()).into());
                    }
                    _ => {}
                }
            }
        }
    }

    /// Asks for one object.
    pub fn get(&mut self, message: RouteNetlinkMessage) -> Result<RouteNetlinkMessage, Refusal> {
        let mut bytes = Vec::new();
        let sequence = self.emit(message, 0, &mut bytes);
        self.socket.send(&bytes, 0)?;
        loop {
            for answer in self.receive()? {
                match answer.payload {
                    NetlinkPayload::InnerMessage(found) if answer.header.sequence_number == sequence => {
                        return Ok(found);
                    }
                    NetlinkPayload::Error(error) if answer.header.sequence_number == sequence => {
                        return Err(Errno::from_raw(error.raw_code().wrapping_neg()).into());
                    }
                    _ => {}
                }
            }
        }
    }

    /// Makes changes in order, many in one send; the kernel goes on after a refusal. One answer for each.
    ///
    /// Only the last message of a batch asks for an acknowledgement: refusals are told without being asked
    /// for, and nothing overflows the receive buffer.
    pub fn change(&mut self, changes: Vec<(RouteNetlinkMessage, u16)>) -> Vec<Result<(), Refusal>> {
        let mut answers = Vec::with_capacity(changes.len());
        let mut changes = changes.into_iter().peekable();
        while changes.peek().is_some() {
            let batch: Vec<_> = changes.by_ref().take(BATCH).collect();
            answers.extend(self.change_batch(batch));
        }
        answers
    }

    fn change_batch(&mut self, batch: Vec<(RouteNetlinkMessage, u16)>) -> Vec<Result<(), Refusal>> {
        let count = batch.len();
        let first = self.sequence.wrapping_add(1);
        let mut bytes = Vec::with_capacity(count * 96);
        for (place, (message, flags)) in batch.into_iter().enumerate() {
            let ack = if place + 1 == count { NLM_F_ACK } else { 0 };
            self.emit(message, flags | ack, &mut bytes);
        }
        let mut answers = vec![Ok(()); count];
        if let Err(error) = self.exchange(&bytes, first, &mut answers) {
            // How far the kernel came is unknown: the next pass looks.
            answers.fill(Err(error));
        }
        answers
    }

    fn exchange(
        &mut self,
        bytes: &[u8],
        first: u32,
        answers: &mut [Result<(), Refusal>],
    ) -> Result<(), Refusal> {
        self.socket.send(bytes, 0)?;
        loop {
            for answer in self.receive()? {
                let place = answer.header.sequence_number.wrapping_sub(first) as usize;
                let (NetlinkPayload::Error(error), true) = (answer.payload, place < answers.len()) else {
                    continue;
                };
                if error.code.is_some() {
                    let errno = Errno::from_raw(error.raw_code().wrapping_neg());
                    answers[place] = Err(Refusal { errno, words: words(&error.header) });
                }
                if place + 1 == answers.len() {
                    return Ok(());
                }
            }
        }
    }

    fn emit(&mut self, message: RouteNetlinkMessage, flags: u16, bytes: &mut Vec<u8>) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        write(message, flags, self.sequence, bytes);
        self.sequence
    }

    /// Receives one datagram, which may hold several answers.
    fn receive(&mut self) -> Result<Vec<NetlinkMessage<RouteNetlinkMessage>>, Refusal> {
        self.buffer.clear();
        while let Err(error) = self.socket.recv(&mut self.buffer, 0) {
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error.into());
            }
        }
        Ok(answers(&self.buffer))
    }
}

/// Appends a request to a run of messages.
pub(super) fn write(message: RouteNetlinkMessage, flags: u16, sequence: u32, bytes: &mut Vec<u8>) {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    header.sequence_number = sequence;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
    message.finalize();
    let start = bytes.len();
    bytes.resize(start + message.buffer_len().next_multiple_of(4), 0);
    message.serialize(&mut bytes[start..]);
}

/// The answers in one datagram. An object that the message crate cannot read is not one of weft's: the others still
/// count.
pub(super) fn answers(mut datagram: &[u8]) -> Vec<NetlinkMessage<RouteNetlinkMessage>> {
    let mut answers = Vec::new();
    while let Some(length) = datagram.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes) as usize) {
        if length < HEADER {
            break;
        }
        answers.extend(NetlinkMessage::<RouteNetlinkMessage>::deserialize(datagram));
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    answers
}

/// The text attribute behind the echoed header (`NLMSGERR_ATTR_MSG`, linux/netlink.h).
pub(super) fn words(echo: &[u8]) -> String {
    let mut attributes = echo.get(16..).unwrap_or_default();
    while let [a, b, c, d, ..] = *attributes {
        let (length, kind) = (usize::from(u16::from_ne_bytes([a, b])), u16::from_ne_bytes([c, d]));
        let Some(value) = attributes.get(4..length) else { break };
        if kind == 1 {
            return String::from_utf8_lossy(value).trim_end_matches('\0').to_owned();
        }
        attributes = attributes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    String::new()
}
