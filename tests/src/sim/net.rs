//! A network in virtual time: loss, duplication, reordering, partitions, links that carry one way only, slow hosts, NATs.
//!
//! A host is known by the address that it is put at. Where it is moved behind a NAT it has another one there, which hosts behind
//! other NATs may have too, and others see it at an address of the NAT.
//!
//! Deterministic: the same seed and the same hosts give the same run. Nothing here sleeps, or reads a clock but for
//! the one `Instant` that all virtual time is counted from. Invariant: no datagram is longer than the budget.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::time::{Duration, Instant};

use rand_chacha::ChaCha8Rng;
use rand_core::{RngCore, SeedableRng};
use weft_wire::seal::MAX_DATAGRAM;

use super::nat::{Behaviour, Nat};

/// The time that a datagram takes at least.
const LATENCY: Duration = Duration::from_millis(1);

/// So many steps at one moment are no work but a loop.
const BUSY: u32 = 1_000_000;

/// What stands at an address of the network.
pub trait Host {
    /// Takes a datagram.
    fn handle_datagram(&mut self, from: SocketAddr, datagram: &[u8], now: Instant);

    /// Does what is due.
    fn handle_timeout(&mut self, now: Instant);

    /// Returns what to do next; called until it returns [`Output::Wait`].
    fn poll(&mut self, now: Instant) -> Output;
}

/// What a host asks for.
#[derive(Debug)]
pub enum Output {
    /// Carry a datagram.
    Send {
        /// Where to.
        to: SocketAddr,
        /// The payload.
        datagram: Vec<u8>,
    },
    /// Nothing, until then.
    Wait {
        /// When to call [`Host::handle_timeout`].
        until: Instant,
    },
}

/// What one host has sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sent {
    /// Datagrams.
    pub datagrams: u64,
    /// Their payload in bytes.
    pub bytes: u64,
}

#[derive(Debug)]
struct Place<H> {
    host: H,
    wake: Instant,
    sent: Sent,
}

/// Hosts that reach each other without translation: the public ones, or those behind one NAT.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Realm(usize);

impl Realm {
    /// Behind no NAT.
    pub const PUBLIC: Self = Self(0);
}

/// A NAT, the realm that it is in with its outside, and whether it carries anything.
#[derive(Debug)]
struct Router {
    outer: Realm,
    nat: Nat,
}

/// A datagram under way: when it arrives, its number, what is written on it, what is in it.
type Flight = (Instant, u64, Label, Rc<[u8]>);

/// Who sent a datagram, and the realm and the two addresses that it is in and has after the sender's NATs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Label {
    sender: SocketAddr,
    realm: Realm,
    from: SocketAddr,
    to: SocketAddr,
}

/// A datagram that arrived.
#[derive(Debug, Clone)]
pub struct Delivered {
    /// When.
    pub at: Instant,
    /// From where.
    pub from: SocketAddr,
    /// At which host.
    pub to: SocketAddr,
    /// What.
    pub datagram: Rc<[u8]>,
}

/// The network with its hosts.
#[derive(Debug)]
pub struct Net<H> {
    /// The time everywhere.
    pub now: Instant,
    /// The randomness of the run.
    pub rng: ChaCha8Rng,
    /// So many datagrams of a hundred are lost.
    pub loss_percent: u64,
    /// So many datagrams of a hundred arrive twice.
    pub duplicate_percent: u64,
    /// Latency is 1 ms plus up to this; more than the gap between two datagrams reorders them.
    pub jitter: Duration,
    /// How much longer a datagram takes from one host to another than within a site.
    pub distance: Option<fn(SocketAddr, SocketAddr) -> Duration>,
    /// Which side of the partition a host is on; hosts on different sides do not hear each other.
    pub sides: BTreeMap<SocketAddr, u8>,
    /// Pairs of which the second does not hear the first.
    pub deaf: BTreeSet<(SocketAddr, SocketAddr)>,
    /// Hosts that take in what comes so much later.
    pub slow: BTreeMap<SocketAddr, Duration>,
    /// Hosts of which such datagrams are lost.
    pub withheld: BTreeMap<SocketAddr, fn(&[u8]) -> bool>,
    places: BTreeMap<SocketAddr, Place<H>>,
    /// The NAT in front of each realm but the public one.
    routers: Vec<Router>,
    /// Where hosts behind NATs are, and who is there.
    homes: BTreeMap<SocketAddr, (Realm, SocketAddr)>,
    residents: BTreeMap<(Realm, SocketAddr), SocketAddr>,
    flights: BinaryHeap<Reverse<Flight>>,
    wakes: BinaryHeap<Reverse<(Instant, SocketAddr)>>,
    count: u64,
    /// Steps since time last moved.
    idle: u32,
    delivered: u64,
    gathered: VecDeque<Delivered>,
    gather: usize,
}

impl<H: Host> Net<H> {
    /// A network without hosts.
    pub fn new(seed: u64) -> Self {
        Self {
            now: Instant::now(),
            rng: ChaCha8Rng::seed_from_u64(seed),
            loss_percent: 0,
            duplicate_percent: 0,
            jitter: Duration::from_millis(4),
            distance: None,
            sides: BTreeMap::new(),
            deaf: BTreeSet::new(),
            slow: BTreeMap::new(),
            withheld: BTreeMap::new(),
            places: BTreeMap::new(),
            routers: Vec::new(),
            homes: BTreeMap::new(),
            residents: BTreeMap::new(),
            flights: BinaryHeap::new(),
            wakes: BinaryHeap::new(),
            count: 0,
            idle: 0,
            delivered: 0,
            gathered: VecDeque::new(),
            gather: 0,
        }
    }

    /// Puts a NAT somewhere with its outside; returns what is behind it.
    pub fn add_nat(&mut self, outer: Realm, outside: IpAddr, behaviour: Behaviour) -> Realm {
        self.routers.push(Router { outer, nat: Nat::new(outside, behaviour) });
        Realm(self.routers.len())
    }

    /// Returns the NAT in front of a realm.
    ///
    /// # Panics
    /// For the public one, which has none.
    pub fn nat(&mut self, realm: Realm) -> &mut Nat {
        &mut self.routers[realm.0 - 1].nat
    }

    /// Has the host at `at` be behind a NAT, with another address there.
    pub fn move_behind(&mut self, at: SocketAddr, realm: Realm, inside: SocketAddr) {
        self.homes.insert(at, (realm, inside));
        self.residents.insert((realm, inside), at);
    }

    /// Puts a host at an address, in place of the one that is there.
    pub fn insert(&mut self, at: SocketAddr, host: H) {
        self.places.insert(at, Place { host, wake: self.now, sent: Sent::default() });
        self.drain(at);
    }

    /// Takes a host away.
    pub fn remove(&mut self, at: SocketAddr) -> Option<H> {
        self.places.remove(&at).map(|place| place.host)
    }

    /// Returns the host at an address.
    pub fn host(&self, at: SocketAddr) -> Option<&H> {
        self.places.get(&at).map(|place| &place.host)
    }

    /// Returns the host at an address, to set what makes it neither send nor wake.
    pub fn host_mut(&mut self, at: SocketAddr) -> Option<&mut H> {
        self.places.get_mut(&at).map(|place| &mut place.host)
    }

    /// Returns the hosts.
    pub fn hosts(&self) -> impl Iterator<Item = (SocketAddr, &H)> {
        self.places.iter().map(|(at, place)| (*at, &place.host))
    }

    /// Returns what a host has sent since it was put there.
    pub fn sent(&self, at: SocketAddr) -> Sent {
        self.places.get(&at).map(|place| place.sent).unwrap_or_default()
    }

    /// Returns what all hosts have sent.
    pub fn sent_by_all(&self) -> Sent {
        self.places.values().fold(Sent::default(), |sum, place| Sent {
            datagrams: sum.datagrams + place.sent.datagrams,
            bytes: sum.bytes + place.sent.bytes,
        })
    }

    /// Returns how many datagrams have arrived.
    pub fn delivered(&self) -> u64 {
        self.delivered
    }

    /// Keeps the last `most` datagrams that arrive.
    pub fn gather(&mut self, most: usize) {
        self.gather = most;
    }

    /// Returns the datagrams that were kept, the latest last.
    pub fn gathered(&self) -> &VecDeque<Delivered> {
        &self.gathered
    }

    /// Does something to a host, and what it asks for after it.
    ///
    /// # Panics
    /// When there is no host at the address.
    pub fn with<T>(&mut self, at: SocketAddr, act: impl FnOnce(&mut H, Instant) -> T) -> T {
        let now = self.now;
        let place = self.places.get_mut(&at).expect("there is a host at the address");
        let result = act(&mut place.host, now);
        self.drain(at);
        result
    }

    /// Hands a datagram to a host at once; nothing where there is none.
    pub fn deliver(&mut self, from: SocketAddr, to: SocketAddr, datagram: &[u8]) {
        let now = self.now;
        if let Some(place) = self.places.get_mut(&to) {
            place.host.handle_datagram(from, datagram, now);
            self.drain(to);
        }
    }

    /// Lets time pass.
    pub fn run(&mut self, time: Duration) {
        self.run_to(self.now + time);
    }

    /// Lets time pass until then.
    pub fn run_to(&mut self, end: Instant) {
        while self.step(end) {}
        self.now = self.now.max(end);
    }

    fn step(&mut self, end: Instant) -> bool {
        let flight = self.flights.peek().map(|Reverse(flight)| flight.0);
        let wake = self.wakes.peek().map(|Reverse(wake)| wake.0);
        let Some(at) = flight.into_iter().chain(wake).min().filter(|at| *at <= end) else { return false };
        self.idle = if at > self.now { 0 } else { self.idle + 1 };
        assert!(self.idle < BUSY, "time stands still: {wake:?} {:?}", self.wakes.peek());
        self.now = self.now.max(at);
        if flight == Some(at) {
            if let Some(Reverse((_, _, label, datagram))) = self.flights.pop() {
                self.arrive(label, datagram);
            }
        } else if let Some(Reverse((at, host))) = self.wakes.pop()
            && let Some(place) = self.places.get_mut(&host)
            && place.wake == at
        {
            place.host.handle_timeout(self.now);
            self.drain(host);
        }
        true
    }

    fn arrive(&mut self, label: Label, datagram: Rc<[u8]>) {
        let Some((from, to)) = self.lead_in(label) else { return };
        let sender = label.sender;
        let apart = self.sides.get(&sender) != self.sides.get(&to) || self.deaf.contains(&(sender, to));
        if apart || !self.places.contains_key(&to) {
            return;
        }
        self.delivered += 1;
        self.deliver(from, to, &datagram);
        if self.gather > 0 {
            if self.gathered.len() == self.gather {
                self.gathered.pop_front();
            }
            self.gathered.push_back(Delivered { at: self.now, from, to, datagram });
        }
    }

    /// Who is at an address of a realm.
    fn resident(&self, realm: Realm, address: SocketAddr) -> Option<SocketAddr> {
        let public = realm == Realm::PUBLIC && !self.homes.contains_key(&address);
        self.residents.get(&(realm, address)).copied().or(public.then_some(address))
    }

    /// The NAT with an outside address in a realm.
    fn router_at(&self, realm: Realm, outside: IpAddr) -> Option<Realm> {
        let is_it = |router: &Router| (router.outer, router.nat.outside) == (realm, outside);
        self.routers.iter().position(is_it).map(|place| Realm(place + 1))
    }

    /// Through the NATs of the receiver: returns where it comes from, as seen there, and who receives it.
    fn lead_in(&mut self, label: Label) -> Option<(SocketAddr, SocketAddr)> {
        let Label { mut realm, from, mut to, .. } = label;
        while let Some(inner) = self.router_at(realm, to.ip()) {
            to = self.routers[inner.0 - 1].nat.inbound(from, to.port(), self.now)?;
            realm = inner;
        }
        Some((from, self.resident(realm, to)?))
    }

    /// Through the NATs of the sender, up to where the receiver, or its NAT, is.
    fn lead_out(&mut self, sender: SocketAddr, to: SocketAddr) -> Option<Label> {
        let (mut realm, mut from) = self.homes.get(&sender).copied().unwrap_or((Realm::PUBLIC, sender));
        while realm != Realm::PUBLIC
            && !self.residents.contains_key(&(realm, to))
            && self.router_at(realm, to.ip()).is_none()
        {
            let Router { outer, nat } = &mut self.routers[realm.0 - 1];
            if to.ip() == nat.outside && !nat.behaviour.hairpin {
                return None;
            }
            from = nat.outbound(from, to, self.now);
            realm = *outer;
        }
        Some(Label { sender, realm, from, to })
    }

    fn drain(&mut self, at: SocketAddr) {
        let now = self.now;
        while let Some(place) = self.places.get_mut(&at) {
            match place.host.poll(now) {
                Output::Send { to, datagram } => {
                    assert!(datagram.len() <= MAX_DATAGRAM, "{at} sends {} bytes", datagram.len());
                    place.sent.datagrams += 1;
                    place.sent.bytes += datagram.len() as u64;
                    self.transmit(at, to, datagram.into());
                }
                Output::Wait { until } => {
                    if place.wake != until || until == now {
                        place.wake = until;
                        self.wakes.push(Reverse((until, at)));
                    }
                    return;
                }
            }
        }
    }

    fn transmit(&mut self, from: SocketAddr, to: SocketAddr, datagram: Rc<[u8]>) {
        if self.rng.next_u64() % 100 < self.loss_percent
            || self.withheld.get(&from).is_some_and(|is_lost| is_lost(&datagram))
        {
            return;
        }
        let twice = self.rng.next_u64() % 100 < self.duplicate_percent;
        let far = self.distance.map_or(Duration::ZERO, |distance| distance(from, to));
        let late = self.slow.get(&to).copied().unwrap_or_default() + far;
        let Some(label) = self.lead_out(from, to) else { return };
        for _ in 0..=usize::from(twice) {
            let jitter = Duration::from_nanos(self.rng.next_u64() % (self.jitter.as_nanos() as u64).max(1));
            self.count += 1;
            let flight = (self.now + LATENCY + jitter + late, self.count, label, datagram.clone());
            self.flights.push(Reverse(flight));
        }
    }
}
