use rand_core::SeedableRng;

use super::*;

const RTT: Duration = Duration::from_millis(10);

fn name(number: usize) -> NodeName {
    format!("n{number}").parse().unwrap()
}

fn gateway(number: usize) -> IpAddr {
    IpAddr::from([10, 32, (number / 256) as u8, (number % 256) as u8])
}

fn endpoint(number: usize) -> IpAddr {
    IpAddr::from([192, 0, (number / 256) as u8, (number % 256) as u8])
}

fn target(number: usize, transport: Transport) -> (NodeName, Target) {
    let target = Target {
        gateway: gateway(number),
        transport,
        ceiling: 1440,
        overhead: 60,
        how: "to there".into(),
        underlay: vec![endpoint(number)],
        alive: true,
    };
    (name(number), target)
}

/// A node with so many peers, in virtual time; what it sends is answered while `answers` says so.
struct Node {
    probes: PathProbes,
    now: Instant,
    /// Bytes and datagrams that were sent, by peer.
    sent: BTreeMap<IpAddr, (usize, usize)>,
}

impl Node {
    fn new(peers: usize, transport: Transport) -> Self {
        let now = Instant::now();
        let mut probes = PathProbes::new(BTreeMap::new(), ChaCha8Rng::seed_from_u64(7), now);
        probes.set_targets((1..=peers).map(|number| target(number, transport)).collect(), now);
        Self { probes, now, sent: BTreeMap::new() }
    }

    fn run(&mut self, length: Duration, answers: impl Fn(IpAddr, usize) -> bool) {
        let end = self.now + length;
        let mut back: Vec<(Instant, IpAddr, u64)> = Vec::new();
        self.sent.clear();
        while self.now < end {
            if self.probes.wake <= self.now {
                for (to, datagram) in self.probes.poll(self.now).0 {
                    let sent = self.sent.entry(to.ip()).or_default();
                    *sent = (sent.0 + datagram.len(), sent.1 + 1);
                    let (_, token) = probe::parse(&datagram).unwrap();
                    if answers(to.ip(), datagram.len() + 28) {
                        back.push((self.now + RTT, to.ip(), token));
                    }
                }
            }
            let next = back.iter().map(|(at, ..)| *at).min();
            self.now = next.into_iter().chain([self.probes.wake]).min().unwrap_or(end).max(self.now);
            for (_, from, token) in back.extract_if(.., |(at, ..)| *at <= self.now) {
                self.probes.handle_answer(from, token, self.now);
            }
        }
    }
}

#[test]
fn at_rest_a_node_probes_a_number_of_peers_that_grows_with_the_logarithm() {
    let mut bytes = Vec::new();
    for (peers, most) in [(3, 3), (10, 7), (100, 10), (1000, 13)] {
        let mut node = Node::new(peers, Transport::Vxlan);
        node.run(Duration::from_secs(250), |_, _| true);
        assert_eq!(node.sent.len(), most, "of {peers}");
        node.run(Duration::from_secs(240), |_, _| true);
        bytes.push(node.sent.values().map(|(bytes, _)| bytes).sum::<usize>() / 240);
    }
    assert!(bytes[3] < 1200, "{bytes:?} bytes a second");
}

#[test]
fn tunnels_that_carry_nothing_are_left_alone_and_those_that_do_are_probed() {
    let mut node = Node::new(3, Transport::WireGuard);
    node.run(Duration::from_secs(60), |_, _| true);
    assert!(node.sent.is_empty(), "no session is opened for a probe");
    let mut carried = 0;
    for _ in 0..20 {
        let traffic = Traffic { tunnels: [(name(2), carried)].into(), ..Traffic::default() };
        node.probes.handle_traffic(&traffic, node.now);
        carried += 100_000;
        node.run(Duration::from_secs(1), |_, _| true);
    }
    assert_eq!(node.sent.keys().collect::<Vec<_>>(), [&gateway(2)]);
    assert_eq!(node.probes.measured(&name(2)), Some(1440));
    assert!(node.probes.quality(&name(2), node.now).is_some());
}

#[test]
fn probes_and_their_answers_are_no_traffic_of_their_own() {
    for transport in [Transport::WireGuard, Transport::Vxlan] {
        let mut node = Node::new(1, transport);
        let (mut carried, mut used) = (1_000_000u64, None);
        let mut busy = Vec::new();
        for second in 0..30 {
            // Pods send for the first five seconds.
            let pods = second < 5;
            node.run(Duration::from_secs(1), |_, _| true);
            if pods {
                (carried, used) = (carried + 50_000, Some(node.now));
            }
            carried += node.sent.values().map(|(bytes, count)| (bytes + count * 60) as u64).sum::<u64>();
            let own = node.probes.peers[&name(1)].own;
            let last = used.into_iter().chain(own).max();
            let idle = last.map_or(Duration::MAX, |at| node.now - at);
            let traffic =
                Traffic { endpoints: [(endpoint(1), idle)].into(), tunnels: [(name(1), carried)].into() };
            node.probes.handle_traffic(&traffic, node.now);
            busy.push(node.probes.busy.len());
        }
        assert_eq!(busy[4], 1, "{transport}: {busy:?}");
        assert_eq!(busy[29], 0, "{transport}: {busy:?}");
    }
}

#[test]
fn a_thousand_busy_peers_get_a_bounded_number_of_probes_a_second() {
    let mut node = Node::new(1000, Transport::Vxlan);
    let endpoints = (1..=1000).map(|number| (endpoint(number), Duration::ZERO)).collect();
    node.probes.handle_traffic(&Traffic { endpoints, ..Traffic::default() }, node.now);
    node.run(Duration::from_secs(120), |_, _| true);
    node.run(Duration::from_secs(60), |_, _| true);
    let sent: usize = node.sent.values().map(|(_, count)| count).sum();
    assert!(sent <= 60 * 70, "{sent} in a minute");
}

#[test]
fn a_peer_that_never_answers_has_no_quality_and_costs_little() {
    let mut node = Node::new(1, Transport::Vxlan);
    node.run(Duration::from_secs(600), |_, _| false);
    assert_eq!(node.probes.quality(&name(1), node.now), None);
    assert_eq!(node.probes.limit(&name(1)), None);
    let (bytes, _) = node.sent[&gateway(1)];
    assert!(bytes / 600 < 200, "{} bytes a second", bytes / 600);
}

#[test]
fn a_black_hole_under_traffic_is_found_within_two_seconds_and_small_packets_do_not_hide_it() {
    let mut node = Node::new(1, Transport::Vxlan);
    node.run(Duration::from_secs(10), |_, _| true);
    let busy = Traffic { endpoints: [(endpoint(1), Duration::ZERO)].into(), ..Traffic::default() };
    node.probes.peers.get_mut(&name(1)).unwrap().own = None;
    node.probes.handle_traffic(&busy, node.now);
    node.run(Duration::from_secs(1), |_, _| true);
    assert_eq!(node.probes.limit(&name(1)), None);
    let began = node.now;
    while node.probes.limit(&name(1)).is_none() {
        node.run(Duration::from_millis(20), |_, size| size + 60 <= 1296);
        assert!(node.now - began < Duration::from_secs(2));
    }
    assert_eq!(node.probes.limit(&name(1)), Some(1236));
}

#[test]
fn answers_from_elsewhere_or_to_nothing_change_nothing() {
    let mut node = Node::new(2, Transport::Vxlan);
    let (sent, _) = node.probes.poll(node.now);
    let (to, datagram) = &sent[0];
    let (_, token) = probe::parse(datagram).unwrap();
    node.probes.handle_answer(gateway(9), token, node.now);
    node.probes.handle_answer(to.ip(), token.wrapping_add(1), node.now);
    assert!(node.probes.measured(&name(1)).is_none() && node.probes.measured(&name(2)).is_none());
    node.probes.handle_answer(to.ip(), token, node.now + RTT);
    assert!(node.probes.peers.values().any(|tracked| tracked.estimate.heard()));
}

#[test]
fn who_has_no_route_is_forgotten_and_another_way_is_another_search() {
    let mut node = Node::new(2, Transport::Vxlan);
    node.run(Duration::from_secs(10), |_, size| size + 60 <= 1296);
    assert_eq!(node.probes.limit(&name(1)), Some(1236));
    let (peer, mut changed) = target(1, Transport::Vxlan);
    changed.how = "to elsewhere".into();
    node.probes.set_targets([(peer.clone(), changed)].into(), node.now);
    assert_eq!(node.probes.limit(&peer), Some(1236), "until the new way is measured");
    assert_eq!(node.probes.peers.len(), 1);
    node.run(Duration::from_secs(10), |_, _| true);
    assert_eq!(node.probes.limit(&peer), None);
}

#[test]
fn what_an_earlier_run_found_is_in_force_before_and_after_the_first_pass() {
    let now = Instant::now();
    let remembered = [(name(1), 1236)].into();
    let mut probes = PathProbes::new(remembered, ChaCha8Rng::seed_from_u64(7), now);
    assert_eq!(probes.limit(&name(1)), Some(1236));
    probes.set_targets([target(1, Transport::Vxlan)].into(), now);
    assert_eq!(probes.limit(&name(1)), Some(1236));
}
