//! Metrics for Prometheus over plain HTTP: `GET /metrics`, and `GET /readyz` for who only asks whether it is well.
//!
//! It holds no numbers: each scrape asks the loop, as `weft status` does. Invariant: a client gets one short
//! request, one answer and a bounded time.

use std::fmt::Write;
use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::timeout;
use tracing::{debug, warn};
use weft_wire::api::{Count, Empty, Relaying, ReplyBody, Request, RequestBody, SitePath, Status};

use crate::server::{Call, Door};

const CONNECTIONS: usize = 16;
const REQUEST_MAX: usize = 4096;
const PATIENCE: Duration = Duration::from_secs(5);

/// Makes the socket, or takes the one that an earlier daemon handed over if it is at the same address. An address that cannot
/// be listened on is told in the log, and nothing else stops.
pub fn listen(address: SocketAddr, inherited: Option<StdListener>) -> Option<StdListener> {
    let same = |listener: &StdListener| listener.local_addr().is_ok_and(|held| held == address);
    if let Some(listener) = inherited.filter(same) {
        return Some(listener);
    }
    let listener = StdListener::bind(address);
    listener
        .inspect_err(|error| {
            warn!(%address, err = %error, "metrics not served; set metrics.listen to a free address, or \"off\"");
        })
        .ok()
}

/// Serves a socket until the loop goes away.
///
/// # Errors
/// Where the runtime does not take it.
pub fn serve(listener: StdListener, door: Door, calls: mpsc::Sender<Call>) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    tokio::spawn(accept(TcpListener::from_std(listener)?, door, calls));
    Ok(())
}

async fn accept(listener: TcpListener, door: Door, calls: mpsc::Sender<Call>) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    while let Ok(slot) = slots.clone().acquire_owned().await {
        let Some((accepted, let_in)) = door.admit(listener.accept()).await else { continue };
        match accepted {
            Ok((stream, _)) => {
                let calls = calls.clone();
                tokio::spawn(async move {
                    match timeout(PATIENCE, answer(stream, calls)).await {
                        Ok(Ok(())) => {}
                        outcome => debug!(?outcome, "scrape not answered"),
                    }
                    drop((slot, let_in));
                });
            }
            // Out of descriptors, as a rule: some come back when other connections end.
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
        if calls.is_closed() {
            return;
        }
    }
}

async fn answer(mut stream: TcpStream, calls: mpsc::Sender<Call>) -> io::Result<()> {
    let mut head = Vec::new();
    while !head.windows(4).any(|window| window == b"\r\n\r\n") {
        let mut chunk = [0; 512];
        let read = stream.read(&mut chunk).await?;
        if read == 0 || head.len() + read > REQUEST_MAX {
            return Ok(());
        }
        head.extend_from_slice(&chunk[..read]);
    }
    let line = String::from_utf8_lossy(&head);
    let mut words = line.split_ascii_whitespace();
    let (code, body) = match (words.next(), words.next()) {
        (Some("GET"), Some("/metrics")) => ("200 OK", text(&status(&calls).await?)),
        (Some("GET"), Some("/readyz")) => {
            let status = status(&calls).await?;
            if status.ready {
                ("200 OK", "ready\n".into())
            } else {
                ("503 Service Unavailable", status.blocked + "\n")
            }
        }
        (Some("GET"), Some(_)) => ("404 Not Found", "try /metrics or /readyz\n".into()),
        _ => ("405 Method Not Allowed", "use GET\n".into()),
    };
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    let mut reply = format!("HTTP/1.1 {code}\r\ncontent-type: {kind}\r\n");
    write!(reply, "content-length: {}\r\nconnection: close\r\n\r\n{body}", body.len())
        .expect("a String takes all that is written");
    stream.write_all(reply.as_bytes()).await
}

async fn status(calls: &mpsc::Sender<Call>) -> io::Result<Status> {
    let gone = || io::Error::other("the daemon is stopping");
    let request = Request { body: Some(RequestBody::Status(Empty {})) };
    let (reply, answer) = oneshot::channel();
    calls.send(Call { request, privileged: false, reply }).await.map_err(|_| gone())?;
    match answer.await.map_err(|_| gone())?.body {
        Some(ReplyBody::Status(status)) => Ok(status),
        _ => Err(gone()),
    }
}

#[derive(Debug, Clone, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ReasonLabel {
    reason: String,
}

#[derive(Debug, Clone, Hash, PartialEq, Eq, EncodeLabelSet)]
struct SiteLabel {
    site: String,
}

#[derive(Debug, Clone, Hash, PartialEq, Eq, EncodeLabelSet)]
struct StateLabel {
    state: &'static str,
}

/// Writes a status in the OpenMetrics text format.
fn text(status: &Status) -> String {
    let mut registry = Registry::with_prefix("weft");
    let mut gauge = |name: &str, help: &str, value: u64| {
        let gauge = Gauge::<i64>::default();
        gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        registry.register(name, help, gauge);
    };
    let store = status.store.clone().unwrap_or_default();
    let reconcile = status.reconcile.clone().unwrap_or_default();
    gauge("ready", "Whether pods can be attached", status.ready.into());
    gauge("pods", "Pods attached to the node", status.pods.into());
    gauge("pod_mtu_bytes", "MTU of pods", status.pod_mtu.into());
    gauge("warnings", "Sentences that `weft status` warns with", status.warnings.len() as u64);
    gauge("store_healthy", "Whether the lease store answers", store.healthy.into());
    gauge(
        "store_stale_milliseconds",
        "Age of the view of the lease store",
        store.stale_ms.unwrap_or_default(),
    );
    gauge("reconcile_ok", "Whether the last pass over the kernel met no refusal", reconcile.last_ok.into());
    gauge(
        "reconcile_failed",
        "Changes that the kernel refused in the last pass",
        reconcile.failed.len() as u64,
    );
    gauge("reconcile_passes", "Passes over the kernel since the daemon started", reconcile.passes);
    gauge("uptime_seconds", "How long the daemon has run", status.uptime_s);
    let reach = status.reach.clone().unwrap_or_default();
    gauge("nat_keepers", "Members that this node keeps a way open to", reach.keepers.len() as u64);
    let counts = status.peers.clone().unwrap_or_default();
    let peers = Family::<StateLabel, Gauge>::default();
    for (state, count) in [("alive", counts.alive), ("suspect", counts.suspect), ("dead", counts.dead)] {
        peers.get_or_create(&StateLabel { state }).set(count.into());
    }
    registry.register("peers", "Other nodes by state", peers);
    let forwarded = Counter::<u64>::default();
    forwarded.inc_by(reach.forwarded);
    registry.register("gossip_forwarded_datagrams", "Datagrams passed on to members behind NAT", forwarded);
    let not_forwarded = by_reason(&reach.dropped);
    registry.register("gossip_unforwarded_datagrams", "Datagrams not passed on, by reason", not_forwarded);
    let refused = by_reason(&status.refused_records);
    registry.register("gossip_refused_records", "Records of nodes not taken in, by reason", refused);
    let dropped = by_reason(status.tunnels.iter().flat_map(|tunnels| &tunnels.dropped));
    registry.register("tunnel_dropped_packets", "Packets that the tunnels dropped, by reason", dropped);
    register_paths(&mut registry, &status.paths);
    status.relaying.iter().for_each(|relaying| register_relay(&mut registry, relaying));
    let mut text = String::new();
    encode(&mut text, &registry).expect("a String takes all that is written");
    text
}

fn by_reason<'a>(counts: impl IntoIterator<Item = &'a Count>) -> Family<ReasonLabel, Counter> {
    let family = Family::<ReasonLabel, Counter>::default();
    for Count { reason, count } in counts {
        family.get_or_create(&ReasonLabel { reason: reason.clone() }).inc_by(*count);
    }
    family
}

/// Of all pairs together: which they are, `weft status` says.
fn register_relay(registry: &mut Registry, relaying: &Relaying) {
    let mut gauge = |name: &str, help: &str, value: f64| {
        let gauge = Gauge::<f64, AtomicU64>::default();
        gauge.set(value);
        registry.register(name, help, gauge);
    };
    gauge("relay_pairs", "Pairs of nodes that this node relays for", relaying.pairs.len() as f64);
    gauge(
        "relay_free_ratio",
        "Share of the relay's ports that are free, 0 to 1",
        f64::from(relaying.room) / 100.0,
    );
    let mut counter = |name: &str, help: &str, value: u64| {
        let counter = Counter::<u64>::default();
        counter.inc_by(value);
        registry.register(name, help, counter);
    };
    counter("relay_forwarded_packets", "Packets that were relayed", relaying.forwarded);
    counter("relay_forwarded_bytes", "Bytes of the packets that were relayed", relaying.bytes);
    counter("relay_handshakes", "Handshakes of relayed pairs", relaying.handshakes);
    let dropped = by_reason(&relaying.dropped);
    registry.register("relay_dropped_packets", "Packets that were not relayed, by reason", dropped);
    let refused = by_reason(&relaying.refused_pairs);
    registry.register("relay_refused_pairs", "Pairs that were refused a relay, by reason", refused);
}

/// By site and never by peer: a cluster has few of these.
fn register_paths(registry: &mut Registry, paths: &[SitePath]) {
    let [rtt, loss] = [(); 2].map(|()| Family::<SiteLabel, Gauge<f64, AtomicU64>>::default());
    let mtu = Family::<SiteLabel, Gauge>::default();
    for path in paths {
        let label = SiteLabel { site: path.site.clone() };
        rtt.get_or_create(&label).set(path.rtt_ms / 1e3);
        loss.get_or_create(&label).set(path.loss);
        if let Some(bytes) = path.path_mtu {
            mtu.get_or_create(&label).set(bytes.into());
        }
    }
    registry.register("path_rtt_seconds", "Median round trip to the nodes of a site", rtt);
    registry.register("path_loss_ratio", "Mean loss of probes to the nodes of a site, 0 to 1", loss);
    registry.register("path_mtu_bytes", "Least packet size that was measured to a node of a site", mtu);
}

#[cfg(test)]
mod tests {
    use super::*;
    use weft_wire::api::Reply;

    async fn get(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.expect("connected");
        stream.write_all(request.as_bytes()).await.expect("sent");
        let mut reply = String::new();
        stream.read_to_string(&mut reply).await.expect("answered");
        reply
    }

    #[tokio::test]
    async fn a_scrape_gets_the_loops_numbers_and_anything_else_a_refusal() {
        let (calls, mut inbox) = mpsc::channel::<Call>(4);
        tokio::spawn(async move {
            while let Some(call) = inbox.recv().await {
                let path =
                    SitePath { site: "s2".into(), nodes: 3, rtt_ms: 12.5, loss: 0.25, path_mtu: Some(1230) };
                let full = Count { reason: "full".into(), count: 3 };
                let relaying = Relaying { bytes: 4096, refused_pairs: vec![full], ..Relaying::default() };
                let relaying = Some(relaying);
                let status =
                    Status { ready: true, pods: 7, paths: vec![path], relaying, ..Status::default() };
                let _ = call.reply.send(Reply::from(ReplyBody::Status(status)));
            }
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        tokio::spawn(accept(listener, Door::new(true), calls));
        let reply = get(address, "GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n").await;
        assert!(reply.starts_with("HTTP/1.1 200 OK"), "{reply}");
        for line in [
            "weft_pods 7",
            "weft_ready 1",
            "weft_peers{state=\"alive\"} 0",
            "weft_path_rtt_seconds{site=\"s2\"} 0.0125",
            "weft_path_mtu_bytes{site=\"s2\"} 1230",
            "weft_relay_pairs 0",
            "weft_relay_forwarded_bytes_total 4096",
            "weft_relay_refused_pairs_total{reason=\"full\"} 3",
            "# EOF",
        ] {
            assert!(reply.contains(line), "{line} is not in {reply}");
        }
        assert!(get(address, "GET /readyz HTTP/1.1\r\n\r\n").await.ends_with("ready\n"));
        assert!(get(address, "GET /secrets HTTP/1.1\r\n\r\n").await.starts_with("HTTP/1.1 404"));
        assert!(get(address, "POST /metrics HTTP/1.1\r\n\r\n").await.starts_with("HTTP/1.1 405"));
    }
}
