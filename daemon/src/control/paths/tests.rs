//! Which paths are told of, when, and whom a pair asks.

use weft_wire::types::TunnelKey;

use super::*;

const PORT: u16 = 51_820;

/// A mesh of a few: `a` is this node, `b` the peer of another site, `r1` to `r3` willing relays of a third.
#[derive(Clone)]
struct World {
    own: Party,
    others: Vec<Party>,
}

impl Parties for World {
    fn own(&self) -> Party {
        self.own.clone()
    }

    fn party(&self, node: &NodeName) -> Option<Party> {
        self.others.iter().find(|party| party.node == *node).cloned()
    }

    fn all(&self) -> Vec<Party> {
        self.others.clone()
    }
}

fn name(text: &str) -> NodeName {
    text.parse().expect("a name")
}

fn at(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

fn party(node: &str, site: &str, address: &str) -> Party {
    Party {
        node: name(node),
        site: site.parse().expect("a name"),
        alive: true,
        addresses: vec![address.parse().expect("an address")],
        behind: false,
        tunnel: Some((TunnelKey([node.as_bytes()[node.len() - 1]; 32]), PORT)),
        reach: TunnelReach::default(),
        rtt: Some(Duration::from_millis(5)),
    }
}

fn relay(node: &str, address: &str) -> Party {
    let reach = TunnelReach { mapping: TunnelMapping::None, relay_room: 100, reflexive: Vec::new() };
    Party { reach, ..party(node, "hub", address) }
}

fn behind(party: Party, reflexive: &str, mapping: TunnelMapping) -> Party {
    Party { reach: TunnelReach { reflexive: vec![at(reflexive)], mapping, relay_room: 0 }, ..party }
}

fn world(mapping: TunnelMapping) -> World {
    let own = behind(party("a", "east", "198.51.100.1"), "192.0.2.201:4001", mapping);
    let b = behind(party("b", "west", "198.51.100.1"), "192.0.2.202:4002", mapping);
    let relays = [relay("r1", "192.0.2.1"), relay("r2", "192.0.2.2"), relay("r3", "192.0.2.3")];
    World { own, others: [b].into_iter().chain(relays).collect() }
}

fn seen(node: &str, endpoint: &str) -> Seen {
    Seen {
        node: name(node),
        endpoint: at(endpoint),
        heard: true,
        ready: true,
        waits: false,
        sent: 0,
        received: 0,
    }
}

fn waiting() -> Seen {
    Seen { ready: false, waits: true, ..seen("b", "192.0.2.202:4002") }
}

fn observed(world: &World, now: Instant) -> Paths {
    let mut paths = Paths::default();
    let looks = [seen("r1", "192.0.2.1:51820"), seen("r2", "192.0.2.2:51820")];
    paths.look(&looks, false, world, now);
    let port = |second| match world.own.reach.mapping {
        TunnelMapping::Dependent if second => "192.0.2.201:4009",
        _ => "192.0.2.201:4001",
    };
    for (node, second) in [("r1", false), ("r2", true)] {
        paths.handle_word(&name(node), PathWord::Observed(at(port(second))), world, now);
    }
    assert_eq!(paths.reach(&world.own).mapping, world.own.reach.mapping);
    paths
}

fn asked(acts: &[Act]) -> Vec<NodeName> {
    let asks = acts.iter().filter_map(|act| match act {
        Act::Say(relay, PathWord::RelayAsk(peer)) if *peer == name("b") => Some(relay.clone()),
        _ => None,
    });
    asks.collect()
}

fn calls(acts: &[Act]) -> usize {
    acts.iter().filter(|act| matches!(act, Act::Say(_, PathWord::Call { .. }))).count()
}

fn places(acts: &[Act]) -> Vec<Candidate> {
    let told = acts.iter().rev().find_map(|act| match act {
        Act::Candidates { node, places, .. } if *node == name("b") => Some(places.clone()),
        _ => None,
    });
    told.unwrap_or_default()
}

fn direct_place(text: &str) -> Candidate {
    Candidate { rank: Rank::Direct, at: at(text) }
}

#[test]
fn a_pair_without_traffic_is_told_nothing_and_says_nothing() {
    let (world, now) = (world(TunnelMapping::Independent), Instant::now());
    let mut paths = observed(&world, now);
    let idle = Seen { ready: false, ..seen("b", "192.0.2.202:4002") };
    let acts = paths.look(&[idle], false, &world, now);
    assert!(calls(&acts) == 0 && places(&acts).is_empty() && asked(&acts).is_empty(), "{acts:?}");
    assert!(paths.pairs.is_empty());
}

#[test]
fn who_waits_calls_the_peer_and_tries_where_its_packets_come_from() {
    let (world, now) = (world(TunnelMapping::Independent), Instant::now());
    let mut paths = observed(&world, now);
    let looks = [waiting(), seen("r1", "192.0.2.1:51820"), seen("r2", "192.0.2.2:51820")];
    let acts = paths.look(&looks, false, &world, now);
    let call = PathWord::Call { endpoints: vec![at("192.0.2.201:4001")], answers: false };
    assert!(acts.contains(&Act::Say(name("b"), call)), "{acts:?}");
    // Its private address is this node's own as well, and no way to it.
    assert_eq!(places(&acts), [direct_place("192.0.2.202:4002")]);
    assert_eq!(paths.ways()[&name("b")], at("192.0.2.202:4002"));
    assert!(asked(&acts).is_empty(), "both may be able to do without a relay");
    assert_eq!(calls(&paths.look(&looks, false, &world, now + CALL / 2)), 0);
}

#[test]
fn who_is_called_sends_at_once_and_answers_once() {
    let (world, now) = (world(TunnelMapping::Independent), Instant::now());
    let mut paths = observed(&world, now);
    let call = PathWord::Call { endpoints: vec![at("192.0.2.202:4777")], answers: false };
    let acts = paths.handle_word(&name("b"), call.clone(), &world, now);
    assert_eq!(places(&acts), [direct_place("192.0.2.202:4002"), direct_place("192.0.2.202:4777")]);
    let answer = |act: &Act| matches!(act, Act::Say(_, PathWord::Call { answers: true, .. }));
    assert!(acts.iter().any(answer));
    assert!(!paths.handle_word(&name("b"), call, &world, now).iter().any(answer));
    let answered = PathWord::Call { endpoints: Vec::new(), answers: true };
    assert_eq!(calls(&paths.handle_word(&name("b"), answered, &world, now + CALL)), 0);
}

#[test]
fn a_call_leads_to_no_place_that_is_no_host() {
    let (world, now) = (world(TunnelMapping::Independent), Instant::now());
    let mut paths = observed(&world, now);
    let endpoints = ["127.0.0.1:53", "224.0.0.1:53", "255.255.255.255:53", "0.0.0.0:53"].map(at).to_vec();
    let acts = paths.handle_word(&name("b"), PathWord::Call { endpoints, answers: true }, &world, now);
    assert_eq!(places(&acts), [direct_place("192.0.2.202:4002")]);
}

#[test]
fn two_translators_that_depend_on_the_destination_need_a_relay_at_once() {
    let (world, now) = (world(TunnelMapping::Dependent), Instant::now());
    let mut paths = observed(&world, now);
    let acts = paths.look(&[waiting()], false, &world, now);
    assert_eq!(asked(&acts).len(), 1, "{acts:?}");
}

#[test]
fn a_pair_that_cannot_be_punched_gets_a_relay_and_then_one_to_fall_back_to() {
    let (world, now) = (world(TunnelMapping::Independent), Instant::now());
    let mut paths = observed(&world, now);
    let observers = [seen("r1", "192.0.2.1:51820"), seen("r2", "192.0.2.2:51820")];
    let with = |look: Seen| observers.iter().cloned().chain([look]).collect::<Vec<_>>();
    paths.look(&with(waiting()), false, &world, now);
    let later = now + PUNCH;
    let relay = asked(&paths.look(&with(waiting()), false, &world, later));
    assert_eq!(relay.len(), 1);
    assert!(asked(&paths.look(&with(waiting()), false, &world, later + SOON)).is_empty());
    let grant = PathWord::RelayGrant(name("b"), 51_900);
    let acts = paths.handle_word(&relay[0], grant.clone(), &world, later);
    let through = world.party(&relay[0]).expect("a member").addresses[0];
    let through = SocketAddr::new(through, 51_900);
    assert_eq!(places(&acts)[1], Candidate { rank: Rank::Relay, at: through });
    let on_relay = Seen { endpoint: through, ..seen("b", "0.0.0.0:1") };
    let acts = paths.look(&with(on_relay.clone()), false, &world, later + SOON);
    assert_eq!(paths.relay_at(&name("b"), through), Some(&relay[0]));
    let standby = asked(&acts);
    assert_eq!(standby.len(), 1);
    assert_ne!(standby, relay);
    // It stops: data goes unanswered.
    paths.handle_word(&standby[0], grant, &world, later + SOON);
    let silent = Seen { sent: 5000, ..on_relay };
    paths.look(&with(silent.clone()), false, &world, later + SOON * 2);
    let dead = later + SOON * 2 + SILENT;
    let acts = paths.look(&with(silent), false, &world, dead);
    assert_eq!(calls(&acts), 1);
    let given_up = paths.given_up(dead);
    assert_eq!((given_up.len(), &given_up[0].relay, given_up[0].carried), (1, &relay[0], true));
    assert!(places(&acts).iter().all(|place| place.at != through), "{acts:?}");
    assert_eq!(places(&acts).iter().filter(|place| place.rank == Rank::Relay).count(), 1);
}

#[test]
fn a_relay_that_was_gone_over_to_just_now_is_not_blamed_for_the_silence_before() {
    let (world, now) = (world(TunnelMapping::Independent), Instant::now());
    let mut paths = observed(&world, now);
    let look = |endpoint: &str, sent| Seen { sent, ..seen("b", endpoint) };
    paths.look(&[look("192.0.2.202:4002", 0)], false, &world, now);
    paths.look(&[look("192.0.2.202:4002", 5000)], false, &world, now);
    paths.handle_word(&name("r1"), PathWord::RelayGrant(name("b"), 51_900), &world, now + SILENT);
    paths.look(&[look("192.0.2.1:51900", 6000)], false, &world, now + SILENT);
    assert_eq!(paths.given_up(now + SILENT), []);
    assert_eq!(paths.relay_at(&name("b"), at("192.0.2.1:51900")), Some(&name("r1")));
    paths.look(&[look("192.0.2.1:51900", 7000)], false, &world, now + SILENT * 2);
    paths.look(&[look("192.0.2.1:51900", 7000)], false, &world, now + SILENT * 3);
    assert_eq!(paths.given_up(now + SILENT * 3).len(), 1, "now it is to blame");
}

#[test]
fn a_relay_that_only_the_peer_knows_of_is_taken_for_one_once_packets_come_by_it() {
    let (world, now) = (world(TunnelMapping::Independent), Instant::now());
    let mut paths = observed(&world, now);
    let through = at("192.0.2.1:51900");
    let acts = paths.look(&[seen("b", "192.0.2.1:51900")], false, &world, now);
    assert_eq!(paths.relay_at(&name("b"), through), Some(&name("r1")));
    assert!(places(&acts).contains(&Candidate { rank: Rank::Relay, at: through }), "{acts:?}");
    let misled = |act: &Act| matches!(act, Act::Say(_, PathWord::Observed(_)));
    assert!(!acts.iter().any(misled), "the relay's address is not the peer's: {acts:?}");
    // It is silent, so given up; then the peer is heard by it after all.
    let look = |sent, received| Seen { sent, received, ..seen("b", "192.0.2.1:51900") };
    paths.look(&[look(5000, 0)], false, &world, now + SOON);
    paths.look(&[look(5000, 0)], false, &world, now + SOON + SILENT);
    assert_eq!(paths.relay_at(&name("b"), through), None);
    let later = now + UPGRADE;
    paths.look(&[look(5000, 100)], false, &world, later);
    assert_eq!(paths.relay_at(&name("b"), through), Some(&name("r1")));
    assert_eq!(
        calls(&paths.look(&[look(5000, 100)], false, &world, later + UPGRADE)),
        1,
        "it is to do without"
    );
    // Where a tunnel of a member or nobody is, there is no relay.
    for endpoint in ["192.0.2.2:51820", "192.0.2.99:51900", "198.51.100.1:51900"] {
        paths.look(&[seen("b", endpoint)], false, &world, later);
        assert_eq!(paths.relay_at(&name("b"), at(endpoint)), None, "{endpoint}");
    }
}

#[test]
fn a_relay_that_was_given_up_and_carries_again_is_named_and_nobody_is_told_that_it_is_the_peer() {
    let (world, now) = (world(TunnelMapping::Independent), Instant::now());
    let mut paths = observed(&world, now);
    let look = |sent, received| Seen { sent, received, ..seen("b", "192.0.2.1:51900") };
    paths.handle_word(&name("r1"), PathWord::RelayGrant(name("b"), 51_900), &world, now);
    paths.look(&[look(0, 0)], false, &world, now);
    paths.look(&[look(5000, 0)], false, &world, now + SOON);
    let acts = paths.look(&[look(5000, 0)], false, &world, now + SOON + SILENT);
    assert_eq!(paths.given_up(now + SOON + SILENT).len(), 1);
    assert!(places(&acts).iter().all(|place| place.rank == Rank::Direct), "{acts:?}");
    // The machine of the relay only stood still.
    let later = now + SOON * 2 + SILENT;
    let acts = paths.look(&[look(6000, 5000)], false, &world, later);
    assert_eq!(paths.relay_at(&name("b"), at("192.0.2.1:51900")), Some(&name("r1")));
    let told = |act: &Act| matches!(act, Act::Say(_, PathWord::Observed(_)));
    assert!(!acts.iter().any(told), "{acts:?}");
    // It is looked after as a pair on a relay is: it tries to do without.
    let acts = paths.look(&[look(7000, 6000)], false, &world, later + UPGRADE);
    assert_eq!(calls(&acts), 1, "{acts:?}");
}

#[test]
fn a_relay_that_grants_and_carries_nothing_is_given_up_and_another_asked() {
    let (world, now) = (world(TunnelMapping::Dependent), Instant::now());
    let mut paths = observed(&world, now);
    let relay = asked(&paths.look(&[waiting()], false, &world, now));
    paths.handle_word(&relay[0], PathWord::RelayGrant(name("b"), 51_900), &world, now);
    let mut others = Vec::new();
    for step in 1..30 {
        others.extend(asked(&paths.look(&[waiting()], false, &world, now + SOON * step)));
    }
    assert!(!others.is_empty() && !others.contains(&relay[0]), "{others:?}");
    assert!(paths.given_up(now + SOON * 30).iter().any(|gone| gone.relay == relay[0] && !gone.carried));
}

#[test]
fn the_only_relay_is_asked_again_after_it_was_given_up_unless_it_refuses() {
    let (mut world, now) = (world(TunnelMapping::Dependent), Instant::now());
    let mut paths = observed(&world, now);
    world.others.retain(|other| !["r2", "r3"].contains(&other.node.as_str()));
    let only = asked(&paths.look(&[waiting()], false, &world, now));
    paths.handle_word(&only[0], PathWord::RelayGrant(name("b"), 51_900), &world, now);
    let gone = now + relays::CARRIES;
    let again = asked(&paths.look(&[waiting()], false, &world, gone));
    assert_eq!(paths.given_up(gone).len(), 1, "it carried nothing");
    assert_eq!(again, only);

    let refuse = PathWord::RelayRefuse(name("b"), weft_wire::mesh::RelayRefusal::Full);
    paths.handle_word(&only[0], refuse, &world, gone);
    assert_eq!(asked(&paths.look(&[waiting()], false, &world, gone + PUNCH * 4)), []);
}

#[test]
fn a_relay_that_refuses_or_is_silent_is_followed_by_another() {
    let (world, now) = (world(TunnelMapping::Dependent), Instant::now());
    let mut paths = observed(&world, now);
    let first = asked(&paths.look(&[waiting()], false, &world, now));
    let refuse = PathWord::RelayRefuse(name("b"), weft_wire::mesh::RelayRefusal::Full);
    paths.handle_word(&first[0], refuse, &world, now);
    let second = asked(&paths.look(&[waiting()], false, &world, now));
    assert_ne!(first, second);
    let third = asked(&paths.look(&[waiting()], false, &world, now + PUNCH * 2));
    assert_eq!(third.len(), 1);
    assert!(third != first && third != second);
}

#[test]
fn a_grant_of_who_relays_for_nobody_is_not_believed() {
    let (mut world, now) = (world(TunnelMapping::Dependent), Instant::now());
    world.others[1].reach.relay_room = 0;
    let mut paths = observed(&world, now);
    let acts = paths.handle_word(&name("r1"), PathWord::RelayGrant(name("b"), 51_900), &world, now);
    assert!(acts.is_empty() && paths.pairs.is_empty());
}

#[test]
fn pairs_are_spread_over_relays_that_are_equally_near_and_a_far_one_is_left_out() {
    let (mut world, now) = (world(TunnelMapping::Dependent), Instant::now());
    world.others[3].rtt = Some(Duration::from_millis(200));
    let template = world.others[0].clone();
    let mut counts: BTreeMap<NodeName, usize> = BTreeMap::new();
    for number in 0..60 {
        let peer = Party { node: name(&format!("b{number}")), ..template.clone() };
        let mut relays = Relays::default();
        let chosen = relays.choose((&world.own, &peer), &[], || world.all(), now).expect("there are relays");
        *counts.entry(chosen).or_default() += 1;
    }
    assert_eq!(counts.len(), 2, "{counts:?}");
    assert!(counts.values().all(|count| *count >= 10), "{counts:?}");
}

#[test]
fn a_pair_on_a_relay_tries_to_do_without_and_soon_after_something_changed() {
    let (mut world, now) = (world(TunnelMapping::Dependent), Instant::now());
    let mut paths = observed(&world, now);
    let relay = asked(&paths.look(&[waiting()], false, &world, now));
    paths.handle_word(&relay[0], PathWord::RelayGrant(name("b"), 51_900), &world, now);
    let through = SocketAddr::new(world.party(&relay[0]).expect("a member").addresses[0], 51_900);
    let look = |now: Instant, paths: &mut Paths, world: &World| {
        paths.look(&[Seen { endpoint: through, ..seen("b", "0.0.0.0:1") }], false, world, now)
    };
    let mut now = now + CALL;
    look(now, &mut paths, &world);
    assert_eq!(calls(&look(now + SOON, &mut paths, &world)), 0);
    now += UPGRADE;
    assert_eq!(calls(&look(now, &mut paths, &world)), 1);
    assert_eq!(calls(&look(now + SOON, &mut paths, &world)), 0);
    world.others[0].reach.mapping = TunnelMapping::Independent;
    assert_eq!(calls(&look(now + SOON * 2, &mut paths, &world)), 1);
}

#[test]
fn a_peer_is_told_where_it_is_seen_once_until_that_changes() {
    let (world, now) = (world(TunnelMapping::Independent), Instant::now());
    let mut paths = Paths::default();
    let told = |acts: Vec<Act>| acts.into_iter().any(|act| matches!(act, Act::Say(_, PathWord::Observed(_))));
    assert!(!told(paths.look(&[seen("b", "192.0.2.202:4002")], false, &world, now)), "its record says so");
    assert!(told(paths.look(&[seen("b", "192.0.2.202:5000")], false, &world, now)));
    assert!(!told(paths.look(&[seen("b", "192.0.2.202:5000")], false, &world, now)));
    assert!(told(paths.look(&[seen("b", "192.0.2.202:5000")], false, &world, now + TOLD)));
}

#[test]
fn a_peer_is_not_told_that_it_is_seen_where_only_its_record_says_that_it_is() {
    let (world, now) = (world(TunnelMapping::Dependent), Instant::now());
    let mut paths = Paths::default();
    let told = |acts: Vec<Act>| acts.into_iter().any(|act| matches!(act, Act::Say(_, PathWord::Observed(_))));
    assert!(told(paths.look(&[seen("b", "192.0.2.202:5000")], false, &world, now)));
    // The tunnel follows the record, which has the place that the peer's translator gave it towards another node.
    let followed = Seen { heard: false, ..seen("b", "192.0.2.202:4002") };
    assert!(!told(paths.look(&[followed], false, &world, now + SOON)));
    assert!(!told(paths.look(&[seen("b", "192.0.2.202:5000")], false, &world, now + SOON * 2)));
    assert!(
        told(paths.look(&[seen("b", "192.0.2.202:4002")], false, &world, now + SOON * 3)),
        "it is seen there"
    );
}

#[test]
fn a_node_asks_two_open_nodes_until_it_knows_that_nothing_stands_before_it() {
    let (mut world, now) = (world(TunnelMapping::Unknown), Instant::now());
    world.own.reach = TunnelReach::default();
    let mut paths = Paths::default();
    let looks = ["r1", "r2", "r3"].map(|node| Seen { ready: false, ..seen(node, "192.0.2.1:51820") });
    let wants = |acts: &[Act]| acts.iter().filter(|act| matches!(act, Act::Want(..))).count();
    assert_eq!(wants(&paths.look(&looks, false, &world, now)), 2);
    let first: Vec<_> = paths.observers.keys().cloned().collect();
    // Those that do not answer give way to others.
    paths.look(&looks, false, &world, now + CALLED);
    assert!(paths.observers.keys().any(|node| !first.contains(node)));
    let word = PathWord::Observed(at("198.51.100.1:51820"));
    paths.handle_word(&name("r3"), word, &world, now + CALLED);
    assert_eq!(wants(&paths.look(&looks, false, &world, now + CALLED)), 0);
    assert!(paths.observers.is_empty());
}

/// What the kernel tells of a peer that it asks in vain.
fn asking(sent: u64) -> Seen {
    Seen { sent, ..waiting() }
}

fn wants(acts: &[Act]) -> bool {
    acts.iter().any(|act| matches!(act, Act::Want(node, _) if *node == name("b")))
}

#[test]
fn the_kernel_is_given_a_direct_path_and_a_granted_relay_at_once_and_begins_anew_there() {
    let (world, now) = (world(TunnelMapping::Independent), Instant::now());
    let mut paths = observed(&world, now);
    paths.look(&[asking(148)], true, &world, now);
    assert_eq!(paths.ways()[&name("b")], at("192.0.2.202:4002"));
    let relay = asked(&paths.look(&[asking(148)], true, &world, now + PUNCH));
    paths.handle_word(&relay[0], PathWord::RelayGrant(name("b"), 51_900), &world, now + PUNCH);
    let acts = paths.look(&[asking(148)], true, &world, now + PUNCH + SOON);
    assert!(acts.contains(&Act::Ways));
    assert_eq!(paths.ways()[&name("b")].port(), 51_900);
    assert!(
        paths.anew().contains(&name("b")),
        "the kernel asks there now, and not five seconds after it asked elsewhere"
    );
    // A session: what the kernel learned of it stays.
    let direct = seen("b", "192.0.2.202:4002");
    paths.look(&[direct], true, &world, now + CALL);
    assert_eq!(paths.ways()[&name("b")], at("192.0.2.202:4002"));
    assert!(paths.anew().is_empty());
}

#[test]
fn a_kernel_that_is_called_asks_at_once_and_one_that_calls_asks_by_itself() {
    let (world, now) = (world(TunnelMapping::Independent), Instant::now());
    let call = PathWord::Call { endpoints: Vec::new(), answers: false };
    let idle = Seen { ready: false, ..seen("b", "192.0.2.202:4002") };
    let mut paths = observed(&world, now);
    paths.look(std::slice::from_ref(&idle), true, &world, now);
    assert!(wants(&paths.handle_word(&name("b"), call.clone(), &world, now)));
    // Its kernel tries then: that is no reason to call in turn, and ends with the calls.
    let acts = paths.look(&[asking(148)], true, &world, now + SOON);
    assert_eq!(calls(&acts), 0, "{acts:?}");
    assert!(paths.wake() == Some(now + SOON * 2), "it has a path to look for");
    paths.look(&[asking(296)], true, &world, now + CALLED);
    assert!(paths.pairs[&name("b")].needs.is_none());

    let mut paths = observed(&world, now);
    paths.look(&[idle], true, &world, now);
    assert_eq!(calls(&paths.look(&[asking(148)], true, &world, now)), 1);
    assert!(!wants(&paths.handle_word(&name("b"), call, &world, now + CALL)));
}

#[test]
fn a_kernel_that_has_given_up_needs_no_path_until_it_asks_again() {
    let (world, now) = (world(TunnelMapping::Independent), Instant::now());
    let mut paths = observed(&world, now);
    assert_eq!(calls(&paths.look(&[asking(148)], true, &world, now)), 1);
    assert_eq!(calls(&paths.look(&[asking(148)], true, &world, now + kernel::TRIES)), 0);
    assert_eq!(
        calls(&paths.look(&[asking(296)], true, &world, now + kernel::TRIES * 9)),
        1,
        "there is more to send"
    );
}

#[test]
fn silence_in_the_kernel_is_first_asked_about_and_then_the_path_is_left() {
    let (world, now) = (world(TunnelMapping::Independent), Instant::now());
    let mut paths = observed(&world, now);
    let look = |sent, received| Seen { sent, received, ..seen("b", "192.0.2.202:4002") };
    let mut seen =
        |sent, received, after: Duration| paths.look(&[look(sent, received)], true, &world, now + after);
    seen(1000, 1000, Duration::ZERO);
    seen(5000, 1000, SOON);
    let acts = seen(6000, 1000, SOON + SILENT);
    assert_eq!((calls(&acts), asked(&acts).len()), (1, 0), "it may be taking and have nothing to say");
    assert_eq!(calls(&seen(6000, 1032, SOON * 2 + SILENT)), 0, "so it was");
    let silent = SOON * 3 + SILENT * 2;
    seen(7000, 1032, SOON * 3 + SILENT);
    assert_eq!(asked(&seen(8000, 1032, silent)).len(), 0);
    assert_eq!(asked(&seen(9000, 1032, silent + PUNCH)).len(), 1, "it does not take either");
}

#[test]
fn a_session_over_which_nothing_comes_is_left_when_the_peer_calls_twice_or_has_a_relay() {
    let (world, now) = (world(TunnelMapping::Independent), Instant::now());
    let call = PathWord::Call { endpoints: Vec::new(), answers: false };
    let relay = PathWord::RelayGrant(name("b"), 51_900);
    let idle = |received| Seen { received, ..seen("b", "192.0.2.202:4002") };
    let later = now + CALL;
    for (word, received, expected) in
        [(Some(call.clone()), 0, true), (None, 0, false), (Some(call.clone()), 32, false)]
    {
        let mut paths = observed(&world, now);
        paths.look(&[idle(0)], true, &world, now);
        paths.handle_word(&name("b"), call.clone(), &world, now);
        paths.look(&[idle(0)], true, &world, now);
        assert!(!paths.anew().contains(&name("b")), "one call is answered over the session");
        paths.look(&[idle(received)], true, &world, later);
        if let Some(word) = word {
            paths.handle_word(&name("b"), word, &world, later);
        }
        paths.look(&[idle(received)], true, &world, later);
        assert_eq!(paths.anew().contains(&name("b")), expected, "{received}");
    }
    let mut paths = observed(&world, now);
    paths.look(&[idle(0)], true, &world, now);
    paths.handle_word(&name("b"), call, &world, now);
    paths.handle_word(&name("r1"), relay, &world, now);
    paths.look(&[idle(0)], true, &world, now);
    assert_eq!((paths.ways()[&name("b")].port(), paths.anew().contains(&name("b"))), (51_900, true));
}
