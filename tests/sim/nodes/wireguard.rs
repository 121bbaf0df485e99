//! WireGuard between the machines, of the kernel and of user space, and a stream of packets from each machine to each other.
//!
//! What is modelled is what decides whether a packet is lost while keys change: which entry a device has for a node, what it
//! opens and seals, who asks for a session and when, and that all of it takes time (docs/decisions/0007-user-space-tunnels.md,
//! 0008-kernel-wireguard.md). Datagrams are not lost, but overtake each other.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use rand_chacha::ChaCha8Rng;
use rand_core::{RngCore, SeedableRng};
use weft_daemon::plan::model::{DETOUR, Sessions, Tunnels, WIREGUARD};
use weft_wire::mesh::Carrier;
use weft_wire::types::{NodeName, TunnelKey};

/// The longest that a datagram takes, in microseconds.
const LONGEST_US: u64 = 3_000;
/// So many packets wait for a session in the kernel (`MAX_STAGED_PACKETS`), and in user space.
const WAIT: [usize; 2] = [128, 64];
/// The kernel asks a peer once in so long, and anew for a session of this age (whitepaper s6.1).
const REKEY_TIMEOUT: Duration = Duration::from_secs(5);
const JITTER_MS: u64 = 334;
const REKEY_AFTER: Duration = Duration::from_secs(120);
const REJECT_AFTER: Duration = Duration::from_secs(180);
/// As in `daemon/src/tunnel`.
const OVERLAP: Duration = Duration::from_secs(15);
const KNOCKED: Duration = Duration::from_secs(10);
const TICK: Duration = Duration::from_millis(250);
/// An entry opens the session before, the one in use, and the one to come.
const OPENS: usize = 3;

/// A packet of a stream: from which machine to which, and its number.
pub type Packet = (usize, usize, u64);

/// One key of a machine's with one of a peer's.
#[derive(Debug)]
struct Entry {
    own: TunnelKey,
    peer: TunnelKey,
    /// The session that it seals with, and those that it opens.
    seals: Option<u64>,
    opens: VecDeque<u64>,
    /// When a session was last known to both.
    shaken: Option<Instant>,
    /// The request that an answer is taken to, and when one was sent last, and how often without an answer.
    request: Option<u64>,
    asked: Option<(Instant, u32)>,
    /// It is asked for until there is one.
    wanted: bool,
    waiting: Vec<Packet>,
}

impl Entry {
    fn new(own: TunnelKey, peer: TunnelKey) -> Self {
        let (opens, waiting) = Default::default();
        Self {
            own,
            peer,
            seals: None,
            opens,
            shaken: None,
            request: None,
            asked: None,
            wanted: false,
            waiting,
        }
    }

    fn add(&mut self, session: u64) {
        self.opens.push_back(session);
        if self.opens.len() > OPENS {
            self.opens.pop_front();
        }
    }

    /// Seals with a session from now on; returns what waited for one.
    fn begin(&mut self, session: u64, carrier: Carrier, now: Instant) -> Vec<Packet> {
        (self.seals, self.shaken, self.request, self.wanted) = (Some(session), Some(now), None, false);
        if carrier == Carrier::UserSpace {
            self.asked = None;
        }
        std::mem::take(&mut self.waiting)
    }

    fn age(&self, now: Instant) -> Option<Duration> {
        self.shaken.map(|at| now.duration_since(at)).filter(|age| *age < REJECT_AFTER)
    }

    fn may_ask(&self, carrier: Carrier, now: Instant) -> bool {
        let pause = |times: u32| match carrier {
            Carrier::Kernel => REKEY_TIMEOUT,
            Carrier::UserSpace => Duration::from_secs(1 << times.min(2)),
        };
        self.asked.is_none_or(|(at, times)| now >= at + pause(times))
    }
}

/// One device of a kernel's, or the tunnels of a process.
#[derive(Debug)]
struct Device {
    carrier: Carrier,
    set: Tunnels,
    keyed: Instant,
    /// User space: the key before.
    earlier: Option<TunnelKey>,
    /// A node's entry, and in user space those of its keys before.
    lines: BTreeMap<NodeName, Vec<Entry>>,
    knocked: BTreeMap<TunnelKey, Instant>,
}

impl Device {
    fn new(carrier: Carrier, set: &Tunnels, now: Instant) -> Self {
        let (lines, knocked) = Default::default();
        Self { carrier, set: set.clone(), keyed: now, earlier: None, lines, knocked }
    }
}

#[derive(Debug, Clone, Copy)]
enum Datagram {
    Request(TunnelKey, TunnelKey, u64),
    Answer(u64),
    Data(u64, Option<Packet>),
}

/// The tunnels of all machines, and what is under way between them.
#[derive(Debug)]
pub struct Wires {
    now: Instant,
    devices: BTreeMap<(usize, &'static str), Device>,
    /// By arrival: from whom, to whom, what.
    flights: BTreeMap<(Instant, u64), (usize, usize, Datagram)>,
    count: u64,
    ticked: Instant,
    rng: ChaCha8Rng,
    /// How many packets arrived, and a sentence about each that did not.
    pub carried: u64,
    pub lost: Vec<String>,
}

fn number_of(node: &NodeName) -> usize {
    node.to_string()[1..].parse().expect("machines are called by their numbers")
}

impl Wires {
    pub fn new(seed: u64, now: Instant) -> Self {
        let (devices, flights, lost) = Default::default();
        let rng = ChaCha8Rng::seed_from_u64(seed);
        Self { now, devices, flights, count: 0, ticked: now, rng, carried: 0, lost }
    }

    /// Takes what a machine's kernel was told of its tunnels, and returns its sessions.
    pub fn follow(&mut self, machine: usize, carrier: Carrier, told: &BTreeMap<String, Tunnels>) -> Sessions {
        for device in [WIREGUARD, DETOUR] {
            let before = self.devices.get(&(machine, device)).map(|device| &device.set);
            match told.get(device) {
                None => self.close(machine, device),
                Some(set) if before == Some(set) => {}
                Some(set) if carrier == Carrier::Kernel => self.set_in_kernel(machine, device, set),
                Some(set) => self.set_in_user_space(machine, set),
            }
        }
        [WIREGUARD, DETOUR]
            .into_iter()
            .flat_map(|device| self.sessions(machine, device))
            .map(|(_, keys)| keys)
            .collect()
    }

    fn close(&mut self, machine: usize, device: &'static str) {
        if let Some(device) = self.devices.remove(&(machine, device)) {
            device.lines.into_values().flatten().for_each(|entry| self.lose(entry, "its device was closed"));
        }
    }

    fn lose(&mut self, entry: Entry, why: &str) {
        self.lost.extend(entry.waiting.iter().map(|packet| format!("{packet:?} waited when {why}")));
    }

    /// Who has sessions that packets go by (`Inside::sessions`, `Tunnel::sessions`).
    fn sessions(&self, machine: usize, device: &'static str) -> Vec<(NodeName, (TunnelKey, TunnelKey))> {
        let Some(device) = self.devices.get(&(machine, device)) else { return Vec::new() };
        let used = |(node, line): (&NodeName, &Vec<Entry>)| {
            let entry = match device.carrier {
                Carrier::Kernel => line
                    .iter()
                    .find(|entry| entry.age(self.now).is_some() && entry.shaken > Some(device.keyed)),
                Carrier::UserSpace => line.iter().find(|entry| entry.seals.is_some()),
            };
            entry.map(|entry| (node.clone(), (entry.own, entry.peer)))
        };
        device.lines.iter().filter_map(used).collect()
    }

    /// As `kernel/tunnel/inside.rs` does it.
    fn set_in_kernel(&mut self, machine: usize, name: &'static str, set: &Tunnels) {
        let other = if name == DETOUR { WIREGUARD } else { DETOUR };
        let in_use: BTreeSet<_> = self.sessions(machine, other).into_iter().map(|(node, _)| node).collect();
        let before = self.devices.remove(&(machine, name));
        let (is_fresh, now) = (before.is_none(), self.now);
        let mut device = before.unwrap_or_else(|| Device::new(Carrier::Kernel, set, now));
        let new_key = is_fresh || device.set.key != set.key;
        let mut asked = Vec::new();
        let mut lines = BTreeMap::new();
        for (key, peer) in &set.peers {
            let found = device.lines.remove(&peer.node).and_then(|mut line| line.pop());
            let lived = found.as_ref().is_some_and(|entry| entry.age(now).is_some());
            let entry = match found {
                Some(mut entry) if entry.peer == *key => {
                    if new_key {
                        (entry.own, entry.seals, entry.request) = (set.key, None, None);
                    }
                    if new_key && lived {
                        asked.push(peer.node.clone());
                    }
                    entry
                }
                found => {
                    found.into_iter().for_each(|entry| self.lose(entry, "its peer had another key"));
                    if is_fresh || lived || in_use.contains(&peer.node) {
                        asked.push(peer.node.clone());
                    }
                    Entry::new(set.key, *key)
                }
            };
            lines.insert(peer.node.clone(), vec![entry]);
        }
        let gone = std::mem::replace(&mut device.lines, lines);
        gone.into_values().flatten().for_each(|entry| self.lose(entry, "its peer was removed"));
        if new_key {
            device.keyed = now;
        }
        device.set = set.clone();
        self.devices.insert((machine, name), device);
        asked.iter().for_each(|node| self.ask(machine, name, node, 0));
    }

    /// As `Tunnel::set_peers` does it.
    fn set_in_user_space(&mut self, machine: usize, set: &Tunnels) {
        let now = self.now;
        let before = self.devices.remove(&(machine, WIREGUARD));
        let mut device = before.unwrap_or_else(|| Device::new(Carrier::UserSpace, set, now));
        if device.set.key != set.key {
            device.earlier = Some(device.set.key);
        }
        let mut asked = Vec::new();
        let mut lines = BTreeMap::new();
        for (key, peer) in &set.peers {
            let mut line = device.lines.remove(&peer.node).unwrap_or_default();
            let known = line.first();
            if known.is_none_or(|known| (known.own, known.peer) != (set.key, *key)) {
                let gives_way = known.is_some_and(|known| known.own == set.key);
                let has_knocked = device.knocked.remove(key).is_some_and(|at| now < at + KNOCKED);
                let ready = line.iter().position(|entry| entry.seals.is_some()).unwrap_or(0);
                let kept = (ready < line.len()).then(|| line.swap_remove(ready));
                line.into_iter().for_each(|entry| self.lose(entry, "its keys were two changes ago"));
                line = [Entry::new(set.key, *key)].into_iter().chain(kept).collect();
                if gives_way || has_knocked {
                    line[0].wanted = true;
                    asked.push(peer.node.clone());
                }
            }
            lines.insert(peer.node.clone(), line);
        }
        let gone = std::mem::replace(&mut device.lines, lines);
        gone.into_values().flatten().for_each(|entry| self.lose(entry, "its peer was removed"));
        device.set = set.clone();
        self.devices.insert((machine, WIREGUARD), device);
        asked.iter().for_each(|node| self.ask(machine, WIREGUARD, node, 0));
    }

    fn transmit(&mut self, from: usize, to: usize, datagram: Datagram) {
        self.count += 1;
        let at = self.now + Duration::from_micros(100 + self.rng.next_u64() % LONGEST_US);
        self.flights.insert((at, self.count), (from, to, datagram));
    }

    /// Asks for a session, unless that was done just now.
    fn ask(&mut self, machine: usize, name: &'static str, node: &NodeName, generation: usize) {
        self.count += 1;
        let (number, now, jitter) = (self.count, self.now, self.rng.next_u64() % JITTER_MS);
        let Some(device) = self.devices.get_mut(&(machine, name)) else { return };
        let carrier = device.carrier;
        let entry = device.lines.get_mut(node).and_then(|line| line.get_mut(generation));
        let Some(entry) = entry.filter(|entry| entry.may_ask(carrier, now)) else { return };
        // Two kernels that asked at once do not ask at once again.
        let later = Duration::from_millis(if carrier == Carrier::Kernel { jitter } else { 0 });
        entry.asked = Some((now + later, entry.asked.map_or(0, |(_, times)| times + 1)));
        entry.request = Some(number);
        entry.wanted |= carrier == Carrier::Kernel;
        let request = Datagram::Request(entry.own, entry.peer, number);
        self.transmit(machine, number_of(node), request);
    }

    /// A pod's packet comes to a machine's device, if there is a route.
    pub fn send(&mut self, packet: Packet, route: Option<&str>, to: &NodeName) {
        let machine = packet.0;
        let name = if route == Some(DETOUR) { DETOUR } else { WIREGUARD };
        let now = self.now;
        let Some(device) = self.devices.get_mut(&(machine, name)).filter(|_| route.is_some()) else {
            return self.lost.push(format!("{packet:?} found no device ({route:?})"));
        };
        let carrier = device.carrier;
        let Some(line) = device.lines.get_mut(to).filter(|line| !line.is_empty()) else {
            return self.lost.push(format!("{packet:?} found no entry on {name}"));
        };
        let generation = line.iter().position(|entry| entry.seals.is_some()).unwrap_or(0);
        let entry = &mut line[generation];
        match entry.seals {
            Some(session) => {
                let is_old = entry.age(now).is_none_or(|age| age > REKEY_AFTER);
                self.transmit(machine, packet.1, Datagram::Data(session, Some(packet)));
                if is_old {
                    self.ask(machine, name, to, generation);
                }
            }
            None if entry.waiting.len() >= WAIT[usize::from(carrier == Carrier::UserSpace)] => {
                self.lost.push(format!("{packet:?} found too many waiting on {name}"));
            }
            None => {
                entry.waiting.push(packet);
                self.ask(machine, name, to, generation);
            }
        }
    }

    /// Lets time pass.
    pub fn run_to(&mut self, now: Instant) {
        while let Some(first) = self.flights.first_entry().filter(|first| first.key().0 <= now) {
            let ((at, _), (from, to, datagram)) = first.remove_entry();
            self.now = self.now.max(at);
            match datagram {
                Datagram::Request(theirs, own, number) => self.requested(from, to, (theirs, own), number),
                Datagram::Answer(number) => self.answered(to, number),
                Datagram::Data(session, packet) => self.arrived(from, to, session, packet),
            }
        }
        self.now = now;
        // A kernel has a timer for each peer; the daemon looks at all of them now and then.
        self.tick(Carrier::Kernel);
        if now >= self.ticked + TICK {
            self.ticked = now;
            self.tick(Carrier::UserSpace);
        }
    }

    fn requested(&mut self, from: usize, machine: usize, (theirs, own): (TunnelKey, TunnelKey), number: u64) {
        let now = self.now;
        let of_machine = self.devices.range_mut((machine, "")..(machine + 1, ""));
        let takes = |device: &&mut Device| [Some(device.set.key), device.earlier].contains(&Some(own));
        let Some(device) = of_machine.map(|(_, device)| device).find(takes) else { return };
        // In user space the entry of now says whose a key is, and the session may be that of one before.
        let line =
            device.lines.values_mut().find(|line| line.first().is_some_and(|entry| entry.peer == theirs));
        let Some(line) = line else {
            device.knocked.insert(theirs, now);
            return;
        };
        let Some(entry) = line.iter_mut().find(|entry| (entry.own, entry.peer) == (own, theirs)) else {
            return;
        };
        entry.add(number);
        if device.carrier == Carrier::Kernel {
            // It remembers one handshake a peer.
            entry.request = None;
        }
        self.transmit(machine, from, Datagram::Answer(number));
    }

    fn entries(&mut self, machine: usize) -> impl Iterator<Item = (Carrier, &NodeName, &mut Entry)> {
        let devices = self.devices.range_mut((machine, "")..(machine + 1, ""));
        let lines = devices.flat_map(|(_, device)| {
            let carrier = device.carrier;
            device.lines.iter_mut().map(move |(node, line)| (carrier, node, line))
        });
        lines.flat_map(|(carrier, node, line)| line.iter_mut().map(move |entry| (carrier, node, entry)))
    }

    fn answered(&mut self, machine: usize, number: u64) {
        let now = self.now;
        let asker = self.entries(machine).find(|(_, _, entry)| entry.request == Some(number));
        let Some((carrier, node, entry)) = asker else { return };
        entry.add(number);
        let (to, waiting) = (number_of(node), entry.begin(number, carrier, now));
        if waiting.is_empty() {
            self.transmit(machine, to, Datagram::Data(number, None));
        }
        waiting
            .into_iter()
            .for_each(|packet| self.transmit(machine, to, Datagram::Data(number, Some(packet))));
    }

    fn arrived(&mut self, from: usize, machine: usize, session: u64, packet: Option<Packet>) {
        let now = self.now;
        self.carried += u64::from(packet.is_some());
        let opener = self.entries(machine).find(|(_, _, entry)| entry.opens.contains(&session));
        let Some((carrier, _, entry)) = opener else {
            self.carried -= u64::from(packet.is_some());
            self.lost
                .extend(packet.map(|packet| format!("{packet:?} came under a session that is not known")));
            return;
        };
        // The first that comes under the latest session says that both know it.
        if entry.opens.back() == Some(&session) && entry.seals != Some(session) {
            let waiting = entry.begin(session, carrier, now);
            waiting
                .into_iter()
                .for_each(|packet| self.transmit(machine, from, Datagram::Data(session, Some(packet))));
        }
    }

    /// What is done by the clock, by those of one kind.
    fn tick(&mut self, carrier: Carrier) {
        let now = self.now;
        let mut asks = Vec::new();
        for ((machine, name), device) in
            self.devices.iter_mut().filter(|(_, device)| device.carrier == carrier)
        {
            for (node, line) in &mut device.lines {
                if device.carrier == Carrier::UserSpace && line[0].age(now).is_some_and(|age| age >= OVERLAP)
                {
                    line.truncate(1);
                }
                let waits = !line[0].waiting.is_empty();
                for (generation, entry) in line.iter().enumerate() {
                    let due = match device.carrier {
                        Carrier::Kernel => entry.wanted,
                        Carrier::UserSpace => entry.seals.is_none() && (waits || entry.wanted),
                    };
                    asks.extend(due.then(|| (*machine, *name, node.clone(), generation)));
                }
            }
        }
        for (machine, name, node, generation) in asks {
            self.ask(machine, name, &node, generation);
        }
    }
}
