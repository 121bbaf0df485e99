//! Several machines, their store and the network between them, driven through a run of steps to quiet.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use rand_core::RngCore;
use weft_daemon::config::Config;
use weft_daemon::kernel::UnderlayError;
use weft_daemon::plan::model::Encryption;
use weft_ipam::pods::AttachmentId;
use weft_tests::sim::net::Net;
use weft_wire::mesh::{Mesh, NodeKey, Rejected};
use weft_wire::seal::{ClusterKey, KeyRing};
use weft_wire::types::{NodeName, TunnelKey};

use super::disk::Disk;
use super::laws;
use super::machine::Machine;
use super::step::Step;
use super::store::{Link, SharedStore};

/// How long the machines may take to be whole again once it is quiet: leases of machines that are off expire first.
const QUIET: Duration = Duration::from_secs(400);
/// Between two looks of the container runtime at its pods.
const RUNTIME: Duration = Duration::from_millis(700);
/// The least time between two looks at the machines.
const MOMENT: Duration = Duration::from_millis(20);
const PORT: u16 = 7117;
const GATHERED: usize = 400;

/// The machines and what is between them.
pub struct World {
    pub(super) net: Net<Machine>,
    store: Rc<RefCell<SharedStore>>,
    revision: u64,
    /// Where each machine is.
    pub(super) places: Vec<SocketAddr>,
    wanted: Vec<BTreeSet<AttachmentId>>,
    leaving: BTreeMap<usize, Duration>,
    next_pod: usize,
    next_place: u8,
    ring: Vec<u8>,
    phase: usize,
    began: std::time::Instant,
    tunnels: bool,
    seeded: bool,
}

/// Which pairs of machines speak encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Secrecy {
    /// None; nobody has tunnels.
    Clear,
    /// Those of which one demands it.
    Mixed,
    /// All.
    Sealed,
}

fn ring(keys: &[u8]) -> KeyRing {
    KeyRing::new(keys.iter().map(|byte| ClusterKey::from_bytes([*byte; 32])).collect())
        .expect("there are keys")
}

fn config(number: usize, dual_stack: bool, secrecy: Secrecy, seeded: bool) -> Config {
    let policy = match secrecy {
        Secrecy::Sealed => Encryption::Always,
        Secrecy::Mixed if number.is_multiple_of(2) => Encryption::Always,
        Secrecy::Clear | Secrecy::Mixed => Encryption::Never,
    };
    let tunnels = secrecy != Secrecy::Clear;
    let seeds = format!("seeds = [\"192.0.2.1:{PORT}\", \"192.0.2.2:{PORT}\"]\n");
    let v6 = "{ cidr = \"fd00:32::/61\", node_prefix = 64 }";
    let text = format!(
        "[node]\nname = \"n{number}\"\n[cluster]\nid = \"sim\"\ncidrs = [{{ cidr = \"10.32.0.0/24\", node_prefix = 27 }}, {}]\n\
         [store]\nlease_ttl = \"60s\"\n[gossip]\n{}\
         [encryption]\npolicy = \"{policy}\"\ntunnels = {tunnels}\n",
        if dual_stack { v6 } else { "" },
        if seeded { &seeds } else { "" },
    );
    Config::parse(&text, Path::new("weft.toml"), "host").expect("the configuration is valid")
}

fn address(place: u8) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, place)), PORT)
}

fn key(rng: &mut impl RngCore) -> NodeKey {
    let mut secret = [0; 32];
    rng.fill_bytes(&mut secret);
    NodeKey::from_secret(secret)
}

pub(super) fn tunnel_key(rng: &mut impl RngCore) -> TunnelKey {
    let mut key = [0; 32];
    rng.fill_bytes(&mut key);
    TunnelKey(key)
}

/// The last byte of the address that a machine starts with.
fn place_of(number: usize) -> u8 {
    u8::try_from(number + 1).expect("there are few machines")
}

/// What a node knows, without what every datagram touches.
fn knowledge(mesh: &Mesh) -> Vec<String> {
    let member = |member: weft_wire::mesh::MemberView<'_>| {
        format!(
            "{} {} {:?} {:?} {:?}",
            member.node, member.state, member.record, member.routed, member.verdict
        )
    };
    mesh.members().map(member).collect()
}

impl World {
    /// Machines that are all off.
    pub fn new(seed: u64, machines: usize, secrecy: Secrecy) -> Self {
        let mut net = Net::new(seed);
        let store = Rc::new(RefCell::new(SharedStore::default()));
        // Most runs leave it to the store to say where others are.
        let seeded = seed.is_multiple_of(4);
        let dual_stack = net.rng.next_u32().is_multiple_of(2);
        let mut places = Vec::new();
        for number in 0..machines {
            let tunnel = TunnelKey([place_of(number); 32]);
            let disk = Disk::new(key(&mut net.rng), tunnel, ring(&[1]));
            let place = place_of(number);
            let machine = Machine::new(
                number,
                config(number, dual_stack, secrecy, seeded),
                address(place),
                disk,
                store.clone(),
                &mut net.rng,
                net.now,
            );
            places.push(machine.address);
            net.insert(machine.address, machine);
        }
        net.gather(GATHERED);
        Self {
            began: net.now,
            tunnels: secrecy != Secrecy::Clear,
            seeded,
            net,
            store,
            revision: 0,
            wanted: vec![BTreeSet::new(); machines],
            places,
            leaving: BTreeMap::new(),
            next_pod: 0,
            next_place: machines as u8 + 1,
            ring: vec![1],
            phase: 0,
        }
    }

    pub(super) fn machine(&mut self, number: usize) -> &mut Machine {
        self.net.host_mut(self.places[number]).expect("every machine has a place")
    }

    pub(super) fn machines(&self) -> Vec<&Machine> {
        self.places.iter().map(|place| self.net.host(*place).expect("every machine has a place")).collect()
    }

    pub(super) fn with(&mut self, number: usize, act: impl FnOnce(&mut Machine, std::time::Instant)) {
        self.net.with(self.places[number], act);
    }

    /// Returns how long it has gone on in virtual time.
    pub fn age(&self) -> Duration {
        self.net.now - self.began
    }

    /// Returns what tells this run from others of the same steps.
    pub fn digest(&self) -> u64 {
        self.net.delivered()
    }

    /// Goes through a run of steps, to quiet.
    ///
    /// # Errors
    /// The law that did not hold.
    pub fn go_through(&mut self, run: &[(Duration, Step)]) -> Result<(), String> {
        let machines = self.places.len();
        (0..machines).for_each(|number| self.with(number, Machine::start));
        self.pass_time(Duration::from_secs(10))?;
        for (pause, step) in run {
            self.pass_time(*pause)?;
            self.apply(step).map_err(|broken| format!("{broken}; after {step:?}"))?;
        }
        self.pass_time(Duration::from_secs(1))?;
        self.become_quiet()
    }

    /// Lets time pass while the runtime looks after its pods, and sees to it that the laws hold.
    pub(super) fn pass_time(&mut self, duration: Duration) -> Result<(), String> {
        let end = self.net.now + duration;
        while self.net.now < end {
            let next = end.min(self.net.now + MOMENT);
            self.net.run_to(next);
            self.look()?;
        }
        Ok(())
    }

    fn look(&mut self) -> Result<(), String> {
        if let Some(broken) = self.machines().iter().find_map(|machine| machine.broken.first()) {
            return Err(broken.clone());
        }
        let truth = self.store.borrow().truth().revision;
        if truth != self.revision {
            self.revision = truth;
            (0..self.places.len()).for_each(|number| self.with(number, Machine::notify_of_store));
        }
        let leases = self.store.borrow().leases();
        let machines = self.machines();
        let broken = laws::live_leases_never_overlap(&machines, &leases)
            .or_else(|| laws::no_address_is_used_twice(&machines, &leases))
            .or_else(|| machines.iter().copied().find_map(laws::nothing_leaves_in_clear));
        if let Some(broken) = broken {
            return Err(broken);
        }
        let age = self.age();
        if age.as_millis() / RUNTIME.as_millis() != (age - MOMENT.min(age)).as_millis() / RUNTIME.as_millis()
        {
            (0..self.places.len()).for_each(|number| self.run_pods(number));
        }
        let gone: Vec<_> =
            self.leaving.extract_if(.., |_, at| *at <= age).map(|(number, _)| number).collect();
        gone.into_iter().for_each(|number| self.machine(number).end_leaving());
        Ok(())
    }

    /// The container runtime: it repeats an ADD or a DEL until it succeeds.
    fn run_pods(&mut self, number: usize) {
        if self.leaving.contains_key(&number) {
            return;
        }
        let wanted = self.wanted[number].clone();
        self.with(number, |machine, now| {
            let unwanted: Vec<_> = machine.pods.keys().chain(machine.disk.journal.keys()).cloned().collect();
            for id in unwanted.iter().filter(|id| !wanted.contains(*id)) {
                machine.delete_pod(id, now);
            }
            for id in &wanted {
                if !machine.pods.contains_key(id) {
                    machine.add_pod(id, now);
                }
            }
        });
    }

    fn apply(&mut self, step: &Step) -> Result<(), String> {
        let jitter = |jitter: Duration| jitter.max(Duration::from_millis(1));
        match step.clone() {
            Step::Start(a) => self.with(a, Machine::start),
            Step::Kill(a) => self.machine(a).kill(),
            Step::CutPower(a) => self.machine(a).lose_power(),
            Step::Leave(a) => {
                let free = self.machine(a).disk.journal.is_empty() && self.machine(a).daemon.is_some();
                if free && self.wanted[a].is_empty() {
                    self.with(a, Machine::leave);
                    self.leaving.insert(a, self.age() + Duration::from_secs(2));
                }
            }
            Step::Part(mask) => {
                self.net.sides = self
                    .places
                    .iter()
                    .enumerate()
                    .map(|(n, place)| (*place, (mask >> n & 1) as u8))
                    .collect();
            }
            Step::Deafen(a, b) => drop(self.net.deaf.insert((self.places[a], self.places[b]))),
            Step::Heal => {
                self.net.sides.clear();
                self.net.deaf.clear();
            }
            Step::Weather { loss_percent, duplicate_percent, jitter: most } => {
                self.net.loss_percent = loss_percent;
                self.net.duplicate_percent = duplicate_percent;
                self.net.jitter = jitter(most);
            }
            Step::Slow(a, by) => drop(self.net.slow.insert(self.places[a], by)),
            Step::AdvanceClock(a, by) => self.machine(a).clock.step(by),
            Step::LoseStore(a) => self.machine(a).link.down = true,
            Step::LoseStoreEverywhere => {
                (0..self.places.len()).for_each(|a| self.machine(a).link.down = true)
            }
            Step::FindStore(a) => self.machine(a).link.down = false,
            Step::LoseAnswers(a, count) => self.machine(a).link.lost_answers = count,
            Step::FallBehind(a, behind) => {
                let link = &mut self.machine(a).link;
                (link.behind, link.stale_lists) = (behind, 3);
            }
            Step::FillDisk(a) => self.machine(a).disk.full = true,
            Step::FreeDisk(a) => self.machine(a).disk.full = false,
            Step::RefuseChanges(a, count) => self.machine(a).kernel.refusals = count,
            Step::FailDumps(a, count) => self.machine(a).kernel.failed_dumps = count,
            Step::Meddle(a, meddling) => self.with(a, |machine, now| {
                meddling.apply(&mut machine.kernel);
                machine.notify_of_kernel(now);
            }),
            Step::MeddleWithinPass(a, meddling) => self.with(a, |machine, now| {
                machine.meddling.push(meddling);
                machine.notify_of_kernel(now);
            }),
            // The seeds stay where everyone looks for them.
            Step::Move(a) if self.seeded && a < 2 => {}
            Step::Move(a) => self.relocate(a),
            Step::LoseUnderlay(a) => self.with(a, |machine, now| {
                machine.kernel.underlay = Err(UnderlayError::Down("eth0".into()));
                machine.notify_of_kernel(now);
            }),
            Step::FindUnderlay(a) => self.with(a, Machine::find_underlay),
            Step::AddPod(a) => {
                if !self.leaving.contains_key(&a) && self.wanted[a].len() < 12 {
                    self.next_pod += 1;
                    let container = format!("pod{}", self.next_pod);
                    self.wanted[a].insert(AttachmentId { container, ifname: "eth0".into() });
                }
            }
            Step::DeletePod(a, choice) => {
                let id = self.wanted[a].iter().nth(choice).cloned();
                id.map(|id| self.wanted[a].remove(&id));
            }
            Step::VanishPod(a, choice) => self.with(a, |machine, now| {
                if let Some(id) = machine.pods.keys().nth(choice).cloned() {
                    machine.vanish(&id, now);
                }
            }),
            Step::RotateNodeKey(a) => {
                let next = key(&mut self.net.rng);
                self.with(a, |machine, now| machine.rotate_key(next, now));
            }
            Step::RotateTunnelKey(a) => {
                let next = tunnel_key(&mut self.net.rng);
                self.with(a, |machine, now| machine.rotate_tunnel_key(next, now));
            }
            // Where there are no tunnels a demand would only part the nodes.
            Step::Demand(a, policy) if self.tunnels => self.with(a, |machine, now| {
                machine.config.encryption.policy = policy;
                machine.kill();
                machine.start(now);
            }),
            Step::Demand(..) => {}
            Step::RotateClusterKey => self.rotate_cluster_key(),
            Step::Replay(count) => return self.attack(count, false),
            Step::Forge(count) => return self.attack(count, true),
            Step::Forget(a, of) => {
                let name: NodeName = format!("n{of}").parse().expect("a valid name");
                self.with(a, |machine, _| {
                    if let Some(daemon) = &mut machine.daemon {
                        daemon.control.mesh.forget(&name);
                    }
                });
            }
        }
        Ok(())
    }

    /// Gives a machine another address; datagrams to the old one find no one.
    fn relocate(&mut self, number: usize) {
        let place = self.next_place;
        self.next_place = self.next_place.checked_add(1).unwrap_or(100);
        let old = self.places[number];
        let mut machine = self.net.remove(old).expect("every machine has a place");
        let now = self.net.now;
        machine.relocate(address(place), now);
        self.places[number] = machine.address;
        let side = self.net.sides.remove(&old);
        side.map(|side| self.net.sides.insert(machine.address, side));
        let slow = self.net.slow.remove(&old);
        slow.map(|by| self.net.slow.insert(machine.address, by));
        self.net.insert(machine.address, machine);
    }

    fn rotate_cluster_key(&mut self) {
        let newest = self.ring.iter().max().copied().unwrap_or(1);
        match self.phase % 3 {
            0 => self.ring.push(newest.wrapping_add(1).max(1)),
            1 => self.ring.reverse(),
            _ => self.ring.truncate(1),
        }
        self.phase += 1;
        let next = ring(&self.ring);
        for number in 0..self.places.len() {
            let next = next.clone();
            self.with(number, move |machine, now| machine.set_ring(next, now));
        }
    }

    /// One text names the cluster keys of all, and is changed at once to another key alone. Each machine learns of it in its
    /// own time, one while its disk is full, and one starts its daemon anew in between.
    ///
    /// # Errors
    /// A datagram that somebody could not open, or machines that do not get there.
    pub fn change_keys_in_one_place(&mut self) -> Result<(), String> {
        let machines = self.places.len();
        (0..machines).for_each(|number| self.with(number, Machine::start));
        self.pass_time(Duration::from_secs(20))?;
        let wanted = ring(&[2]);
        let mut moment = || self.net.rng.next_u64() % 100;
        let (mut learns, anew): (Vec<_>, u64) = ((0..machines).map(|_| moment()).collect(), moment());
        self.machine(0).disk.full = true;
        // Everybody else is there long before the last.
        learns[1] = 150;
        for second in 0..600 {
            for number in (0..machines).filter(|number| learns[*number] == second) {
                let wanted = wanted.clone();
                self.with(number, |machine, now| machine.want_ring(wanted, now));
            }
            if second == 170 {
                self.machine(0).disk.full = false;
            }
            if second == anew {
                self.machine(2).kill();
                self.with(2, Machine::start);
            }
            self.pass_time(Duration::from_secs(1))?;
            let rings = || self.machines().into_iter().filter_map(|machine| machine.daemon.as_ref());
            for daemon in rings() {
                let unread = daemon.control.mesh.counters().rejected(Rejected::UnknownKey);
                if unread > 0 {
                    let node = &daemon.control.config.node.name;
                    return Err(format!("{node} could not open {unread} datagrams after {second} s"));
                }
            }
            if second < 150 && self.machines().iter().any(|machine| machine.disk.ring == wanted) {
                return Err(format!("the old key was forgotten after {second} s, before n1 knew another"));
            }
            if rings().all(|daemon| *daemon.control.mesh.ring() == wanted) {
                let same = |machine: &&Machine| machine.disk.ring == wanted;
                return if self.machines().iter().all(same) { Ok(()) } else { Err("a disk lags".into()) };
            }
        }
        Err("not everybody has the wanted keys after ten minutes".into())
    }

    /// Delivers datagrams again that were delivered before, as they were or changed: nobody may learn from them.
    fn attack(&mut self, count: usize, change: bool) -> Result<(), String> {
        for _ in 0..count {
            let count = self.net.gathered().len().max(1);
            let place = self.net.rng.next_u64() as usize % count;
            let Some(delivered) = self.net.gathered().get(place).cloned() else { return Ok(()) };
            let (from, to) = (delivered.from, delivered.to);
            let mut datagram = delivered.datagram.to_vec();
            if change {
                let bit = self.net.rng.next_u64() as usize % (datagram.len() * 8);
                datagram[bit / 8] ^= 1 << (bit % 8);
            }
            let Some(machine) = self.net.host(to) else { continue };
            // A daemon that has just started cannot know what an earlier one was told: it learns what was true once,
            // and its peers tell it better.
            let witness = machine.daemon.as_ref().filter(|daemon| change || daemon.started <= delivered.at);
            let Some(before) = witness.map(|daemon| knowledge(&daemon.control.mesh)) else { continue };
            self.net.deliver(from, to, &datagram);
            let Some(daemon) = &self.net.host(to).expect("it is where it was").daemon else { continue };
            let after = knowledge(&daemon.control.mesh);
            if before != after {
                let what = if change { "forged" } else { "replayed" };
                return Err(format!(
                    "a {what} datagram from {from} taught {to}: {before:#?} became {after:#?}"
                ));
            }
        }
        Ok(())
    }

    /// Ends all trouble, and sees the machines become one whole network.
    fn become_quiet(&mut self) -> Result<(), String> {
        self.apply(&Step::Heal)?;
        let calm = Step::Weather { loss_percent: 0, duplicate_percent: 0, jitter: Duration::from_millis(4) };
        self.apply(&calm)?;
        self.net.slow.clear();
        for number in 0..self.places.len() {
            // Configured seeds stay on: a node that knows no one must find someone.
            let off = number > usize::from(self.seeded) && self.net.rng.next_u32().is_multiple_of(8);
            self.with(number, move |machine, now| {
                machine.link = Link::default();
                machine.disk.full = false;
                machine.meddling.clear();
                // A refusal that nothing has met yet is trouble too.
                (machine.kernel.refusals, machine.kernel.failed_dumps) = (0, 0);
                machine.find_underlay(now);
                if off {
                    machine.lose_power();
                } else {
                    machine.start(now);
                }
            });
        }
        let end = self.net.now + QUIET;
        loop {
            self.pass_time(Duration::from_secs(1))?;
            self.drain_fenced();
            let leases = self.store.borrow().leases();
            // A change that waits for another's would begin once all else is done.
            let changes = self.machines().into_iter().find(|machine| machine.changes_its_key(self.net.now));
            let changes = changes.map(|machine| format!("{} changes its key", machine.config.node.name));
            match laws::unsettled(&self.machines(), &leases).or(changes) {
                None => break,
                Some(wrong) if self.net.now > end => {
                    return Err(format!("not whole after {QUIET:?}: {wrong}"));
                }
                Some(_) => {}
            }
        }
        self.pass_time(Duration::from_secs(40))?;
        while self.machines().iter().any(|machine| machine.is_in_a_pass()) {
            self.pass_time(MOMENT)?;
        }
        let leases = self.store.borrow().leases();
        if let Some(wrong) = laws::unsettled(&self.machines(), &leases) {
            return Err(format!("whole, and then not: {wrong}"));
        }
        self.machines().into_iter().find_map(laws::a_pass_changes_nothing).map_or(Ok(()), Err)
    }

    /// What a person does about pods of a lost lease: they are made anew.
    fn drain_fenced(&mut self) {
        for number in 0..self.places.len() {
            let fenced = self.machine(number).fenced_pods();
            if !fenced.is_empty() {
                self.wanted[number].retain(|id| !fenced.contains(id));
            }
        }
    }
}
