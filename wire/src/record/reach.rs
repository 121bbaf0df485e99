//! The part of a record that says how other sites reach its node.

use std::net::SocketAddr;

use super::{RecordError, parse_all, socket_from_bytes};
use crate::mesh::proto;

/// The most keepers that a record names.
pub const MAX_KEEPERS: usize = 2;
/// The most addresses outside that a record names: one a family.
pub const MAX_OUTSIDE: usize = 2;

/// Whether datagrams that a node did not ask for reach it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Reach {
    /// The node does not know, or is older than the question.
    #[default]
    Unsaid = 0,
    /// They do.
    Open = 1,
    /// They do not: the node is behind NAT or a filter.
    Behind = 2,
}

/// How other sites reach a node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reachability {
    /// Whether it is reached without having asked.
    pub reach: Reach,
    /// The members that it keeps a way open to, by name hash; at most [`MAX_KEEPERS`].
    pub keepers: Vec<u64>,
    /// Where other sites reach it, if not at its gossip addresses; at most [`MAX_OUTSIDE`].
    pub outside: Vec<SocketAddr>,
}

impl Reachability {
    pub(super) fn truncate(&mut self) {
        self.keepers.truncate(MAX_KEEPERS);
        self.outside.truncate(MAX_OUTSIDE);
    }

    /// Gives up one thing that it says, the least needed first; returns whether there was one.
    pub(super) fn shorten(&mut self) -> bool {
        let list = self.outside.len() + self.keepers.len();
        if self.outside.len() > 1 || self.keepers.is_empty() {
            self.outside.pop();
        } else {
            self.keepers.pop();
        }
        list > 0
    }

    pub(super) fn parse(record: &proto::Record) -> Result<Self, RecordError> {
        use RecordError::Field;
        let reach = match record.reach {
            0 => Reach::Unsaid,
            1 => Reach::Open,
            2 => Reach::Behind,
            _ => return Err(Field("reach")),
        };
        if record.keepers.len() > MAX_KEEPERS {
            return Err(Field("keepers"));
        }
        let outside = parse_all(&record.outside, socket_from_bytes);
        let outside = outside.filter(|outside| outside.len() <= MAX_OUTSIDE).ok_or(Field("outside"))?;
        Ok(Self { reach, keepers: record.keepers.clone(), outside })
    }
}
