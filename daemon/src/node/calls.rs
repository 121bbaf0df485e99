//! What the local socket asks for: one function a request.

use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tracing::{info, warn};
use weft_wire::api::{PingRequest, Pong, Reply, ReplyBody, RequestBody};
use weft_wire::types::NodeName;

use super::{LEAVE, Node, worker};
use crate::server::Call;

/// How long the mesh takes to tell enough peers that the node goes.
const TELL: Duration = Duration::from_millis(600);
/// How long a ping waits for its answer.
const PING: Duration = Duration::from_secs(2);

/// A ping under way.
#[derive(Debug)]
pub(super) struct PendingPing {
    node: NodeName,
    reply: oneshot::Sender<Reply>,
    pub(super) deadline: Instant,
}

/// A node that goes away on purpose.
#[derive(Debug)]
pub(super) struct Leaving {
    pub(super) deadline: Instant,
    told: Instant,
    reply: Option<oneshot::Sender<Reply>>,
    purged: bool,
}

impl Leaving {
    pub(super) fn wake(&self, now: Instant) -> Instant {
        if now < self.told { self.told } else { self.deadline }
    }
}

impl Node {
    pub(super) fn handle_call(&mut self, call: Call, now: Instant) {
        let Call { request, privileged, reply } = call;
        let Some(body) = request.body else {
            let _ = reply.send(Reply::refusal(1, "the request is empty; use a weft of the same release"));
            return;
        };
        let changes = matches!(
            body,
            RequestBody::Cni(_)
                | RequestBody::Leave(_)
                | RequestBody::ClusterKey(_)
                | RequestBody::RotateNodeKey(_)
                | RequestBody::Forget(_)
                | RequestBody::Site(_)
        );
        if changes && !privileged {
            let _ = reply.send(Reply::refusal(3, "only root may change the node; run the command with sudo"));
            return;
        }
        let answer = match body {
            RequestBody::Cni(request) => {
                let ready = self.control.ready();
                self.pods.handle_call(request, reply, ready);
                // A pod that is being attached has its addresses already.
                return self.pods_changed(now);
            }
            RequestBody::Ping(request) => return self.start_ping(&request, reply, now),
            RequestBody::Leave(_) => return self.start_leaving(reply, now),
            RequestBody::Status(_) => ReplyBody::Status(self.status(now)).into(),
            RequestBody::Peers(_) => ReplyBody::Peers(self.peers(now)).into(),
            RequestBody::Routes(_) => ReplyBody::Routes(self.routes()).into(),
            RequestBody::Leases(_) => ReplyBody::Leases(self.lease_list(now)).into(),
            RequestBody::Pods(_) => ReplyBody::Pods(self.pod_list()).into(),
            RequestBody::Trace(request) => ReplyBody::Trace(self.trace(&request, now)).into(),
            RequestBody::Doctor(_) => ReplyBody::Doctor(self.doctor(now)).into(),
            RequestBody::ClusterKey(request) => self.change_cluster_keys(&request, now),
            RequestBody::RotateNodeKey(_) => self.rotate_node_key(now),
            RequestBody::Forget(request) => self.forget(&request.node),
            RequestBody::Sites(_) => ReplyBody::Sites(self.sites(now)).into(),
            RequestBody::Site(request) if request.action == "join" => {
                return self.start_joining(&request, reply, now);
            }
            RequestBody::Site(request) => self.speak(&request, now),
        };
        // A caller that hung up wants no answer.
        let _ = reply.send(answer);
    }

    fn forget(&mut self, name: &str) -> Reply {
        match name.parse::<NodeName>() {
            Err(error) => Reply::refusal(1, error.to_string()),
            Ok(node) => {
                self.control.mesh.forget(&node);
                self.control.memory.peers.remove(&node);
                Reply::done(format!("{node} is forgotten, if it was dead"))
            }
        }
    }

    fn start_ping(&mut self, request: &PingRequest, reply: oneshot::Sender<Reply>, now: Instant) {
        let token = self.next_token;
        self.next_token += 1;
        let started = request.node.parse::<NodeName>().map_err(|error| error.to_string()).and_then(|node| {
            self.control.mesh.ping(&node, token, now).map(|()| node).map_err(|error| error.to_string())
        });
        match started {
            Ok(node) => {
                self.pings.insert(token, PendingPing { node, reply, deadline: now + PING });
            }
            Err(error) => {
                let _ = reply.send(Reply::refusal(2, error));
            }
        }
    }

    pub(super) fn finish_ping(&mut self, token: u64, rtt: Duration) {
        if let Some(ping) = self.pings.remove(&token) {
            let pong = Pong { node: ping.node.to_string(), rtt_ms: rtt.as_secs_f64() * 1e3 };
            let _ = ping.reply.send(ReplyBody::Ping(pong).into());
        }
    }

    pub(super) fn expire_pings(&mut self, now: Instant) {
        for (_, ping) in self.pings.extract_if(.., |_, ping| ping.deadline <= now) {
            let _ = ping.reply.send(Reply::refusal(
                2,
                format!(
                    "no answer from {} within {} s; `weft peers` shows its state",
                    ping.node,
                    PING.as_secs()
                ),
            ));
        }
    }

    /// Gives everything back: the leases, the place in the mesh, the kernel objects.
    fn start_leaving(&mut self, reply: oneshot::Sender<Reply>, now: Instant) {
        if !self.pods.is_empty() {
            let _ = reply.send(Reply::refusal(
                1,
                "pods still use this node's network; drain the node first (`weft pods` lists them)",
            ));
            return;
        }
        info!("leaving the cluster");
        self.control.leave(now);
        let purged = self.jobs.send(worker::Job::Purge).is_err();
        self.leaving = Some(Leaving { deadline: now + LEAVE, told: now + TELL, reply: Some(reply), purged });
    }

    pub(super) fn take_purged(&mut self, left: &[String]) {
        for what in left {
            warn!(what, "could not be removed");
        }
        if let Some(leaving) = &mut self.leaving {
            leaving.purged = true;
        }
    }

    /// Ends the leaving once the kernel is clean and the leases are given back, or the time is over.
    pub(super) fn left(&mut self, now: Instant) -> bool {
        let released = self.control.leasing.held().is_empty();
        let Some(leaving) = &mut self.leaving else { return false };
        let late = now >= leaving.deadline;
        if !(leaving.purged && now >= leaving.told && (released || late)) {
            return false;
        }
        let message = if released {
            "the node has left: its leases are released and its kernel objects removed".to_owned()
        } else {
            "the node has left; its leases could not be released and will expire".to_owned()
        };
        if let Err(error) = self.dir.forget() {
            warn!(err = %error, "state not removed");
        }
        if let Some(reply) = leaving.reply.take() {
            let _ = reply.send(Reply::done(message));
        }
        true
    }
}
