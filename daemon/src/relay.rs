//! Relaying for pairs of other nodes that have no direct path: one UDP port a pair, at which both see each other.
//!
//! What goes where is decided in [`pair`]; this is its shell: sockets, and one thread that waits at all of them. Nothing is added
//! to what is forwarded and nothing of it can be read here. Invariants: no more ports than were configured, no more bytes a
//! second than were; a pair that nobody uses loses its port; without pairs there is no socket.

pub mod handed;
pub mod pair;

use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use weft_wire::mesh::RelayRefusal;
use weft_wire::types::NodeName;

use crate::tunnel::udp::{Batch, Udp};
use pair::{Allowance, Counts, Member, Pair, Refused, Step};

/// One call brings at most one IP packet's worth of datagrams.
const MOST: usize = 1 << 16;
/// So many calls are made at a socket before the next one has its turn.
const TURNS: usize = 16;
/// Between two looks for pairs that nobody uses.
const LOOK: Duration = Duration::from_secs(5);

/// How much a node relays for others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelayLimits {
    /// The UDP ports: one a pair.
    pub ports: RangeInclusive<u16>,
    /// Of a pair, in bytes a second.
    pub pair_bytes: u64,
    /// Of all, in bytes a second.
    pub total_bytes: u64,
}

/// A pair as people see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PairStatus {
    /// Who.
    pub nodes: [NodeName; 2],
    /// At which port.
    pub port: u16,
    /// Where the two are, as far as they have been heard.
    pub legs: [Option<SocketAddr>; 2],
    /// What it counted.
    pub counts: Counts,
}

/// The relay of a node; dropping it closes all ports.
#[derive(Debug)]
pub struct Relay {
    limits: RelayLimits,
    shared: Arc<Shared>,
    waker: PipeWriter,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    places: Mutex<Vec<Arc<Place>>>,
    total: Mutex<Allowance>,
    /// What pairs counted that are gone.
    past: Mutex<Counts>,
    wake: PipeReader,
    stop: AtomicBool,
}

/// A pair at its port.
#[derive(Debug)]
struct Place {
    port: u16,
    v4: Option<Udp>,
    v6: Option<Udp>,
    pair: Mutex<Pair>,
}

impl Relay {
    /// Makes a relay without pairs.
    ///
    /// # Errors
    /// No pipe.
    pub fn new(limits: RelayLimits, now: Instant) -> io::Result<Self> {
        let (wake, waker) = io::pipe()?;
        let shared = Shared {
            places: Mutex::default(),
            total: Mutex::new(Allowance::new(limits.total_bytes, now)),
            past: Mutex::default(),
            wake,
            stop: AtomicBool::new(false),
        };
        Ok(Self { limits, shared: Arc::new(shared), waker, thread: None })
    }

    /// Gives a pair its port: the one that it has, or a free one.
    ///
    /// # Errors
    /// Why there is none.
    pub fn allocate(&mut self, members: [Member; 2], now: Instant) -> Result<u16, RelayRefusal> {
        self.shared.close_unused(now);
        let mut places = lock(&self.shared.places);
        let [one, other] = &members;
        if let Some(place) = places.iter().find(|place| lock(&place.pair).is_of(&one.node, &other.node)) {
            lock(&place.pair).follow(&members);
            return Ok(place.port);
        }
        let share = (self.limits.ports.len() / 4).max(4);
        let has = |member: &Member| {
            places.iter().filter(|place| lock(&place.pair).nodes().contains(&&member.node)).count()
        };
        if members.iter().any(|member| has(member) >= share) {
            return Err(RelayRefusal::Full);
        }
        let taken: Vec<u16> = places.iter().map(|place| place.port).collect();
        let mut free = self.limits.ports.clone().filter(|port| !taken.contains(port)).peekable();
        if free.peek().is_none() {
            return Err(RelayRefusal::Full);
        }
        let place = free.find_map(Place::open).ok_or(RelayRefusal::NoPort)?;
        let (port, v4, v6) = place;
        let pair = Mutex::new(Pair::new(members, self.limits.pair_bytes, now));
        places.push(Arc::new(Place { port, v4, v6, pair }));
        drop(places);
        self.start().map_err(|error| {
            tracing::warn!(err = %error, "no thread for the relay");
            RelayRefusal::NoPort
        })?;
        Ok(port)
    }

    fn start(&mut self) -> io::Result<()> {
        if self.thread.is_none() {
            let shared = Arc::clone(&self.shared);
            self.thread = Some(thread::Builder::new().name("relay".into()).spawn(move || shared.run())?);
        }
        self.waker.write_all(&[0])
    }

    /// Has the thread end; what arrives from now on waits in the sockets.
    fn pause(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A pipe that is full is readable all the same.
            let _ = self.waker.write_all(&[0]);
            drop(thread.join());
        }
    }

    /// Returns how many percent of the ports are free.
    pub fn room(&self) -> u8 {
        let all = self.limits.ports.len();
        let used = lock(&self.shared.places).len().min(all);
        u8::try_from((all - used) * 100 / all.max(1)).expect("a percentage")
    }

    /// Returns the pairs that it relays for.
    pub fn status(&self) -> Vec<PairStatus> {
        let status = |place: &Arc<Place>| {
            let pair = lock(&place.pair);
            let nodes = pair.nodes().map(NodeName::clone);
            PairStatus { nodes, port: place.port, legs: pair.legs(), counts: pair.counts }
        };
        lock(&self.shared.places).iter().map(status).collect()
    }

    /// Returns what all pairs counted, also those that are gone.
    pub fn counts(&self) -> Counts {
        // Together: a pair that goes meanwhile is counted once.
        let places = lock(&self.shared.places);
        let mut sum = *lock(&self.shared.past);
        places.iter().for_each(|place| sum.add(&lock(&place.pair).counts));
        sum
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.pause();
    }
}

impl Place {
    fn open(port: u16) -> Option<(u16, Option<Udp>, Option<Udp>)> {
        let (v4, v6) = (Udp::open(true, port), Udp::open(false, port));
        let taken = |udp: &io::Result<Udp>| matches!(udp, Err(e) if e.kind() == io::ErrorKind::AddrInUse);
        if taken(&v4) || taken(&v6) || (v4.is_err() && v6.is_err()) {
            return None;
        }
        Some((port, v4.ok(), v6.ok()))
    }

    fn sockets(&self) -> impl Iterator<Item = &Udp> {
        self.v4.iter().chain(&self.v6)
    }

    fn send(&self, to: SocketAddr, batch: &Batch) {
        if let Some(udp) = if to.is_ipv4() { &self.v4 } else { &self.v6 } {
            // What the kernel does not take is lost, as on any path.
            let lost = udp.send(to, batch);
            if lost > 0 {
                lock(&self.pair).counts.refuse(Refused::NotSent, lost);
            }
        }
    }
}

/// What the thread keeps from call to call.
struct Room {
    buffer: Vec<u8>,
    control: Vec<u8>,
    batch: Batch,
    held: Batch,
}

impl Shared {
    fn run(&self) {
        let mut room = Room {
            buffer: vec![0; MOST],
            control: Udp::control(),
            batch: Batch::default(),
            held: Batch::default(),
        };
        let mut look = Instant::now() + LOOK;
        while !self.stop.load(Ordering::Relaxed) {
            let places: Vec<Arc<Place>> = lock(&self.places).clone();
            for (place, udp) in self.wait(&places) {
                for _ in 0..TURNS {
                    if !self.serve(place, udp, &mut room) {
                        break;
                    }
                }
            }
            let now = Instant::now();
            if look <= now {
                look = now + LOOK;
                self.close_unused(now);
            }
        }
    }

    /// Waits until something can be read, or for a second; returns where.
    fn wait<'a>(&self, places: &'a [Arc<Place>]) -> Vec<(&'a Place, &'a Udp)> {
        let sockets: Vec<(&Place, &Udp)> =
            places.iter().flat_map(|place| place.sockets().map(move |udp| (&**place, udp))).collect();
        let mut waits: Vec<PollFd<'_>> =
            sockets.iter().map(|(_, udp)| PollFd::new(udp.as_fd(), PollFlags::POLLIN)).collect();
        waits.push(PollFd::new(self.wake.as_fd(), PollFlags::POLLIN));
        let _ = poll(&mut waits, 1000_u16);
        let is_ready = |wait: &PollFd<'_>| wait.any().unwrap_or(false);
        if waits.last().is_some_and(is_ready) {
            let _ = (&self.wake).read(&mut [0; 64]);
        }
        sockets.iter().zip(&waits).filter(|(_, wait)| is_ready(wait)).map(|(socket, _)| *socket).collect()
    }

    /// Takes what one call brings; returns whether there may be more.
    fn serve(&self, place: &Place, udp: &Udp, room: &mut Room) -> bool {
        let arrived = match udp.receive(&mut room.buffer, &mut room.control) {
            Ok(arrived) => arrived,
            Err(Errno::EAGAIN) => return false,
            // An ICMP error of an earlier datagram; there is one for each at most.
            Err(_) => return true,
        };
        let now = Instant::now();
        let mut to = None;
        for message in room.buffer[..arrived.length].chunks(arrived.size) {
            let step = if lock(&self.total).take(message.len(), now) {
                lock(&place.pair).handle(arrived.from, message, now)
            } else {
                lock(&place.pair).counts.refuse(Refused::TotalLimit, 1);
                Step::Drop(Refused::TotalLimit)
            };
            let (forward, held) = match step {
                Step::Forward { to, held } => (Some(to), held),
                Step::Hold { held } => (None, held),
                Step::Drop(why) => {
                    tracing::trace!(from = %arrived.from, ?why, "not relayed");
                    continue;
                }
            };
            if let Some(held) = held {
                room.held.clear();
                push(&mut room.held, &held);
                place.send(arrived.from, &room.held);
            }
            let Some(forward) = forward else { continue };
            if let Some(earlier) = to.filter(|earlier| *earlier != forward) {
                place.send(earlier, &room.batch);
                room.batch.clear();
            }
            to = Some(forward);
            push(&mut room.batch, message);
        }
        if let Some(to) = to {
            place.send(to, &room.batch);
            room.batch.clear();
        }
        true
    }

    fn close_unused(&self, now: Instant) {
        lock(&self.places).retain(|place| {
            let pair = lock(&place.pair);
            let over = pair.is_over(now);
            if over {
                lock(&self.past).add(&pair.counts);
                let [one, other] = pair.nodes();
                tracing::info!(%one, %other, port = place.port, "no longer relays");
            }
            !over
        });
    }
}

fn push(batch: &mut Batch, message: &[u8]) {
    batch.push(message.len(), |room| {
        room.copy_from_slice(message);
        message.len()
    });
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
