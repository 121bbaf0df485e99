//! What `weft doctor` looks at: everything that usually breaks, a function a kind. Reads state, changes none.
//!
//! A finding says what is wrong and where; its advice, what to do about it.

use std::time::Instant;

use weft_wire::api::{Check, Doctor, Status};
use weft_wire::mesh::MemberState;

use super::Node;
use super::reach::{OPEN_ONE, reach_sentence};

/// Puts a finding together: it is well where there are no problems.
fn check(name: &str, problems: impl IntoIterator<Item = String>, fine: String, advice: &str) -> Check {
    let problems: Vec<String> = problems.into_iter().collect();
    let ok = problems.is_empty();
    Check {
        name: name.into(),
        ok,
        detail: if ok { fine } else { problems.join("; ") },
        advice: if ok { String::new() } else { advice.into() },
    }
}

impl Node {
    /// Looks at everything that usually breaks.
    pub(super) fn doctor(&self, now: Instant) -> Doctor {
        let status = self.status(now);
        let findings = [
            Some(self.check_ready()),
            Some(self.check_store()),
            Some(self.check_leases(&status)),
            Some(self.check_peers(&status)),
            Some(self.check_nat()),
            Some(self.check_identity(now)),
            self.check_sites(now),
            self.check_tunnels(),
            self.check_relays(now),
            Some(self.check_routes()),
            Some(self.check_kernel(&status)),
            Some(self.check_forwarding()),
            Some(self.check_host()),
            Some(self.check_mtu(&status)),
            Some(self.check_paths(now)),
            Some(self.check_pods(&status)),
        ];
        let checks: Vec<Check> = findings.into_iter().flatten().collect();
        Doctor { ok: checks.iter().all(|check| check.ok), checks }
    }

    fn check_ready(&self) -> Check {
        check(
            "ready",
            self.control.ready().err(),
            "pods can be attached".into(),
            "see the sentence above; the checks below narrow it down",
        )
    }

    fn check_store(&self) -> Check {
        check(
            "store",
            self.control.store_error.clone(),
            format!("{} answers", self.leases.kind()),
            "running pods are not affected; bring the store back before leases expire",
        )
    }

    fn check_leases(&self, status: &Status) -> Check {
        check(
            "leases",
            self.control.problems.lease.keys().cloned(),
            format!("holds {}", status.subnets.join(", ")),
            "`weft leases` lists every lease",
        )
    }

    fn check_peers(&self, status: &Status) -> Check {
        let (alive, dead) =
            status.peers.as_ref().map(|counts| (counts.alive, counts.dead)).unwrap_or_default();
        let lonely = alive == 0 && !self.control.config.gossip.seeds.is_empty();
        let silent = lonely.then(|| "no peer answers".to_owned());
        let dead = (dead > 0).then(|| format!("{dead} peers are dead"));
        check(
            "peers",
            silent.into_iter().chain(dead),
            format!("{alive} alive"),
            "check that UDP port gossip.listen_port is open between the nodes, and `weft peers`",
        )
    }

    fn check_nat(&self) -> Check {
        check("nat", self.unreached(), reach_sentence(&self.reach().unwrap_or_default()), OPEN_ONE)
    }

    fn check_identity(&self, now: Instant) -> Check {
        let strangers = self.foreign_gossip(now).into_iter().chain(self.namesake(now));
        check(
            "identity",
            strangers.chain(self.recent_route_conflicts(now)),
            "no other node has this name, key or subnet".into(),
            "every node needs its own name and the cluster's key",
        )
    }

    fn check_sites(&self, now: Instant) -> Option<Check> {
        let judges = self.control.mesh.judges_sites();
        judges.then(|| {
            check(
                "sites",
                self.site_problems(now).chain(self.control.pair_troubles(now)),
                "nothing is wrong between sites".into(),
                "`weft sites` shows who is in; what a sentence names is to be changed there, then invite and join anew",
            )
        })
    }

    fn check_tunnels(&self) -> Option<Check> {
        let tunnels = self.tunnels()?.status();
        let sessions = tunnels.iter().filter(|tunnel| tunnel.handshake.is_some()).count();
        let silent = tunnels.iter().filter(|tunnel| tunnel.handshake.is_none() && tunnel.waiting > 0);
        Some(check(
            "tunnels",
            silent.map(|tunnel| format!("{} does not answer handshakes at {}", tunnel.node, tunnel.endpoint)),
            format!("sessions with {sessions} of {} peers; the others had nothing to carry", tunnels.len()),
            "check that UDP port encryption.port is open between the nodes",
        ))
    }

    fn check_relays(&self, now: Instant) -> Option<Check> {
        self.tunnels()?;
        let fine = self.relaying().map_or("relays for nobody".into(), |relaying| {
            format!("relays for {} pairs, {} % of its ports are free", relaying.pairs.len(), relaying.room)
        });
        Some(check(
            "relays",
            self.relay_problems(now),
            fine,
            "see that UDP relay.ports of that node are open to all sites, or set relay.enabled = false on it",
        ))
    }

    fn check_routes(&self) -> Check {
        let routes = || self.control.pass.report.iter().flat_map(|report| &report.routes);
        let without = routes().filter(|route| route.dev.is_empty());
        check(
            "routes",
            without.map(|route| format!("no way to {} of {}: {}", route.prefix, route.node, route.reason)),
            format!("{} subnets of peers have a way", routes().count()),
            "the sentence says on which node to change what; pods of other nodes are reached all the same",
        )
    }

    fn check_kernel(&self, status: &Status) -> Check {
        let failed = status.reconcile.iter().flat_map(|reconcile| reconcile.failed.iter().cloned());
        check(
            "kernel",
            failed.chain(self.control.problems.underlay.clone()),
            format!("as planned, after {} passes", self.control.pass.passes),
            "the daemon tries again; the sentence is the kernel's own",
        )
    }

    fn check_forwarding(&self) -> Check {
        check(
            "forwarding",
            self.control.pass.report.iter().flat_map(|report| report.warnings.iter().cloned()),
            "nothing seen that cuts pods off".into(),
            "let the firewall's forward chain accept the cluster's CIDRs",
        )
    }

    fn check_host(&self) -> Check {
        check(
            "host",
            self.preflight.clone(),
            "no overlap with the cluster's CIDRs".into(),
            "choose cluster.cidrs that nothing else uses",
        )
    }

    fn check_mtu(&self, status: &Status) -> Check {
        let own = self.control.underlay.as_ref().map_or(0, |underlay| underlay.mtu);
        let alive = self.control.mesh.members().filter(|member| member.state == MemberState::Alive);
        let smaller = alive.filter(|member| u32::from(member.record.facts.mtu) < own).map(|member| {
            format!("{} has underlay mtu {}, this node {own}", member.node, member.record.facts.mtu)
        });
        check(
            "mtu",
            smaller.chain(self.too_small_for_ipv6()),
            format!("underlay {own}, pods {}", status.pod_mtu),
            "set underlay.mtu to the smallest of the cluster on every node, and see that it leaves IPv6 its 1,280",
        )
    }

    fn check_paths(&self, now: Instant) -> Check {
        check(
            "paths",
            self.path_problems(now),
            self.path_summary(),
            "`weft peers` shows MTU, round trip and loss of each path; see docs/operations.md, paths",
        )
    }

    fn check_pods(&self, status: &Status) -> Check {
        let full = self.control.subnets().into_iter().filter(|subnet| self.pods.pool().free(*subnet) == 0);
        check(
            "pods",
            full.map(|subnet| format!("{subnet} has no free pod address")),
            format!("{} attached", status.pods),
            "delete pods on this node, or give nodes larger blocks",
        )
    }
}
