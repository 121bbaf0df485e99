//! A random walk of several machines over one store: clocks of different speeds, messages that are lost,
//! late or answered by an error although they worked, crashes with and without the persisted leases,
//! nodes that cut the range differently, outages and operators who delete entries.
//!
//! `WEFT_STEPS` sets the length (a million for a night), `WEFT_SEED` repeats a run.

use std::collections::BTreeMap;

use rand_chacha::ChaCha8Rng;
use rand_core::{RngCore, SeedableRng};

use super::super::*;
use crate::carve::ClusterCidr;
use crate::store::memory::MemoryMap;
use crate::store::{Entry, Snapshot};

const NODES: usize = 6;
const TTL: Duration = Duration::from_secs(60);
/// How long one walk is, in steps.
const WALK: u64 = 10_000;
/// Walks that once failed.
const ONCE_FAILED: [u64; 4] = [
    // The first answer after a restart was older than the lease, and showed the entry of a lost key.
    1_592_607_689,
    // A claim's answer came after others had seen it expire, and was taken for a lease.
    14_000_051,
    28_000_029,
    // What an earlier run had claimed and not got was taken for a clone's.
    21_000_031,
];

#[derive(Debug, Clone)]
enum Message {
    List,
    Put(Key, Expect, Vec<u8>),
    Delete(Key, u64),
    Listed(Snapshot),
    PutDone(Key, Result<u64, Option<Entry>>),
    Deleted(Key, Result<u64, Option<Entry>>),
    Failed,
}

struct Node {
    core: Leasing,
    /// This node's clock: where it stands, and how fast it runs in thousandths.
    clock: Instant,
    speed: u32,
    runs: u32,
    /// All keys of the node, the current one last.
    keys: Vec<PublicKey>,
    /// The outstanding request or its answer.
    message: Option<Message>,
    /// What it told to hold, by subnet.
    announced: BTreeMap<Subnet, HeldLease>,
    paused: bool,
}

struct Walk {
    rng: ChaCha8Rng,
    map: MemoryMap,
    history: Vec<Snapshot>,
    nodes: Vec<Node>,
    /// Writes whose sender was told that they failed, and which may still arrive.
    stray: Vec<(usize, u32, Message)>,
    /// True time, and when each key was last written, in milliseconds.
    time: u64,
    written: BTreeMap<Key, u64>,
    /// The highest epoch of a lease that was acquired, by subnet.
    epochs: BTreeMap<Subnet, Epoch>,
    up: bool,
    /// The store ends leases, as Kubernetes does: they do not expire, and a node that lost its key asks for its own.
    kept: bool,
    counts: BTreeMap<&'static str, u64>,
}

impl Walk {
    fn new(seed: u64, kept: bool) -> Self {
        let mut walk = Self {
            rng: ChaCha8Rng::seed_from_u64(seed),
            map: MemoryMap::default(),
            history: Vec::new(),
            nodes: Vec::new(),
            stray: Vec::new(),
            time: 0,
            written: BTreeMap::new(),
            epochs: BTreeMap::new(),
            up: true,
            kept,
            counts: BTreeMap::new(),
        };
        for index in 0..NODES {
            // Clocks that start anywhere and differ by up to five per cent in speed.
            let clock = Instant::now() + Duration::from_secs(walk.below(1_000_000));
            let speed = 950 + u32::try_from(walk.below(101)).expect("small");
            let keys = vec![PublicKey([u8::try_from(index).expect("small"); 32])];
            let core = walk.core(index, 0, &keys, Vec::new(), clock);
            let announced = BTreeMap::new();
            walk.nodes.push(Node {
                core,
                clock,
                speed,
                runs: 0,
                keys,
                message: None,
                announced,
                paused: false,
            });
        }
        walk
    }

    fn below(&mut self, end: u64) -> u64 {
        self.rng.next_u64() % end
    }

    fn new_key(&mut self) -> PublicKey {
        let mut key = [0; 32];
        self.rng.fill_bytes(&mut key);
        PublicKey(key)
    }

    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    fn core(
        &mut self,
        index: usize,
        run: u32,
        keys: &[PublicKey],
        persisted: Vec<HeldLease>,
        now: Instant,
    ) -> Leasing {
        // Fewer blocks than nodes; one node cuts them in halves, one in doubles.
        let node_prefix = [24, 24, 24, 24, 25, 23][index];
        let cidr = |cidr: &str, node_prefix| ClusterCidr {
            cidr: cidr.parse().expect("a prefix"),
            node_prefix,
            reserved: Vec::new(),
        };
        let cidrs = vec![cidr("10.32.0.0/22", node_prefix), cidr("fd00:32::/62", 64)];
        let carver = Carver::new(cidrs).expect("valid CIDRs");
        let name = |text: String| text.parse().expect("a name");
        let site = "default".parse().expect("a name");
        let (&key, old_keys) = keys.split_last().expect("a node has a key");
        let config = LeaseConfig::new(name(format!("n{index}")), site, key, carver, format!("{index}-{run}"));
        let config = LeaseConfig { old_keys: old_keys.to_vec(), ..config };
        let mut seed = [0; 32];
        self.rng.fill_bytes(&mut seed);
        let config = if self.kept { config.kept_by_store() } else { config.with_ttl(TTL) };
        let config = LeaseConfig { list_every: TTL / 20, ..config };
        Leasing::new(config, persisted, seed, now)
    }

    fn step(&mut self) {
        let index = usize::try_from(self.below(NODES as u64)).expect("small");
        match self.below(1000) {
            0..=2 => self.crash(index),
            3..=4 => self.nodes[index].paused ^= true,
            5 => self.up = false,
            6..=25 if !self.up => self.up = true,
            6 => self.delete_by_hand(),
            7..=8 => {
                let may = self.below(3) > 0;
                let node = &mut self.nodes[index];
                node.core.set_may_renumber(may, node.clock);
            }
            9 if self.below(4) == 0 => {
                let node = &mut self.nodes[index];
                node.core.release(node.clock);
            }
            10 => {
                let key = self.new_key();
                let node = &mut self.nodes[index];
                node.keys.push(key);
                node.core.rotate_key(key, node.clock);
            }
            11..=20 => self.deliver_stray(),
            21..=120 => self.pass_time(),
            _ => self.advance(index),
        }
        self.check();
    }

    fn pass_time(&mut self) {
        let longest = if self.below(50) == 0 { 300_000 } else { 3_000 };
        let millis = self.below(longest) + 1;
        self.time += millis;
        for node in &mut self.nodes {
            node.clock += Duration::from_micros(millis * u64::from(node.speed));
        }
    }

    /// Moves one node's conversation with the store one step on.
    fn advance(&mut self, index: usize) {
        if self.nodes[index].paused {
            return;
        }
        match self.nodes[index].message.take() {
            None => self.drain(index),
            Some(request @ (Message::List | Message::Put(..) | Message::Delete(..))) => {
                let fate = self.below(20);
                let answer = if !self.up || fate == 0 {
                    if self.below(2) == 0 && !matches!(request, Message::List) {
                        let run = self.nodes[index].runs;
                        self.stray.push((index, run, request));
                    }
                    Message::Failed
                } else {
                    let answer = self.serve(index, request);
                    if fate == 1 { Message::Failed } else { answer }
                };
                self.nodes[index].message = Some(answer);
            }
            Some(answer) => {
                let node = &mut self.nodes[index];
                match answer {
                    Message::Listed(snapshot) => node.core.handle_snapshot(&snapshot, node.clock),
                    Message::PutDone(key, result) => node.core.handle_put(key, result, node.clock),
                    Message::Deleted(key, result) => node.core.handle_delete(key, result, node.clock),
                    _ => node.core.handle_store_error(node.clock),
                }
                self.drain(index);
            }
        }
    }

    fn drain(&mut self, index: usize) {
        for _ in 0..50 {
            let node = &mut self.nodes[index];
            let message = match node.core.poll_output(node.clock) {
                Output::Wait { until } => return assert!(until > node.clock || node.message.is_some()),
                Output::Event(event) => {
                    self.told(index, event);
                    continue;
                }
                Output::List => Message::List,
                Output::Put { key, expect, value } => Message::Put(key, expect, value),
                Output::Delete { key, revision } => Message::Delete(key, revision),
            };
            assert!(node.message.is_none(), "a second request at once: {message:?}");
            node.message = Some(message);
        }
        panic!("{:?} does not come to rest", self.nodes[index].core);
    }

    fn told(&mut self, index: usize, event: LeaseEvent) {
        let announced = &mut self.nodes[index].announced;
        match event {
            LeaseEvent::Acquired(lease) => {
                self.count("acquired");
                // A later lease of the same addresses has a higher epoch, whoever held the earlier one.
                let before = self.epochs.insert(lease.subnet, lease.epoch);
                assert!(before.is_none_or(|before| before < lease.epoch), "{before:?} then {lease:?}");
                self.nodes[index].announced.insert(lease.subnet, lease);
            }
            LeaseEvent::Renewed(lease) => {
                let before = announced.insert(lease.subnet, lease).expect("held before");
                assert_eq!(before.epoch, lease.epoch);
                self.count("renewed");
            }
            LeaseEvent::Lost { subnet, .. } => {
                announced.remove(&subnet).expect("held before");
                self.count("lost");
            }
            LeaseEvent::Released(subnet) => {
                announced.remove(&subnet).expect("held before");
                self.count("released");
            }
            LeaseEvent::Exhausted { .. } => self.count("exhausted"),
            LeaseEvent::Conflict(conflict) => panic!("{conflict}"),
        }
    }

    fn serve(&mut self, index: usize, request: Message) -> Message {
        match request {
            Message::List => {
                let old = self.below(10) == 0 && !self.history.is_empty();
                let now = self.map.list("s");
                // Sometimes an answer of an earlier time, as from a replica that lags.
                let back =
                    usize::try_from(self.below(self.history.len().clamp(1, 20) as u64)).expect("small");
                let snapshot = if old { self.history[self.history.len() - 1 - back].clone() } else { now };
                Message::Listed(snapshot)
            }
            Message::Put(key, expect, value) => {
                let before = self.owner(key);
                let result = self.map.put_if(key, expect, value);
                if result.is_ok() && self.owner(key).is_some_and(|value| value.asked.is_some()) {
                    self.count("asked");
                }
                if result.is_ok() {
                    let name = format!("n{index}");
                    assert!(before.is_none_or(|before| before.node.as_str() == name), "wrote over another's");
                    self.written.insert(key, self.time);
                    self.remember();
                }
                Message::PutDone(key, result)
            }
            Message::Delete(key, revision) => {
                let before = self.owner(key);
                let result = self.map.delete_if(key, revision);
                if result.is_ok() {
                    let before = before.expect("deleted it");
                    if before.node.as_str() != format!("n{index}") {
                        assert!(!self.kept, "deleted another's");
                        // Clock-free expiry: never before the time to live, at the speed of the fastest clock.
                        let quiet = self.time - self.written[&key];
                        assert!(u128::from(quiet) * 105 / 100 >= TTL.as_millis(), "expired after {quiet} ms");
                        self.count("expired");
                    }
                    self.remember();
                }
                Message::Deleted(key, result)
            }
            answer => answer,
        }
    }

    fn remember(&mut self) {
        self.history.push(self.map.list("s"));
        if self.history.len() > 100 {
            self.history.drain(..50);
        }
    }

    fn deliver_stray(&mut self) {
        if self.stray.is_empty() {
            return;
        }
        let at = usize::try_from(self.below(self.stray.len() as u64)).expect("small");
        let (index, run, message) = self.stray.swap_remove(at);
        // A write of a dead process arrives no more; one of a live process arrives late.
        if self.nodes[index].runs == run && self.up {
            self.count("stray");
            self.serve(index, message);
        }
    }

    fn crash(&mut self, index: usize) {
        self.count("crashed");
        let held: Vec<_> = self.nodes[index].announced.values().copied().collect();
        // Now and then the disk is lost as well, and the key with it; or only the list of leases.
        let lost = if self.kept { 5 } else { 1 };
        let (persisted, key) = match self.below(20) {
            fate if fate < lost => (Vec::new(), Some(self.new_key())),
            fate if fate == lost => (Vec::new(), None),
            _ => (held, None),
        };
        if let Some(key) = key {
            self.nodes[index].keys = vec![key];
        }
        let run = self.nodes[index].runs + 1;
        let clock = self.nodes[index].clock;
        let keys = self.nodes[index].keys.clone();
        let core = self.core(index, run, &keys, persisted.clone(), clock);
        let node = &mut self.nodes[index];
        node.core = core;
        node.runs = run;
        node.message = None;
        node.announced = persisted.into_iter().map(|lease| (lease.subnet, lease)).collect();
    }

    fn delete_by_hand(&mut self) {
        let entries = self.map.list("s").entries;
        let at = usize::try_from(self.below(entries.len().max(1) as u64)).expect("small");
        if let Some((&key, entry)) = entries.iter().nth(at) {
            self.map.delete_if(key, entry.revision).expect("current");
            self.remember();
            self.count("deleted by hand");
        }
    }

    fn owner(&self, key: Key) -> Option<LeaseValue> {
        let entry = self.map.list("s").entries.remove(&key)?;
        Some(LeaseValue::decode(key, &entry.value).expect("a lease"))
    }

    /// The laws that hold after every step.
    fn check(&self) {
        let entries = self.map.list("s").entries;
        // A lease lives while the store says so: same node, same epoch. Whoever else holds an overlapping
        // one is fenced, and peers refuse it by its epoch.
        let live: Vec<(usize, HeldLease)> = self
            .nodes
            .iter()
            .enumerate()
            .flat_map(|(index, node)| {
                let entries = &entries;
                node.announced
                    .values()
                    .filter(move |lease| {
                        entries.get(&lease.subnet).is_some_and(|entry| {
                            let value = LeaseValue::decode(lease.subnet, &entry.value).expect("a lease");
                            value.node.as_str() == format!("n{index}") && value.epoch == lease.epoch
                        })
                    })
                    .map(move |lease| (index, *lease))
            })
            .collect();
        for (at, (one, a)) in live.iter().enumerate() {
            for (two, b) in &live[..at] {
                assert!(!a.subnet.overlaps(b.subnet), "n{one} {a:?} and n{two} {b:?}");
            }
        }
        for node in &self.nodes {
            let held: Vec<_> = node.announced.values().copied().collect();
            let mut told = node.core.held();
            told.sort_by_key(|lease| lease.subnet);
            assert_eq!(held, told, "events and state agree");
            for family in Family::ALL {
                let count = held.iter().filter(|lease| Family::of(lease.subnet) == family).count();
                assert!(count <= 1, "{held:?}");
            }
        }
    }

    /// With a healthy store and everybody awake, all come to rest: what is held is what the store says.
    fn heal(&mut self) {
        self.up = true;
        self.stray.clear();
        self.nodes.iter_mut().for_each(|node| node.paused = false);
        for _ in 0..NODES * 2_000 {
            let index = usize::try_from(self.below(NODES as u64)).expect("small");
            if self.below(10) == 0 {
                self.pass_time();
            }
            self.advance(index);
        }
        let entries = self.map.list("s").entries;
        for (index, node) in self.nodes.iter().enumerate() {
            for lease in node.announced.values() {
                let entry =
                    entries.get(&lease.subnet).unwrap_or_else(|| panic!("n{index} {lease:?} is not stored"));
                let value = LeaseValue::decode(lease.subnet, &entry.value).expect("a lease");
                assert_eq!((value.node.as_str(), value.epoch), (&*format!("n{index}"), lease.epoch));
            }
        }
    }
}

fn walk(seed: u64, steps: u64, kept: bool) -> BTreeMap<&'static str, u64> {
    eprintln!("WEFT_SEED={seed} WEFT_STEPS={steps}{}", if kept { ", kept by the store" } else { "" });
    let mut walk = Walk::new(seed, kept);
    for _ in 0..steps {
        walk.step();
    }
    walk.heal();
    walk.counts
}

fn setting(name: &str) -> Option<u64> {
    std::env::var(name)
        .ok()
        .map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is no number: {text}")))
}

/// Walks as long as the environment says, and returns what happened.
fn walks(kept: bool) -> (u64, BTreeMap<&'static str, u64>) {
    // `make test` must say the same of the same code every time; a walk of a length of its own goes where none has been.
    let length = setting("WEFT_STEPS");
    let steps = length.unwrap_or(100_000);
    let anywhere = || length.map_or(1, |_| u64::from(std::process::id()) ^ 0x5eed_0000);
    let seed = setting("WEFT_SEED").unwrap_or_else(anywhere);
    let mut done = 0;
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    // Many walks, so that rare beginnings are met too.
    for part in 0.. {
        let length = WALK.min(steps - done);
        for (what, count) in walk(seed.wrapping_add(part), length, kept) {
            *counts.entry(what).or_default() += count;
        }
        done += length;
        if done == steps {
            break;
        }
    }
    eprintln!("{counts:?}");
    (steps, counts)
}

fn assert_happened(steps: u64, counts: &BTreeMap<&'static str, u64>, expected: &[&str]) {
    for what in expected.iter().filter(|_| steps >= 100_000) {
        assert!(counts.get(what).is_some_and(|count| *count > 10), "{what} hardly happened: {counts:?}");
    }
}

#[test]
fn two_live_leases_never_overlap_and_a_fenced_owner_never_overwrites() {
    let (steps, counts) = walks(false);
    let expected = ["acquired", "renewed", "lost", "released", "exhausted", "expired", "crashed", "stray"];
    assert_happened(steps, &counts, &expected);
}

#[test]
fn leases_that_the_store_ends_never_overlap_and_nobody_touches_anothers() {
    let (steps, counts) = walks(true);
    let expected = ["acquired", "renewed", "lost", "released", "exhausted", "asked", "crashed", "stray"];
    assert_happened(steps, &counts, &expected);
    assert_eq!(counts.get("expired"), None);
}

#[test]
fn what_once_failed_holds() {
    for seed in ONCE_FAILED {
        assert!(walk(seed, WALK, false)["crashed"] > 0);
    }
}
