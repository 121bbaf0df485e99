//! From a configuration to a running node, in the order that lets every mistake be told before anything changes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tracing::{info, warn};
use weft_ipam::pods::PodPool;
use weft_ipam::store::{EtcdStore, KubernetesStore, SqliteStore, StaticStore, Store};

use super::cluster::Cluster;
use super::handover::OPEN_AFTER;
use super::{Fatal, Inbox, Node, pods, sites, worker};
use crate::config::{Config, EncryptionConfig, StoreKind};
use crate::control::{Control, OwnKeys, PROBE_PORT, Start};
use crate::gossip::Sockets;
use crate::handover::{self, Heritage, Relays, Talk, Tunnels as Inherited};
use crate::journal::{self, Journal};
use crate::kernel::linux::Linux;
use crate::kernel::netlink::Conn;
use crate::kernel::{Kernel as _, UnderlaySpec, monitor, preflight};
use crate::kubernetes::{Kubernetes, News};
use crate::leases::Leases;
use crate::metrics;
use crate::plan::model::WIREGUARD;
use crate::relay::Relay;
use crate::ring_file::read_ring;
use crate::server::{self, Call, Door};
use crate::state::{self, StateDir, TunnelPlace};
use crate::tunnel::{TunnelConfig, TunnelSecret};

/// How many datagrams wait for the loop; more are dropped, and gossip repeats itself.
const DATAGRAMS: usize = 1024;
/// How many other events of a kind wait for the loop.
const EVENTS: usize = 64;

fn fatal(error: impl std::fmt::Display) -> Fatal {
    Fatal(error.to_string())
}

/// What a daemon starts after.
#[derive(Debug)]
pub enum Origin {
    /// Nothing that runs: another daemon of this node is a mistake.
    Alone,
    /// Another daemon, if one runs that offers it.
    TakeOver,
    /// Itself: another daemon did not take over after all.
    Back(Heritage),
}

/// How long a daemon that goes on waits for the lock of one that is just ending.
const LOCK: Duration = Duration::from_secs(5);

fn open_state(path: &Path, origin: Origin) -> Result<(StateDir, Heritage, bool), Fatal> {
    match origin {
        Origin::Alone => Ok((StateDir::open(path).map_err(fatal)?, Heritage::default(), false)),
        Origin::TakeOver => {
            let mut heritage = handover::take_over(path).map_err(fatal)?.unwrap_or_default();
            let dir = match heritage.lock.take() {
                Some(lock) => StateDir::adopt(path, lock),
                None => StateDir::open(path).map_err(fatal)?,
            };
            Ok((dir, heritage, true))
        }
        Origin::Back(mut heritage) => {
            let began = Instant::now();
            // What was not given away is still held.
            let mut kept = heritage.lock.take();
            loop {
                match kept.take().map_or_else(|| StateDir::open(path), |lock| Ok(StateDir::adopt(path, lock)))
                {
                    Err(state::StateError::Locked { .. }) if began.elapsed() < LOCK => {
                        std::thread::sleep(Duration::from_millis(20));
                    }
                    outcome => {
                        let dir = outcome.map_err(fatal)?;
                        info!("this daemon goes on");
                        heritage.resume();
                        return Ok((dir, heritage, true));
                    }
                }
            }
        }
    }
}

/// Returns the tunnels as they can be used with a configuration, and the daemon that is then to be told that it can go.
fn fitting(config: &Config, heritage: Inherited, talk: Option<Talk>) -> (Inherited, Option<Talk>) {
    let wanted = config.encryption.tunnels;
    match (heritage, talk) {
        (Inherited::Offered(mut offered), talk) if wanted && offered.are_at(config.encryption.port) => {
            offered.talk = talk;
            (Inherited::Offered(offered), None)
        }
        // With another port, or without tunnels: the other daemon must let go of the device first.
        (Inherited::Offered(offered), talk) => {
            drop(offered);
            talk.iter().for_each(Talk::finish);
            (Inherited::None, None)
        }
        (Inherited::Running(_), talk) if !wanted => (Inherited::None, talk),
        (tunnels, talk) => (tunnels, talk),
    }
}

/// Returns the relay that the node is to have, with the pairs that are relayed for already.
fn inherit_relay(
    config: &Config,
    heritage: Relays,
    talk: Option<&Talk>,
    now: Instant,
) -> Result<Option<Relay>, Fatal> {
    let Some(limits) = config.relay.clone() else { return Ok(None) };
    let offered = matches!(heritage, Relays::Offered);
    if let Relays::Running(relay) = heritage {
        return Ok(Some(relay));
    }
    let mut relay = Relay::new(limits, now).map_err(fatal)?;
    match talk.filter(|_| offered).map(Talk::take_relay) {
        Some(Ok(pairs)) => relay.adopt(pairs, now),
        Some(Err(error)) => warn!(err = %error, "what the earlier daemon relayed for finds another relay"),
        None => {}
    }
    Ok(Some(relay))
}

/// Puts a node together. Must run inside the runtime that will run it.
///
/// # Errors
/// The first thing that a person must resolve.
pub async fn start(config: Config, origin: Origin) -> Result<Node, Fatal> {
    let now = Instant::now();
    if let Some(sentence) = preflight::missing_capability() {
        return Err(Fatal(sentence));
    }
    let ring = read_ring(&config.cluster.key_file).map_err(Fatal)?;
    let trust = sites::trust(&config).map_err(Fatal)?;
    let (dir, heritage, waited_for) = open_state(&config.node.state_dir, origin)?;
    let Heritage { local, metrics, tunnels, relay, talk, .. } = heritage;
    let relay = inherit_relay(&config, relay, talk.as_ref(), now)?;
    let waited_for = waited_for && local.is_some();
    let (tunnels, predecessor) = fitting(&config, tunnels, talk);
    let key = dir.node_key().map_err(fatal)?;
    let mut memory = dir.memory().map_err(fatal)?;
    let preflight = preflight(&config, !memory.held.is_empty())?;
    memory.incarnation = memory.incarnation.saturating_add(1);
    dir.set_memory(&memory).map_err(fatal)?;

    let (kernel, tunnel) = open_kernel(&config.encryption, &dir)?;
    let kernel = kernel.with_inherited(tunnels, dir.active_peers());
    let (kernel_done, kernel_inbox) = mpsc::channel(EVENTS);
    let jobs = worker::spawn(Box::new(kernel), underlay_spec(&config), kernel_done).map_err(fatal)?;
    let (changed, kernel_changed) = mpsc::channel(1);
    monitor::watch(changed).map_err(fatal)?;

    let store = open_store(&config.store.kind)?;
    let (cluster, news) = follow_cluster(&config).await?;
    let (store_done, store_inbox) = mpsc::channel(EVENTS);
    let leases = Leases::new(store, store_done);

    let (pods_done, pods_inbox) = mpsc::channel(EVENTS);
    let boot = journal::boot_id().map_err(fatal)?;
    let pods = open_pods(&config, &dir, &memory, &boot, pods_done)?;

    let (datagrams, datagram_inbox) = mpsc::channel(DATAGRAMS);
    let sockets = Sockets::new(config.gossip.port, datagrams);
    let (probes, probe_inbox) = mpsc::channel(EVENTS);
    // Callers who waited for the hand-over wait until they can have an answer.
    let door = Door::new(!waited_for);
    let (local, metrics, call_inbox) = open_doors(&config, &door, local, metrics)?;
    let (take_over, take_overs) = mpsc::channel(1);
    super::handover::listen(&dir.file(handover::SOCKET), take_over);
    let inbox = Inbox {
        datagrams: datagram_inbox,
        probes: probe_inbox,
        store: store_inbox,
        kernel: kernel_inbox,
        kernel_changed,
        news,
        pods: pods_inbox,
        calls: call_inbox,
        take_overs,
        stop: signals().map_err(fatal)?,
    };
    info!(node = %config.node.name, site = %config.node.site, incarnation = memory.incarnation, "weftd started");
    let seed = state::random().map_err(fatal)?;
    let rekey = now + config.encryption.rotate_after;
    let start = Start { config, memory, boot, key, ring, tunnel, trust, seed };
    let control = Control::new(start, now);
    let mut node = Node {
        control,
        dir,
        sockets,
        probe_sockets: Sockets::new(PROBE_PORT, probes).unfragmented(),
        leases,
        pods,
        jobs,
        pings: BTreeMap::new(),
        joining: None,
        next_token: 1,
        leaving: None,
        inbox,
        preflight,
        unheard: Vec::new(),
        survey: now,
        rekey,
        rotated: None,
        untwinned: None,
        look: now,
        active: BTreeSet::new(),
        door,
        opening: waited_for.then(|| now + OPEN_AFTER),
        local,
        metrics,
        handing: None,
        cluster,
        relay,
        predecessor,
    };
    node.pods_changed(now);
    Ok(node)
}

fn underlay_spec(config: &Config) -> UnderlaySpec {
    UnderlaySpec {
        device: config.underlay.device.clone(),
        addresses: config.underlay.addresses.clone(),
        of_cluster: config.underlay.of_cluster,
        mtu: config.underlay.mtu,
    }
}

/// Opens the kernel, with the keys of the tunnels where the node has any.
fn open_kernel(encryption: &EncryptionConfig, dir: &StateDir) -> Result<(Linux, Option<OwnKeys>), Fatal> {
    let kernel = Linux::open().map_err(|error| {
        Fatal(format!("the kernel gives no netlink socket: {error}; weftd needs CAP_NET_ADMIN and nf_tables"))
    })?;
    if !encryption.tunnels {
        return Ok((kernel, None));
    }
    let read = |place| dir.tunnel_secret(place).map_err(fatal);
    let (mut secret, next, spare) =
        (read(TunnelPlace::Main)?, read(TunnelPlace::Next)?, read(TunnelPlace::Detour)?);
    let tunnels = TunnelConfig {
        device: WIREGUARD.into(),
        port: encryption.port,
        secret: secret.clone().expect("one is made where there is none"),
        seed: state::random().map_err(fatal)?,
    };
    let mut kernel = kernel.with_tunnels(tunnels, encryption.detour_port, encryption.implementation);
    if kernel.follows_user_space().map_err(fatal)? {
        secret = Some(dir.new_tunnel_secret(TunnelPlace::Main).map_err(fatal)?);
    }
    for secret in [&secret, &next, &spare].into_iter().flatten() {
        kernel.add_tunnel_secret(secret.clone());
    }
    let public = |secret: Option<TunnelSecret>| secret.map(|secret| secret.public());
    let keys = public(secret).zip(public(spare)).map(|(main, spare)| OwnKeys {
        main,
        next: public(next),
        spare,
        carrier: kernel.carrier(),
    });
    Ok((kernel, keys))
}

fn open_store(kind: &StoreKind) -> Result<Box<dyn Store>, Fatal> {
    Ok(match kind {
        StoreKind::Sqlite(path) => Box::new(SqliteStore::open(path.clone())),
        StoreKind::Etcd(options) => Box::new(EtcdStore::open(options.clone()).map_err(fatal)?),
        StoreKind::Kubernetes(options) => Box::new(KubernetesStore::open(options.clone()).map_err(fatal)?),
        StoreKind::Static(subnets) => Box::new(StaticStore::new(subnets.clone())),
    })
}

/// Follows the Kubernetes cluster that the node is in, where its leases are there.
async fn follow_cluster(config: &Config) -> Result<(Option<Cluster>, mpsc::Receiver<News>), Fatal> {
    let StoreKind::Kubernetes(options) = &config.store.kind else {
        // Nobody sends.
        return Ok((None, mpsc::channel(1).1));
    };
    let client = options.client().await.map_err(fatal)?;
    let (kubernetes, news) = Kubernetes::start(client, options, &config.cluster.key_file);
    Ok((Some(Cluster::new(kubernetes)), news))
}

/// Listens for people, for the shim and for who reads the metrics, with the sockets of an earlier daemon where they fit.
fn open_doors(
    config: &Config,
    door: &Door,
    local: Option<UnixListener>,
    metrics: Option<TcpListener>,
) -> Result<(UnixListener, Option<TcpListener>, mpsc::Receiver<Call>), Fatal> {
    let (calls, inbox) = mpsc::channel(EVENTS);
    let metrics = config.metrics.and_then(|address| metrics::listen(address, metrics));
    let local = server::listen(&config.node.socket, local).map_err(fatal)?;
    if let Some(metrics) = &metrics {
        metrics::serve(metrics.try_clone().map_err(fatal)?, door.clone(), calls.clone()).map_err(fatal)?;
    }
    server::serve(local.try_clone().map_err(fatal)?, door.clone(), calls).map_err(fatal)?;
    Ok((local, metrics, inbox))
}

/// Looks whether the cluster's ranges fit this machine. A node that holds a lease already keeps serving its pods.
fn preflight(config: &Config, established: bool) -> Result<Vec<String>, Fatal> {
    let cluster: Vec<_> = config.cluster.carver.cidrs().iter().map(|cidr| cidr.cidr).collect();
    let mut conn =
        Conn::open().map_err(|error| Fatal(format!("the kernel gives no netlink socket: {error}")))?;
    let findings = preflight::overlaps(&mut conn, &cluster).map_err(fatal)?;
    match findings.iter().find(|finding| finding.fatal && !established) {
        Some(finding) => Err(Fatal(finding.sentence.clone())),
        None => Ok(findings.into_iter().map(|finding| finding.sentence).collect()),
    }
}

fn open_pods(
    config: &Config,
    dir: &StateDir,
    memory: &state::Memory,
    boot: &str,
    done: mpsc::Sender<pods::Done>,
) -> Result<pods::Pods, Fatal> {
    let (journal, recovered) = Journal::open(&dir.file("pods.db"), boot).map_err(fatal)?;
    if recovered.stale > 0 {
        info!(stale = recovered.stale, "addresses of pods from before the last boot are free");
    }
    let subnets: Vec<_> = memory.held.iter().map(|held| held.subnet).collect();
    let pool = PodPool::new(&subnets, &config.pods.reserved, random_u64()?);
    Ok(pods::Pods::new(pool, journal, recovered.attachments, done))
}

fn random_u64() -> Result<u64, Fatal> {
    let bytes = state::random().map_err(fatal)?;
    Ok(u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")))
}

/// Returns a receiver of SIGTERM and SIGINT.
fn signals() -> std::io::Result<mpsc::Receiver<()>> {
    let (stop, inbox) = mpsc::channel(1);
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        let mut signal = signal(kind)?;
        let stop = stop.clone();
        tokio::spawn(async move {
            while signal.recv().await.is_some() {
                let _ = stop.send(()).await;
            }
        });
    }
    Ok(inbox)
}
