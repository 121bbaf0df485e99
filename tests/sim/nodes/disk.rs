//! One machine's disk: what a daemon finds there after a kill, and what after a power cut.

use std::collections::BTreeMap;

use rand_core::RngCore;
use weft_daemon::state::Memory;
use weft_ipam::pods::{AttachmentId, PodAddresses};
use weft_wire::mesh::NodeKey;
use weft_wire::seal::KeyRing;
use weft_wire::types::TunnelKey;

/// What the journal holds of an attachment.
#[derive(Debug, Clone)]
pub struct Pod {
    pub addresses: PodAddresses,
    pub mtu: u32,
}

/// The files of one daemon.
#[derive(Debug)]
pub struct Disk {
    /// As every process sees it.
    memory: Memory,
    /// As it was last synced.
    synced: Memory,
    /// The node's key; always synced.
    pub key: NodeKey,
    /// The keys of its tunnels: in force, about to follow, and the detour's; always synced.
    pub tunnel: TunnelKey,
    pub next_tunnel: Option<TunnelKey>,
    pub spare_tunnel: TunnelKey,
    /// The cluster keys; always synced.
    pub ring: KeyRing,
    /// The journal of pod addresses, with the boot it is of; every write is synced.
    pub journal: BTreeMap<AttachmentId, Pod>,
    pub journal_boot: u64,
    /// Nothing can be written.
    pub full: bool,
}

/// Makes a key from another one.
pub fn another(mut key: TunnelKey) -> TunnelKey {
    let count = u64::from_be_bytes(*key.0.last_chunk().expect("a key has more bytes"));
    *key.0.last_chunk_mut().expect("a key has more bytes") = count.wrapping_add(1).to_be_bytes();
    key
}

impl Disk {
    /// A disk with keys and nothing else.
    pub fn new(key: NodeKey, tunnel: TunnelKey, ring: KeyRing) -> Self {
        let (memory, synced) = Default::default();
        Self {
            memory,
            synced,
            key,
            tunnel,
            next_tunnel: None,
            spare_tunnel: another(tunnel),
            ring,
            journal: BTreeMap::new(),
            journal_boot: 0,
            full: false,
        }
    }

    /// Reads what was remembered.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Replaces what is remembered.
    pub fn remember(&mut self, memory: &Memory, durable: bool) -> Result<(), String> {
        if self.full {
            return Err("no space left on device".into());
        }
        self.memory.clone_from(memory);
        if durable {
            self.synced.clone_from(memory);
        }
        Ok(())
    }

    /// The power goes: a file that was replaced and not synced is the old one, the new one, or empty.
    pub fn lose_power(&mut self, rng: &mut impl RngCore) {
        if self.memory != self.synced {
            match rng.next_u32() % 3 {
                0 => {}
                1 => self.memory.clone_from(&self.synced),
                _ => self.memory = Memory::default(),
            }
        }
        self.synced.clone_from(&self.memory);
    }

    /// Removes what a daemon wrote, as `weft leave` does.
    pub fn forget(&mut self) {
        self.memory = Memory::default();
        self.synced = Memory::default();
        self.journal.clear();
    }
}
