//! The control plane of one node alone: what it asks its shell for, and how often.

#![allow(clippy::unwrap_used, reason = "a test that unwraps names its line")]

use std::path::Path;
use std::time::{Duration, Instant};

use weft_daemon::config::Config;
use weft_daemon::control::{Control, Output, Start, StoreAnswer, StoreRequest};
use weft_daemon::kernel::UnderlayError;
use weft_daemon::plan::model::Underlay;
use weft_daemon::reconcile::Report;
use weft_daemon::state::Memory;
use weft_ipam::lease::LeaseValue;
use weft_ipam::store::{Entry, Snapshot};
use weft_wire::mesh::NodeKey;
use weft_wire::seal::{ClusterKey, KeyRing};
use weft_wire::types::{Epoch, Subnet};

fn control(now: Instant) -> Control {
    let text = "[node]\nname = \"n1\"\n[cluster]\ncidrs = [{ cidr = \"10.32.0.0/12\", node_prefix = 24 }]\n\
                [store]\ntype = \"static\"\nsubnets = [\"10.32.4.0/24\"]\n";
    control_of(text, now)
}

fn control_of(text: &str, now: Instant) -> Control {
    let start = Start {
        tunnel: None,
        trust: None,
        config: Config::parse(text, Path::new("weft.toml"), "n1").unwrap(),
        memory: Memory { incarnation: 1, ..Memory::default() },
        boot: "boot".into(),
        key: NodeKey::from_secret([1; 32]),
        ring: KeyRing::new(vec![ClusterKey::from_bytes([1; 32])]).unwrap(),
        seed: [7; 32],
    };
    Control::new(start, now)
}

/// Runs for so long in virtual time; a pass finds what `found` says, and the number of passes is returned.
fn passes(
    control: &mut Control,
    now: &mut Instant,
    length: Duration,
    found: &Result<Underlay, UnderlayError>,
) -> usize {
    let (end, mut passes, mut idle) = (*now + length, 0, 0);
    while *now < end {
        match control.poll_output(*now) {
            Output::Reconcile(inputs) => {
                passes += 1;
                let same = found.as_ref().is_ok_and(|found| *found == inputs.underlay);
                let report = same.then(|| Report { pod_mtu: 1450, ..Report::default() });
                control.handle_pass(found.clone(), report, *now);
            }
            Output::Remember { .. } => control.handle_remembered(Ok(()), *now),
            Output::Wait { until } => {
                // What is due now is done now; to be asked for again and again would be a busy loop.
                idle = if until > *now { 0 } else { idle + 1 };
                assert!(idle < 10, "the control plane asks to be called at once, again and again");
                *now = until;
                control.handle_timeout(*now);
            }
            _ => {}
        }
    }
    passes
}

#[test]
fn what_keeps_one_family_from_its_lease_is_told_though_the_other_has_its_own() {
    let mut now = Instant::now();
    let text = "[node]\nname = \"n1\"\n[cluster]\ncidrs = [{ cidr = \"10.32.0.0/24\", node_prefix = 24 }, \
                { cidr = \"fd00:32::/48\", node_prefix = 64 }]\n";
    let mut control = control_of(text, now);
    let taken: Subnet = "10.32.0.0/24".parse().unwrap();
    let value = LeaseValue {
        subnet: taken,
        node: "n2".parse().unwrap(),
        site: "default".parse().unwrap(),
        key: NodeKey::from_secret([2; 32]).public(),
        epoch: Epoch(1),
        ttl: None,
        renewals: 0,
        boot: "boot".into(),
        gossip: Vec::new(),
        asked: None,
    };
    let entry = Entry { value: value.encode(), revision: 1 };
    let mut store = Snapshot { store_id: "s".into(), revision: 1, entries: [(taken, entry)].into() };
    let (end, mut told, mut renewals) = (now + Duration::from_secs(3600), false, 0);
    while now < end {
        match control.poll_output(now) {
            Output::Store(StoreRequest::List) => {
                control.handle_store(StoreAnswer::Listed(Ok(store.clone())), now);
            }
            Output::Store(StoreRequest::Put { key, value, .. }) => {
                store.revision += 1;
                renewals += 1;
                store.entries.insert(key, Entry { value, revision: store.revision });
                control.handle_store(StoreAnswer::Put(key, Ok(store.revision)), now);
            }
            Output::Remember { .. } => control.handle_remembered(Ok(()), now),
            Output::Reconcile(_) => control.handle_pass(Ok(underlay()), None, now),
            Output::Wait { until } => {
                let says = control
                    .problems
                    .lease
                    .keys()
                    .any(|said| said.contains("no free node subnet in 10.32.0.0/24"));
                assert!(says || !told, "it is told no more, {renewals} writes later");
                told |= says;
                now = until.max(now + Duration::from_millis(1));
                control.handle_timeout(now);
            }
            _ => {}
        }
    }
    assert!(told && renewals > 3, "the other family renewed its lease {renewals} times");
    assert_eq!(control.subnets().len(), 1);
}

fn underlay() -> Underlay {
    let addresses = vec!["192.0.2.1/24".parse().unwrap()];
    Underlay { device: "eth0".into(), index: 2, mtu: 1500, addresses, strict_sources: false, tunnel: None }
}

#[test]
fn a_lost_underlay_is_looked_for_once_a_second_and_told_until_it_is_back() {
    let mut now = Instant::now();
    let mut control = control(now);
    passes(&mut control, &mut now, Duration::from_secs(5), &Ok(underlay()));
    let lost = Err(UnderlayError::Down("eth0".into()));
    control.handle_kernel_change(now);
    let looks = passes(&mut control, &mut now, Duration::from_secs(60), &lost);
    assert!((50..=65).contains(&looks), "{looks} looks in a minute");
    assert!(control.problems.underlay.as_ref().is_some_and(|why| why.contains("eth0 is down")));
    assert_eq!(control.underlay, Ok(underlay()), "what the kernel carries stays");
    passes(&mut control, &mut now, Duration::from_secs(5), &Ok(underlay()));
    assert_eq!(control.problems.underlay, None);
}

#[test]
fn at_rest_a_node_looks_at_its_kernel_twice_a_minute() {
    let mut now = Instant::now();
    let mut control = control(now);
    passes(&mut control, &mut now, Duration::from_secs(10), &Ok(underlay()));
    let looks = passes(&mut control, &mut now, Duration::from_secs(600), &Ok(underlay()));
    assert!((18..=22).contains(&looks), "{looks} looks in ten minutes");
}
