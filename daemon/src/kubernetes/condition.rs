//! The condition `NetworkUnavailable` of the Node: whether pods here can talk, as `/readyz` says it.
//!
//! The node lifecycle controller makes the taint `node.kubernetes.io/network-unavailable` from it. Pure but for [`patch`].
//! Invariant: what the Node shows already is not written again.

use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{Node, NodeCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;
use tokio::time::timeout;

use super::DEADLINE;
use super::trouble::{Ask, sentence};

const TYPE: &str = "NetworkUnavailable";
/// A daemon that starts, or takes over, is not ready for a moment although pods talk all the while.
const MOMENT: Duration = Duration::from_secs(20);
/// Between two writes of another sentence about the same status.
const SAME_STATUS: Duration = Duration::from_secs(10);

/// What the Node shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// Whether there is no network.
    unavailable: bool,
    reason: String,
    message: String,
    /// Since when the status is as it is.
    since: Option<Timestamp>,
}

/// What the Node should show.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wanted {
    unavailable: bool,
    message: String,
    /// Since when, where the status stays.
    since: Option<Timestamp>,
}

impl Wanted {
    fn reason(&self) -> &'static str {
        if self.unavailable { "WeftIsNotReady" } else { "WeftIsUp" }
    }
}

/// Finds the condition among those of a Node.
pub(super) fn shown(node: &Node) -> Option<Shown> {
    let conditions = node.status.as_ref()?.conditions.as_ref()?;
    let condition = conditions.iter().find(|condition| condition.type_ == TYPE)?;
    Some(Shown {
        unavailable: condition.status != "False",
        reason: condition.reason.clone().unwrap_or_default(),
        message: condition.message.clone().unwrap_or_default(),
        since: condition.last_transition_time.as_ref().map(|time| time.0),
    })
}

/// Decides what to write.
#[derive(Debug, Default)]
pub(super) struct Condition {
    /// Since when pods cannot talk.
    blocked: Option<Instant>,
    written: Option<Instant>,
}

impl Condition {
    /// Returns what the Node should show, if it does not.
    pub(super) fn next(
        &mut self,
        shown: Option<&Shown>,
        ready: &Result<(), String>,
        now: Instant,
    ) -> Option<Wanted> {
        let since = |at: Instant| now.saturating_duration_since(at);
        let (unavailable, message) = match ready {
            Ok(()) => {
                self.blocked = None;
                (false, "pods on this node can talk".to_owned())
            }
            Err(why) => {
                let blocked = *self.blocked.get_or_insert(now);
                if shown.is_some_and(|shown| !shown.unavailable) && since(blocked) < MOMENT {
                    return None;
                }
                (true, why.clone())
            }
        };
        let same_status = shown.filter(|shown| shown.unavailable == unavailable);
        let wanted = Wanted { unavailable, message, since: same_status.and_then(|shown| shown.since) };
        let same = same_status
            .is_some_and(|shown| shown.message == wanted.message && shown.reason == wanted.reason());
        // The watch may not have shown yet what was written last; and sentences may change all the time.
        let pause = if same_status.is_some() { SAME_STATUS } else { Duration::from_secs(2) };
        if same || self.written.is_some_and(|at| since(at) < pause) {
            return None;
        }
        self.written = Some(now);
        Some(wanted)
    }
}

/// Writes the condition.
pub(super) async fn patch(client: &Client, node: &str, wanted: &Wanted) -> Result<(), String> {
    let api: Api<Node> = Api::all(client.clone());
    let now = Time(Timestamp::now());
    let condition = NodeCondition {
        type_: TYPE.into(),
        status: if wanted.unavailable { "True" } else { "False" }.into(),
        reason: Some(wanted.reason().into()),
        message: Some(wanted.message.clone()),
        last_heartbeat_time: Some(now.clone()),
        last_transition_time: Some(wanted.since.map_or(now, Time)),
    };
    let patch = Patch::Strategic(json!({ "status": { "conditions": [condition] } }));
    match timeout(DEADLINE, api.patch_status(node, &PatchParams::default(), &patch)).await {
        Ok(outcome) => {
            outcome.map(drop).map_err(|error| sentence(&Ask { verb: "patch", what: "nodes/status" }, &error))
        }
        Err(_) => Err("the API server did not take the condition of the Node in time".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn up() -> Shown {
        Shown {
            unavailable: false,
            reason: "WeftIsUp".into(),
            message: "pods on this node can talk".into(),
            since: Some(Timestamp::UNIX_EPOCH),
        }
    }

    #[test]
    fn what_the_node_shows_is_not_written_and_what_it_lost_is() {
        let (mut condition, now) = (Condition::default(), Instant::now());
        assert_eq!(condition.next(Some(&up()), &Ok(()), now), None);
        let written = condition.next(None, &Ok(()), now).expect("a Node without the condition gets it");
        assert!(!written.unavailable && written.since.is_none());
        let cloud = Shown { unavailable: true, reason: "NoRouteCreated".into(), ..up() };
        let later = now + Duration::from_secs(60);
        let written = condition.next(Some(&cloud), &Ok(()), later).expect("somebody else set it");
        assert_eq!((written.unavailable, written.since), (false, None), "the status changes now");
    }

    #[test]
    fn a_new_node_that_is_not_ready_is_told_at_once_with_the_step() {
        let (mut condition, now) = (Condition::default(), Instant::now());
        let blocked = Err("no subnet".to_owned());
        let written = condition.next(None, &blocked, now).expect("written");
        assert_eq!((written.unavailable, written.message.as_str()), (true, "no subnet"));
    }

    #[test]
    fn a_daemon_that_starts_takes_no_network_away() {
        let (mut condition, now) = (Condition::default(), Instant::now());
        let blocked = Err("the first pass is under way".to_owned());
        assert_eq!(condition.next(Some(&up()), &blocked, now), None);
        assert_eq!(condition.next(Some(&up()), &blocked, now + MOMENT / 2), None);
        assert_eq!(condition.next(Some(&up()), &Ok(()), now + MOMENT / 2), None);
        assert_eq!(condition.next(Some(&up()), &blocked, now + MOMENT), None, "it counts anew");
        assert!(condition.next(Some(&up()), &blocked, now + MOMENT * 2).is_some());
    }

    #[test]
    fn a_sentence_that_changes_all_the_time_is_written_now_and_then_and_keeps_its_time() {
        let (mut condition, began) = (Condition::default(), Instant::now());
        let mut shown: Option<Shown> = None;
        let mut writes = 0;
        for second in 0..100 {
            let ready = Err(format!("step {second}"));
            if let Some(wanted) = condition.next(shown.as_ref(), &ready, began + Duration::from_secs(second))
            {
                writes += 1;
                assert_eq!(wanted.since, shown.as_ref().and_then(|shown| shown.since));
                let since = wanted.since.or(Some(Timestamp::UNIX_EPOCH));
                let reason = wanted.reason().to_owned();
                shown = Some(Shown { unavailable: true, reason, message: wanted.message, since });
            }
        }
        assert!((5..=11).contains(&writes), "{writes}");
    }
}
