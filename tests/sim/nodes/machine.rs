//! One machine: its kernel, its disk, its clock, its pods, and the daemon that runs on it or does not.
//!
//! It is the other shell around [`Control`], beside `weftd`'s: what takes time there (the store, a pass over the
//! kernel, attaching a pod) is put off here and done later in virtual time, so that everything may come in between.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use rand_chacha::ChaCha8Rng;
use rand_core::{RngCore, SeedableRng};
use weft_daemon::config::Config;
use weft_daemon::control::{Control, Output, OwnKeys, Start, StoreAnswer, StoreRequest};
use weft_daemon::kernel::Kernel;
use weft_daemon::kernel::memory::MemoryKernel;
use weft_daemon::plan::model::{BRIDGE, HostVeth, Inputs, Underlay, VethState};
use weft_daemon::reconcile::{Report, reconcile};
use weft_ipam::pods::{AttachmentId, PodPool};
use weft_tests::sim::net;
use weft_wire::mesh::{Carrier, NodeKey, Trust};
use weft_wire::seal::KeyRing;
use weft_wire::types::{Subnet, TunnelKey};

use super::disk::{Disk, Pod, another};
use super::laws;
use super::meddling::{Meddled, Meddling};
use super::store::{Link, SharedStore};

/// Between two looks for pods that vanished without a DEL, as in `node.rs`.
const SURVEY: Duration = Duration::from_secs(30);

/// A clock that neither starts nor runs like the others.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    began: Instant,
    ahead: Duration,
    /// How long its second is, in millionths of a true second.
    rate_ppm: u64,
}

impl Clock {
    pub fn read(&self, now: Instant) -> Instant {
        let run = now.duration_since(self.began);
        self.began + self.ahead + run * self.rate_ppm as u32 / 1_000_000
    }

    /// The true time at which the clock shows `local`.
    fn when(&self, local: Instant) -> Instant {
        let run = local.saturating_duration_since(self.began + self.ahead);
        self.began + run * 1_000_000 / self.rate_ppm as u32 + Duration::from_micros(1)
    }

    /// Moves it forward at once, as when a virtual machine is moved.
    pub fn step(&mut self, by: Duration) {
        self.ahead += by;
    }
}

/// A daemon that runs.
#[derive(Debug)]
pub struct Daemon {
    pub control: Control,
    pool: PodPool,
    attached: BTreeMap<AttachmentId, Pod>,
    busy: BTreeSet<AttachmentId>,
    strays: BTreeSet<String>,
    pub started: Instant,
    wake: Instant,
    survey: Instant,
    /// What the latest pass was asked for.
    pub last: Option<Inputs>,
    /// The pass that runs, if the kernel's thread has not come to it yet.
    pass: Option<Box<Inputs>>,
    /// What it was started with.
    pub config: Config,
    /// A pass has gone through without a failure: from now on its policy holds.
    pub fenced: bool,
}

/// What was put off.
#[derive(Debug)]
enum Todo {
    Ask(StoreRequest),
    Answer(StoreAnswer),
    Pass,
    PassDone(Result<Underlay, weft_daemon::kernel::UnderlayError>, Option<Report>),
    KernelChanged,
    Attach(AttachmentId),
    Detach(AttachmentId),
}

/// One machine.
#[derive(Debug)]
pub struct Machine {
    pub number: usize,
    pub address: SocketAddr,
    pub config: Config,
    pub clock: Clock,
    pub kernel: MemoryKernel,
    pub disk: Disk,
    pub link: Link,
    pub daemon: Option<Daemon>,
    /// The pods whose namespaces exist, by attachment.
    pub pods: BTreeMap<AttachmentId, Pod>,
    /// What happens in the kernel between the dump and the changes of the next pass.
    pub meddling: Vec<Meddling>,
    pub boot: u64,
    /// Counts the daemons that ran here: what was put off by an earlier one is void.
    run: u64,
    store: Rc<RefCell<SharedStore>>,
    todo: BTreeMap<(Instant, u64), (u64, Todo)>,
    count: u64,
    outbox: VecDeque<(SocketAddr, Vec<u8>)>,
    rng: ChaCha8Rng,
    /// What a law did not hold of.
    pub broken: Vec<String>,
    /// The cluster keys that it was told are wanted everywhere.
    wanted_ring: Option<KeyRing>,
    /// Handshakes go through by chance; otherwise who runs the machines says whom there are sessions with.
    pub by_chance: bool,
    /// How its daemon judges other sites.
    pub trust: Option<Trust>,
}

/// Returns the name of the host's end of an attachment.
pub fn host_ifname(id: &AttachmentId) -> String {
    let number = id.container.bytes().fold(7_u32, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
    format!("weft{number:08x}")
}

/// The underlay of a machine at an address.
pub fn underlay_at(address: SocketAddr) -> Underlay {
    let addresses = vec![IpNet::new(address.ip(), 24).expect("24 is a prefix length")];
    Underlay { device: "eth0".into(), index: 2, mtu: 1500, addresses, strict_sources: false, tunnel: None }
}

impl Machine {
    /// A machine that was never switched on.
    pub fn new(
        number: usize,
        config: Config,
        address: SocketAddr,
        disk: Disk,
        store: Rc<RefCell<SharedStore>>,
        rng: &mut ChaCha8Rng,
        now: Instant,
    ) -> Self {
        let rate_ppm = 980_000 + rng.next_u64() % 40_000;
        let ahead = Duration::from_secs(rng.next_u64() % 100_000);
        Self {
            number,
            address,
            config,
            clock: Clock { began: now, ahead, rate_ppm },
            kernel: MemoryKernel::new(Ok(underlay_at(address))),
            disk,
            link: Link::default(),
            daemon: None,
            pods: BTreeMap::new(),
            meddling: Vec::new(),
            boot: 1,
            run: 0,
            store,
            todo: BTreeMap::new(),
            count: 0,
            outbox: VecDeque::new(),
            rng: ChaCha8Rng::seed_from_u64(rng.next_u64()),
            broken: Vec::new(),
            wanted_ring: None,
            by_chance: true,
            trust: None,
        }
    }

    /// Starts the daemon; it does not start on a full disk.
    pub fn start(&mut self, now: Instant) {
        let mut memory = self.disk.memory().clone();
        memory.incarnation += 1;
        if self.daemon.is_some() || self.disk.remember(&memory, true).is_err() {
            return;
        }
        if self.disk.journal_boot != self.boot {
            self.disk.journal.clear();
            self.disk.journal_boot = self.boot;
        }
        self.run += 1;
        let mut seed = [0; 32];
        self.rng.fill_bytes(&mut seed);
        let subnets: Vec<_> = memory.held.iter().map(|held| held.subnet).collect();
        let mut pool = PodPool::new(&subnets, &[], self.rng.next_u64());
        for (id, pod) in &self.disk.journal {
            let addresses: Vec<_> = pod.addresses.0.iter().map(|pod| pod.address).collect();
            if let Err(error) = pool.adopt(id, &addresses) {
                self.broken.push(format!("the journal holds what the pool refuses: {error}"));
            }
        }
        let start = Start {
            config: self.config.clone(),
            memory,
            boot: self.boot.to_string(),
            key: self.disk.key.clone(),
            trust: self.trust.clone(),
            ring: self.disk.ring.clone(),
            tunnel: self.config.encryption.tunnels.then_some(OwnKeys {
                main: self.disk.tunnel,
                next: self.disk.next_tunnel,
                spare: self.disk.spare_tunnel,
                carrier: self.carrier(),
            }),
            seed,
        };
        let local = self.clock.read(now);
        let mut control = Control::new(start, local);
        control.handle_pods(self.disk.journal.is_empty(), local);
        if let Some(ring) = &self.wanted_ring {
            control.follow_ring(0, ring.clone(), local);
        }
        self.daemon = Some(Daemon {
            control,
            pool,
            attached: self.disk.journal.clone(),
            busy: BTreeSet::new(),
            strays: BTreeSet::new(),
            started: now,
            wake: now,
            survey: now + SURVEY,
            last: None,
            pass: None,
            config: self.config.clone(),
            fenced: false,
        });
    }

    /// Kills the daemon; a pass that runs is cut off in the middle.
    pub fn kill(&mut self) {
        let Some(daemon) = self.daemon.take() else { return };
        if let Some(inputs) = daemon.pass {
            let most = self.rng.next_u32() as usize % 12;
            let mut kernel = Meddled::new(&mut self.kernel, Vec::new()).that_stops_after(most);
            reconcile(&mut kernel, &inputs);
        }
        // What the process itself carried ends with it; the device stays.
        self.kernel.actual.state.tunnels.clear();
        // Requests on their way to the store arrive all the same.
        self.todo.retain(|_, (_, todo)| matches!(todo, Todo::Ask(_)));
    }

    /// Takes the power away: the kernel is empty, the pods are gone, the disk holds what was synced.
    pub fn lose_power(&mut self) {
        self.kill();
        self.kernel.actual = Default::default();
        self.pods.clear();
        self.disk.lose_power(&mut self.rng);
        self.boot += 1;
    }

    /// Leaves the cluster in order; a node with pods does not.
    pub fn leave(&mut self, now: Instant) {
        let local = self.clock.read(now);
        if let Some(daemon) = &mut self.daemon
            && daemon.attached.is_empty()
        {
            daemon.control.leave(local);
        }
    }

    /// Ends what `leave` began.
    pub fn end_leaving(&mut self) {
        self.kill();
        weft_daemon::kernel::purge(&mut self.kernel);
        self.disk.forget();
    }

    /// Returns whether a pass over the kernel runs.
    pub fn is_in_a_pass(&self) -> bool {
        self.daemon.as_ref().is_some_and(|daemon| daemon.control.pass.running)
    }

    /// Gives the machine another address.
    pub fn relocate(&mut self, address: SocketAddr, now: Instant) {
        self.address = address;
        self.kernel.underlay = Ok(underlay_at(address));
        self.notify_of_kernel(now);
    }

    /// Brings the underlay back as it was.
    pub fn find_underlay(&mut self, now: Instant) {
        if self.kernel.underlay.is_err() {
            self.kernel.underlay = Ok(underlay_at(self.address));
            self.notify_of_kernel(now);
        }
    }

    /// Replaces the node's key, as `weft rotate-key` does.
    pub fn rotate_key(&mut self, next: NodeKey, now: Instant) {
        let local = self.clock.read(now);
        let Some(daemon) = &mut self.daemon else { return };
        if self.disk.full {
            return;
        }
        let config = &self.config;
        let endorsed = next.endorsed_by(daemon.control.mesh.key(), &config.cluster.id, &config.node.name);
        self.disk.key = endorsed.clone();
        daemon.control.use_key(endorsed, local);
    }

    /// Replaces the key of its tunnels.
    pub fn rotate_tunnel_key(&mut self, next: TunnelKey, now: Instant) {
        let local = self.clock.read(now);
        if self.disk.full {
            return;
        }
        let Some(daemon) = self.daemon.as_mut().filter(|daemon| daemon.config.encryption.tunnels) else {
            return;
        };
        if !daemon.control.is_rotating(local) {
            self.disk.next_tunnel = Some(next);
            daemon.control.rotate_tunnel_key(next, local);
        }
    }

    /// Whether the key of its tunnels changes, waits for others that change theirs, or the last change is not over yet.
    pub fn changes_its_key(&self, now: Instant) -> bool {
        let local = self.clock.read(now);
        let rotates = self.daemon.as_ref().is_some_and(|daemon| daemon.control.is_rotating(local));
        rotates || (self.daemon.is_some() && self.disk.next_tunnel.is_some())
    }

    /// Returns who carries the machine's tunnels.
    pub fn carrier(&self) -> Carrier {
        if self.number.is_multiple_of(2) { Carrier::Kernel } else { Carrier::UserSpace }
    }

    /// Handshakes go through or not: whom the kernel says that there are sessions with.
    fn shake_hands(&mut self) {
        let tunnels = self.kernel.actual.state.tunnels.values();
        let pairs = tunnels.flat_map(|tunnels| tunnels.peers.keys().map(|key| (tunnels.key, *key)));
        self.kernel.sessions = pairs.filter(|_| self.rng.next_u32().is_multiple_of(3)).collect();
    }

    /// Replaces the cluster keys.
    pub fn set_ring(&mut self, ring: KeyRing, now: Instant) {
        let local = self.clock.read(now);
        if let Some(daemon) = &mut self.daemon {
            daemon.control.mesh.set_ring(ring.clone(), local);
        }
        self.disk.ring = ring;
    }

    /// Tells the machine which cluster keys are wanted everywhere.
    pub fn want_ring(&mut self, ring: KeyRing, now: Instant) {
        let local = self.clock.read(now);
        if let Some(daemon) = &mut self.daemon {
            daemon.control.follow_ring(0, ring.clone(), local);
        }
        self.wanted_ring = Some(ring);
    }

    /// Returns the pods whose addresses are of a subnet that the node no longer holds.
    pub fn fenced_pods(&self) -> Vec<AttachmentId> {
        let Some(daemon) = &self.daemon else { return Vec::new() };
        let subnets = daemon.control.subnets();
        let fenced = |pod: &Pod| {
            pod.addresses.0.iter().any(|pod| !subnets.iter().any(|subnet| subnet.contains(pod.address)))
        };
        daemon.attached.iter().filter(|(_, pod)| fenced(pod)).map(|(id, _)| id.clone()).collect()
    }

    /// Tells the daemon that something in the kernel changed, unless the message is lost.
    pub fn notify_of_kernel(&mut self, now: Instant) {
        if !self.rng.next_u32().is_multiple_of(10) {
            self.put_off(now, 20, Todo::KernelChanged);
        }
    }

    /// Tells the daemon that someone wrote to the store.
    pub fn notify_of_store(&mut self, now: Instant) {
        let change = weft_ipam::store::Change::Relist;
        if !self.link.down && !self.rng.next_u32().is_multiple_of(10) {
            self.put_off(now, 200, Todo::Answer(StoreAnswer::Changed(change)));
        }
    }

    fn put_off(&mut self, now: Instant, most_ms: u64, todo: Todo) {
        self.count += 1;
        let at = now + Duration::from_micros(1000 + self.rng.next_u64() % (most_ms * 1000));
        self.todo.insert((at, self.count), (self.run, todo));
    }

    /// Asks the daemon to attach a pod, as the shim does; returns whether it began to.
    pub fn add_pod(&mut self, id: &AttachmentId, now: Instant) -> bool {
        let Some(daemon) = &mut self.daemon else { return false };
        let stray = daemon.strays.contains(&host_ifname(id));
        let Ok(network) = daemon.control.ready() else { return false };
        if daemon.busy.contains(id) || stray {
            return false;
        }
        let known = daemon.attached.contains_key(id);
        let Ok(addresses) = daemon.pool.assign(id, &[]) else { return false };
        if self.disk.full {
            if !known {
                daemon.pool.release(id);
            }
            return false;
        }
        let pod = Pod { addresses, mtu: network.mtu };
        self.disk.journal.insert(id.clone(), pod.clone());
        daemon.attached.insert(id.clone(), pod);
        daemon.busy.insert(id.clone());
        self.put_off(now, 50, Todo::Attach(id.clone()));
        true
    }

    /// Asks the daemon to detach a pod; returns whether nothing of it is left already.
    pub fn delete_pod(&mut self, id: &AttachmentId, now: Instant) -> bool {
        let Some(daemon) = &mut self.daemon else { return false };
        if daemon.busy.contains(id) || self.disk.full {
            return false;
        }
        if !daemon.attached.contains_key(id) && !self.pods.contains_key(id) {
            return true;
        }
        daemon.busy.insert(id.clone());
        self.put_off(now, 50, Todo::Detach(id.clone()));
        false
    }

    /// Lets a pod's namespace vanish, and the pair with it.
    pub fn vanish(&mut self, id: &AttachmentId, now: Instant) {
        self.pods.remove(id);
        self.kernel.actual.veths.remove(&host_ifname(id));
        self.notify_of_kernel(now);
    }

    fn perform(&mut self, todo: Todo, now: Instant) {
        let local = self.clock.read(now);
        if let Todo::Ask(request) = todo {
            let answer = self.store.borrow_mut().perform(request, &mut self.link);
            return self.put_off(now, 40, Todo::Answer(answer));
        }
        if matches!(todo, Todo::Pass) && self.by_chance {
            self.shake_hands();
        }
        let Some(daemon) = &mut self.daemon else { return };
        match todo {
            Todo::Ask(_) => {}
            Todo::Answer(answer) => {
                let seen = match &answer {
                    StoreAnswer::Listed(Ok(snapshot)) => Some(snapshot.clone()),
                    _ => None,
                };
                daemon.control.handle_store(answer, local);
                self.drain(now);
                if let (Some(daemon), Some(seen)) = (&self.daemon, seen) {
                    self.broken.extend(laws::heeds_the_store(&daemon.control, &seen));
                }
            }
            Todo::Pass => {
                let Some(inputs) = daemon.pass.take() else { return };
                let found = self.kernel.underlay(&Default::default());
                let same = found.as_ref().is_ok_and(|found| *found == inputs.underlay);
                let meddled =
                    !self.meddling.is_empty() || self.kernel.refusals + self.kernel.failed_dumps > 0;
                let report = same.then(|| {
                    let mut kernel = Meddled::new(&mut self.kernel, std::mem::take(&mut self.meddling));
                    reconcile(&mut kernel, &inputs)
                });
                for failure in report.iter().flat_map(|report| &report.failed) {
                    if !meddled || failure.error.contains("not weft's") {
                        self.broken
                            .push(format!("the kernel refused to {}: {}", failure.what, failure.error));
                    }
                }
                if report.as_ref().is_some_and(|report| report.applied > 0) {
                    self.notify_of_kernel(now);
                }
                self.put_off(now, 30, Todo::PassDone(found, report));
            }
            Todo::PassDone(found, report) => {
                if let Some(report) = &report {
                    daemon.strays.clear();
                    daemon.fenced |= report.failed.is_empty();
                }
                daemon.control.handle_pass(found, report, local);
            }
            Todo::KernelChanged => daemon.control.handle_kernel_change(local),
            Todo::Attach(id) => self.attach(&id, local),
            Todo::Detach(id) => {
                self.kernel.actual.veths.remove(&host_ifname(&id));
                self.pods.remove(&id);
                daemon.busy.remove(&id);
                daemon.free(&id, &mut self.disk);
                daemon.tell_pods(local);
            }
        }
    }

    fn attach(&mut self, id: &AttachmentId, local: Instant) {
        let Some(daemon) = &mut self.daemon else { return };
        daemon.busy.remove(id);
        let bridged = self.kernel.actual.state.links.contains_key(BRIDGE);
        if bridged {
            let pod = daemon.attached[id].clone();
            let veth = VethState { bridged, hairpin: self.config.pods.hairpin, up: true, mtu: pod.mtu };
            self.kernel.actual.veths.insert(host_ifname(id), veth);
            self.pods.insert(id.clone(), pod);
        } else if !self.pods.contains_key(id) {
            daemon.free(id, &mut self.disk);
        }
        daemon.tell_pods(local);
    }

    /// Does what the control plane asks for.
    fn drain(&mut self, now: Instant) {
        let local = self.clock.read(now);
        loop {
            let Some(daemon) = &mut self.daemon else { return };
            match daemon.control.poll_output(local) {
                Output::Remember { durable } => {
                    let outcome = self.disk.remember(&daemon.control.memory, durable);
                    daemon.control.handle_remembered(outcome, local);
                }
                Output::Store(request) => self.put_off(now, 40, Todo::Ask(request)),
                Output::KeepRing(_) if self.disk.full => {
                    daemon.control.handle_ring_kept(Err("the disk is full".to_owned()), local);
                }
                Output::KeepRing(ring) => {
                    self.disk.ring = ring.clone();
                    daemon.control.handle_ring_kept(Ok(ring), local);
                }
                Output::Send { to, datagram } => self.outbox.push_back((to, datagram)),
                Output::Probe { .. } | Output::Listen(_) | Output::Pong { .. } | Output::Joined(_) => {}
                // Nothing stands between these machines.
                Output::LookAtTunnels | Output::Paths { .. } | Output::WantSession(_) | Output::Relay(_) => {}
                Output::TunnelKey(key) => {
                    self.disk.tunnel = key;
                    self.disk.next_tunnel = None;
                }
                Output::SpareKeyUsed => {
                    self.disk.spare_tunnel = another(self.disk.spare_tunnel);
                    daemon.control.use_spare_key(self.disk.spare_tunnel);
                }
                Output::Subnets(subnets) => daemon.pool.set_subnets(&subnets),
                Output::Reconcile(mut inputs) => {
                    daemon.complete(&mut inputs);
                    daemon.last = Some((*inputs).clone());
                    daemon.pass = Some(inputs);
                    self.put_off(now, 20, Todo::Pass);
                }
                Output::Fatal(sentence) => {
                    self.broken.push(format!("the daemon ended: {sentence}"));
                    return self.kill();
                }
                Output::Wait { until } => {
                    daemon.wake = self.clock.when(until).max(now);
                    self.broken.extend(laws::announces_only_what_it_holds(&daemon.control));
                    return;
                }
            }
        }
    }
}

impl net::Host for Machine {
    fn handle_datagram(&mut self, from: SocketAddr, datagram: &[u8], now: Instant) {
        let local = self.clock.read(now);
        if let Some(daemon) = &mut self.daemon {
            daemon.control.handle_datagram(from, datagram, local);
            self.drain(now);
        }
    }

    fn handle_timeout(&mut self, now: Instant) {
        while let Some(entry) = self.todo.first_entry()
            && entry.key().0 <= now
        {
            let (run, todo) = entry.remove();
            // What an earlier daemon asked of the store happens; its answers find no one.
            if run == self.run || matches!(todo, Todo::Ask(_)) {
                self.perform(todo, now);
                self.drain(now);
            }
        }
        let local = self.clock.read(now);
        if let Some(daemon) = &mut self.daemon {
            if daemon.wake <= now {
                daemon.control.handle_timeout(local);
            }
            if daemon.survey <= now {
                daemon.survey = now + SURVEY;
                let gone = |id: &&AttachmentId| !self.pods.contains_key(id) && !daemon.busy.contains(id);
                let gone: Vec<_> = daemon.attached.keys().filter(gone).cloned().collect();
                gone.iter().for_each(|id| daemon.free(id, &mut self.disk));
                daemon.tell_pods(local);
            }
        }
        self.drain(now);
    }

    fn poll(&mut self, now: Instant) -> net::Output {
        if let Some((to, datagram)) = self.outbox.pop_front() {
            return net::Output::Send { to, datagram };
        }
        let daemon = self.daemon.as_ref().map(|daemon| daemon.wake.min(daemon.survey));
        let todo = self.todo.keys().next().map(|(at, _)| *at);
        let until = daemon.into_iter().chain(todo).min().unwrap_or(now + SURVEY);
        net::Output::Wait { until: until.max(now) }
    }
}

impl Daemon {
    /// Adds to a pass the pods as they are now, as `node.rs` does.
    fn complete(&mut self, inputs: &mut Inputs) {
        let veth = |(id, pod): (&AttachmentId, &Pod)| HostVeth { ifname: host_ifname(id), mtu: pod.mtu };
        inputs.attachments = self.attached.iter().map(veth).collect();
        inputs.strays.retain(|name| inputs.attachments.iter().all(|veth| veth.ifname != *name));
        self.strays.clone_from(&inputs.strays);
    }

    fn free(&mut self, id: &AttachmentId, disk: &mut Disk) {
        if disk.full {
            return;
        }
        disk.journal.remove(id);
        self.attached.remove(id);
        self.pool.release(id);
    }

    /// Returns a subnet of which some address is neither free nor a pod's.
    pub fn leaked(&self) -> Option<Subnet> {
        let used = |subnet: Subnet| {
            let addresses = self.attached.values().flat_map(|pod| &pod.addresses.0);
            addresses.filter(|pod| subnet.contains(pod.address)).count() as u128
        };
        self.pool
            .subnets()
            .find(|subnet| self.pool.capacity(*subnet) != self.pool.free(*subnet) + used(*subnet))
    }

    fn tell_pods(&mut self, local: Instant) {
        self.control.handle_pods(self.attached.is_empty(), local);
    }
}
