//! The loop: the shell around a node's control plane. Everything that can happen to a daemon is an [`Event`].
//!
//! It moves values between [`Control`], which decides, and the shells (sockets, store, kernel, pods, disk).
//! Invariants: nothing in here blocks for long; stopping leaves the data plane as it is.

mod calls;
mod cluster;
mod doctor;
mod handover;
mod keys;
mod paths;
mod paths_view;
pub mod pods;
mod reach;
mod sites;
mod start;
mod trace;
mod view;
mod worker;

use std::collections::{BTreeMap, BTreeSet};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep_until;
use tracing::{debug, info, warn};
use weft_wire::api::Reply;
use weft_wire::types::NodeName;

use crate::control::{Control, Output, StoreAnswer};
use crate::gossip::{Received, Sockets};
use crate::handover::{Heritage, Talk};
use crate::kernel::TunnelLook;
use crate::kubernetes::News;
use crate::leases::Leases;
use crate::plan::model::{HostVeth, Inputs};
use crate::relay::Relay;
use crate::server::{Call, Door};
use crate::state::StateDir;

pub use start::{Origin, start};

/// Between two looks for pods that vanished without a DEL.
const SURVEY: Duration = Duration::from_secs(30);
/// Between two looks whom there are tunnels with.
const LOOK: Duration = Duration::from_secs(2);
/// How long a leaving node waits for its store and its peers.
const LEAVE: Duration = Duration::from_secs(5);

/// Everything that can happen to a daemon.
#[derive(Debug)]
enum Event {
    /// A gossip datagram came.
    Datagram(Received),
    /// A probe or its answer came through the tunnel.
    Probe(Received),
    /// The store answered or changed.
    Store(StoreAnswer),
    /// The kernel thread finished a job.
    Kernel(worker::Done),
    /// Something of ours or of the underlay may have changed in the kernel.
    KernelChanged,
    /// The cluster that the node is in said something.
    News(News),
    /// A worker finished with a pod.
    Pod(pods::Done),
    /// A person or the shim asks.
    Call(Call),
    /// Another daemon wants to take over.
    TakeOver(Talk),
    /// Nobody is in any more, since the door was closed for another daemon.
    Quiet,
    /// A deadline passed.
    Tick,
    /// SIGTERM or SIGINT.
    Stop,
}

/// Why a daemon ended other than by a signal: one sentence that says what to do.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Fatal(pub String);

/// How a daemon ended.
#[derive(Debug)]
pub enum Ended {
    /// By a signal, or because the node has left.
    Stopped,
    /// For another daemon, to which this is to be handed over.
    HandOver(Heritage),
}

/// One node.
#[derive(Debug)]
pub struct Node {
    control: Control,
    dir: StateDir,
    sockets: Sockets,
    probe_sockets: Sockets,
    leases: Leases,
    pods: pods::Pods,
    jobs: std::sync::mpsc::Sender<worker::Job>,
    pings: BTreeMap<u64, calls::PendingPing>,
    /// Who waits to hear how joining another site went.
    joining: Option<oneshot::Sender<Reply>>,
    next_token: u64,
    leaving: Option<calls::Leaving>,
    inbox: Inbox,
    /// What was wrong with the machine at the start.
    preflight: Vec<String>,
    /// Why gossip does not listen on some address.
    unheard: Vec<String>,
    survey: Instant,
    /// When the tunnel key is replaced.
    rekey: Instant,
    /// When it was replaced last.
    rotated: Option<Instant>,
    /// When it was replaced last because another node has it.
    untwinned: Option<Instant>,
    /// When to look next whom there are tunnels with, and whom there were when that was written last.
    look: Instant,
    active: BTreeSet<NodeName>,
    /// Where callers wait while nobody is let in.
    door: Door,
    /// Until when nobody is let in unless the node is ready.
    opening: Option<Instant>,
    local: UnixListener,
    metrics: Option<TcpListener>,
    handing: Option<handover::Handing>,
    /// The Kubernetes cluster that the node is in, where its leases are there.
    cluster: Option<cluster::Cluster>,
    /// What it relays for others, where it does.
    relay: Option<Relay>,
    /// A daemon that was taken over from and has nothing left to do, until it is told so.
    predecessor: Option<Talk>,
}

/// The receiving ends of all shells.
#[derive(Debug)]
struct Inbox {
    datagrams: mpsc::Receiver<Received>,
    probes: mpsc::Receiver<Received>,
    store: mpsc::Receiver<StoreAnswer>,
    kernel: mpsc::Receiver<worker::Done>,
    kernel_changed: mpsc::Receiver<()>,
    news: mpsc::Receiver<News>,
    pods: mpsc::Receiver<pods::Done>,
    calls: mpsc::Receiver<Call>,
    take_overs: mpsc::Receiver<Talk>,
    stop: mpsc::Receiver<()>,
}

impl Node {
    /// Runs until a signal, until the node has left the cluster, or until another daemon can take over.
    ///
    /// # Errors
    /// A [`Fatal`] that a person must resolve.
    pub async fn run(mut self) -> Result<Ended, Fatal> {
        loop {
            if self.rests(Instant::now()) {
                return Ok(self.surrender().await);
            }
            let until = self.settle(Instant::now())?;
            match self.next_event(until).await {
                Event::Stop => {
                    if self.control.unremembered() {
                        self.remember(true, Instant::now());
                    }
                    self.note_active_peers();
                    self.end_tunnels().await;
                    info!("stopped, the data plane stays");
                    return Ok(Ended::Stopped);
                }
                event => self.handle(event, Instant::now()),
            }
            if self.left(Instant::now()) {
                info!("left the cluster");
                return Ok(Ended::Stopped);
            }
        }
    }

    async fn next_event(&mut self, until: Instant) -> Event {
        let inbox = &mut self.inbox;
        let closed = self.handing.as_ref().is_some_and(|handing| handing.closed && !handing.quiet);
        tokio::select! {
            Some(()) = inbox.stop.recv() => Event::Stop,
            Some(call) = inbox.calls.recv() => Event::Call(call),
            Some(done) = inbox.pods.recv() => Event::Pod(done),
            Some(done) = inbox.kernel.recv() => Event::Kernel(done),
            Some(answer) = inbox.store.recv() => Event::Store(answer),
            Some(news) = inbox.news.recv() => Event::News(news),
            Some(talk) = inbox.take_overs.recv() => Event::TakeOver(talk),
            () = self.door.quiet(), if closed => Event::Quiet,
            Some(()) = inbox.kernel_changed.recv() => Event::KernelChanged,
            Some(received) = inbox.probes.recv() => Event::Probe(received),
            Some(received) = inbox.datagrams.recv() => Event::Datagram(received),
            () = sleep_until(until.into()) => Event::Tick,
        }
    }

    fn handle(&mut self, event: Event, now: Instant) {
        match event {
            Event::Datagram(Received { from, datagram }) => {
                self.control.handle_datagram(from, &datagram, now)
            }
            Event::Probe(Received { from, datagram }) => self.control.handle_probe(from, &datagram, now),
            Event::Store(answer) => self.control.handle_store(answer, now),
            Event::Kernel(worker::Done::Reconciled { underlay, report }) => {
                if report.is_some() {
                    self.pods.set_strays(BTreeSet::new());
                }
                self.control.handle_pass(underlay, report.map(|report| *report), now);
                let gateways: Vec<_> = self.control.subnets().iter().map(|subnet| subnet.gateway()).collect();
                // Without its socket the probe stays unanswered, which blames nothing.
                drop(self.probe_sockets.set_addresses(&gateways));
            }
            Event::Kernel(worker::Done::Traffic(traffic)) => self.control.handle_traffic(&traffic, now),
            Event::Kernel(worker::Done::Strayed) => self.control.handle_kernel_change(now),
            Event::Kernel(worker::Done::Purged(left)) => self.take_purged(&left),
            // Only who ends asks for it, and takes the answer.
            Event::Kernel(worker::Done::Surrendered(_)) => {}
            Event::KernelChanged => self.control.handle_kernel_change(now),
            Event::Pod(done) => {
                if self.pods.handle_done(done) {
                    self.pods_changed(now);
                }
            }
            Event::News(news) => self.handle_news(news, now),
            Event::Call(call) => self.handle_call(call, now),
            Event::TakeOver(talk) => self.handle_take_over(talk, now),
            Event::Quiet => {
                if let Some(handing) = &mut self.handing {
                    handing.quiet = true;
                }
            }
            Event::Tick => {
                self.control.handle_timeout(now);
                self.expire_pings(now);
            }
            Event::Stop => {}
        }
    }

    /// Does what the control plane asks for, and returns when to wake.
    fn settle(&mut self, now: Instant) -> Result<Instant, Fatal> {
        if self.survey <= now {
            self.survey = now + SURVEY;
            self.pods.survey();
        }
        if self.rekey <= now || self.has_twin(now) {
            self.rotate_on_schedule(now);
        }
        if self.look <= now {
            self.look = now + LOOK;
            self.note_active_peers();
            self.tell_cluster(now);
        }
        let until = loop {
            match self.control.poll_output(now) {
                Output::Remember { durable } => self.remember(durable, now),
                Output::Store(request) => self.leases.ask(request),
                Output::Send { to, datagram } => self.sockets.send(to, &datagram),
                Output::Probe { to, datagram } => self.probe_sockets.send(to, &datagram),
                Output::TunnelKey(key) => self.turn_tunnel_key(key),
                Output::SpareKeyUsed => self.renew_spare_key(),
                Output::Subnets(subnets) => self.pods.set_subnets(&subnets),
                Output::Listen(addresses) => {
                    self.unheard =
                        self.sockets.set_addresses(&addresses).iter().map(ToString::to_string).collect();
                    for problem in &self.unheard {
                        warn!("{problem}");
                    }
                }
                Output::Joined(said) => self.finish_joining(said),
                Output::KeepRing(ring) => self.keep_ring(ring, now),
                Output::LookAtTunnels => self.look_at_tunnels(now),
                Output::Paths { key, places, keep, trial } => self.set_paths(&key, &places, keep, trial),
                Output::WantSession(key) => self.want_session(&key),
                Output::Relay(members) => self.relay(&members, now),
                Output::Reconcile(inputs) => self.reconcile(inputs),
                Output::Pong { token, rtt } => self.finish_ping(token, rtt),
                Output::Fatal(sentence) => return Err(Fatal(sentence)),
                Output::Wait { until } => break until,
            }
        };
        self.open_door(now);
        let wakes = [
            Some(until),
            Some(self.look),
            self.opening,
            self.rest_wake(now),
            Some(self.survey),
            Some(self.rekey),
            self.pings.values().map(|ping| ping.deadline).min(),
            self.leaving.as_ref().map(|leaving| leaving.wake(now)),
        ];
        Ok(wakes.into_iter().flatten().min().expect("the control plane always has a next time"))
    }

    /// Hands a pass to the kernel's thread, with the pods as they are now.
    fn reconcile(&mut self, mut inputs: Box<Inputs>) {
        inputs.strays = self.pods.set_strays(std::mem::take(&mut inputs.strays));
        inputs.attachments = self
            .pods
            .attachments()
            .map(|attachment| HostVeth { ifname: attachment.host_ifname(), mtu: attachment.mtu })
            .collect();
        self.jobs
            .send(worker::Job::Reconcile(inputs))
            .expect("the kernel's thread lives as long as the loop");
    }

    fn remember(&mut self, durable: bool, now: Instant) {
        let memory = &self.control.memory;
        let outcome = if durable { self.dir.set_memory(memory) } else { self.dir.set_memory_of_boot(memory) };
        self.control.handle_remembered(outcome.map_err(|error| error.to_string()), now);
    }

    /// Writes down whom there are tunnels with, for a daemon that starts without these sessions.
    fn note_active_peers(&mut self) {
        let tunnels = self.control.pass.report.as_ref().and_then(|report| report.tunnels.as_ref());
        let Some(active) = tunnels.map(TunnelLook::active).filter(|active| *active != self.active) else {
            return;
        };
        match self.dir.set_active_peers(&active) {
            Ok(()) => self.active = active,
            Err(error) => debug!(err = %error, "active peers not written"),
        }
    }

    /// After the set of pods changed.
    fn pods_changed(&mut self, now: Instant) {
        self.control.handle_pods(self.pods.is_empty(), now);
    }
}
