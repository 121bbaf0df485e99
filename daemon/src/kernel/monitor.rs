//! Tells that something in the kernel changed: links, addresses, neighbours, routes, nftables.
//!
//! It says that, never what: the pass looks. Invariant: a change that is missed because too much happened
//! at once counts as a change.

use std::io;

use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use netlink_sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};
use tokio::sync::mpsc;

/// RTMGRP_LINK, NEIGH, IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE (linux/rtnetlink.h).
const ROUTE_GROUPS: u32 = 0x1 | 0x4 | 0x10 | 0x40 | 0x100 | 0x400;
/// NFNLGRP_NFTABLES is group 7 (linux/netfilter/nfnetlink.h).
const NFTABLES_GROUPS: u32 = 1 << (7 - 1);
/// `NFT_MSG_NEWGEN` of subsystem 10: the commit itself; the objects before it say the same.
const BUFFER: usize = 64 * 1024;

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
        // ENOBUFS means that messages were lost, which is a change as well.
        let _ = socket.recv(&mut buffer).await;
        if let Err(mpsc::error::TrySendError::Closed(())) = changed.try_send(()) {
            return;
        }
        tokio::task::yield_now().await;
    }
}
