//! The mesh's sockets: one UDP socket an underlay address. It moves datagrams and knows nothing of them.
//!
//! Invariant: a socket exists for exactly the addresses last given, so a node that changes its address
//! goes on without a restart.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use rustix::net::sockopt::{self, Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery};
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tracing::{debug, info, warn};

/// A datagram may not be larger; what is longer is cut here and refused by the mesh.
const DATAGRAM_MAX: usize = 2048;

/// A received datagram.
#[derive(Debug)]
pub struct Received {
    /// Who sent it, by its UDP source address.
    pub from: SocketAddr,
    /// The payload.
    pub datagram: Vec<u8>,
}

/// The open sockets.
#[derive(Debug)]
pub struct Sockets {
    port: u16,
    inbox: mpsc::Sender<Received>,
    /// Datagrams of any size go out whole, whatever the kernel believes of the path.
    unfragmented: bool,
    open: BTreeMap<IpAddr, Open>,
    /// Datagrams that could not be sent, by reason: the network was unreachable or its queue full.
    pub send_errors: u64,
}

#[derive(Debug)]
struct Open {
    socket: Arc<UdpSocket>,
    reader: JoinHandle<()>,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// An address on which gossip cannot listen.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot listen for gossip on {address}: {source}; is another daemon on that port, or underlay.address not of this node?"
)]
pub struct ListenError {
    address: SocketAddr,
    #[source]
    source: io::Error,
}

impl Sockets {
    /// Makes an empty set; received datagrams go to `inbox` and are dropped when it is full.
    pub fn new(port: u16, inbox: mpsc::Sender<Received>) -> Self {
        Self { port, inbox, unfragmented: false, open: BTreeMap::new(), send_errors: 0 }
    }

    /// Has datagrams go out whole up to the MTU of the device, for who asks what a path carries (IP_PMTUDISC_PROBE,
    /// ip(7)).
    #[must_use]
    pub fn unfragmented(mut self) -> Self {
        self.unfragmented = true;
        self
    }

    /// Opens and closes sockets so that there is one for each address; reports what could not be opened.
    pub fn set_addresses(&mut self, addresses: &[IpAddr]) -> Vec<ListenError> {
        self.open.retain(|address, _| addresses.contains(address));
        let missing: Vec<_> = addresses.iter().filter(|a| !self.open.contains_key(a)).copied().collect();
        let mut errors = Vec::new();
        for address in missing {
            match self.listen(SocketAddr::new(address, self.port)) {
                Ok(open) => {
                    info!(%address, port = self.port, "listening");
                    self.open.insert(address, open);
                }
                Err(error) => errors.push(error),
            }
        }
        errors
    }

    fn listen(&self, address: SocketAddr) -> Result<Open, ListenError> {
        let bind = || -> io::Result<UdpSocket> {
            let socket = std::net::UdpSocket::bind(address)?;
            socket.set_nonblocking(true)?;
            if self.unfragmented && address.is_ipv4() {
                sockopt::set_ip_mtu_discover(&socket, Ipv4PathMtuDiscovery::PROBE)?;
            } else if self.unfragmented {
                sockopt::set_ipv6_mtu_discover(&socket, Ipv6PathMtuDiscovery::PROBE)?;
            }
            UdpSocket::from_std(socket)
        };
        let socket = Arc::new(bind().map_err(|source| ListenError { address, source })?);
        let reader = tokio::spawn(read(socket.clone(), self.inbox.clone()));
        Ok(Open { socket, reader })
    }

    /// Sends one datagram from the socket of the destination's family; a failure is counted, not returned:
    /// gossip repeats itself.
    pub fn send(&mut self, to: SocketAddr, datagram: &[u8]) {
        let socket = self.open.iter().find(|(address, _)| address.is_ipv4() == to.is_ipv4());
        let Some((_, open)) = socket else {
            self.send_errors += 1;
            return;
        };
        if let Err(error) = open.socket.try_send_to(datagram, to) {
            self.send_errors += 1;
            debug!(%to, %error, "gossip not sent");
        }
    }
}

async fn read(socket: Arc<UdpSocket>, inbox: mpsc::Sender<Received>) {
    let mut buffer = vec![0; DATAGRAM_MAX];
    loop {
        match socket.recv_from(&mut buffer).await {
            Ok((length, from)) => {
                let datagram = buffer[..length].to_vec();
                if let Err(mpsc::error::TrySendError::Closed(_)) = inbox.try_send(Received { from, datagram })
                {
                    return;
                }
            }
            // An ICMP error of an earlier send (ECONNREFUSED and its kin) says nothing of this socket.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            Err(error) => {
                warn!(%error, "gossip socket failed a read");
                tokio::task::yield_now().await;
            }
        }
    }
}
