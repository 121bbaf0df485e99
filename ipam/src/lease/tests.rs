mod model;

use super::*;
use crate::carve::{Carver, ClusterCidr};
use crate::store::memory::MemoryMap;
use crate::store::{Change, Entry};

const SEED: [u8; 32] = [7; 32];
const TTL: Duration = Duration::from_secs(3600);

/// A shared store and a time.
struct World {
    map: MemoryMap,
    store_id: &'static str,
    down: bool,
    /// It answers lists and refuses writes.
    full: bool,
    /// How many writes it refused.
    refusals: u32,
    now: Instant,
}

impl World {
    fn new() -> Self {
        Self {
            map: MemoryMap::default(),
            store_id: "s",
            down: false,
            full: false,
            refusals: 0,
            now: Instant::now(),
        }
    }

    /// Serves a node until it waits, and returns what it told.
    fn run(&mut self, node: &mut Leasing) -> Vec<LeaseEvent> {
        let mut events = Vec::new();
        for _ in 0..100 {
            match node.poll_output(self.now) {
                Output::Event(event) => events.push(event),
                Output::Wait { until } => {
                    assert!(until > self.now || self.down, "a wait that is over");
                    return events;
                }
                _ if self.down => node.handle_store_error(self.now),
                Output::Put { .. } | Output::Delete { .. } if self.full => {
                    self.refusals += 1;
                    node.handle_store_error(self.now);
                }
                Output::List => node.handle_snapshot(&self.map.list(self.store_id), self.now),
                Output::Put { key, expect, value } => {
                    node.handle_put(key, self.map.put_if(key, expect, value), self.now);
                }
                Output::Delete { key, revision } => {
                    node.handle_delete(key, self.map.delete_if(key, revision), self.now);
                }
            }
        }
        panic!("{node:?} does not come to rest: {events:?}");
    }

    /// Lets time pass in steps in which each node does what is due.
    fn pass(&mut self, time: Duration, nodes: &mut [&mut Leasing]) -> Vec<LeaseEvent> {
        let end = self.now + time;
        let mut events = Vec::new();
        while self.now < end {
            self.now = end.min(self.now + Duration::from_secs(20));
            nodes.iter_mut().for_each(|node| events.extend(self.run(node)));
        }
        events
    }

    fn value(&self, key: Key) -> Option<LeaseValue> {
        let entry = self.map.list("").entries.remove(&key)?;
        Some(LeaseValue::decode(key, &entry.value).expect("a lease"))
    }

    fn keys(&self) -> Vec<String> {
        self.map.list("").entries.keys().map(ToString::to_string).collect()
    }
}

fn subnet(text: &str) -> Subnet {
    text.parse().expect("a subnet")
}

fn key(number: u8) -> PublicKey {
    PublicKey([number; 32])
}

fn carver(cidrs: &[(&str, u8)]) -> Carver {
    let cidr = |&(cidr, node_prefix): &(&str, u8)| ClusterCidr {
        cidr: cidr.parse().expect("a prefix"),
        node_prefix,
        reserved: Vec::new(),
    };
    Carver::new(cidrs.iter().map(cidr).collect()).expect("valid CIDRs")
}

fn config(number: u8, cidrs: &[(&str, u8)], boot: &str) -> LeaseConfig {
    let name = format!("n{number}").parse().expect("a name");
    let site = "default".parse().expect("a name");
    LeaseConfig::new(name, site, key(number), carver(cidrs), boot.to_owned())
}

fn node(world: &World, number: u8, cidrs: &[(&str, u8)]) -> Leasing {
    Leasing::new(config(number, cidrs, &format!("boot-{number}")), Vec::new(), SEED, world.now)
}

const ONE: &[(&str, u8)] = &[("10.32.4.0/24", 24)];
const DUAL: &[(&str, u8)] = &[("10.32.0.0/16", 24), ("fd00:32::/48", 64)];

fn acquired(events: &[LeaseEvent]) -> Vec<HeldLease> {
    let lease = |event: &LeaseEvent| match event {
        LeaseEvent::Acquired(lease) => Some(*lease),
        _ => None,
    };
    events.iter().filter_map(lease).collect()
}

#[test]
fn a_node_says_of_which_families_it_still_gets_a_lease() {
    let mut world = World::new();
    let mut node = node(&world, 1, DUAL);
    for _ in 0..20 {
        assert_eq!(node.held().len() + node.getting().len(), 2, "{node:?}");
        match node.poll_output(world.now) {
            Output::List => node.handle_snapshot(&world.map.list("s"), world.now),
            Output::Put { key, expect, value } => {
                node.handle_put(key, world.map.put_if(key, expect, value), world.now);
            }
            _ => {}
        }
    }
    assert_eq!(node.held().len(), 2);
    // What cannot be had is not on the way, and what is not wanted neither.
    let full = &[("10.32.4.0/24", 24), ("fd00:32::/64", 64)];
    let taken = acquired(&world.run(&mut self::node(&world, 2, full)));
    assert_eq!(taken.len(), 2);
    let mut late = self::node(&world, 3, full);
    assert_eq!(late.getting().len(), 2);
    world.run(&mut late);
    assert_eq!((late.held().len(), late.getting().len()), (0, 0));
    let mut one = self::node(&world, 4, &[("10.64.0.0/16", 24)]);
    assert_eq!(one.getting(), [Family::V4]);
    world.run(&mut one);
    assert_eq!((one.held().len(), one.getting().len()), (1, 0));
}

#[test]
fn a_node_leases_one_subnet_of_each_family() {
    let mut world = World::new();
    let mut node = node(&world, 1, DUAL);
    assert_eq!(node.staleness(world.now), None);
    let leases = acquired(&world.run(&mut node));
    assert_eq!(leases.len(), 2);
    assert_eq!(node.held(), leases);
    assert_eq!(node.staleness(world.now), Some(Duration::ZERO));
    let table = node.table(world.now);
    assert_eq!(table.len(), 2);
    assert!(table.iter().all(|lease| lease.own && !lease.expired && lease.expires_in == Some(TTL)));
    assert!(leases.iter().all(|lease| world.value(lease.subnet).expect("stored").epoch == lease.epoch));
}

#[test]
fn two_nodes_racing_for_the_last_subnet_end_with_one_owner_and_one_told_why() {
    let mut world = World::new();
    let (mut a, mut b) = (node(&world, 1, ONE), node(&world, 2, ONE));
    // Both list the empty store before either writes.
    let empty = world.map.list("s");
    for node in [&mut a, &mut b] {
        assert_eq!(node.poll_output(world.now), Output::List);
        node.handle_snapshot(&empty, world.now);
    }
    assert_eq!(acquired(&world.run(&mut a)).len(), 1);
    let told = world.run(&mut b);
    let [exhausted @ LeaseEvent::Exhausted { capacity: 1, .. }] = &told[..] else { panic!("{told:?}") };
    assert_eq!(
        exhausted.to_string(),
        "no free IPv4 subnet in 10.32.4.0/24: all 1 blocks are leased; remove nodes that are gone, add a cluster CIDR, or use a longer node_prefix"
    );
    assert!(b.held().is_empty());
    // The winner leaves: the other gets the subnet, with a higher epoch, without being told to try.
    let before = a.held()[0].epoch;
    a.release(world.now);
    assert_eq!(world.run(&mut a), [LeaseEvent::Released(subnet("10.32.4.0/24"))]);
    let leases = acquired(&world.pass(TTL / 30, &mut [&mut b]));
    assert!(leases[0].epoch > before);
}

#[test]
fn a_lease_lives_as_long_as_it_is_renewed_and_keeps_its_epoch() {
    let mut world = World::new();
    let (mut a, mut b) = (node(&world, 1, ONE), node(&world, 2, ONE));
    let lease = acquired(&world.run(&mut a))[0];
    let events = world.pass(TTL * 10, &mut [&mut a, &mut b]);
    let renewed = events.iter().filter(|event| **event == LeaseEvent::Renewed(lease)).count();
    assert!((27..=34).contains(&renewed), "{renewed}");
    assert_eq!(a.held(), [lease]);
    assert!(b.held().is_empty());
}

#[test]
fn a_node_back_after_expiry_and_takeover_is_fenced_and_never_writes() {
    let mut world = World::new();
    let (mut a, mut b) = (node(&world, 1, ONE), node(&world, 2, ONE));
    let old = acquired(&world.run(&mut a))[0];
    a.set_may_renumber(false, world.now);
    // `a` hears nothing; `b` watches the lease stay the same for longer than its time to live.
    let new = acquired(&world.pass(TTL * 2, &mut [&mut b]))[0];
    assert_eq!(new.subnet, old.subnet);
    assert!(new.epoch > old.epoch);
    assert_eq!(a.held(), [old]);
    let before = world.map.clone();
    let to = Some("n2".parse().expect("a name"));
    assert_eq!(world.run(&mut a), [LeaseEvent::Lost { subnet: old.subnet, to }]);
    assert!(a.held().is_empty());
    world.pass(TTL, &mut [&mut a]);
    assert_eq!(world.map.list(""), before.list(""));
}

#[test]
fn a_renewal_that_was_under_way_does_not_overwrite_the_new_owner() {
    let mut world = World::new();
    let (mut a, mut b) = (node(&world, 1, ONE), node(&world, 2, ONE));
    world.run(&mut a);
    // The renewal leaves `a` and stays on the road while `b` watches the lease expire.
    world.now += Duration::from_secs(1500);
    assert_eq!(a.poll_output(world.now), Output::List);
    a.handle_snapshot(&world.map.list("s"), world.now);
    let Output::Put { key, expect, value } = a.poll_output(world.now) else { panic!("no renewal") };
    world.pass(TTL * 2, &mut [&mut b]);
    assert_eq!(b.held().len(), 1);
    let late = world.map.put_if(key, expect, value);
    a.handle_put(key, late, world.now);
    assert!(matches!(&world.run(&mut a)[0], LeaseEvent::Lost { to: Some(_), .. }));
    assert_eq!(world.value(key).expect("stored").node.as_str(), "n2");
}

#[test]
fn a_fenced_node_takes_another_subnet_once_no_pod_lives() {
    let mut world = World::new();
    let mut a = node(&world, 1, DUAL);
    let lost = acquired(&world.run(&mut a))[0];
    a.set_may_renumber(false, world.now);
    let thief =
        LeaseValue { node: "thief".parse().expect("a name"), ..world.value(lost.subnet).expect("stored") };
    let revision = world.map.list("").entries[&lost.subnet].revision;
    world.map.put_if(lost.subnet, Expect::Revision(revision), thief.encode()).expect("current");
    let events = world.pass(TTL / 2, &mut [&mut a]);
    assert!(matches!(&events[0], LeaseEvent::Lost { subnet, .. } if *subnet == lost.subnet));
    assert!(acquired(&events).is_empty());
    a.set_may_renumber(true, world.now);
    let next = acquired(&world.run(&mut a))[0];
    assert!(next.subnet != lost.subnet && next.subnet.is_ipv4());
}

#[test]
fn a_store_outage_takes_nothing_away_and_expires_nobody() {
    let mut world = World::new();
    let (mut a, mut b) = (node(&world, 1, ONE), node(&world, 2, ONE));
    let lease = acquired(&world.run(&mut a))[0];
    world.run(&mut b);
    world.down = true;
    assert!(world.pass(TTL * 5, &mut [&mut a, &mut b]).is_empty());
    assert_eq!(a.held(), [lease]);
    assert!(a.staleness(world.now).expect("once seen") >= TTL * 5);
    assert!(a.failures() > 0);
    world.down = false;
    // `b` is first at the store and sees an entry that nobody could renew: it is not expired.
    let events = world.pass(Duration::from_secs(60), &mut [&mut b, &mut a]);
    assert_eq!(events, [LeaseEvent::Renewed(lease)]);
    assert_eq!(a.failures(), 0);
}

#[test]
fn a_full_store_takes_nothing_away_expires_nobody_and_is_not_asked_in_a_row() {
    let mut world = World::new();
    let (mut a, mut b) = (node(&world, 1, ONE), node(&world, 2, ONE));
    let lease = acquired(&world.run(&mut a))[0];
    world.run(&mut b);
    world.full = true;
    world.pass(TTL / 2, &mut [&mut a, &mut b]);
    assert!(a.write_refused() && !b.write_refused(), "only a has something to write");
    assert!(a.staleness(world.now).expect("listed") <= Duration::from_secs(60), "lists go on");
    assert!(world.pass(TTL * 4, &mut [&mut a, &mut b]).is_empty());
    assert_eq!(a.held(), [lease]);
    // One of the two every 20 s of five hours at most; the rest is back-off.
    assert!(world.refusals < 900, "{} writes", world.refusals);
    world.full = false;
    let events = world.pass(Duration::from_secs(60), &mut [&mut b, &mut a]);
    assert_eq!(events, [LeaseEvent::Renewed(lease)]);
    assert!(!a.write_refused());
}

#[test]
fn a_restarted_node_holds_its_lease_before_it_reaches_the_store() {
    let mut world = World::new();
    let mut a = node(&world, 1, DUAL);
    world.run(&mut a);
    let held = a.held();
    world.down = true;
    let mut again = Leasing::new(config(1, DUAL, "boot-1b"), held.clone(), SEED, world.now);
    assert_eq!(again.held(), held);
    world.run(&mut again);
    world.down = false;
    let events = world.pass(Duration::from_secs(60), &mut [&mut again]);
    assert_eq!(events, held.iter().copied().map(LeaseEvent::Renewed).collect::<Vec<_>>());
    assert_eq!(world.value(held[0].subnet).expect("stored").boot, "boot-1b");
}

#[test]
fn a_node_without_its_state_finds_its_subnet_again_under_a_new_epoch() {
    let mut world = World::new();
    let mut a = node(&world, 1, DUAL);
    let before = acquired(&world.run(&mut a));
    let mut again = Leasing::new(config(1, DUAL, "boot-1b"), Vec::new(), SEED, world.now);
    let after = acquired(&world.run(&mut again));
    for (before, after) in before.iter().zip(&after) {
        assert_eq!(before.subnet, after.subnet);
        assert!(before.epoch < after.epoch);
    }
    assert_eq!(world.keys().len(), 2);
}

#[test]
fn a_clone_of_a_running_node_fences_it_and_is_reported_once() {
    let mut world = World::new();
    let mut a = node(&world, 1, DUAL);
    world.run(&mut a);
    let mut clone = Leasing::new(config(1, DUAL, "boot-clone"), a.held(), SEED, world.now);
    world.run(&mut clone);
    let events = world.pass(Duration::from_secs(300), &mut [&mut a, &mut clone]);
    let duplicate =
        |event: &&LeaseEvent| matches!(event, LeaseEvent::Conflict(LeaseConflict::DuplicateName { .. }));
    assert_eq!(events.iter().filter(duplicate).count(), 2, "one a family: {events:?}");
    assert!(a.held().is_empty());
    assert_eq!(clone.held().len(), 2);
    assert_eq!(world.keys().len(), 2);
}

#[test]
fn a_reinstalled_node_with_a_new_key_takes_another_subnet() {
    let mut world = World::new();
    let mut a = node(&world, 1, DUAL);
    let before = acquired(&world.run(&mut a));
    let mut config = config(1, DUAL, "boot-1b");
    config.key = key(99);
    let mut again = Leasing::new(config, Vec::new(), SEED, world.now);
    let after = acquired(&world.run(&mut again));
    assert_ne!(before[0].subnet, after[0].subnet);
    assert_eq!(world.keys().len(), 4);
}

#[test]
fn a_rotated_key_reaches_the_store_and_keeps_the_epoch() {
    let mut world = World::new();
    let mut a = node(&world, 1, ONE);
    let lease = acquired(&world.run(&mut a))[0];
    a.rotate_key(key(50), world.now);
    assert_eq!(a.held(), [lease], "the old key until the store has the new one");
    let rotated = HeldLease { key: key(50), ..lease };
    assert_eq!(world.run(&mut a), [LeaseEvent::Renewed(rotated)]);
    assert_eq!(world.value(lease.subnet).expect("stored").key, key(50));
    // Rotated while the daemon was down: the persisted lease names the key that the store still has.
    let mut config = config(1, ONE, "boot-1b");
    config.key = key(51);
    let mut again = Leasing::new(config, a.held(), SEED, world.now);
    assert_eq!(world.run(&mut again), [LeaseEvent::Renewed(HeldLease { key: key(51), ..lease })]);
}

#[test]
fn leases_cut_with_different_prefix_lengths_never_overlap() {
    let mut world = World::new();
    let (mut a, mut b) = (node(&world, 1, ONE), node(&world, 2, &[("10.32.4.0/24", 25)]));
    // Both write before either lists: different keys, so both writes succeed.
    let empty = world.map.list("s");
    for node in [&mut a, &mut b] {
        node.poll_output(world.now);
        node.handle_snapshot(&empty, world.now);
        let Output::Put { key, expect, value } = node.poll_output(world.now) else { panic!("no claim") };
        node.handle_put(key, world.map.put_if(key, expect, value), world.now);
    }
    assert_eq!(world.keys().len(), 2);
    world.pass(Duration::from_secs(600), &mut [&mut a, &mut b]);
    let (a, b) = (a.held(), b.held());
    assert_eq!(a.len() + b.len(), 1, "{a:?} {b:?}");
}

#[test]
fn an_epoch_is_never_below_the_revision_that_created_the_lease() {
    let mut world = World::new();
    let mut a = node(&world, 1, DUAL);
    a.poll_output(world.now);
    a.handle_snapshot(&world.map.list("s"), world.now);
    let Output::Put { key, expect, value } = a.poll_output(world.now) else { panic!("no claim") };
    // Another owner had the subnet meanwhile, and gave it back.
    let passing = world.map.put_if(key, Expect::Absent, value.clone()).expect("free");
    world.map.delete_if(key, passing).expect("current");
    a.handle_put(key, world.map.put_if(key, expect, value), world.now);
    let lease = acquired(&world.run(&mut a))[0];
    assert!(lease.epoch.0 >= 3, "{lease:?}");
    assert_eq!(world.value(lease.subnet).expect("stored").epoch, lease.epoch);
}

#[test]
fn a_claim_answered_after_others_may_have_seen_it_expire_is_no_lease() {
    let mut world = World::new();
    let mut a = node(&world, 1, ONE);
    a.poll_output(world.now);
    a.handle_snapshot(&world.map.list("s"), world.now);
    let Output::Put { key, expect, value } = a.poll_output(world.now) else { panic!("no claim") };
    let written = world.map.put_if(key, expect, value);
    a.handle_put(key, written.clone(), world.now);
    assert_eq!(a.poll_output(world.now), Output::List);
    // The list stays on the road for longer than the entry is sure to live.
    let list = world.map.list("s");
    world.now += TTL;
    a.handle_snapshot(&list, world.now);
    assert!(a.held().is_empty());
    let lease = acquired(&world.run(&mut a))[0];
    assert!(lease.subnet == key && lease.epoch.0 > written.expect("free"), "{lease:?}");
}

#[test]
fn what_an_earlier_run_left_is_no_clones_although_this_run_has_written() {
    let mut world = World::new();
    let mut gone = node(&world, 1, ONE);
    world.run(&mut gone);
    // The range changed, and the state was lost: the old entry is of no use and stays until it expires.
    let mut a = Leasing::new(config(1, &[("10.32.5.0/24", 24)], "boot-1b"), Vec::new(), SEED, world.now);
    let lease = acquired(&world.run(&mut a))[0];
    let thief =
        LeaseValue { node: "thief".parse().expect("a name"), ..world.value(lease.subnet).expect("stored") };
    let revision = world.map.list("").entries[&lease.subnet].revision;
    world.map.put_if(lease.subnet, Expect::Revision(revision), thief.encode()).expect("current");
    let events = world.pass(TTL / 2, &mut [&mut a]);
    assert!(matches!(&events[0], LeaseEvent::Lost { subnet, .. } if *subnet == lease.subnet));
    let conflict = |event: &LeaseEvent| matches!(event, LeaseEvent::Conflict(_));
    assert!(!events.iter().any(conflict), "{events:?}");
}

#[test]
fn an_emptied_store_gets_its_leases_back_with_higher_epochs() {
    let mut world = World::new();
    let (mut a, mut b) = (node(&world, 1, DUAL), node(&world, 2, DUAL));
    world.run(&mut a);
    let before = acquired(&world.run(&mut b));
    b.set_may_renumber(false, world.now);
    world.map = MemoryMap::default();
    world.store_id = "another";
    let after = acquired(&world.pass(Duration::from_secs(120), &mut [&mut b]));
    for (before, after) in before.iter().zip(&after) {
        assert_eq!(before.subnet, after.subnet);
        assert!(before.epoch < after.epoch);
    }
}

#[test]
fn an_entry_deleted_by_hand_is_claimed_again() {
    let mut world = World::new();
    let mut a = node(&world, 1, ONE);
    let lease = acquired(&world.run(&mut a))[0];
    a.set_may_renumber(false, world.now);
    let revision = world.map.list("").entries[&lease.subnet].revision;
    let deleted = world.map.delete_if(lease.subnet, revision).expect("current");
    a.handle_change(&Change::Delete { key: lease.subnet, revision: deleted }, world.now);
    assert_eq!(a.held(), [lease]);
    let again = acquired(&world.run(&mut a))[0];
    assert!(again.subnet == lease.subnet && again.epoch > lease.epoch);
}

#[test]
fn an_unreadable_entry_is_reported_once_and_left_alone() {
    let mut world = World::new();
    world.map.put_if(subnet("10.32.4.0/24"), Expect::Absent, b"{}".to_vec()).expect("free");
    let mut a = node(&world, 1, ONE);
    let events = world.pass(TTL * 3, &mut [&mut a]);
    assert_eq!(events.len(), 2, "{events:?}");
    assert!(matches!(events[0], LeaseEvent::Conflict(LeaseConflict::Unreadable { .. })));
    assert!(matches!(events[1], LeaseEvent::Exhausted { .. }));
}

#[test]
fn a_fixed_subnet_is_leased_or_its_owner_is_named() {
    let mut world = World::new();
    let fixed =
        |number, boot| LeaseConfig { fixed: vec![subnet("10.32.9.0/24")], ..config(number, DUAL, boot) };
    let mut a = Leasing::new(fixed(1, "boot-1"), Vec::new(), SEED, world.now);
    let leases = acquired(&world.run(&mut a));
    assert_eq!(leases[0].subnet, subnet("10.32.9.0/24"));
    assert_eq!(leases.len(), 2, "IPv6 from the CIDR");
    let mut b = Leasing::new(fixed(2, "boot-2"), Vec::new(), SEED, world.now);
    let events = world.run(&mut b);
    let taken =
        LeaseConflict::FixedTaken { subnet: subnet("10.32.9.0/24"), owner: "n1".parse().expect("a name") };
    assert!(events.contains(&LeaseEvent::Conflict(taken)), "{events:?}");
    assert_eq!(b.held().len(), 1);
}

#[test]
fn a_subnet_outside_new_ranges_is_kept_while_pods_live_and_then_exchanged() {
    let mut world = World::new();
    let mut a = node(&world, 1, ONE);
    let held = acquired(&world.run(&mut a));
    let config = config(1, &[("10.40.0.0/16", 24)], "boot-1b");
    let mut again = Leasing::new(config, held.clone(), SEED, world.now);
    let events = world.pass(TTL, &mut [&mut again]);
    assert_eq!(events[0], LeaseEvent::Conflict(LeaseConflict::Outside { subnet: held[0].subnet }));
    assert_eq!(again.held(), held);
    assert_eq!(again.giving_back(), None);
    again.set_may_renumber(true, world.now);
    let Output::Delete { key, revision } = again.poll_output(world.now) else {
        panic!("nothing is given back")
    };
    assert_eq!((key, again.giving_back()), (held[0].subnet, Some(held[0].subnet)));
    let deleted = world.map.delete_if(key, revision);
    again.handle_delete(key, deleted, world.now);
    assert_eq!((again.held(), again.giving_back()), (Vec::new(), None));
    let events = world.run(&mut again);
    assert_eq!(events[0], LeaseEvent::Released(held[0].subnet));
    assert_eq!(world.keys(), [again.held()[0].subnet.to_string()]);
    assert!(again.held()[0].subnet.net().to_string().starts_with("10.40."));
}

#[test]
fn a_change_of_the_store_wakes_a_waiting_node() {
    let mut world = World::new();
    let mut a = node(&world, 1, ONE);
    world.run(&mut a);
    world.now += Duration::from_secs(1);
    a.handle_change(&Change::Relist, world.now);
    assert_eq!(a.poll_output(world.now), Output::List);
    a.handle_snapshot(&world.map.list("s"), world.now);
    // A second change at once is put off a little.
    a.handle_change(&Change::Relist, world.now);
    let Output::Wait { until } = a.poll_output(world.now) else { panic!("too soon") };
    assert_eq!(until, world.now + Duration::from_millis(500));
}

#[test]
fn a_change_ends_the_wait_after_failures() {
    let mut world = World::new();
    let mut a = node(&world, 1, ONE);
    world.down = true;
    world.pass(TTL, &mut [&mut a]);
    world.down = false;
    assert!(world.run(&mut a).is_empty(), "it waits out its pause");
    world.now += Duration::from_millis(500);
    a.handle_change(&Change::Relist, world.now);
    assert_eq!(acquired(&world.run(&mut a)).len(), 1);
}

#[test]
fn after_a_failed_write_the_store_is_listed_before_the_next_one() {
    let mut world = World::new();
    let mut a = node(&world, 1, ONE);
    a.poll_output(world.now);
    a.handle_snapshot(&world.map.list("s"), world.now);
    let Output::Put { key, expect, value } = a.poll_output(world.now) else { panic!("no claim") };
    // The write happened, and its answer was lost.
    world.map.put_if(key, expect, value).expect("free");
    a.handle_store_error(world.now);
    world.now += Duration::from_secs(1);
    assert_eq!(a.poll_output(world.now), Output::List);
    a.handle_snapshot(&world.map.list("s"), world.now);
    assert_eq!(acquired(&world.run(&mut a))[0].subnet, key);
    assert_eq!(world.keys().len(), 1);
}

#[test]
fn a_claim_is_no_lease_before_a_list_although_the_watch_has_news() {
    let mut world = World::new();
    let mut a = node(&world, 1, ONE);
    a.poll_output(world.now);
    a.handle_snapshot(&world.map.list("s"), world.now);
    let Output::Put { key, expect, value } = a.poll_output(world.now) else { panic!("no claim") };
    a.handle_put(key, world.map.put_if(key, expect, value.clone()), world.now);
    let entry = Entry { value, revision: 9 };
    a.handle_change(&Change::Put { key: subnet("10.99.0.0/24"), entry }, world.now);
    assert_eq!(a.poll_output(world.now), Output::List);
    assert!(a.held().is_empty());
}

#[test]
fn a_write_that_arrives_after_it_was_given_up_is_cleared_away() {
    let mut world = World::new();
    let cidrs = &[("10.32.4.0/23", 24)];
    let mut a = node(&world, 1, cidrs);
    a.poll_output(world.now);
    a.handle_snapshot(&world.map.list("s"), world.now);
    let Output::Put { key, expect, value } = a.poll_output(world.now) else { panic!("no claim") };
    a.handle_store_error(world.now);
    // Meanwhile another node leases that block and gives it back, so `a` leases the other one.
    let other = LeaseValue {
        node: "n9".parse().expect("a name"),
        ..LeaseValue::decode(key, &value).expect("a lease")
    };
    let revision = world.map.put_if(key, Expect::Absent, other.encode()).expect("free");
    let events = world.pass(Duration::from_secs(60), &mut [&mut a]);
    assert_ne!(acquired(&events)[0].subnet, key);
    world.map.delete_if(key, revision).expect("current");
    world.map.put_if(key, expect, value).expect("free");
    assert_eq!(world.keys().len(), 2);
    world.pass(Duration::from_secs(120), &mut [&mut a]);
    assert_eq!(world.keys(), [a.held()[0].subnet.to_string()]);
}

#[test]
fn an_old_snapshot_is_not_believed() {
    let mut world = World::new();
    let mut a = node(&world, 1, ONE);
    let empty = world.map.list("s");
    let lease = acquired(&world.run(&mut a))[0];
    world.now += TTL / 20;
    assert_eq!(a.poll_output(world.now), Output::List);
    a.handle_snapshot(&empty, world.now);
    assert!(matches!(a.poll_output(world.now), Output::Wait { .. }));
    assert_eq!(a.held(), [lease]);
    assert_eq!(a.table(world.now).len(), 1);
}

#[test]
fn a_restarted_node_does_not_believe_a_list_older_than_its_lease() {
    let mut world = World::new();
    // The subnet was leased under this name by a key that was lost with its disk.
    let before = LeaseConfig { key: key(9), ..config(1, ONE, "boot-0") };
    let mut gone = Leasing::new(before, Vec::new(), SEED, world.now);
    world.run(&mut gone);
    let old = world.map.list("s");
    gone.release(world.now);
    world.run(&mut gone);
    let mut a = node(&world, 1, ONE);
    let held = acquired(&world.run(&mut a));
    let mut again = Leasing::new(config(1, ONE, "boot-1b"), held.clone(), SEED, world.now);
    assert_eq!(again.poll_output(world.now), Output::List);
    again.handle_snapshot(&old, world.now);
    assert!(matches!(again.poll_output(world.now), Output::Wait { .. }));
    assert_eq!(again.held(), held);
    assert_eq!(world.pass(TTL / 60, &mut [&mut again]), [LeaseEvent::Renewed(held[0])]);
}

#[test]
fn a_restored_store_is_believed_after_a_while_although_it_is_older_than_the_lease() {
    let mut world = World::new();
    let mut a = node(&world, 1, ONE);
    let backup = world.map.clone();
    let held = acquired(&world.run(&mut a));
    world.map = backup;
    let mut again = Leasing::new(config(1, ONE, "boot-1b"), held.clone(), SEED, world.now);
    let events = world.pass(TTL / 20, &mut [&mut again]);
    let [LeaseEvent::Acquired(lease)] = events[..] else { panic!("{events:?}") };
    assert_eq!(lease.subnet, held[0].subnet);
    assert!(lease.epoch > held[0].epoch);
}

#[test]
fn the_lease_value_is_the_documented_json() {
    let text = format!(
        r#"{{"subnet":"10.32.4.0/24","node":"n1","site":"default","key":"{}","epoch":17,"ttl_ms":3600000,"renewals":4,"boot":"b"}}"#,
        "07".repeat(32)
    );
    let value = LeaseValue::decode(subnet("10.32.4.0/24"), text.as_bytes()).expect("a lease");
    assert_eq!(value.ttl, Some(TTL));
    assert_eq!(String::from_utf8(value.encode()).expect("text"), text);
    let other = LeaseValue::decode(subnet("10.32.5.0/24"), text.as_bytes()).expect_err("another key");
    assert_eq!(other.to_string(), "the value is for 10.32.4.0/24");
    let entry = Entry { value: text.into_bytes(), revision: 1 };
    assert!(LeaseValue::decode(subnet("10.32.4.0/24"), &entry.value[1..]).is_err());
}

#[test]
fn a_lease_says_where_its_owner_gossips_now() {
    let mut world = World::new();
    let mut a = node(&world, 1, DUAL);
    let mut b = node(&world, 2, DUAL);
    let place = |text: &str| vec![text.parse().expect("an address")];
    let told = |world: &World, node: &Leasing| -> Vec<Vec<SocketAddr>> {
        node.held().iter().map(|held| world.value(held.subnet).expect("stored").gossip).collect()
    };
    world.run(&mut a);
    assert_eq!(told(&world, &a), [vec![], vec![]], "an owner that has no address yet names none");

    a.set_gossip(place("192.0.2.1:7117"), world.now);
    world.run(&mut a);
    assert_eq!(told(&world, &a), [place("192.0.2.1:7117"), place("192.0.2.1:7117")]);
    world.run(&mut b);
    let of_a = b.table(world.now).into_iter().filter(|view| view.node.as_str() == "n1");
    assert!(of_a.map(|view| view.gossip).eq([place("192.0.2.1:7117"), place("192.0.2.1:7117")]));

    // It moves while a write is under way, which names the former address.
    world.now += TTL / 2;
    let output = loop {
        match a.poll_output(world.now) {
            Output::List => a.handle_snapshot(&world.map.list("s"), world.now),
            output => break output,
        }
    };
    let Output::Put { key, expect, value } = output else { panic!("no renewal: {output:?}") };
    a.set_gossip(place("192.0.2.9:7117"), world.now);
    a.handle_put(key, world.map.put_if(key, expect, value), world.now);
    world.run(&mut a);
    assert_eq!(told(&world, &a), [place("192.0.2.9:7117"), place("192.0.2.9:7117")]);
    let before = world.map.list("s").revision;
    a.set_gossip(place("192.0.2.9:7117"), world.now);
    world.run(&mut a);
    assert_eq!(world.map.list("s").revision, before, "who has not moved writes nothing");
}

#[test]
fn a_claim_of_a_node_that_moves_meanwhile_becomes_a_lease() {
    let mut world = World::new();
    let mut a = node(&world, 1, ONE);
    a.poll_output(world.now);
    a.handle_snapshot(&world.map.list("s"), world.now);
    let Output::Put { key, expect, value } = a.poll_output(world.now) else { panic!("no claim") };
    a.handle_put(key, world.map.put_if(key, expect, value), world.now);
    a.set_gossip(vec!["192.0.2.1:7117".parse().expect("an address")], world.now);
    let events = world.run(&mut a);
    assert_eq!(acquired(&events).len(), 1);
    assert_eq!(world.map.list("s").revision, 2, "the claim and one renewal");
    assert_eq!(world.value(key).expect("stored").gossip.len(), 1);
}

/// A node of a store that ends the leases of nodes that are gone, and proves their names.
fn kept(world: &World, number: u8, own_key: u8, cidrs: &[(&str, u8)]) -> Leasing {
    let boot = format!("boot-{number}-{own_key}");
    let config = LeaseConfig { key: key(own_key), ..config(number, cidrs, &boot) }.kept_by_store();
    Leasing::new(config, Vec::new(), SEED, world.now)
}

/// The keys of the conflicts of two daemons with one name: who was found to run, and who asked.
fn namesakes(events: &[LeaseEvent]) -> Vec<(&'static str, PublicKey)> {
    let conflict = |event: &LeaseEvent| match event {
        LeaseEvent::Conflict(LeaseConflict::DuplicateName { key, .. }) => Some(("runs", *key)),
        LeaseEvent::Conflict(LeaseConflict::NameAsked { key, .. }) => Some(("asked", *key)),
        _ => None,
    };
    events.iter().filter_map(conflict).collect()
}

#[test]
fn leases_that_the_store_ends_are_written_once_and_never_expire() {
    let mut world = World::new();
    let mut a = kept(&world, 1, 1, ONE);
    world.run(&mut a);
    let [held] = a.held()[..] else { panic!("{a:?}") };
    let mut b = kept(&world, 2, 2, ONE);
    world.run(&mut b);
    let before = world.map.list("s").revision;
    world.pass(Duration::from_secs(7 * 24 * 3600), &mut [&mut b]);
    assert_eq!(world.map.list("s").revision, before, "nobody writes while nothing changes");
    let table = b.table(world.now);
    assert!(table.iter().all(|lease| !lease.expired && lease.expires_in.is_none()), "{table:?}");
    assert!(b.held().is_empty());
    let value = world.value(held.subnet).expect("still there");
    assert!(!String::from_utf8(value.encode()).expect("text").contains("ttl"));
    // The store removes it with its node.
    let revision = world.map.list("s").entries[&held.subnet].revision;
    let revision = world.map.delete_if(held.subnet, revision).expect("current");
    b.handle_change(&Change::Delete { key: held.subnet, revision }, world.now);
    world.run(&mut b);
    assert_eq!(b.held().len(), 1);
    assert!(b.held()[0].epoch > held.epoch);
}

#[test]
fn a_node_that_lost_its_state_has_its_subnet_back_when_nobody_answers() {
    let mut world = World::new();
    let mut before = kept(&world, 1, 1, ONE);
    world.run(&mut before);
    let [lost] = before.held()[..] else { panic!("{before:?}") };
    drop(before);
    // Reinstalled: the same name, another key; its range holds no other block.
    let mut after = kept(&world, 1, 2, ONE);
    let mut events = world.run(&mut after);
    assert!(after.held().is_empty(), "not before the owner had time to answer");
    assert_eq!(world.value(lost.subnet).expect("there").asked.expect("a question").key, key(2));
    events.extend(world.pass(Duration::from_secs(40), &mut [&mut after]));
    let [held] = after.held()[..] else { panic!("{after:?}") };
    assert!(held.subnet == lost.subnet && held.epoch > lost.epoch, "{lost:?} {held:?}");
    assert!(namesakes(&events).is_empty(), "{events:?}");
    let value = world.value(held.subnet).expect("there");
    assert_eq!((value.key, value.asked), (key(2), None));
}

#[test]
fn of_two_daemons_with_one_name_the_first_keeps_its_lease_and_both_are_told() {
    let mut world = World::new();
    let mut first = kept(&world, 1, 1, ONE);
    world.run(&mut first);
    let held = first.held();
    let mut second = kept(&world, 1, 2, ONE);
    let mut told = [world.run(&mut second), Vec::new()];
    // The first one watches.
    let entry = world.map.list("s").entries[&held[0].subnet].clone();
    first.handle_change(&Change::Put { key: held[0].subnet, entry }, world.now);
    told[1].extend(world.run(&mut first));
    let writes = world.map.list("s").revision;
    for _ in 0..180 {
        told[0].extend(world.pass(Duration::from_secs(9), &mut [&mut second]));
        let entry = world.map.list("s").entries[&held[0].subnet].clone();
        first.handle_change(&Change::Put { key: held[0].subnet, entry }, world.now);
        told[1].extend(world.pass(Duration::from_secs(1), &mut [&mut first]));
        assert_eq!((first.held(), second.held()), (held.clone(), Vec::new()));
    }
    assert_eq!(namesakes(&told[0]), [("runs", key(1))]);
    assert!(namesakes(&told[1]).contains(&("asked", key(2))), "{told:?}");
    let writes = world.map.list("s").revision - writes;
    assert!((2..=8).contains(&writes), "asked again now and then: {writes} writes in half an hour");
    // Once the first is gone, the second is its heir.
    drop(first);
    world.pass(Duration::from_secs(1200), &mut [&mut second]);
    assert_eq!(second.held().len(), 1);
}

#[test]
fn a_node_that_comes_back_answers_who_asked_meanwhile() {
    let mut world = World::new();
    let mut first = kept(&world, 1, 1, ONE);
    world.run(&mut first);
    let held = first.held();
    drop(first);
    let mut second = kept(&world, 1, 2, ONE);
    world.run(&mut second);
    // Restarted with its state, before the other takes silence for an answer.
    let config = LeaseConfig { key: key(1), ..config(1, ONE, "boot-later") }.kept_by_store();
    let mut first = Leasing::new(config, held.clone(), SEED, world.now);
    world.run(&mut first);
    let told = world.pass(Duration::from_secs(60), &mut [&mut first, &mut second]);
    assert_eq!((first.held(), second.held()), (held, Vec::new()));
    assert_eq!(namesakes(&told), [("runs", key(1))]);
}

#[test]
fn what_a_node_that_lost_its_state_left_elsewhere_is_cleared() {
    let mut world = World::new();
    let mut before = kept(&world, 1, 1, &[("10.32.4.0/23", 23)]);
    world.run(&mut before);
    drop(before);
    // Reinstalled with another block size: the old block is in the way of the new one.
    let mut after = kept(&world, 1, 2, ONE);
    world.run(&mut after);
    world.pass(Duration::from_secs(60), &mut [&mut after]);
    assert_eq!(world.keys(), ["10.32.4.0/24"]);
    // And beside it.
    drop(after);
    let mut last = kept(&world, 1, 3, &[("10.48.0.0/24", 24)]);
    world.run(&mut last);
    world.pass(Duration::from_secs(60), &mut [&mut last]);
    assert_eq!(world.keys(), ["10.48.0.0/24"]);
    assert_eq!(last.held().len(), 1);
}

#[test]
fn a_node_leases_what_was_chosen_for_it_once_it_is_and_nothing_else() {
    let mut world = World::new();
    let only = |number, own_key| {
        let config = LeaseConfig { key: key(own_key), ..config(number, DUAL, "boot") };
        LeaseConfig { only_fixed: true, ..config.kept_by_store() }
    };
    let mut a = Leasing::new(only(1, 1), Vec::new(), SEED, world.now);
    assert!(world.run(&mut a).is_empty() && world.keys().is_empty(), "nothing is chosen yet");
    a.set_fixed(vec![subnet("10.32.7.0/24")], world.now);
    world.run(&mut a);
    assert_eq!(world.keys(), ["10.32.7.0/24"], "of one family only");
    a.set_fixed(vec![subnet("10.32.7.0/24"), subnet("fd00:32:0:7::/64")], world.now);
    world.run(&mut a);
    assert_eq!(world.keys(), ["10.32.7.0/24", "fd00:32:0:7::/64"]);

    // Another choice is told, and waits until the pods are gone; none at all changes nothing.
    a.set_may_renumber(false, world.now);
    a.set_fixed(vec![], world.now);
    assert!(world.run(&mut a).is_empty());
    a.set_fixed(vec![subnet("10.32.8.0/24"), subnet("fd00:32:0:7::/64")], world.now);
    let outside = LeaseConflict::Outside { subnet: subnet("10.32.7.0/24") };
    assert_eq!(world.run(&mut a), [LeaseEvent::Conflict(outside)]);
    assert_eq!(world.keys(), ["10.32.7.0/24", "fd00:32:0:7::/64"]);
    a.set_may_renumber(true, world.now);
    world.run(&mut a);
    assert_eq!(world.keys(), ["10.32.8.0/24", "fd00:32:0:7::/64"]);

    // What another node has is not taken, and is taken as soon as it is free.
    let mut b = Leasing::new(only(2, 2), Vec::new(), SEED, world.now);
    b.set_fixed(vec![subnet("10.32.8.0/24")], world.now);
    let taken =
        LeaseConflict::FixedTaken { subnet: subnet("10.32.8.0/24"), owner: "n1".parse().expect("a name") };
    assert_eq!(world.run(&mut b), [LeaseEvent::Conflict(taken)]);
    assert!(world.pass(Duration::from_secs(24 * 3600), &mut [&mut b]).is_empty(), "told once");
    let revision = world.map.list("s").entries[&subnet("10.32.8.0/24")].revision;
    let revision = world.map.delete_if(subnet("10.32.8.0/24"), revision).expect("current");
    b.handle_change(&Change::Delete { key: subnet("10.32.8.0/24"), revision }, world.now);
    world.run(&mut b);
    assert_eq!(b.held().len(), 1);
}
