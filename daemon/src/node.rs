//! The loop: the one owner of a node's state. Everything that can happen to a daemon is an [`Event`].
//!
//! It moves values between the cores (mesh, leases, plan) and the shells (sockets, store, kernel, pods) and
//! decides nothing that a core can decide. Invariants: nothing in here blocks; an event wakes, and the pass
//! that follows reads everything; stopping leaves the data plane as it is.

mod calls;
mod facts;
mod keys;
pub mod pods;
mod probe;
mod start;
mod view;
mod worker;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::time::sleep_until;
use tracing::{debug, error, info, warn};
use weft_ipam::lease::{LeaseConflict, LeaseEvent};
use weft_wire::mesh::{Mesh, MeshEvent, NodeKey, Output, Owner};
use weft_wire::seal::KeyRing;
use weft_wire::types::{PublicKey, Subnet};

use crate::config::{Config, TxChecksum};
use crate::gossip::{Received, Sockets};
use crate::leases::{self, Leases};
use crate::plan::model::{Inputs, Underlay};
use crate::reconcile::Report;
use crate::server::Call;
use crate::state::{Memory, StateDir};

pub use start::start;

/// Changes that come together are planned together.
const COALESCE: Duration = Duration::from_millis(50);
/// Between two passes that changes in the kernel ask for.
const KERNEL_QUIET: Duration = Duration::from_millis(200);
/// Between two looks at the kernel when nothing woke the node.
const RESYNC: Duration = Duration::from_secs(30);
/// Between two looks for pods that vanished without a DEL.
const SURVEY: Duration = Duration::from_secs(30);
/// After a pass with failures.
const RETRY: Duration = Duration::from_secs(1);
/// What is remembered is written at most this often.
const REMEMBER: Duration = Duration::from_millis(500);
/// Peers that an earlier run knew are kept this long without a word of them, where no store speaks for them.
const REMEMBERED_PEER: Duration = Duration::from_secs(600);
/// A node that hears of another with its name this soon after its start is the later one.
const NEWCOMER: Duration = Duration::from_secs(20);
/// How long a leaving node waits for its store and its peers.
const LEAVE: Duration = Duration::from_secs(5);

/// Everything that can happen to a daemon.
#[derive(Debug)]
enum Event {
    /// A gossip datagram came.
    Datagram(Received),
    /// A checksum probe came through the tunnel.
    Probe(Received),
    /// The store answered or changed.
    Store(leases::Done),
    /// The kernel thread finished a job.
    Kernel(worker::Done),
    /// Something of ours or of the underlay may have changed in the kernel.
    KernelChanged,
    /// A worker finished with a pod.
    Pod(pods::Done),
    /// A person or the shim asks.
    Call(Call),
    /// A deadline passed.
    Tick,
    /// SIGTERM or SIGINT.
    Stop,
}

/// Why a daemon ended other than by a signal: one sentence that says what to do.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Fatal(pub String);

/// One node.
#[derive(Debug)]
pub struct Node {
    config: Config,
    dir: StateDir,
    memory: Memory,
    memory_dirty: Option<Instant>,
    started: Instant,
    mesh: Mesh,
    sockets: Sockets,
    leases: Leases,
    pods: pods::Pods,
    underlay: Result<Underlay, String>,
    jobs: std::sync::mpsc::Sender<worker::Job>,
    pass: Pass,
    problems: Problems,
    pings: BTreeMap<u64, calls::PendingPing>,
    leaving: Option<calls::Leaving>,
    inbox: Inbox,
    ring: KeyRing,
    authority: Option<BTreeMap<Subnet, Owner>>,
    next_token: u64,
    /// The next node key, until the leases carry it.
    endorsed: Option<NodeKey>,
    preflight: Vec<String>,
    boot: String,
    /// Host ends that the last pass found and no pod accounted for.
    strays: BTreeSet<String>,
    survey: Instant,
    probe: probe::Probe,
    probe_sockets: Sockets,
}

/// The receiving ends of all shells.
#[derive(Debug)]
struct Inbox {
    datagrams: mpsc::Receiver<Received>,
    probes: mpsc::Receiver<Received>,
    store: mpsc::Receiver<leases::Done>,
    kernel: mpsc::Receiver<worker::Done>,
    kernel_changed: mpsc::Receiver<()>,
    pods: mpsc::Receiver<pods::Done>,
    calls: mpsc::Receiver<Call>,
    stop: mpsc::Receiver<()>,
}

/// Where the reconciler stands.
#[derive(Debug, Default)]
struct Pass {
    running: bool,
    due: Option<Instant>,
    resync: Option<Instant>,
    ended: Option<Instant>,
    report: Option<Report>,
    last_ok: Option<Instant>,
    passes: u64,
}

/// What people should hear of until it is over.
#[derive(Debug, Default)]
struct Problems {
    wrong_key: Option<(SocketAddr, Instant)>,
    duplicate_name: Option<(SocketAddr, PublicKey, Instant)>,
    route_conflicts: BTreeMap<String, Instant>,
    lease: BTreeMap<String, Instant>,
    gossip: Vec<String>,
    memory: Option<String>,
}

impl Node {
    /// Runs until a signal, or until the node has left the cluster.
    ///
    /// # Errors
    /// A [`Fatal`] that a person must resolve.
    pub async fn run(mut self) -> Result<(), Fatal> {
        self.wake(Instant::now());
        loop {
            let now = Instant::now();
            let until = self.settle(now)?;
            match self.next_event(until).await {
                Event::Stop => {
                    self.remember_now();
                    info!("stopped, the data plane stays");
                    return Ok(());
                }
                event => self.handle(event, Instant::now())?,
            }
            if self.left(Instant::now()) {
                info!("left the cluster");
                return Ok(());
            }
        }
    }

    async fn next_event(&mut self, until: Instant) -> Event {
        let inbox = &mut self.inbox;
        tokio::select! {
            Some(()) = inbox.stop.recv() => Event::Stop,
            Some(call) = inbox.calls.recv() => Event::Call(call),
            Some(done) = inbox.pods.recv() => Event::Pod(done),
            Some(done) = inbox.kernel.recv() => Event::Kernel(done),
            Some(done) = inbox.store.recv() => Event::Store(done),
            Some(()) = inbox.kernel_changed.recv() => Event::KernelChanged,
            Some(received) = inbox.probes.recv() => Event::Probe(received),
            Some(received) = inbox.datagrams.recv() => Event::Datagram(received),
            () = sleep_until(until.into()) => Event::Tick,
        }
    }

    fn handle(&mut self, event: Event, now: Instant) -> Result<(), Fatal> {
        match event {
            Event::Datagram(Received { datagram, .. }) if probe::is_answer(&datagram) => {
                self.take_probe_answer(&datagram, now);
            }
            Event::Datagram(Received { from, datagram }) => {
                if let Err(reason) = self.mesh.handle_datagram(from, &datagram, now) {
                    debug!(%from, %reason, "gossip datagram dropped");
                }
            }
            Event::Probe(Received { from, datagram }) => self.answer_probe(from, &datagram),
            Event::Store(done) => {
                self.leases.handle(done, now);
                self.take_lease_table(now);
            }
            Event::Kernel(worker::Done::Reconciled { underlay, report }) => {
                self.take_pass(underlay, report, now);
            }
            Event::Kernel(worker::Done::Purged(left)) => self.take_purged(&left),
            Event::KernelChanged => self.wake_for_kernel(now),
            Event::Pod(done) => {
                if self.pods.handle_done(done) {
                    self.pods_changed(now);
                }
            }
            Event::Call(call) => self.handle_call(call, now),
            Event::Tick => {
                self.mesh.handle_timeout(now);
                self.leases.core.handle_timeout(now);
                self.expire_pings(now);
            }
            Event::Stop => {}
        }
        Ok(())
    }

    /// Drains the cores, starts a pass if one is due, and returns when to wake.
    fn settle(&mut self, now: Instant) -> Result<Instant, Fatal> {
        let (events, lease_wake) = self.leases.drain(now);
        for event in events {
            self.handle_lease_event(event, now)?;
        }
        let mesh_wake = loop {
            match self.mesh.poll_output(now) {
                Output::Send { to, datagram } => self.sockets.send(to, &datagram),
                Output::Event(event) => self.handle_mesh_event(event, now)?,
                Output::Wait { until, .. } => break until,
            }
        };
        self.run_probe(now);
        self.start_pass(now);
        self.remember_if_due(now);
        let wakes = [
            Some(lease_wake),
            Some(mesh_wake),
            self.pass.due.filter(|_| !self.pass.running),
            self.pass.resync,
            self.memory_dirty,
            self.probe_wake(),
            Some(self.survey),
            self.pings.values().map(|ping| ping.deadline).min(),
            self.leaving.as_ref().map(|leaving| leaving.wake(now)),
        ];
        Ok(wakes.into_iter().flatten().min().unwrap_or(now + RESYNC))
    }

    fn handle_lease_event(&mut self, event: LeaseEvent, now: Instant) -> Result<(), Fatal> {
        match event {
            LeaseEvent::Acquired(held) | LeaseEvent::Renewed(held) => {
                debug!(subnet = %held.subnet, epoch = %held.epoch, "lease held");
                self.use_next_key(now);
                self.problems.lease.clear();
            }
            LeaseEvent::Lost { subnet, to } => {
                let owner = to.map_or_else(|| "no one".to_owned(), |node| node.to_string());
                error!(%subnet, owner, "lease lost, the subnet is no longer announced");
                self.problems.lease.insert(
                    format!("the lease of {subnet} was lost to {owner}; recreate the pods that still use it"),
                    now,
                );
            }
            LeaseEvent::Released(subnet) => info!(%subnet, "lease released"),
            LeaseEvent::Exhausted { cidrs, capacity, .. } => {
                let cidrs: Vec<_> = cidrs.iter().map(ToString::to_string).collect();
                let sentence = format!(
                    "no free node subnet in {}: all {capacity} are leased; add a CIDR to cluster.cidrs or remove nodes that are gone",
                    cidrs.join(", ")
                );
                self.tell_lease_problem(sentence, now);
            }
            LeaseEvent::Conflict(conflict) => self.handle_lease_conflict(&conflict, now)?,
            other => debug!(event = ?other, "lease event"),
        }
        self.leases_changed(now);
        Ok(())
    }

    fn handle_lease_conflict(&mut self, conflict: &LeaseConflict, now: Instant) -> Result<(), Fatal> {
        let name = &self.config.node.name;
        let sentence = match conflict {
            LeaseConflict::DuplicateName { subnet, key } => {
                let sentence = duplicate_name(name.as_str(), &format!("writes the lease of {subnet}"), key);
                if now.duration_since(self.started) < NEWCOMER {
                    return Err(Fatal(sentence));
                }
                sentence
            }
            LeaseConflict::FixedTaken { subnet, owner } => format!(
                "the configured subnet overlaps {subnet}, which {owner} leases; choose another in store.subnets"
            ),
            LeaseConflict::Outside { subnet } => format!(
                "the held subnet {subnet} is outside cluster.cidrs; it is kept while pods use it, drain the node to renumber it"
            ),
            LeaseConflict::Unreadable { subnet, why } => {
                format!("the store's entry for {subnet} cannot be read ({why}); it is left alone")
            }
            other => format!("lease conflict: {other:?}"),
        };
        self.tell_lease_problem(sentence, now);
        Ok(())
    }

    fn tell_lease_problem(&mut self, sentence: String, now: Instant) {
        if self.problems.lease.insert(sentence.clone(), now).is_none() {
            warn!("{sentence}");
        }
    }

    fn handle_mesh_event(&mut self, event: MeshEvent, now: Instant) -> Result<(), Fatal> {
        match event {
            MeshEvent::RoutesChanged => self.wake(now),
            MeshEvent::MemberChanged { node, state } => {
                info!(peer = %node, %state, "peer changed");
                self.wake(now);
            }
            MeshEvent::Pong { token, rtt, .. } => self.finish_ping(token, rtt),
            MeshEvent::Conflict { subnet, kept, refused } => {
                let sentence = format!(
                    "{refused} and {kept} both claim addresses of {subnet}; {kept} keeps them here, give {refused} another subnet"
                );
                if self.problems.route_conflicts.insert(sentence.clone(), now).is_none() {
                    warn!(%subnet, %kept, %refused, "two nodes claim one subnet");
                }
            }
            MeshEvent::DuplicateName { from, key } => {
                let sentence =
                    duplicate_name(self.config.node.name.as_str(), &format!("gossips at {from}"), &key);
                if now.duration_since(self.started) < NEWCOMER && !self.established() {
                    return Err(Fatal(sentence));
                }
                warn!(%from, ?key, "another node has this node's name");
                self.problems.duplicate_name = Some((from, key, now));
            }
            MeshEvent::WrongKey { from } => {
                warn!(%from, "gossip comes that no key of the ring opens");
                self.problems.wrong_key = Some((from, now));
            }
        }
        Ok(())
    }

    /// Whether the node has been announced with a lease of its own.
    fn established(&self) -> bool {
        self.mesh.record().is_some_and(|record| !record.facts.subnets.is_empty())
            && self.mesh.members().next().is_some()
    }

    /// Asks for a pass soon.
    fn wake(&mut self, now: Instant) {
        let due = now + COALESCE;
        self.pass.due = Some(self.pass.due.map_or(due, |earlier| earlier.min(due)));
    }

    /// Asks for a pass because the kernel changed; a foreign program that changes it all the time gets a pass
    /// five times a second.
    fn wake_for_kernel(&mut self, now: Instant) {
        let earliest = self.pass.ended.map_or(now, |ended| ended + KERNEL_QUIET);
        let due = earliest.max(now + COALESCE);
        self.pass.due = Some(self.pass.due.map_or(due, |earlier| earlier.min(due)));
    }

    fn start_pass(&mut self, now: Instant) {
        if self.pass.resync.is_some_and(|resync| resync <= now) {
            self.pass.due = Some(now);
        }
        if self.survey <= now {
            self.survey = now + SURVEY;
            self.pods.survey();
        }
        if self.pass.running || self.leaving.is_some() || self.pass.due.is_none_or(|due| due > now) {
            return;
        }
        let inputs: Inputs = self.inputs(now);
        self.pass.due = None;
        self.pass.resync = Some(now + RESYNC);
        self.pass.running = self.jobs.send(worker::Job::Reconcile(Box::new(inputs))).is_ok();
    }

    fn take_pass(
        &mut self,
        found: Result<Underlay, crate::kernel::UnderlayError>,
        report: Option<Report>,
        now: Instant,
    ) {
        self.pass.running = false;
        self.pass.ended = Some(now);
        self.pass.passes += 1;
        match found {
            Err(error) => {
                let error = error.to_string();
                if self.underlay.as_ref().err() != Some(&error) {
                    warn!(err = error, "no underlay");
                }
                // What the kernel carries stays: the underlay may come back as it was.
                self.underlay = self.underlay.clone().or(Err(error));
                self.pass.due = Some(now + RETRY);
            }
            Ok(found) => {
                if self.underlay.as_ref() != Ok(&found) {
                    info!(device = found.device, mtu = found.mtu, addresses = ?found.addresses, "underlay found");
                    self.underlay = Ok(found);
                    self.underlay_changed(now);
                }
            }
        }
        if let Some(report) = report {
            if report.failed.is_empty() {
                self.pass.last_ok = Some(now);
            } else {
                for failure in &report.failed {
                    warn!(what = failure.what, err = failure.error, "kernel refused a change");
                }
                self.pass.due.get_or_insert(now + RETRY);
            }
            self.pods.set_strays(BTreeSet::new());
            self.strays = report.unknown_veths.iter().cloned().collect();
            if !self.strays.is_empty() {
                self.pass.due.get_or_insert(now + RETRY);
            }
            self.pass.report = Some(report);
            let gateways: Vec<_> = self.subnets().iter().map(|subnet| subnet.gateway()).collect();
            // Without its socket the probe stays unanswered, which blames nothing.
            drop(self.probe_sockets.set_addresses(&gateways));
        } else {
            self.wake(now);
        }
    }

    fn probe_wake(&self) -> Option<Instant> {
        self.probe.wake().filter(|_| self.config.overlay.tx_checksum == TxChecksum::Auto)
    }

    /// Asks a peer through the tunnel whether checksums survive it, as long as that is open.
    fn run_probe(&mut self, now: Instant) {
        if self.probe_wake().is_none_or(|wake| wake > now) {
            return;
        }
        let before = self.probe.offload();
        let peer = self.tunnelled_gateway();
        if let Some((to, request)) = self.probe.poll(peer, now) {
            self.probe_sockets.send(to, &request);
        }
        if self.probe.offload() != before {
            self.wake(now);
        }
    }

    /// Answers a peer's probe over the underlay, to where the peer gossips: no one else gets an answer.
    fn answer_probe(&mut self, from: SocketAddr, datagram: &[u8]) {
        let Some(answer) = probe::answer_to(datagram) else { return };
        let asker = self.mesh.members().find(|member| {
            member.verdict.is_accepted()
                && member.record.facts.subnets.iter().any(|leased| leased.subnet.contains(from.ip()))
        });
        if let Some(to) = asker.and_then(|member| member.record.facts.gossip.first().copied()) {
            self.sockets.send(to, &answer);
        }
    }

    fn take_probe_answer(&mut self, datagram: &[u8], now: Instant) {
        if self.probe.wake().is_none() {
            return;
        }
        self.probe.handle_answer(datagram);
        if self.probe.wake().is_none() {
            let broken = self.probe.is_broken();
            if broken {
                warn!("this kernel breaks TX checksum offload in the tunnel, it is off");
            } else {
                info!("TX checksum offload works through the tunnel, it stays on");
            }
            self.memory.tx_checksum_off = broken.then(|| self.boot.clone());
            self.touch_memory(now);
            self.remember_now();
            self.wake(now);
        }
    }

    fn remember_if_due(&mut self, now: Instant) {
        if self.memory_dirty.is_some_and(|due| due <= now) {
            self.remember_now();
        }
    }

    fn remember_now(&mut self) {
        if self.memory_dirty.take().is_some() {
            self.problems.memory = self.dir.set_memory(&self.memory).err().map(|error| {
                warn!(err = %error, "memory not written");
                self.memory_dirty = Some(Instant::now() + RETRY);
                error.to_string()
            });
        }
    }
}

fn duplicate_name(name: &str, what: &str, key: &PublicKey) -> String {
    format!(
        "another node named {name} (key {}) {what}; give this node its own node.name, or stop the other",
        key.short()
    )
}
