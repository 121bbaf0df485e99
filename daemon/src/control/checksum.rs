//! The control plane's part in the checksum probe: whom to ask, whom to answer, what follows from an answer.

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use tracing::{info, warn};
use weft_wire::mesh::MemberState;
use weft_wire::types::{NodeName, Subnet};

use super::{Control, Output, probe};
use crate::config::TxChecksum;
use crate::plan::model::Transport;

impl Control {
    /// Answers a probe that came through the tunnel over the underlay, to where the asker gossips: no one else gets an
    /// answer.
    pub(super) fn answer_checksum_probe(&mut self, from: SocketAddr, token: u64) {
        let asker = self.mesh.members().find(|member| {
            member.verdict.is_accepted()
                && member.record.facts.subnets.iter().any(|leased| leased.subnet.contains(from.ip()))
        });
        if let Some(to) = asker.and_then(|member| member.record.facts.gossip.first().copied()) {
            let datagram = probe::message(probe::Kind::ChecksumAnswer, token, probe::LENGTH);
            self.outputs.push_back(Output::Send { to, datagram });
        }
    }

    pub(super) fn probe_wake(&self) -> Option<Instant> {
        self.probe.wake().filter(|_| self.config.overlay.tx_checksum == TxChecksum::Auto)
    }

    /// Asks a peer through the tunnel whether checksums survive it, as long as that is open; returns whether it did.
    pub(super) fn run_probe(&mut self, now: Instant) -> bool {
        if self.probe_wake().is_none_or(|wake| wake > now) {
            return false;
        }
        let before = self.probe.offload();
        let peer = self.tunnelled_gateway();
        if let Some((to, datagram)) = self.probe.poll(peer, now) {
            self.outputs.push_back(Output::Probe { to, datagram });
        }
        if self.probe.offload() != before {
            self.wake(now);
        }
        true
    }

    pub(super) fn take_probe_answer(&mut self, datagram: &[u8], now: Instant) {
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
            self.remember_first(true);
            self.wake(now);
        }
    }

    /// Returns the gateway of a peer that lives and that a tunnel leads to, IPv4 first.
    fn tunnelled_gateway(&self) -> Option<IpAddr> {
        let report = self.pass.report.as_ref()?;
        let alive = |node: &NodeName| {
            self.mesh.members().any(|member| member.node == node && member.state == MemberState::Alive)
        };
        let mut routes: Vec<_> = report
            .routes
            .iter()
            .filter(|route| route.installed && route.transport == Transport::Vxlan && alive(&route.node))
            .collect();
        routes.sort_by_key(|route| !route.prefix.addr().is_ipv4());
        routes.first().and_then(|route| Subnet::try_from(route.prefix).ok()).map(Subnet::gateway)
    }
}
