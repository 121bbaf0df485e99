use std::time::UNIX_EPOCH;

use super::*;

fn key(number: u16) -> TunnelKey {
    let mut bytes = [7; 32];
    bytes[..2].copy_from_slice(&number.to_be_bytes());
    TunnelKey(bytes)
}

fn net(text: &str) -> IpNet {
    text.parse().expect("a prefix")
}

fn wanted(endpoint: &str, prefixes: &[&str]) -> WantedPeer {
    WantedPeer {
        endpoint: endpoint.parse().expect("an endpoint"),
        anew: false,
        preshared: [0; 32],
        prefixes: prefixes.iter().map(|text| net(text)).collect(),
    }
}

fn now() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_000_000)
}

/// What the kernel makes of changes, message by message, as the messages' bytes tell it (`set_peer`, drivers/net/wireguard).
fn apply(device: &mut Device, changes: &[Change]) {
    for message in wire::messages(changes) {
        let mut writer = Writer::default();
        writer.message(1, 0, 1, &command(SET_DEVICE), |writer| wire::peers(writer, "weft-wg", &message));
        assert!(writer.bytes.len() < 60_000, "{} bytes in one message", writer.bytes.len());
        let mut told = Device::default();
        wire::merge(&writer.bytes[20..], &mut told);
        for change in &message {
            let says = told.peers.get(&change.key).expect("each peer is in its message");
            match change.kind {
                ChangeKind::Remove => drop(device.peers.remove(&change.key)),
                ChangeKind::Add => drop(device.peers.entry(change.key).or_default()),
                ChangeKind::Replace => {
                    device.peers.get_mut(&change.key).expect("it is there").prefixes.clear();
                }
                ChangeKind::Update => {}
            }
            for (other, peer) in &mut device.peers {
                if *other != change.key && change.kind != ChangeKind::Remove {
                    peer.prefixes.retain(|net| !says.prefixes.contains(net));
                }
            }
            let Some(peer) = device.peers.get_mut(&change.key) else { continue };
            peer.prefixes.extend(&says.prefixes);
            peer.endpoint = says.endpoint.or(peer.endpoint);
            peer.keepalive = change.keepalive.map_or(peer.keepalive, |_| says.keepalive);
            peer.preshared = change.preshared.map_or(peer.preshared, |_| says.preshared);
        }
    }
}

#[test]
fn after_the_changes_there_are_none_however_many_peers_and_prefixes_there_are() {
    let mut device = Device::default();
    let mut peers = BTreeMap::new();
    for number in 0..2_000_u16 {
        let [high, low] = number.to_be_bytes();
        let prefixes = [format!("10.{high}.{low}.0/24"), format!("fd00:32:0:{number:x}::/64")];
        let endpoint = if number % 2 == 0 { "192.0.2.1:51820" } else { "[2001:db8::1]:51820" };
        peers.insert(key(number), wanted(endpoint, &prefixes.each_ref().map(String::as_str)));
    }
    let many = (0..3_000_u32)
        .map(|number| IpNet::new((0x0a80_0000 + number).to_be_bytes().into(), 32).expect("a host"));
    peers.insert(key(9_999), WantedPeer { prefixes: many.collect(), ..wanted("192.0.2.9:1", &[]) });
    let check = |device: &mut Device, peers: &BTreeMap<TunnelKey, WantedPeer>| {
        let told = changes(device, peers, &BTreeMap::new(), now());
        apply(device, &told);
        assert_eq!(changes(device, peers, &BTreeMap::new(), now()), [], "once is enough");
        assert_eq!(device.peers.len(), peers.len());
        for (key, peer) in peers {
            assert_eq!(device.peers[key].prefixes, peer.prefixes, "{key}");
        }
    };
    check(&mut device, &peers);
    // Some go, one gets what another had, one loses one of its own, and the long one another of its own.
    let moved = peers.remove(&key(3)).expect("it is there");
    peers.insert(key(5_000), moved);
    peers.retain(|other, _| *other != key(8));
    peers.get_mut(&key(4)).expect("it is there").prefixes.pop_first();
    peers.get_mut(&key(9_999)).expect("it is there").prefixes.pop_last();
    let few = changes(&device, &peers, &BTreeMap::new(), now());
    assert_eq!(few.len(), 5, "only what changed is told: {few:?}");
    check(&mut device, &peers);
}

#[test]
fn a_peer_that_someone_removed_or_changed_comes_back_and_others_are_not_mentioned() {
    let peers = BTreeMap::from([
        (key(1), wanted("192.0.2.1:51820", &["10.32.1.0/24"])),
        (key(2), wanted("192.0.2.2:51820", &["10.32.2.0/24"])),
    ]);
    let mut device = Device { key: Some(key(9)), ..Device::default() };
    let all = changes(&device, &peers, &BTreeMap::new(), now());
    apply(&mut device, &all);
    let whole = device.clone();
    let known: BTreeMap<_, _> = peers.iter().map(|(key, peer)| (*key, peer.endpoint)).collect();

    device.peers.remove(&key(1));
    let mend = changes(&device, &peers, &known, now());
    assert!(mend.iter().all(|change| change.key == key(1)), "{mend:?}");
    assert_eq!(
        to_ask(&device, &mend, false, &known, now()),
        [key(1)],
        "its session is gone here and not there"
    );
    apply(&mut device, &mend);
    assert_eq!(device, whole);

    let peer = device.peers.get_mut(&key(2)).expect("it is there");
    peer.prefixes = BTreeSet::from([net("0.0.0.0/0")]);
    peer.keepalive = 10;
    peer.preshared = [1; 32];
    let mend = changes(&device, &peers, &known, now());
    assert_eq!(mend.iter().map(|change| change.key).collect::<Vec<_>>(), [key(2)]);
    assert_eq!(to_ask(&device, &mend, false, &known, now()), [], "a session that goes on is left alone");
    apply(&mut device, &mend);
    assert_eq!(device, whole);
}

#[test]
fn where_packets_came_from_outweighs_what_is_announced_until_that_changes_or_the_session_ends() {
    let roamed: SocketAddr = "203.0.113.7:4000".parse().expect("an endpoint");
    let peers = BTreeMap::from([(key(1), wanted("192.0.2.1:51820", &["10.32.1.0/24"]))]);
    let there = FoundPeer {
        endpoint: Some(roamed),
        prefixes: BTreeSet::from([net("10.32.1.0/24")]),
        handshake: Some(now() - Duration::from_secs(100)),
        ..FoundPeer::default()
    };
    let device = Device { peers: BTreeMap::from([(key(1), there.clone())]), ..Device::default() };
    let announced = peers[&key(1)].endpoint;
    let endpoint = |device: &Device, before: &str, wall: SystemTime| {
        let before = BTreeMap::from([(key(1), before.parse().expect("an endpoint"))]);
        changes(device, &peers, &before, wall).first().and_then(|change| change.endpoint)
    };
    assert_eq!(endpoint(&device, "192.0.2.1:51820", now()), None, "it roamed");
    assert_eq!(endpoint(&device, "192.0.2.200:51820", now()), Some(announced), "it announces another place");
    assert_eq!(
        changes(&device, &peers, &BTreeMap::new(), now()),
        [],
        "a daemon that restarted does not know"
    );
    let late = now() + Duration::from_secs(81);
    assert_eq!(
        endpoint(&device, "192.0.2.1:51820", late),
        Some(announced),
        "nothing says that it is still there"
    );
}

#[test]
fn who_begins_anew_is_forgotten_and_asked_where_it_is_now_and_only_once() {
    let before: SocketAddr = "192.0.2.1:51820".parse().expect("an endpoint");
    let relay = wanted("192.0.2.9:51900", &["10.32.1.0/24"]);
    let there = FoundPeer {
        endpoint: Some(before),
        prefixes: relay.prefixes.clone(),
        handshake: Some(now()),
        ..FoundPeer::default()
    };
    let mut device =
        Device { key: Some(key(9)), peers: BTreeMap::from([(key(1), there)]), ..Device::default() };
    let known = BTreeMap::from([(key(1), before)]);
    let gentle = BTreeMap::from([(key(1), relay.clone())]);
    let told = changes(&device, &gentle, &known, now());
    assert_eq!(told.iter().map(|change| change.kind).collect::<Vec<_>>(), [ChangeKind::Update]);

    let peers = BTreeMap::from([(key(1), WantedPeer { anew: true, ..relay })]);
    let told = changes(&device, &peers, &known, now());
    let kinds: Vec<_> = told.iter().map(|change| change.kind).collect();
    assert_eq!(kinds, [ChangeKind::Remove, ChangeKind::Add]);
    assert_eq!(to_ask(&device, &told, false, &known, now()), [key(1)]);
    apply(&mut device, &told);
    let known = BTreeMap::from([(key(1), peers[&key(1)].endpoint)]);
    // Where its packets come from then is no reason to begin once more.
    let peer = device.peers.get_mut(&key(1)).expect("it is there again");
    assert!(peer.handshake.is_none() && peer.prefixes == peers[&key(1)].prefixes);
    (peer.endpoint, peer.handshake) = (Some(before), Some(now()));
    assert_eq!(changes(&device, &peers, &known, now()), []);
}

#[test]
fn a_node_under_a_new_key_takes_over_and_is_asked_if_it_had_a_session() {
    let mut device = Device {
        key: Some(key(9)),
        peers: BTreeMap::from([(
            key(1),
            FoundPeer {
                prefixes: BTreeSet::from([net("10.32.1.0/24")]),
                handshake: Some(now()),
                ..FoundPeer::default()
            },
        )]),
        ..Device::default()
    };
    let peers = BTreeMap::from([(key(2), wanted("192.0.2.1:51820", &["10.32.1.0/24"]))]);
    let rotate = changes(&device, &peers, &BTreeMap::new(), now());
    let kinds: Vec<_> = rotate.iter().map(|change| (change.key, change.kind)).collect();
    assert_eq!(kinds, [(key(2), ChangeKind::Add), (key(1), ChangeKind::Remove)], "the heir comes first");
    assert_eq!(to_ask(&device, &rotate, false, &BTreeMap::new(), now()), [key(2)]);
    let idle = now() + Duration::from_secs(1_000);
    assert_eq!(to_ask(&device, &rotate, false, &BTreeMap::new(), idle), [], "there was nothing to go on");
    apply(&mut device, &rotate);
    assert_eq!(device.peers.keys().collect::<Vec<_>>(), [&key(2)]);

    // The node's own key changes: who has a session is asked for another.
    device.peers.get_mut(&key(2)).expect("it is there").handshake = Some(now());
    assert_eq!(to_ask(&device, &[], true, &BTreeMap::new(), now()), [key(2)]);
    assert_eq!(to_ask(&device, &[], true, &BTreeMap::new(), idle), []);
}

#[test]
fn answers_of_any_content_are_read_without_harm() {
    let mut writer = Writer::default();
    let all: Vec<Change> = (0..20)
        .map(|number| Change {
            endpoint: Some("192.0.2.1:1".parse().expect("an endpoint")),
            prefixes: vec![net("10.0.0.0/8"), net("fd00::/8")],
            ..Change::new(key(number), ChangeKind::Add)
        })
        .collect();
    wire::peers(&mut writer, "weft-wg", &all);
    for cut in 0..writer.bytes.len() {
        let mut device = Device::default();
        wire::merge(&writer.bytes[..cut], &mut device);
        assert!(device.peers.len() <= 20);
        let mut spoilt = writer.bytes.clone();
        spoilt[cut] ^= 0xff;
        wire::merge(&spoilt, &mut device);
    }
}
