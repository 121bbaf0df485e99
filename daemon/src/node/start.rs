//! From a configuration to a running node, in the order that lets every mistake be told before anything changes.

use std::collections::BTreeMap;
use std::time::Instant;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tracing::info;
use weft_ipam::pods::PodPool;
use weft_ipam::store::{SqliteStore, StaticStore, Store};

use super::{Fatal, Inbox, Node, keys, pods, worker};
use crate::config::{Config, StoreKind};
use crate::control::{Control, PROBE_PORT, Start};
use crate::gossip::Sockets;
use crate::journal::{self, Journal};
use crate::kernel::linux::Linux;
use crate::kernel::netlink::Conn;
use crate::kernel::{UnderlaySpec, monitor, preflight};
use crate::leases::Leases;
use crate::metrics;
use crate::plan::model::WIREGUARD;
use crate::server;
use crate::state::{self, StateDir};
use crate::tunnel::TunnelConfig;

/// How many datagrams wait for the loop; more are dropped, and gossip repeats itself.
const DATAGRAMS: usize = 1024;
/// How many other events of a kind wait for the loop.
const EVENTS: usize = 64;

fn fatal(error: impl std::fmt::Display) -> Fatal {
    Fatal(error.to_string())
}

/// Puts a node together. Must run inside the runtime that will run it.
///
/// # Errors
/// The first thing that a person must resolve.
pub fn start(config: Config) -> Result<Node, Fatal> {
    let now = Instant::now();
    if let Some(sentence) = preflight::missing_capability() {
        return Err(Fatal(sentence));
    }
    let ring = keys::read_ring(&config.cluster.key_file).map_err(Fatal)?;
    let dir = StateDir::open(&config.node.state_dir).map_err(fatal)?;
    let key = dir.node_key().map_err(fatal)?;
    let mut memory = dir.memory().map_err(fatal)?;
    let preflight = preflight(&config, !memory.held.is_empty())?;
    memory.incarnation = memory.incarnation.saturating_add(1);
    dir.set_memory(&memory).map_err(fatal)?;

    let spec = UnderlaySpec {
        device: config.underlay.device.clone(),
        addresses: config.underlay.addresses.clone(),
        mtu: config.underlay.mtu,
    };
    let kernel = Linux::open().map_err(|error| {
        Fatal(format!("the kernel gives no netlink socket: {error}; weftd needs CAP_NET_ADMIN and nf_tables"))
    })?;
    let tunnel = config.encryption.tunnels.then(|| dir.tunnel_secret()).transpose().map_err(fatal)?;
    let kernel = match &tunnel {
        None => kernel,
        Some(secret) => kernel.with_tunnels(TunnelConfig {
            device: WIREGUARD.into(),
            port: config.encryption.port,
            secret: secret.clone(),
            seed: state::random().map_err(fatal)?,
        }),
    };
    let (kernel_done, kernel_inbox) = mpsc::channel(EVENTS);
    let jobs = worker::spawn(Box::new(kernel), spec, kernel_done).map_err(fatal)?;
    let (changed, kernel_changed) = mpsc::channel(1);
    monitor::watch(changed).map_err(fatal)?;

    let store: Box<dyn Store> = match &config.store.kind {
        StoreKind::Sqlite(path) => Box::new(SqliteStore::open(path.clone())),
        StoreKind::Static(subnets) => Box::new(StaticStore::new(subnets.clone())),
    };
    let (store_done, store_inbox) = mpsc::channel(EVENTS);
    let leases = Leases::new(store, store_done);

    let (pods_done, pods_inbox) = mpsc::channel(EVENTS);
    let boot = journal::boot_id().map_err(fatal)?;
    let pods = open_pods(&config, &dir, &memory, &boot, pods_done)?;

    let (datagrams, datagram_inbox) = mpsc::channel(DATAGRAMS);
    let sockets = Sockets::new(config.gossip.port, datagrams);
    let (probes, probe_inbox) = mpsc::channel(EVENTS);
    let (calls, call_inbox) = mpsc::channel(EVENTS);
    if let Some(address) = config.metrics {
        metrics::serve(address, calls.clone());
    }
    server::serve(&config.node.socket, calls).map_err(fatal)?;
    let inbox = Inbox {
        datagrams: datagram_inbox,
        probes: probe_inbox,
        store: store_inbox,
        kernel: kernel_inbox,
        kernel_changed,
        pods: pods_inbox,
        calls: call_inbox,
        stop: signals().map_err(fatal)?,
    };
    info!(node = %config.node.name, site = %config.node.site, incarnation = memory.incarnation, "weftd started");
    let seed = state::random().map_err(fatal)?;
    let tunnel = tunnel.map(|secret| secret.public());
    let rekey = now + config.encryption.rotate_after;
    let start = Start { config, memory, boot, key, ring, tunnel, seed };
    let control = Control::new(start, now);
    let mut node = Node {
        control,
        dir,
        sockets,
        probe_sockets: Sockets::new(PROBE_PORT, probes),
        leases,
        pods,
        jobs,
        pings: BTreeMap::new(),
        next_token: 1,
        leaving: None,
        inbox,
        preflight,
        unheard: Vec::new(),
        survey: now,
        rekey,
        untwinned: None,
    };
    node.pods_changed(now);
    Ok(node)
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
