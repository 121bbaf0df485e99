//! Words about the paths of tunnels, from one member to another: where its packets come from, that both are to send now, and
//! what a relay is asked and answers. The mesh carries them and decides nothing about them.
//!
//! A word is said once and may be lost: who wants an answer says it again.

use std::net::SocketAddr;

use super::api::{MeshEvent, Output, UnknownNode};
use super::proto::{self, Body};
use super::{Mesh, ReplyTo};
use crate::record::{parse_all, socket_from_bytes, socket_to_bytes};
use crate::types::NodeName;

/// The most endpoints that a call names.
pub const MAX_CALLED: usize = 4;

/// What one member says to another about the paths between tunnels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathWord {
    /// The packets of the receiver's tunnels come from there, as the sender sees them.
    Observed(SocketAddr),
    /// The sender wants a path to the receiver, and sends to it now: the receiver is to do so too.
    Call {
        /// Where the sender may be reached, besides what its record says; at most [`MAX_CALLED`].
        endpoints: Vec<SocketAddr>,
        /// It answers a call: no other answer is wanted.
        answers: bool,
    },
    /// The receiver is asked to relay between the sender and a third member.
    RelayAsk(NodeName),
    /// The sender relays between the receiver and a third member, at this port of its addresses.
    RelayGrant(NodeName, u16),
    /// The sender does not relay between the receiver and a third member.
    RelayRefuse(NodeName, RelayRefusal),
}

/// Why a node does not relay for a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
pub enum RelayRefusal {
    /// Its operator does not want it to.
    #[error("it relays for nobody")]
    Unwilling,
    /// All its ports or its limits are used up.
    #[error("it relays for as many pairs as it may")]
    Full,
    /// It does not know one of the two, or no tunnel key of it.
    #[error("it does not know both nodes and their tunnel keys")]
    Unknown,
    /// It could not open the port.
    #[error("it could not open a port")]
    NoPort,
}

impl RelayRefusal {
    /// Every reason.
    pub const ALL: [Self; 4] = [Self::Unwilling, Self::Full, Self::Unknown, Self::NoPort];

    /// Returns a short name, for metric labels.
    pub fn label(self) -> &'static str {
        match self {
            Self::Unwilling => "unwilling",
            Self::Full => "full",
            Self::Unknown => "unknown",
            Self::NoPort => "no_port",
        }
    }

    fn to_proto(self) -> u32 {
        self as u32 + 1
    }

    fn from_proto(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|refusal| refusal.to_proto() == number)
    }
}

impl Mesh {
    /// Says a word to a member; it may be lost.
    pub fn say(
        &mut self,
        node: &NodeName,
        word: &PathWord,
        now: std::time::Instant,
    ) -> Result<(), UnknownNode> {
        self.advance(now);
        let id = self.table.find_name(node).filter(|id| Some(*id) != self.table.me);
        let id = id.ok_or_else(|| UnknownNode(node.clone()))?;
        self.send_to_member(id, to_body(word), Vec::new());
        self.settle();
        Ok(())
    }

    /// Passes a word on to the rest of the node. Who is no member has nothing to say: its record is not known.
    pub(super) fn on_path_word(&mut self, reply: &ReplyTo, word: PathWord) {
        if self.credit.is_some() && asks_for_packets(&to_body(&word)) {
            // Who is there asks again.
            return;
        }
        if self.table.find_member(reply.hash).is_some_and(|member| member.gone_since.is_none()) {
            let event = MeshEvent::PathWord { from: reply.name.clone(), word };
            self.outputs.push_back(Output::Event(event));
        }
    }
}

/// Whether packets follow from a body, perhaps many, or to others: who sent it has to answer first.
pub(super) fn asks_for_packets(body: &Body) -> bool {
    matches!(body, Body::Call(_) | Body::RelayAsk(_) | Body::PingRequest(_))
}

pub(super) fn to_body(word: &PathWord) -> Body {
    match word {
        PathWord::Observed(endpoint) => {
            Body::Observed(proto::Observed { endpoint: socket_to_bytes(endpoint) })
        }
        PathWord::Call { endpoints, answers } => {
            let endpoints = endpoints.iter().take(MAX_CALLED).map(socket_to_bytes).collect();
            Body::Call(proto::Call { endpoints, answers: *answers })
        }
        PathWord::RelayAsk(peer) => Body::RelayAsk(proto::RelayAsk { peer: peer.to_string() }),
        PathWord::RelayGrant(peer, port) => {
            Body::RelayGrant(proto::RelayGrant { peer: peer.to_string(), port: (*port).into() })
        }
        PathWord::RelayRefuse(peer, why) => {
            Body::RelayRefuse(proto::RelayRefuse { peer: peer.to_string(), reason: why.to_proto() })
        }
    }
}

/// Returns the word that a body says: `None` for a body of another kind, and within it `None` for one out of range.
pub(super) fn from_body(body: &Body) -> Option<Option<PathWord>> {
    Some(match body {
        Body::Observed(observed) => socket_from_bytes(&observed.endpoint).map(PathWord::Observed),
        Body::Call(call) => parse_all(&call.endpoints, socket_from_bytes)
            .filter(|endpoints| endpoints.len() <= MAX_CALLED)
            .map(|endpoints| PathWord::Call { endpoints, answers: call.answers }),
        Body::RelayAsk(ask) => ask.peer.parse().ok().map(PathWord::RelayAsk),
        Body::RelayGrant(grant) => {
            let port = u16::try_from(grant.port).ok().filter(|port| *port > 0);
            grant.peer.parse().ok().zip(port).map(|(peer, port)| PathWord::RelayGrant(peer, port))
        }
        Body::RelayRefuse(refuse) => {
            // A reason that this version does not know is a refusal all the same.
            let why = RelayRefusal::from_proto(refuse.reason).unwrap_or(RelayRefusal::Unwilling);
            refuse.peer.parse().ok().map(|peer| PathWord::RelayRefuse(peer, why))
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_read_as_it_was_said() {
        let peer: NodeName = "east-2".parse().expect("a name");
        let endpoint: SocketAddr = "192.0.2.7:40000".parse().expect("an address");
        let six: SocketAddr = "[2001:db8::7]:40000".parse().expect("an address");
        let mut words = vec![
            PathWord::Observed(six),
            PathWord::Call { endpoints: vec![endpoint, six], answers: false },
            PathWord::Call { endpoints: Vec::new(), answers: true },
            PathWord::RelayAsk(peer.clone()),
            PathWord::RelayGrant(peer.clone(), 51_900),
        ];
        words.extend(RelayRefusal::ALL.map(|why| PathWord::RelayRefuse(peer.clone(), why)));
        for word in words {
            assert_eq!(from_body(&to_body(&word)), Some(Some(word)));
        }
    }

    #[test]
    fn a_word_out_of_range_is_malformed_and_other_bodies_are_no_words() {
        let bad = [
            Body::Observed(proto::Observed { endpoint: vec![1, 2, 3] }),
            Body::Call(proto::Call {
                endpoints: vec![vec![192, 0, 2, 1, 0, 1]; MAX_CALLED + 1],
                answers: false,
            }),
            Body::RelayAsk(proto::RelayAsk { peer: "Not A Name".into() }),
            Body::RelayGrant(proto::RelayGrant { peer: "n1".into(), port: 0 }),
            Body::RelayGrant(proto::RelayGrant { peer: "n1".into(), port: 65_536 }),
        ];
        for body in bad {
            assert_eq!(from_body(&body), Some(None), "{body:?}");
        }
        assert_eq!(from_body(&Body::Push(proto::Push { sync: false })), None);
    }
}
