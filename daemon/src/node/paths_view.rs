//! What the paths to peers are like, as people are told it.

use std::time::Instant;

use weft_wire::api::SitePath;
use weft_wire::mesh::MemberState;

use super::Node;

/// What is lost more often than this, people hear of.
const LOSSY: f32 = 0.2;
/// The least that IPv6 takes (RFC 8200 s5).
const IPV6_MTU: u32 = 1280;
/// What Ethernet carries (RFC 894), and a link that is no tunnel as a rule.
const ETHERNET: u32 = 1500;
/// How many paths are named one by one.
const NAMED: usize = 8;

impl Node {
    pub(super) fn site_paths(&self, now: Instant) -> Vec<SitePath> {
        let paths = self.control.quality_of_sites(now).into_iter().map(|path| SitePath {
            site: path.site.to_string(),
            nodes: u32::try_from(path.nodes).unwrap_or(u32::MAX),
            rtt_ms: path.rtt.as_secs_f64() * 1e3,
            loss: path.loss.into(),
            path_mtu: path.path_mtu,
        });
        paths.collect()
    }

    /// Returns what the underlay is, where it is a tunnel itself.
    pub(super) fn underlay_tunnel(&self) -> String {
        match &self.control.underlay {
            Ok(underlay) => match &underlay.tunnel {
                Some(kind) => format!("a {kind} tunnel"),
                None if underlay.mtu < ETHERNET => format!("a tunnel by its mtu of {}", underlay.mtu),
                None => String::new(),
            },
            Err(_) => String::new(),
        }
    }

    /// Returns what is wrong with paths.
    pub(super) fn path_problems(&self, now: Instant) -> Vec<String> {
        let ipv6 = self.control.subnets().iter().any(|subnet| !subnet.is_ipv4());
        let probes = &self.control.path_probes;
        let mut said = Vec::new();
        for (node, carries, devices) in probes.narrow() {
            let short = if ipv6 && carries < IPV6_MTU {
                format!("; IPv6 needs {IPV6_MTU}, so beside TCP it does not work there")
            } else {
                String::new()
            };
            said.push(format!(
                "the path to {node} carries packets of {carries} bytes and not the {devices} that pods may send, and nobody on it says so: pods are told by this node; let ICMP \"too big\" pass, or set underlay.mtu to what the path carries{short}"
            ));
        }
        said.extend(probes.closed().map(|node| {
            format!("the path to {node} carries small packets and none of 576 bytes: see what drops them between the nodes")
        }));
        let alive = self.control.mesh.members().filter(|member| member.state == MemberState::Alive);
        said.extend(alive.filter_map(|member| {
            let quality = self.control.quality_of(member.node, now)?;
            (quality.loss > LOSSY && quality.in_tunnel).then(|| {
                format!(
                    "{:.0} % of the probes to {} are lost: see what drops packets between the nodes, such as a full link or a limit on UDP",
                    quality.loss * 100.0,
                    member.node
                )
            })
        }));
        let more = said.len().saturating_sub(NAMED);
        if more > 0 {
            said.truncate(NAMED);
            said.push(format!("and {more} more of this kind; `weft peers` lists the paths"));
        }
        said
    }

    pub(super) fn path_summary(&self) -> String {
        let members = self.control.mesh.members();
        let measured = members.filter(|member| self.control.path_probes.measured(member.node).is_some());
        let under = match self.underlay_tunnel() {
            tunnel if tunnel.is_empty() => tunnel,
            tunnel => format!("; the underlay is itself {tunnel}, and what carries it may be smaller still"),
        };
        format!("{} measured, all carry what pods may send{under}", measured.count())
    }
}
