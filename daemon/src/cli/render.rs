//! Answers as text for people.

use comfy_table::{Table, presets};
use weft_wire::api::{
    ClusterKeys, Doctor, Leases, Peers, Pods, Reach, Relaying, Routes, Sites, Status, Trace,
};

/// So many of the pairs that a node relays for are shown.
const NAMED_PAIRS: usize = 8;

fn table(head: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(head.iter().copied());
    for row in rows {
        table.add_row(row);
    }
    let text: Vec<String> = table.lines().map(|line| line.trim().to_owned()).collect();
    text.join("\n") + "\n"
}

fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".into() } else { text.into() }
}

fn age(ms: Option<u64>) -> String {
    ms.map_or_else(
        || "-".into(),
        |ms| if ms < 10_000 { format!("{ms} ms") } else { format!("{} s", ms / 1000) },
    )
}

fn measured(figure: Option<String>) -> String {
    figure.unwrap_or_else(|| "-".into())
}

pub(super) fn status(status: &Status) -> String {
    let store = status.store.clone().unwrap_or_default();
    let peers = status.peers.clone().unwrap_or_default();
    let reconcile = status.reconcile.clone().unwrap_or_default();
    let mut lines = vec![
        format!(
            "node       {} (site {}), weft {}, up {} s",
            status.node, status.site, status.version, status.uptime_s
        ),
        format!("ready      {}", if status.ready { "yes".into() } else { format!("no: {}", status.blocked) }),
        format!("subnets    {}", or_dash(&status.subnets.join(", "))),
        format!("underlay   {}{}", or_dash(&status.underlay.join(", ")), tunnel(&status.underlay_tunnel)),
        format!(
            "store      {}, {}, seen {} ago",
            store.kind,
            if store.healthy { "healthy".into() } else { format!("not healthy: {}", or_dash(&store.error)) },
            age(store.stale_ms),
        ),
        format!("peers      {} alive, {} suspect, {} dead", peers.alive, peers.suspect, peers.dead),
        format!(
            "kernel     {}, last look {} ago",
            if reconcile.last_ok { "as planned" } else { "not as planned" },
            age(reconcile.last_ok_ms),
        ),
        format!("pods       {}, mtu {}", status.pods, status.pod_mtu),
        format!("checksum   {}", status.tx_checksum),
        format!("encryption {}", encryption(status)),
    ];
    if status.tunnels.is_some() {
        let seen = status.reflexive.join(", ");
        lines.push(format!("mapping    {}, peers see the tunnels at {}", status.mapping, or_dash(&seen)));
    }
    lines.extend(status.relaying.iter().flat_map(relaying));
    lines.extend(status.reach.as_ref().map(|seen| format!("reach      {}", reach(seen))));
    lines.extend(reconcile.failed.iter().map(|failed| format!("failed     {failed}")));
    lines.extend(status.warnings.iter().map(|warning| format!("warning    {warning}")));
    lines.join("\n") + "\n"
}

/// Whom a node relays for: how many, and the pairs that it forwards most for.
fn relaying(relaying: &Relaying) -> Vec<String> {
    let mut lines = vec![format!(
        "relay      {}, {} % free, {} packets forwarded, {} refused",
        pairs_of(relaying.pairs.len()),
        relaying.room,
        relaying.forwarded,
        relaying.refused
    )];
    let mut pairs: Vec<_> = relaying.pairs.iter().collect();
    pairs.sort_by_key(|pair| std::cmp::Reverse(pair.bytes));
    lines.extend(pairs.iter().take(NAMED_PAIRS).map(|pair| {
        format!(
            "relays for {} at port {}: {} packets, {} bytes, {} handshakes, {} refused",
            pair.nodes.join(" and "),
            pair.port,
            pair.forwarded,
            pair.bytes,
            pair.handshakes,
            pair.refused
        )
    }));
    let more = pairs.len().saturating_sub(NAMED_PAIRS);
    if more > 0 {
        lines.push(format!("relays for {} more: `weft -o json status` has them all", pairs_of(more)));
    }
    lines
}

fn pairs_of(number: usize) -> String {
    format!("{number} {}", if number == 1 { "pair" } else { "pairs" })
}

fn tunnel(kind: &str) -> String {
    if kind.is_empty() { String::new() } else { format!(" (itself {kind})") }
}

pub(super) fn status_line(status: &Status) -> String {
    let peers = status.peers.clone().unwrap_or_default();
    format!(
        "{} {} peers {}/{}/{} pods {} warnings {}\n",
        status.node,
        if status.ready { "ready" } else { "not-ready" },
        peers.alive,
        peers.suspect,
        peers.dead,
        status.pods,
        status.warnings.len(),
    )
}

fn reach(reach: &Reach) -> String {
    let mut text = reach.reach.clone();
    if !reach.reflexive.is_empty() {
        // A mapping that depends has an address for each peer.
        let (few, more) = reach.reflexive.split_at(reach.reflexive.len().min(2));
        text += &format!(", seen at {}", few.join(", "));
        text += if more.is_empty() { "" } else { ", ..." };
        text += &format!(" (mapping {})", reach.mapping);
    }
    if !reach.keepers.is_empty() {
        text += &format!(", kept by {}, every {} s", reach.keepers.join(", "), reach.pause_ms / 1000);
    } else if reach.reach == "behind-nat" {
        text += ", kept by nobody";
    }
    if reach.forwarded > 0 {
        text += &format!(", passed on {}", reach.forwarded);
    }
    text
}

fn encryption(status: &Status) -> String {
    let Some(tunnels) = &status.tunnels else { return or_dash(&status.encryption) };
    let dropped: Vec<String> = tunnels
        .dropped
        .iter()
        .filter(|dropped| dropped.count > 0)
        .map(|dropped| format!("{} {}", dropped.count, dropped.reason))
        .collect();
    let carried = &tunnels.implementation;
    format!(
        "{} ({carried}), key {}, dropped {}",
        status.encryption,
        tunnels.key,
        or_dash(&dropped.join(", "))
    )
}

pub(super) fn sites(sites: &Sites) -> String {
    let own = match (sites.key.as_str(), sites.speaks) {
        ("", _) => "nodes of other sites are believed as the store says".to_owned(),
        (key, true) => format!("key {key}, for which this node speaks"),
        (key, false) => format!("key {key}"),
    };
    let mut text = format!("this site  {}, {}\n", sites.site, own);
    text += &format!("prefixes   {}\n", or_dash(&sites.prefixes.join(", ")));
    if sites.sites.is_empty() {
        return text + "no other site is let in\n";
    }
    text += &table(
        &["SITE", "STANDING", "PREFIXES", "NODES", "ALIVE", "RTT", "LOSS", "MTU", "LET IN BY", "KEY"],
        sites.sites.iter().map(|site| {
            vec![
                site.site.clone(),
                site.standing.clone(),
                or_dash(&site.prefixes.join(",")),
                site.nodes.to_string(),
                site.alive.to_string(),
                measured(site.path.as_ref().map(|path| format!("{:.2} ms", path.rtt_ms))),
                measured(site.path.as_ref().map(|path| format!("{:.1} %", path.loss * 100.0))),
                measured(site.path.as_ref().and_then(|path| path.path_mtu).map(|mtu| mtu.to_string())),
                site.admitted_by.clone(),
                site.key.chars().take(8).collect(),
            ]
        }),
    );
    for site in &sites.sites {
        text.extend(
            site.problems.iter().map(|problem| format!("problem    site {}: {problem}\n", site.site)),
        );
    }
    text
}

pub(super) fn peers(peers: &Peers, wide: bool) -> String {
    let mut head =
        vec!["NODE", "SITE", "STATE", "TRANSPORT", "ADDRESSES", "SUBNETS", "RTT", "LOSS", "MTU", "SEEN"];
    if wide {
        head.extend([
            "JITTER",
            "PATH MTU",
            "VERDICT",
            "KEY",
            "VERSION",
            "TUNNEL",
            "CARRIED",
            "HANDSHAKE",
            "SENT",
            "RECEIVED",
        ]);
    }
    table(
        &head,
        peers.peers.iter().map(|peer| {
            let mut row = vec![
                peer.node.clone(),
                peer.site.clone(),
                peer.state.clone(),
                match peer.via.as_str() {
                    "" => or_dash(&peer.transport),
                    via => format!("{} via {via}", peer.transport),
                },
                peer.addresses.join(","),
                or_dash(&peer.subnets.join(",")),
                peer.rtt_ms.map_or_else(|| "-".into(), |rtt| format!("{rtt:.2} ms")),
                format!("{:.0} %", peer.loss * 100.0),
                peer.mtu.to_string(),
                age(peer.last_seen_ms),
            ];
            if wide {
                row.extend([
                    measured(peer.jitter_ms.map(|jitter| format!("{jitter:.2} ms"))),
                    measured(peer.path_mtu.map(|mtu| mtu.to_string())),
                    peer.verdict.clone(),
                    peer.key.chars().take(8).collect(),
                    peer.version.to_string(),
                ]);
                let tunnel = peer.tunnel.as_ref();
                let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".into());
                row.extend([
                    or_none(tunnel.map(|tunnel| tunnel.endpoint.clone())),
                    or_none(
                        tunnel.map(|tunnel| format!("{}/{}", tunnel.carrier, or_dash(&tunnel.peer_carrier))),
                    ),
                    tunnel.map_or_else(|| "-".into(), |tunnel| age(tunnel.handshake_ms)),
                    or_none(tunnel.map(|tunnel| format!("{} B", tunnel.sent_bytes))),
                    or_none(tunnel.map(|tunnel| format!("{} B", tunnel.received_bytes))),
                ]);
            }
            row
        }),
    )
}

pub(super) fn routes(routes: &Routes) -> String {
    table(
        &["PREFIX", "NODE", "TRANSPORT", "DEV", "VIA", "MTU", "INSTALLED", "REASON"],
        routes.routes.iter().map(|route| {
            vec![
                route.prefix.clone(),
                route.node.clone(),
                route.transport.clone(),
                or_dash(&route.dev),
                or_dash(&route.via),
                route.mtu.to_string(),
                if route.installed { "yes" } else { "no" }.into(),
                route.reason.clone(),
            ]
        }),
    )
}

pub(super) fn leases(leases: &Leases) -> String {
    table(
        &["SUBNET", "NODE", "SITE", "EPOCH", "EXPIRES"],
        leases.leases.iter().map(|lease| {
            vec![
                lease.subnet.clone(),
                format!("{}{}", lease.node, if lease.own { " (this node)" } else { "" }),
                lease.site.clone(),
                lease.epoch.to_string(),
                lease.expires_in_s.map_or_else(|| "with its node".into(), |left| format!("in {left} s")),
            ]
        }),
    )
}

pub(super) fn pods(pods: &Pods) -> String {
    table(
        &["NAMESPACE", "NAME", "ADDRESSES", "IFNAME", "HOST", "CONTAINER"],
        pods.pods.iter().map(|pod| {
            vec![
                or_dash(&pod.namespace),
                or_dash(&pod.name),
                pod.ips.join(","),
                pod.ifname.clone(),
                pod.host_ifname.clone(),
                pod.id.clone(),
            ]
        }),
    )
}

pub(super) fn trace(trace: &Trace) -> String {
    let mut text = table(
        &["HOP", "", "DETAIL"],
        trace.hops.iter().map(|hop| {
            vec![hop.what.clone(), if hop.ok { "ok" } else { "BROKEN" }.into(), hop.detail.clone()]
        }),
    );
    text.push_str(&trace.verdict);
    text.push('\n');
    text
}

pub(super) fn doctor(doctor: &Doctor) -> String {
    let mut text = String::new();
    for check in &doctor.checks {
        text += &format!("{} {:<11}{}\n", if check.ok { "ok  " } else { "FAIL" }, check.name, check.detail);
        if !check.advice.is_empty() {
            text += &format!("     {:<11}-> {}\n", "", check.advice);
        }
    }
    text
}

pub(super) fn keys(keys: &ClusterKeys) -> String {
    let rows = keys
        .ids
        .iter()
        .enumerate()
        .map(|(place, id)| vec![id.clone(), if place == 0 { "seals and opens" } else { "opens" }.into()]);
    table(&["KEY", "USE"], rows)
}

pub(super) fn pings(pongs: &[(String, Result<f64, String>)]) -> String {
    pongs
        .iter()
        .map(|(node, rtt)| match rtt {
            Ok(rtt) => format!("{node}: {rtt:.2} ms\n"),
            Err(error) => format!("{node}: {error}\n"),
        })
        .collect()
}
