//! Rotation of the cluster keys and of the node's own key. Each change is on the disk before it is used.

use std::time::{Duration, Instant};

use tracing::{info, warn};
use weft_wire::api::{ClusterKeyRequest, ClusterKeys, Reply, ReplyBody};
use weft_wire::mesh::NodeKey;
use weft_wire::seal::{ClusterKey, KeyRing};
use weft_wire::types::TunnelKey;

use super::{Node, worker};
use crate::ring_file::write_ring;
use crate::state::{self, StateError, TunnelPlace};

/// After a rotation on schedule that failed, and between two because of a twin.
const RETRY: Duration = Duration::from_secs(60);
/// So long peers have to follow a key of the tunnels before a person's word brings another: a session that is only being
/// made has no place beside two that came after it.
const FOLLOWED: Duration = Duration::from_secs(5);

impl Node {
    /// Writes the cluster keys that the control plane goes on with.
    pub(super) fn keep_ring(&mut self, ring: KeyRing, now: Instant) {
        let written = write_ring(&self.control.config.cluster.key_file, &ring);
        self.control.handle_ring_kept(written.map(|()| ring).map_err(|error| error.to_string()), now);
    }

    /// Lists, adds, uses or removes a cluster key.
    pub(super) fn change_cluster_keys(&mut self, request: &ClusterKeyRequest, now: Instant) -> Reply {
        match self.changed_ring(request) {
            Err((code, why)) => return Reply::refusal(code, why),
            Ok(None) => {}
            Ok(Some(ring)) => {
                if let Err(error) = write_ring(&self.control.config.cluster.key_file, &ring) {
                    return Reply::refusal(1, error.to_string());
                }
                info!(action = request.action, keys = ?ring.ids().collect::<Vec<_>>(), "cluster keys changed");
                self.control.use_ring(ring, now);
            }
        }
        let ids = self.control.mesh.ring().ids().map(|id| id.to_string()).collect();
        ReplyBody::ClusterKeys(ClusterKeys { ids }).into()
    }

    fn changed_ring(&self, request: &ClusterKeyRequest) -> Result<Option<KeyRing>, (u32, String)> {
        let mut keys: Vec<ClusterKey> = self.control.mesh.ring().keys().cloned().collect();
        let place = keys.iter().position(|key| key.id().to_string() == request.key);
        let unknown =
            || (2, format!("no key {:?} in the ring; `weft cluster-key list` shows the ids", request.key));
        match request.action.as_str() {
            "" | "list" => return Ok(None),
            _ if self.control.memory.mesh_keys.is_some() => {
                return Err((
                    1,
                    "the cluster keys are those that the sites gave each other: `weft site rekey` changes them, on a node that speaks for a site".into(),
                ));
            }
            _ if self.control.follows() => {
                return Err((
                    1,
                    "the cluster keys are those of the Secret weft-cluster-key: edit that, and every node follows".into(),
                ));
            }
            "add" => {
                let key: ClusterKey = request.key.parse().map_err(|error| (1, format!("{error}")))?;
                if keys.contains(&key) {
                    return Ok(None);
                }
                keys.push(key);
            }
            "use" => keys[..=place.ok_or_else(unknown)?].rotate_right(1),
            "remove" => match place.ok_or_else(unknown)? {
                0 => {
                    return Err((
                        1,
                        "this key seals what the node sends; `weft cluster-key use` another one first".into(),
                    ));
                }
                place => drop(keys.remove(place)),
            },
            other => {
                return Err((1, format!("unknown action {other:?}: use list, add, use or remove")));
            }
        }
        KeyRing::new(keys).map(Some).map_err(|error| (1, error.to_string()))
    }

    /// Replaces the key of the tunnels, where there are any, and says when it is time again.
    pub(super) fn rotate_on_schedule(&mut self, now: Instant) {
        if let Some(at) = self.settled_at(now) {
            self.rekey = at;
            return;
        }
        let pause = match self.rotate_tunnel_key(now) {
            Ok(key) => {
                // Nodes that started together do not rotate together: up to an eighth later.
                let after = self.control.config.encryption.rotate_after;
                after + after / 2048 * key.map_or(0, |key| u32::from(key.0[0]))
            }
            Err(error) => {
                warn!(err = %error, "tunnel key not rotated");
                RETRY
            }
        };
        self.rekey = now + pause;
    }

    /// Returns when to look again whether the last change of the tunnel key is over; nothing where it is.
    fn settled_at(&self, now: Instant) -> Option<Instant> {
        let followed = self.rotated.map(|at| at + FOLLOWED).filter(|at| *at > now);
        followed.or_else(|| self.control.is_rotating(now).then_some(now + FOLLOWED))
    }

    /// Returns whether to replace the tunnel key because another node has it, as the clone of a disk does: whoever of the two
    /// speaks would take the other's sessions. Both do so, and not over and over should someone copy what is announced.
    pub(super) fn has_twin(&mut self, now: Instant) -> bool {
        let Some(twin) = &self.control.problems.tunnel_twin else { return false };
        let again = self.untwinned.is_none_or(|at| now.duration_since(at) >= RETRY);
        if again {
            warn!(peer = %twin, "another node has this node's tunnel key, which is replaced");
            self.untwinned = Some(now);
        }
        again
    }

    /// Begins to change the key of the tunnels. Returns the next one; nothing where there are no tunnels.
    fn rotate_tunnel_key(&mut self, now: Instant) -> Result<Option<TunnelKey>, StateError> {
        if self.control.tunnel_key().is_none() {
            return Ok(None);
        }
        let key = self.new_tunnel_secret(TunnelPlace::Next)?;
        self.control.rotate_tunnel_key(key, now);
        self.rotated = Some(now);
        info!(%key, "tunnel key is to change");
        Ok(Some(key))
    }

    fn new_tunnel_secret(&self, place: TunnelPlace) -> Result<TunnelKey, StateError> {
        let secret = self.dir.new_tunnel_secret(place)?;
        let key = secret.public();
        self.jobs
            .send(worker::Job::TunnelSecret(secret))
            .expect("the kernel's thread lives as long as the loop");
        Ok(key)
    }

    /// Takes that the next key of the tunnels is in force.
    pub(super) fn turn_tunnel_key(&self, key: TunnelKey) {
        match self.dir.turn_tunnel_secret() {
            Ok(()) => info!(%key, "tunnel key changed"),
            // The next daemon finds it as the one that was to come, and begins anew.
            Err(error) => warn!(%key, err = %error, "tunnel key changed, but not on the disk"),
        }
    }

    /// Makes another key for the next detour.
    pub(super) fn renew_spare_key(&mut self) {
        match self.new_tunnel_secret(TunnelPlace::Detour) {
            Ok(key) => self.control.use_spare_key(key),
            Err(error) => warn!(err = %error, "the key of the detour is used once more"),
        }
    }

    /// Replaces the node's keys: that of its tunnels, if it has any, and that which signs, which the old one endorses. Peers
    /// follow without a person.
    pub(super) fn rotate_node_key(&mut self, now: Instant) -> Reply {
        let tunnel = match self.settled_at(now) {
            Some(at) => {
                self.rekey = self.rekey.min(at);
                ", and changes that of its tunnels again when the last change is over".to_owned()
            }
            None => match self.rotate_tunnel_key(now) {
                Ok(None) => String::new(),
                Ok(Some(key)) => format!(", and goes over to tunnel key {key}"),
                Err(error) => return Reply::refusal(1, error.to_string()),
            },
        };
        let rotate = || -> Result<NodeKey, StateError> {
            let key = NodeKey::from_secret(state::random()?);
            // The mesh endorses the same way; the file must have the endorsement before the key is used.
            let endorsed = key.endorsed_by(
                self.control.mesh.key(),
                &self.control.config.cluster.id,
                &self.control.config.node.name,
            );
            self.dir.set_node_key(&endorsed)?;
            Ok(endorsed)
        };
        match rotate() {
            Err(error) => Reply::refusal(1, error.to_string()),
            Ok(key) => {
                let public = key.public();
                self.control.use_key(key, now);
                Reply::done(format!("the node now signs with key {public}{tunnel}"))
            }
        }
    }
}
