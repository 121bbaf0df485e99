//! A small blocking rtnetlink connection: a few messages in one `send`, each with its own answer.
//!
//! For the short exchanges of one pod; bulk changes belong to the reconciler's batch writer.
//!
//! Invariant: after an exchange no answer of it is left in the socket.

use std::fmt;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, protocols::NETLINK_ROUTE};
use nix::errno::Errno;
use weft_wire::cni::{CniError, Code};

/// A socket in the namespace of the thread that opened it.
#[derive(Debug)]
pub(super) struct Conn {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

/// One change.
#[derive(Debug, Clone)]
pub(super) struct Step {
    /// What a person reads when it fails: "cannot ...".
    pub what: &'static str,
    /// The message.
    pub message: RouteNetlinkMessage,
    /// Flags beside REQUEST and ACK.
    pub flags: u16,
    /// An error that counts as success.
    pub tolerated: Option<Errno>,
}

/// What the kernel refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    /// Which step: its index.
    pub step: usize,
    /// The step in words.
    pub what: &'static str,
    /// The kernel's error.
    pub errno: Errno,
    /// The kernel's own words (NETLINK_EXT_ACK), or nothing.
    pub words: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.errno.desc())?;
        if self.words.is_empty() { Ok(()) } else { write!(f, ": {}", self.words) }
    }
}

impl From<Refusal> for CniError {
    fn from(refusal: Refusal) -> Self {
        let message = match refusal.errno {
            Errno::EPERM => format!("weftd may not {}; it needs the capability CAP_NET_ADMIN", refusal.what),
            Errno::ENOMEM | Errno::ENOBUFS => format!("the kernel has no memory left to {}", refusal.what),
            _ => format!("the kernel refused to {}", refusal.what),
        };
        Self::new(Code::Kernel, message).with_details(refusal)
    }
}

impl Conn {
    /// Opens a socket in the namespace of the calling thread.
    pub(super) fn open() -> Result<Self, CniError> {
        let broken = |error: std::io::Error| {
            CniError::new(Code::Kernel, "no netlink socket can be opened").with_details(error)
        };
        let socket = Socket::new(NETLINK_ROUTE).map_err(broken)?;
        // Answers with the kernel's own words, and without a copy of the request.
        socket.set_ext_ack(true).map_err(broken)?;
        socket.set_cap_ack(true).map_err(broken)?;
        Ok(Self { socket, sequence: 0, buffer: Vec::with_capacity(32 * 1024) })
    }

    /// Makes changes in order, all in one message to the kernel, which goes on after a refusal.
    ///
    /// Returns the first refusal that is not tolerated.
    pub(super) fn change(&mut self, steps: &[Step]) -> Result<(), Refusal> {
        let first = self.sequence.wrapping_add(1);
        let mut bytes = Vec::with_capacity(1024);
        for step in steps {
            self.emit(step.message.clone(), step.flags | NLM_F_ACK, &mut bytes);
        }
        let fail = |step: usize, errno, words| Refusal { step, what: steps[step].what, errno, words };
        self.socket.send(&bytes, 0).map_err(|error| fail(0, errno_of(&error), String::new()))?;
        let mut refused: Option<Refusal> = None;
        let mut waiting = steps.len();
        while waiting > 0 {
            let answers =
                self.receive().map_err(|errno| fail(steps.len() - waiting, errno, String::new()))?;
            for answer in answers {
                let index = answer.header.sequence_number.wrapping_sub(first) as usize;
                let (NetlinkPayload::Error(error), true) = (answer.payload, index < steps.len()) else {
                    continue;
                };
                waiting = waiting.saturating_sub(1);
                let errno = Errno::from_raw(-error.raw_code());
                if error.code.is_some() && steps[index].tolerated != Some(errno) && refused.is_none() {
                    refused = Some(fail(index, errno, words(&error.header)));
                }
            }
        }
        refused.map_or(Ok(()), Err)
    }

    /// Asks for one object; `None` where it does not exist.
    pub(super) fn get(
        &mut self,
        message: RouteNetlinkMessage,
    ) -> Result<Option<RouteNetlinkMessage>, CniError> {
        let mut bytes = Vec::new();
        let sequence = self.emit(message, 0, &mut bytes);
        self.socket.send(&bytes, 0).map_err(|error| unanswered(errno_of(&error)))?;
        loop {
            for answer in self.receive().map_err(unanswered)? {
                if answer.header.sequence_number != sequence {
                    continue;
                }
                match answer.payload {
                    NetlinkPayload::InnerMessage(found) => return Ok(Some(found)),
                    NetlinkPayload::Error(error) => {
                        return match Errno::from_raw(-error.raw_code()) {
                            Errno::ENODEV | Errno::ENOENT | Errno::ESRCH => Ok(None),
                            errno => Err(unanswered(errno)),
                        };
                    }
                    _ => {}
                }
            }
        }
    }

    /// Asks for all objects of a kind.
    pub(super) fn dump(
        &mut self,
        message: RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, CniError> {
        let mut bytes = Vec::new();
        let sequence = self.emit(message, NLM_F_DUMP, &mut bytes);
        self.socket.send(&bytes, 0).map_err(|error| unanswered(errno_of(&error)))?;
        let mut found = Vec::new();
        loop {
            for answer in self.receive().map_err(unanswered)? {
                if answer.header.sequence_number != sequence {
                    continue;
                }
                match answer.payload {
                    NetlinkPayload::InnerMessage(message) => found.push(message),
                    NetlinkPayload::Done(_) => return Ok(found),
                    NetlinkPayload::Error(error) => {
                        return Err(unanswered(Errno::from_raw(-error.raw_code())));
                    }
                    _ => {}
                }
            }
        }
    }

    fn emit(&mut self, message: RouteNetlinkMessage, flags: u16, bytes: &mut Vec<u8>) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let start = bytes.len();
        bytes.resize(start + message.buffer_len().next_multiple_of(4), 0);
        message.serialize(&mut bytes[start..]);
        self.sequence
    }

    /// Receives one datagram, which may hold several answers.
    fn receive(&mut self) -> Result<Vec<NetlinkMessage<RouteNetlinkMessage>>, Errno> {
        self.buffer.clear();
        loop {
            match self.socket.recv(&mut self.buffer, 0) {
                Ok(_) => break,
                Err(error) if errno_of(&error) == Errno::EINTR => {}
                Err(error) => return Err(errno_of(&error)),
            }
        }
        let mut answers = Vec::new();
        let mut rest = &self.buffer[..];
        while rest.len() >= 16 {
            let answer =
                NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest).map_err(|_| Errno::EBADMSG)?;
            let length = answer.header.length as usize;
            if length < 16 {
                return Err(Errno::EBADMSG);
            }
            answers.push(answer);
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        Ok(answers)
    }
}

fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

fn unanswered(errno: Errno) -> CniError {
    CniError::new(Code::Kernel, "the kernel does not answer over netlink").with_details(errno)
}

/// The text attribute behind the echoed header (`NLMSGERR_ATTR_MSG`).
fn words(echo: &[u8]) -> String {
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
