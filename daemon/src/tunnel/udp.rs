//! The UDP socket of the tunnels, one a family: runs of equal datagrams go out and come in by one call each
//! (`UDP_SEGMENT`, `UDP_GRO`; Linux 4.18 and 5.0, linux/udp.h).
//!
//! It knows nothing of what is in them. A kernel that refuses a run gets single datagrams from then on.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, SockaddrStorage, bind,
    recvmsg, sendmsg, setsockopt, socket, sockopt,
};

/// The most datagrams of a run (`UDP_MAX_SEGMENTS` of older kernels).
const MOST: usize = 64;
/// The most bytes of a run: one IP packet's payload.
const MOST_BYTES: usize = 65_000;
/// What the kernel may hold for the socket, in bytes, where it lets the daemon choose.
const BUFFER: usize = 8 << 20;

/// Datagrams to one destination, end to end in one buffer.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    pub(crate) bytes: Vec<u8>,
    runs: Vec<Run>,
}

/// Datagrams of one size; the last may be shorter.
#[derive(Debug, Clone, Copy)]
struct Run {
    start: usize,
    end: usize,
    size: usize,
    count: usize,
    open: bool,
}

impl Batch {
    pub(crate) fn clear(&mut self) {
        self.bytes.clear();
        self.runs.clear();
    }

    /// Whether to send before more is added: a run of the usual kind is complete.
    pub(crate) fn is_full(&self) -> bool {
        self.bytes.len() >= MOST_BYTES / 2 || self.runs.iter().map(|run| run.count).sum::<usize>() >= MOST
    }

    /// Forgets what was sent by [`Udp::send_complete`]: all but the rest of a run.
    pub(super) fn keep_rest(&mut self) {
        let Some(rest) = self.rest() else { return self.clear() };
        let run = self.runs[rest];
        self.bytes.copy_within(run.start..run.end, 0);
        self.bytes.truncate(run.end - run.start);
        self.runs.clear();
        self.runs.push(Run { start: 0, end: self.bytes.len(), ..run });
    }

    /// Which run is worth to be continued: a super-packet of 64 KiB is longer than a run once it is sealed, and its last few
    /// datagrams would cost each kernel on the way as much as a whole run.
    fn rest(&self) -> Option<usize> {
        let run = self.runs.last().filter(|run| run.open && run.count < MOST)?;
        (run.end - run.start < MOST_BYTES / 2).then(|| self.runs.len() - 1)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Returns the datagrams one by one.
    #[cfg(fuzzing)]
    pub(crate) fn datagrams(&self) -> Vec<Vec<u8>> {
        let of = |run: &Run| {
            self.bytes[run.start..run.end].chunks(run.size).map(<[u8]>::to_vec).collect::<Vec<_>>()
        };
        self.runs.iter().flat_map(of).collect()
    }

    /// Makes room for a datagram of at most `most` bytes and lets `fill` write it; `fill` returns its length, 0 for none.
    pub(crate) fn push(&mut self, most: usize, fill: impl FnOnce(&mut [u8]) -> usize) {
        let start = self.bytes.len();
        self.bytes.resize(start + most, 0);
        let length = fill(&mut self.bytes[start..]);
        self.bytes.truncate(start + length);
        if length == 0 {
            return;
        }
        match self.runs.last_mut() {
            Some(run)
                if run.open
                    && length <= run.size
                    && run.count < MOST
                    && start + length - run.start <= MOST_BYTES =>
            {
                run.end = start + length;
                run.count += 1;
                run.open = length == run.size;
            }
            _ => self.runs.push(Run { start, end: start + length, size: length, count: 1, open: true }),
        }
    }
}

/// A bound socket.
#[derive(Debug)]
pub(crate) struct Udp {
    socket: UdpSocket,
    /// The kernel takes runs.
    segments: AtomicBool,
}

/// What one call brought: so many bytes of datagrams of one size, the last maybe shorter.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arrived {
    pub(crate) from: SocketAddr,
    pub(crate) length: usize,
    pub(crate) size: usize,
}

impl Udp {
    /// Opens a socket at every address of a family.
    pub(crate) fn open(v4: bool, port: u16) -> io::Result<Self> {
        let family = if v4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(family, SockType::Datagram, flags, None)?;
        if !v4 {
            setsockopt(&fd, sockopt::Ipv6V6Only, &true)?;
        }
        // Without the capability in the first namespace the forced sizes are refused: then the defaults do.
        let _ = setsockopt(&fd, sockopt::RcvBufForce, &BUFFER);
        let _ = setsockopt(&fd, sockopt::SndBufForce, &BUFFER);
        // An older kernel hands over each datagram alone.
        let _ = setsockopt(&fd, sockopt::UdpGroSegment, &true);
        let any: IpAddr = if v4 { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        bind(fd.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(any, port)))?;
        Ok(Self { socket: fd.into(), segments: AtomicBool::new(true) })
    }

    /// Takes a socket that another daemon opened with [`Udp::open`].
    pub(crate) fn adopt(socket: OwnedFd) -> Self {
        Self { socket: socket.into(), segments: AtomicBool::new(true) }
    }

    /// Sends a batch; returns how many datagrams the kernel did not take.
    pub(crate) fn send(&self, to: SocketAddr, batch: &Batch) -> usize {
        batch.runs.iter().map(|run| self.send_run(to, batch, *run)).sum()
    }

    /// Sends a batch but the rest of a run that can be continued; returns how many datagrams the kernel did not take.
    pub(super) fn send_complete(&self, to: SocketAddr, batch: &Batch) -> usize {
        let complete = batch.rest().unwrap_or(batch.runs.len());
        batch.runs[..complete].iter().map(|run| self.send_run(to, batch, *run)).sum()
    }

    fn send_run(&self, to: SocketAddr, batch: &Batch, run: Run) -> usize {
        let bytes = &batch.bytes[run.start..run.end];
        if run.count > 1 && self.segments.load(Ordering::Relaxed) {
            let size = u16::try_from(run.size).expect("a run has fewer than 65,536 bytes");
            match self.send_once(to, bytes, Some(size)) {
                Ok(()) => return 0,
                // No offload on the way out (EIO), or a kernel without it (EINVAL).
                Err(Errno::EIO | Errno::EINVAL) => self.segments.store(false, Ordering::Relaxed),
                // The path takes less than a datagram of the run: the kernel fragments single ones, and no runs.
                Err(Errno::EMSGSIZE) => {}
                Err(_) => return run.count,
            }
        }
        bytes.chunks(run.size).filter(|datagram| self.send_once(to, datagram, None).is_err()).count()
    }

    fn send_once(&self, to: SocketAddr, bytes: &[u8], size: Option<u16>) -> Result<(), Errno> {
        let to = SockaddrStorage::from(to);
        let segments = size.as_ref().map(ControlMessage::UdpGsoSegments);
        loop {
            let slices = [IoSlice::new(bytes)];
            match sendmsg(self.socket.as_raw_fd(), &slices, segments.as_slice(), MsgFlags::empty(), Some(&to))
            {
                Ok(_) => return Ok(()),
                Err(Errno::EAGAIN) => wait(&[(self.as_fd(), PollFlags::POLLOUT)]),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Takes what came, without waiting.
    pub(crate) fn receive(&self, buffer: &mut [u8], control: &mut [u8]) -> Result<Arrived, Errno> {
        let mut slices = [IoSliceMut::new(buffer)];
        let message = recvmsg::<SockaddrStorage>(
            self.socket.as_raw_fd(),
            &mut slices,
            Some(control),
            MsgFlags::empty(),
        )?;
        let length = message.bytes;
        let from = message.address.as_ref().and_then(address).ok_or(Errno::EAFNOSUPPORT)?;
        let segment = message.cmsgs().ok().and_then(|mut messages| {
            messages.find_map(|message| match message {
                ControlMessageOwned::UdpGroSegments(size) => usize::try_from(size).ok(),
                _ => None,
            })
        });
        Ok(Arrived { from, length, size: segment.filter(|size| *size > 0).unwrap_or(length).max(1) })
    }

    /// Room for the control messages of one call.
    pub(crate) fn control() -> Vec<u8> {
        nix::cmsg_space!(i32, [u64; 4])
    }
}

impl AsFd for Udp {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn address(storage: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = storage.as_sockaddr_in().map(|address| SocketAddr::V4((*address).into()));
    v4.or_else(|| storage.as_sockaddr_in6().map(|address| SocketAddr::V6((*address).into())))
}

/// Waits until a descriptor is ready, or for a second.
pub(crate) fn wait(fds: &[(BorrowedFd<'_>, PollFlags)]) {
    let mut fds: Vec<_> = fds.iter().map(|(fd, events)| PollFd::new(*fd, *events)).collect();
    let _ = poll(&mut fds, 1000_u16);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn push(batch: &mut Batch, count: usize, length: usize) {
        for number in 0..count {
            batch.push(length, |room| {
                room.fill(u8::try_from(number).expect("few"));
                length
            });
        }
    }

    fn runs(batch: &Batch) -> Vec<(usize, usize)> {
        batch.runs.iter().map(|run| (run.count, run.size)).collect()
    }

    #[test]
    fn the_end_of_a_super_packet_goes_with_the_next() {
        let mut batch = Batch::default();
        push(&mut batch, 46, 1472);
        assert_eq!(runs(&batch), [(44, 1472), (2, 1472)]);
        batch.keep_rest();
        assert_eq!(runs(&batch), [(2, 1472)]);
        assert_eq!(
            (batch.bytes[0], batch.bytes[1472], batch.bytes.len()),
            (44, 45, 2 * 1472),
            "the last two"
        );
        push(&mut batch, 46, 1472);
        assert_eq!(runs(&batch), [(44, 1472), (4, 1472)]);
    }

    #[test]
    fn what_cannot_be_continued_or_is_large_is_not_kept() {
        for (count, length, last) in [(30, 1472, None), (3, 1472, Some(100)), (64, 96, None), (0, 0, None)] {
            let mut batch = Batch::default();
            push(&mut batch, count, length);
            last.into_iter().for_each(|last| push(&mut batch, 1, last));
            batch.keep_rest();
            assert!(batch.is_empty() && batch.bytes.is_empty(), "{count} of {length}");
        }
    }
}
