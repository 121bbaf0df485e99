//! Delay and loss between nodes, by a relay in the keeper.
//!
//! The kernel's own way (the netem queueing discipline) is a module that many kernels lack, so frames take a detour: an
//! nftables rule at the sender's port forwards them into a veth pair whose far end the keeper reads as raw packets; the
//! keeper holds each frame for its time and writes it back, and the bridge delivers it. Only what is addressed to the
//! other node is delayed; broadcasts (ARP) are not.
//!
//! The near end has offloads turned off, so that what the keeper reads are whole frames with finished checksums. That
//! costs throughput: a delayed pair of nodes is for behaviour, not for benchmarks.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, bind, recv, send, socket,
};

use super::tools::tool;
use super::underlay::nft;

/// The end of the detour that is a port of the bridge, and the end that the keeper reads.
const NEAR: &str = "lab-delay0";
const FAR: &str = "lab-delay1";

/// How many frames wait at most; more are dropped, as by any queue.
const QUEUE: usize = 16_384;

type Mac = [u8; 6];
/// How long a frame takes longer, and how many of a hundred are lost.
type Delays = Arc<Mutex<HashMap<(Mac, Mac), (Duration, u8)>>>;

/// The running relay. It ends with the keeper.
#[derive(Debug)]
pub(crate) struct Relay {
    delays: Delays,
}

impl Relay {
    /// Builds the detour for these ports of the bridge, with nothing on it yet.
    pub(crate) fn start(ports: &[String]) -> anyhow::Result<Self> {
        tool(&format!("ip link add {NEAR} type veth peer name {FAR}"))?;
        for end in [NEAR, FAR] {
            tool(&format!("ip link set {end} addrgenmode none"))?;
        }
        tool(&format!("ethtool -K {NEAR} tx off tso off gso off")).context("delay needs ethtool")?;
        tool(&format!("ip link set {NEAR} master lab0 up"))?;
        // What comes back has the sender's address; the bridge must not learn that the sender moved here.
        tool(&format!("bridge link set dev {NEAR} learning off flood off mcast_flood off bcast_flood off"))?;
        tool(&format!("ip link set {FAR} up"))?;
        nft(&format!(
            "table netdev lab {{
               set delayed {{ type ether_addr . ether_addr; }}
               chain detour {{
                 type filter hook ingress devices = {{ {} }} priority 0;
                 ether saddr . ether daddr @delayed fwd to \"{NEAR}\"
               }}
             }}",
            ports.join(", ")
        ))?;
        let socket = Arc::new(raw_socket(FAR)?);
        let delays: Delays = Arc::default();
        let (frames, due) = sync_channel(QUEUE);
        let (reader, known) = (socket.clone(), delays.clone());
        std::thread::spawn(move || read(&reader, &known, &frames));
        std::thread::spawn(move || write(&socket, &due));
        Ok(Relay { delays })
    }

    /// Sets what befalls frames from one to another. Nothing takes the entry away.
    pub(crate) fn set(&self, (from, to): &(String, String), delay: Duration, loss: u8) -> anyhow::Result<()> {
        let pair = (mac(from)?, mac(to)?);
        let mut delays = self.delays.lock().expect("no thread panics with the lock");
        let known = delays.contains_key(&pair);
        if delay.is_zero() && loss == 0 {
            if known {
                nft(&format!("delete element netdev lab delayed {{ {from} . {to} }}"))?;
                delays.remove(&pair);
            }
            return Ok(());
        }
        delays.insert(pair, (delay, loss));
        if !known {
            nft(&format!("add element netdev lab delayed {{ {from} . {to} }}"))?;
        }
        Ok(())
    }
}

fn mac(text: &str) -> anyhow::Result<Mac> {
    let bytes: Vec<u8> =
        text.split(':').map(|part| u8::from_str_radix(part, 16)).collect::<Result<_, _>>()?;
    bytes.try_into().map_err(|_| anyhow::anyhow!("{text} is not a hardware address"))
}

fn raw_socket(device: &str) -> anyhow::Result<OwnedFd> {
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)
        .context("cannot open a packet socket")?;
    let address: Option<LinkAddr> = nix::ifaddrs::getifaddrs()?
        .filter(|entry| entry.interface_name == device)
        .find_map(|entry| entry.address?.as_link_addr().copied());
    let Some(address) = address else { bail!("no device {device}") };
    bind(socket.as_raw_fd(), &address).context("cannot bind a packet socket")?;
    Ok(socket)
}

fn read(socket: &OwnedFd, delays: &Delays, frames: &SyncSender<(Instant, Vec<u8>)>) {
    let mut buffer = vec![0u8; 65_536];
    let mut drawn = 0u64;
    loop {
        let Ok(length) = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) else { continue };
        let frame = &buffer[..length];
        let (Some(to), Some(from)) =
            (frame.first_chunk::<6>(), frame.get(6..12).and_then(|mac| mac.first_chunk()))
        else {
            continue;
        };
        let delay = delays.lock().expect("no thread panics with the lock").get(&(*from, *to)).copied();
        // Frames of other pairs are not for the detour..
        let Some((delay, loss)) = delay else { continue };
        // Any sequence that is even over a hundred frames will do; this one does not repeat the same for each flow.
        drawn = drawn.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        if (drawn >> 33) % 100 < u64::from(loss) {
            continue;
        }
        frames.try_send((Instant::now() + delay, frame.to_vec())).ok();
    }
}

fn write(socket: &OwnedFd, frames: &Receiver<(Instant, Vec<u8>)>) {
    let mut waiting: BinaryHeap<Reverse<(Instant, u64, Vec<u8>)>> = BinaryHeap::new();
    let mut count = 0;
    loop {
        let until = waiting.peek().map_or(Duration::from_secs(3600), |Reverse((due, ..))| {
            due.saturating_duration_since(Instant::now())
        });
        match frames.recv_timeout(until) {
            Ok((due, frame)) => {
                count += 1;
                waiting.push(Reverse((due, count, frame)));
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        while waiting.peek().is_some_and(|Reverse((due, ..))| *due <= Instant::now()) {
            let Reverse((_, _, frame)) = waiting.pop().expect("there is a first frame");
            send(socket.as_raw_fd(), &frame, MsgFlags::empty()).ok();
        }
    }
}
