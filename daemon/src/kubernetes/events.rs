//! What an operator should hear, as Events of the Node: each once, again only now and then, and never many.
//!
//! Invariant: at most [`A_MINUTE`] are written in a minute; a remark that finds no place waits for as long as it holds.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::json;
use tokio::time::timeout;

use super::DEADLINE;
use super::trouble::{Ask, sentence};

/// The most Events in a minute.
pub(super) const A_MINUTE: usize = 5;
/// A remark that the API server did not take is repeated after so long.
const LOST: Duration = Duration::from_secs(30);
/// A remark that still holds is repeated after so long: the API server keeps an Event for an hour.
const AGAIN: Duration = Duration::from_secs(20 * 60);
/// Between two remarks of one reason, whose words may differ each time.
const SAME_REASON: Duration = Duration::from_secs(20);
/// The API server takes no longer message.
const MOST_BYTES: usize = 1000;

/// Why an operator should hear something; the `reason` of the Event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// The daemon ended, and says why.
    Ended,
    /// The way to the API server, or its answers.
    ApiServer,
    /// A verb that weft needs and has not.
    MissingPermission,
    /// The store of the leases.
    Store,
    /// The node's pod subnets.
    PodSubnet,
    /// `spec.podCIDRs` of the Node.
    PodCidr,
    /// Another node has this one's name or keys.
    DuplicateNode,
    /// The cluster keys.
    ClusterKey,
    /// Another network configuration comes first.
    OtherNetwork,
    /// The cluster's ranges and the machine.
    Machine,
    /// The Node's addresses are not those in use.
    NodeAddress,
}

impl Reason {
    fn name(self) -> &'static str {
        match self {
            Self::Ended => "WeftEnded",
            Self::ApiServer => "WeftAPIServer",
            Self::MissingPermission => "WeftMissingPermission",
            Self::Store => "WeftStore",
            Self::PodSubnet => "WeftPodSubnet",
            Self::PodCidr => "WeftPodCIDR",
            Self::DuplicateNode => "WeftDuplicateNode",
            Self::ClusterKey => "WeftClusterKey",
            Self::OtherNetwork => "WeftOtherNetwork",
            Self::Machine => "WeftMachine",
            Self::NodeAddress => "WeftNodeAddress",
        }
    }
}

/// What an operator should hear.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Remark {
    /// Why.
    pub reason: Reason,
    /// What happened, where, and what to do.
    pub sentence: String,
}

/// What was told, and when.
#[derive(Debug, Default)]
pub(super) struct Events {
    told: BTreeMap<Remark, Told>,
    by_reason: BTreeMap<Reason, Instant>,
    lately: VecDeque<Instant>,
}

#[derive(Debug)]
struct Told {
    at: Instant,
    count: i32,
    /// It did not get through.
    lost: bool,
}

impl Told {
    /// Returns how long it is not said again.
    fn rest(&self) -> Duration {
        if self.lost { LOST } else { AGAIN }
    }
}

impl Events {
    /// Returns which of the remarks that hold now are to be written, each with how often it was by then.
    pub(super) fn next(&mut self, remarks: &[Remark], now: Instant) -> Vec<(Remark, i32)> {
        let since = |at: Instant| now.saturating_duration_since(at);
        // What is over for long would be news again.
        self.told.retain(|remark, told| since(told.at) < AGAIN * 3 || remarks.contains(remark));
        self.lately.retain(|at| since(*at) < Duration::from_secs(60));
        let mut due = Vec::new();
        for remark in remarks {
            let known = self.told.get(remark);
            if known.is_some_and(|told| since(told.at) < told.rest())
                || self.by_reason.get(&remark.reason).is_some_and(|at| since(*at) < SAME_REASON)
                || self.lately.len() >= A_MINUTE
            {
                continue;
            }
            let count = known.map_or(1, |told| told.count.saturating_add(i32::from(!told.lost)));
            self.told.insert(remark.clone(), Told { at: now, count, lost: false });
            self.by_reason.insert(remark.reason, now);
            self.lately.push_back(now);
            due.push((remark.clone(), count));
        }
        due
    }

    /// Takes that the API server did not take a remark: it is due again soon, as long as it holds.
    pub(super) fn lost(&mut self, remark: &Remark) {
        if let Some(told) = self.told.get_mut(remark) {
            told.lost = true;
        }
    }
}

/// Writes one Event, or counts up the one that says the same.
pub(super) async fn write(
    client: &Client,
    node: &str,
    uid: Option<String>,
    remark: &Remark,
    count: i32,
) -> Result<(), String> {
    // Events of what has no namespace are in this one.
    let api: Api<Event> = Api::namespaced(client.clone(), "default");
    let now = Time(Timestamp::now());
    let name = format!("{node}.weft.{:016x}", fingerprint(remark));
    let event = Event {
        metadata: ObjectMeta {
            name: Some(name.clone()),
            namespace: Some("default".into()),
            ..ObjectMeta::default()
        },
        involved_object: ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Node".into()),
            name: Some(node.into()),
            uid,
            ..ObjectReference::default()
        },
        reason: Some(remark.reason.name().into()),
        message: Some(shortened(&remark.sentence).to_owned()),
        type_: Some("Warning".into()),
        source: Some(EventSource { component: Some("weft".into()), host: Some(node.into()) }),
        first_timestamp: Some(now.clone()),
        last_timestamp: Some(now.clone()),
        count: Some(count),
        ..Event::default()
    };
    let refused = |verb, error: &kube::Error| sentence(&Ask { verb, what: "events" }, error);
    let late = |_| "the API server did not take an Event in time".to_owned();
    match timeout(DEADLINE, api.create(&PostParams::default(), &event)).await.map_err(late)? {
        Ok(_) => Ok(()),
        // An earlier run of the daemon said the same, or this one did.
        Err(kube::Error::Api(status)) if status.code == 409 => {
            let again = Patch::Merge(json!({ "lastTimestamp": now, "count": count.max(2) }));
            let patched = timeout(DEADLINE, api.patch(&name, &PatchParams::default(), &again)).await;
            patched.map_err(late)?.map(drop).map_err(|error| refused("patch", &error))
        }
        Err(error) => Err(refused("create", &error)),
    }
}

/// The same for the same remark in every run (FNV-1a).
fn fingerprint(remark: &Remark) -> u64 {
    let bytes = remark.reason.name().bytes().chain([0]).chain(remark.sentence.bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

fn shortened(sentence: &str) -> &str {
    let end = (0..=MOST_BYTES.min(sentence.len())).rev().find(|end| sentence.is_char_boundary(*end));
    &sentence[..end.unwrap_or(0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remark(reason: Reason, sentence: &str) -> Remark {
        Remark { reason, sentence: sentence.into() }
    }

    #[test]
    fn what_did_not_get_through_is_told_again_soon() {
        let (mut events, now) = (Events::default(), Instant::now());
        let holds = [remark(Reason::Machine, "the address is gone")];
        assert_eq!(events.next(&holds, now), [(holds[0].clone(), 1)]);
        events.lost(&holds[0]);
        assert!(events.next(&holds, now + LOST / 2).is_empty());
        assert_eq!(events.next(&holds, now + LOST), [(holds[0].clone(), 1)]);
        assert!(events.next(&holds, now + LOST * 3).is_empty(), "it got through");
    }

    #[test]
    fn what_holds_is_told_once_and_again_after_a_long_time() {
        let (mut events, now) = (Events::default(), Instant::now());
        let holds = [remark(Reason::PodCidr, "no podCIDR")];
        assert_eq!(events.next(&holds, now), [(holds[0].clone(), 1)]);
        for second in 1..AGAIN.as_secs() {
            assert!(events.next(&holds, now + Duration::from_secs(second)).is_empty());
        }
        assert_eq!(events.next(&holds, now + AGAIN), [(holds[0].clone(), 2)]);
    }

    #[test]
    fn a_sentence_that_comes_and_goes_is_not_told_each_time() {
        let (mut events, now) = (Events::default(), Instant::now());
        let holds = [remark(Reason::Store, "gone")];
        let told: usize = (0..600)
            .map(|second| {
                let now = now + Duration::from_secs(second);
                events.next(if second % 2 == 0 { &holds } else { &[] }, now).len()
            })
            .sum();
        assert_eq!(told, 1);
    }

    #[test]
    fn words_that_always_differ_make_no_flood_and_leave_room_for_other_reasons() {
        let (mut events, began) = (Events::default(), Instant::now());
        let mut told = Vec::new();
        for second in 0..600_u64 {
            let now = began + Duration::from_secs(second);
            let mut remarks: Vec<_> =
                (0..50).map(|number| remark(Reason::Store, &format!("{number} {second}"))).collect();
            if second > 300 {
                remarks.push(remark(Reason::ClusterKey, "nonsense"));
            }
            told.extend(events.next(&remarks, now).into_iter().map(|(remark, _)| (second, remark)));
            let lately = told.iter().filter(|(at, _)| second - at < 60).count();
            assert!(lately <= A_MINUTE, "{lately} in the minute before {second}");
        }
        assert!(told.iter().any(|(at, remark)| *at < 330 && remark.reason == Reason::ClusterKey));
    }

    #[test]
    fn a_message_fits_and_is_cut_between_characters() {
        let long = "ä".repeat(MOST_BYTES);
        assert_eq!(shortened(&long).len(), MOST_BYTES);
        assert_eq!(shortened(&format!("a{long}")).len(), MOST_BYTES - 1);
        assert_eq!(shortened("short"), "short");
        assert_ne!(fingerprint(&remark(Reason::Store, "a")), fingerprint(&remark(Reason::Store, "b")));
    }
}
