//! What the loop knows, as the local socket tells it. Reads state, changes none, asks the kernel nothing.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use weft_wire::api::{
    Count, Lease, Leases, Peer, PeerCounts, Peers, Pod, Pods, Reconcile, Route, Routes, Status, Store,
    Tunnel, Tunnels,
};
use weft_wire::mesh::{MemberState, TunnelFacts, Verdict};
use weft_wire::types::NodeName;

use super::Node;
use crate::config::TxChecksum;
use crate::control::duplicate_name;
use crate::kernel::TunnelLook;
use crate::reconcile::RouteStatus;
use crate::tunnel::TunnelStatus;

/// How long a problem that has not shown again is still told.
const MEMORY: Duration = Duration::from_secs(60);

/// The least that IPv6 takes (RFC 8200 s5).
const IPV6_MTU: u32 = 1280;

fn shown(tunnel: &TunnelStatus) -> Tunnel {
    Tunnel {
        key: tunnel.key.to_string(),
        endpoint: tunnel.endpoint.to_string(),
        handshake_ms: tunnel.handshake.map(millis),
        sent: tunnel.sent.0,
        sent_bytes: tunnel.sent.1,
        received: tunnel.received.0,
        received_bytes: tunnel.received.1,
        ..Tunnel::default()
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl Node {
    pub(super) fn status(&self, now: Instant) -> Status {
        let ready = self.control.ready();
        let mut counts = PeerCounts::default();
        let is_in = self.control.sites_that_are_in();
        for member in self.control.mesh.members().filter(|member| is_in(member.site)) {
            match member.state {
                MemberState::Alive => counts.alive += 1,
                MemberState::Suspect => counts.suspect += 1,
                MemberState::Dead => counts.dead += 1,
                MemberState::Left => {}
            }
        }
        let report = self.control.pass.report.as_ref();
        Status {
            reach: self.reach(),
            refused_records: self.refused_records(),
            instance: self.control.config.node.instance.clone().unwrap_or_default(),
            node: self.control.config.node.name.to_string(),
            site: self.control.config.node.site.to_string(),
            subnets: self.control.subnets().iter().map(ToString::to_string).collect(),
            store: Some(Store {
                kind: self.leases.kind().into(),
                healthy: self.control.store_error.is_none() && self.control.leasing.staleness(now).is_some(),
                stale_ms: self.control.leasing.staleness(now).map(millis),
                error: self.control.store_error.clone().unwrap_or_default(),
            }),
            peers: Some(counts),
            reconcile: Some(Reconcile {
                last_ok: report.is_some_and(|report| report.failed.is_empty()),
                pending: u32::from(self.control.pass.running || self.control.pass.due.is_some()),
                failed: report
                    .iter()
                    .flat_map(|report| &report.failed)
                    .map(|failure| format!("{}: {}", failure.what, failure.error))
                    .collect(),
                last_ok_ms: self.control.pass.last_ok.map(|at| millis(now.duration_since(at))),
                passes: self.control.pass.passes,
            }),
            warnings: self.warnings(now),
            ready: ready.is_ok(),
            blocked: ready.err().unwrap_or_default(),
            version: env!("CARGO_PKG_VERSION").into(),
            uptime_s: now.duration_since(self.control.started).as_secs(),
            underlay: self
                .control
                .underlay
                .iter()
                .flat_map(|underlay| &underlay.addresses)
                .map(|address| address.addr().to_string())
                .collect(),
            pod_mtu: report.map_or(0, |report| report.pod_mtu),
            tx_checksum: self.tx_checksum(),
            key: self.control.mesh.key().public().to_string(),
            pods: u32::try_from(self.pods.attachments().count()).unwrap_or(u32::MAX),
            encryption: self.control.config.encryption.policy.to_string(),
            paths: self.site_paths(now),
            underlay_tunnel: self.underlay_tunnel(),
            mapping: self.control.own_reach().mapping.as_str().into(),
            reflexive: self.control.own_reach().reflexive.iter().map(ToString::to_string).collect(),
            relaying: self.relaying(),
            pair_secrets: self.pair_secrets(),
            tunnels: self.tunnels().map(|tunnels| Tunnels {
                implementation: tunnels.to_string(),
                key: self.control.tunnel_key().map(String::from).unwrap_or_default(),
                dropped: tunnels
                    .drops()
                    .into_iter()
                    .map(|(reason, count)| Count { reason: reason.to_string(), count })
                    .collect(),
            }),
        }
    }

    /// Returns what is wrong with the MTU of pods, where they have IPv6 (RFC 8200 s5).
    pub(super) fn too_small_for_ipv6(&self) -> Option<String> {
        let mtu = self.control.pass.report.as_ref()?.pod_mtu;
        let underlay = self.control.underlay.as_ref().ok()?;
        let ipv6 = self.control.subnets().iter().any(|subnet| !subnet.is_ipv4());
        (ipv6 && mtu < IPV6_MTU).then(|| {
            format!(
                "pods have an MTU of {mtu}, and IPv6 needs {IPV6_MTU}: raise that of {} from {} to {}, or IPv6 does not work here",
                underlay.device,
                underlay.mtu,
                underlay.mtu + IPV6_MTU - mtu
            )
        })
    }

    fn refused_records(&self) -> Vec<Count> {
        let counters = self.control.mesh.counters();
        let counts = [
            ("key", counters.refused_keys),
            ("table", counters.refused_full),
            ("site", counters.refused_site),
            ("uncertified", counters.refused_uncertified),
        ];
        let counted = counts.into_iter().filter(|(_, count)| *count > 0);
        counted.map(|(reason, count)| Count { reason: reason.into(), count }).collect()
    }

    pub(super) fn tunnels(&self) -> Option<&TunnelLook> {
        self.control.pass.report.as_ref()?.tunnels.as_ref()
    }

    fn tx_checksum(&self) -> String {
        match self.control.config.overlay.tx_checksum {
            TxChecksum::On => "on (configured)".into(),
            TxChecksum::Off => "off (configured)".into(),
            TxChecksum::Auto => {
                format!(
                    "{} ({})",
                    if self.control.probe.offload() { "on" } else { "off" },
                    self.control.probe.verdict()
                )
            }
        }
    }

    /// Everything that a person should hear of now, one sentence each.
    fn warnings(&self, now: Instant) -> Vec<String> {
        let mut warnings = self.preflight.clone();
        if let Some(error) = &self.control.store_error {
            let age = self.control.leasing.staleness(now).map_or_else(
                || "it has not answered since the daemon started".to_owned(),
                |age| format!("the view of it is {} s old", age.as_secs()),
            );
            warnings.push(format!("the lease store does not answer ({error}); {age}, and what runs goes on"));
        }
        warnings.extend(self.control.problems.underlay.iter().cloned());
        warnings.extend(self.unheard.iter().cloned());
        warnings.extend(self.control.problems.lease.keys().cloned());
        warnings.extend(self.recent_route_conflicts(now));
        warnings.extend(self.site_problems(now));
        warnings.extend(self.control.pair_troubles(now));
        warnings.extend(self.unreached());
        warnings.extend(self.control.problems.memory.iter().cloned());
        warnings.extend(self.control.problems.ring.iter().cloned());
        warnings.extend(self.control.problems.chosen.iter().cloned());
        warnings.extend(self.cluster_warnings());
        warnings.extend(self.foreign_gossip(now));
        warnings.extend(self.namesake(now));
        warnings.extend(self.asked_name(now));
        for member in self.control.mesh.members() {
            if let Verdict::Refused { why } | Verdict::Pending { why } = member.verdict
                && member.state != MemberState::Left
                && !self.control.is_out(member.site)
            {
                warnings.push(format!("no routes to {}: {why}", member.node));
            }
        }
        warnings.extend(self.too_small_for_ipv6());
        warnings.extend(self.path_problems(now));
        warnings.extend(self.control.pass.report.iter().flat_map(|report| report.warnings.iter().cloned()));
        warnings
    }

    /// Returns who gossips with a key that this node has not.
    pub(super) fn foreign_gossip(&self, now: Instant) -> Option<String> {
        let (from, _) = self.control.problems.wrong_key.filter(|(_, at)| now.duration_since(*at) < MEMORY)?;
        Some(format!(
            "{from} gossips with a cluster key that is not in this node's ring; compare `weft cluster-key list` on both"
        ))
    }

    /// Returns who gossips under this node's name.
    pub(super) fn namesake(&self, now: Instant) -> Option<String> {
        let (from, key, at) = self.control.problems.duplicate_name.as_ref()?;
        let recent = now.duration_since(*at) < MEMORY;
        let name = self.control.config.node.name.as_str();
        recent.then(|| duplicate_name(name, &format!("gossips at {from}"), key))
    }

    /// Returns who asked for this node's lease under its name; it asks again every ten minutes while it runs.
    pub(super) fn asked_name(&self, now: Instant) -> Option<String> {
        let (subnet, key, at) = self.control.problems.name_asked.as_ref()?;
        let recent = now.duration_since(*at) < MEMORY * 12;
        let name = self.control.config.node.name.as_str();
        recent.then(|| duplicate_name(name, &format!("asked for the lease of {subnet}"), key))
    }

    pub(super) fn recent_route_conflicts(&self, now: Instant) -> impl Iterator<Item = String> + '_ {
        let recent = move |at: &Instant| now.duration_since(*at) < MEMORY * 10;
        self.control
            .problems
            .route_conflicts
            .iter()
            .filter(move |(_, at)| recent(at))
            .map(|(text, _)| text.clone())
    }

    pub(super) fn peers(&self, now: Instant) -> Peers {
        let tunnels = self.tunnels_by_node();
        let carrier = self.tunnels().map(ToString::to_string).unwrap_or_default();
        let tunnel = |node: &NodeName, facts: Option<&TunnelFacts>| {
            let tunnel = tunnels.get(node)?;
            let theirs = facts.and_then(|facts| facts.carrier).map(|carrier| carrier.to_string());
            Some(Tunnel {
                carrier: carrier.clone(),
                peer_carrier: theirs.unwrap_or_default(),
                ..shown(tunnel)
            })
        };
        let mut peers: Vec<_> = self
            .control
            .mesh
            .members()
            .map(|member| {
                let facts = &member.record.facts;
                let route = self.route_to(member.node.as_str());
                let tunnel = tunnel(member.node, facts.tunnel.as_ref());
                let via = tunnels.get(member.node).and_then(|tunnel| self.relay_to(tunnel));
                // Who is relayed for is so in place of being reached by its own tunnel.
                let transport = match &via {
                    Some(_) => "relay".into(),
                    None => route.map(|route| route.transport.to_string()).unwrap_or_default(),
                };
                let quality = self.control.quality_of(member.node, now);
                Peer {
                    node: member.node.to_string(),
                    site: member.site.to_string(),
                    addresses: facts.underlay.iter().map(ToString::to_string).collect(),
                    state: member.state.as_str().into(),
                    transport,
                    rtt_ms: quality.map(|quality| quality.rtt.as_secs_f64() * 1e3),
                    loss: f64::from(quality.map_or(member.loss, |quality| quality.loss)),
                    mtu: route.map_or(u32::from(facts.mtu), |route| route.mtu.min(route.room)),
                    subnets: facts.subnets.iter().map(|leased| leased.subnet.to_string()).collect(),
                    last_seen_ms: member.last_seen.map(|at| millis(now.duration_since(at))),
                    verdict: match member.verdict {
                        Verdict::Accepted => "accepted".into(),
                        Verdict::Pending { why } => format!("pending: {why}"),
                        Verdict::Refused { why } => format!("refused: {why}"),
                    },
                    key: member.record.key.to_string(),
                    version: member.record.version,
                    tunnel,
                    via: via.unwrap_or_default(),
                    mapping: facts.tunnel_reach.mapping.as_str().into(),
                    path_mtu: self.control.path_probes.measured(member.node),
                    jitter_ms: quality
                        .and_then(|quality| quality.jitter)
                        .map(|jitter| jitter.as_secs_f64() * 1e3),
                    in_tunnel: quality.is_some_and(|quality| quality.in_tunnel),
                }
            })
            .collect();
        peers.sort_by(|a, b| a.node.cmp(&b.node));
        Peers { peers }
    }

    fn tunnels_by_node(&self) -> BTreeMap<NodeName, TunnelStatus> {
        let tunnels: Vec<_> = self.tunnels().map(TunnelLook::status).unwrap_or_default();
        tunnels.into_iter().map(|tunnel| (tunnel.node.clone(), tunnel)).collect()
    }

    /// Returns the first route to a node that is installed, or else any.
    fn route_to(&self, node: &str) -> Option<&RouteStatus> {
        let routes = self.control.pass.report.iter().flat_map(|report| &report.routes);
        let mut routes: Vec<_> = routes.filter(|route| route.node.as_str() == node).collect();
        routes.sort_by_key(|route| !route.installed);
        routes.first().copied()
    }

    pub(super) fn routes(&self) -> Routes {
        let routes = self.control.pass.report.iter().flat_map(|report| &report.routes);
        let tunnels = self.tunnels_by_node();
        // The plan names where the peer itself is.
        let reason = |route: &RouteStatus| match tunnels.get(&route.node).and_then(|it| self.relay_to(it)) {
            Some(relay) => format!("{}; at present by the relay {relay}", route.reason),
            None => route.reason.clone(),
        };
        Routes {
            routes: routes
                .map(|route| Route {
                    prefix: route.prefix.to_string(),
                    node: route.node.to_string(),
                    transport: route.transport.to_string(),
                    dev: route.dev.clone(),
                    via: route.via.map(|via| via.to_string()).unwrap_or_default(),
                    mtu: route.mtu,
                    installed: route.installed,
                    reason: reason(route),
                })
                .collect(),
        }
    }

    pub(super) fn lease_list(&self, now: Instant) -> Leases {
        let leases = self.control.lease_views(now).into_iter().map(|view| Lease {
            subnet: view.subnet.to_string(),
            node: view.node.to_string(),
            site: view.site.to_string(),
            epoch: view.epoch.0,
            expires_in_s: view.expires_in.map(|left| left.as_secs()),
            own: view.own,
        });
        Leases { leases: leases.collect() }
    }

    pub(super) fn pod_list(&self) -> Pods {
        let pods = self.pods.attachments().map(|attachment| Pod {
            id: attachment.id.container().into(),
            namespace: attachment.pod.namespace.clone(),
            name: attachment.pod.name.clone(),
            ips: attachment.addresses.iter().map(|address| address.address.addr().to_string()).collect(),
            ifname: attachment.id.ifname().into(),
            host_ifname: attachment.host_ifname(),
            since: attachment.since_unix_s,
        });
        Pods { pods: pods.collect() }
    }
}
