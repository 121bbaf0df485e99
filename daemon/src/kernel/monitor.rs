//! Tells that something in the kernel changed: links, addresses, neighbours, routes, nftables.
//!
//! It says that, never what: the pass looks. Invariant: a change that is missed because too much happened
//! at once counts as a change.

use std::io;
use std::time::Duration;

use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use netlink_sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};
use tokio::sync::mpsc;

/// RTMGRP_LINK, NEIGH, IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE (linux/rtnetlink.h).
const ROUTE_GROUPS: u32 = 0x1 | 0x4 | 0x10 | 0x40 | 0x100 | 0x400;
/// NFNLGRP_NFTABLES is group 7 (linux/netfilter/nfnetlink.h).
const NFTABLES_GROUPS: u32 = 1 << (7 - 1);
const BUFFER: usize = 64 * 1024;
/// A socket that fails is asked again, and never in a busy loop.
const AFTER_FAILURE: Duration = Duration::from_secs(1);

/// Starts to watch the network namespace of the calling thread; a full `changed` already says enough.
///
/// # Errors
/// Where the kernel gives no such socket.
pub fn watch(changed: mpsc::Sender<()>) -> io::Result<()> {
    for (protocol, groups) in [(NETLINK_ROUTE, ROUTE_GROUPS), (NETLINK_NETFILTER, NFTABLES_GROUPS)] {
        let mut socket = TokioSocket::new(protocol)?;
        socket.socket_mut().bind(&SocketAddr::new(0, groups))?;
        tokio::spawn(read(socket, changed.clone()));
    }
    Ok(())
}

async fn read(socket: TokioSocket, changed: mpsc::Sender<()>) {
    let mut buffer = Vec::with_capacity(BUFFER);
    loop {
        buffer.clear();
        let told = match socket.recv(&mut buffer).await {
            Ok(_) => matters(&buffer),
            // Messages were lost, and any of them may have mattered.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => true,
            Err(error) => {
                tracing::warn!(err = %error, "kernel monitor failed a read");
                tokio::time::sleep(AFTER_FAILURE).await;
                true
            }
        };
        if told && matches!(changed.try_send(()), Err(mpsc::error::TrySendError::Closed(()))) {
            return;
        }
        tokio::task::yield_now().await;
    }
}

/// Returns whether the datagram tells of anything but the neighbour cache's own life: entries that traffic
/// makes and ages are not permanent, and weft's are.
pub(super) fn matters(mut datagram: &[u8]) -> bool {
    const HEADER: usize = 16;
    const NEWNEIGH: u16 = 28;
    const STATE: usize = HEADER + 8;
    const PERMANENT: u16 = 0x80;
    while datagram.len() >= HEADER {
        let length = u32::from_ne_bytes([datagram[0], datagram[1], datagram[2], datagram[3]]) as usize;
        let kind = u16::from_ne_bytes([datagram[4], datagram[5]]);
        let state = datagram.get(STATE..STATE + 2).map_or(PERMANENT, |s| u16::from_ne_bytes([s[0], s[1]]));
        if kind != NEWNEIGH || state & PERMANENT != 0 {
            return true;
        }
        datagram = datagram.get(length.max(HEADER).next_multiple_of(4)..).unwrap_or_default();
    }
    false
}
