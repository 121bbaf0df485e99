//! Whoever has not answered yet is sent no more than it sends, whatever it sends: all messages that there are, to a node that knows
//! their senders and has not heard them since it started.

use std::path::Path;

use prost::encoding::{bytes, fixed64, string, uint32, uint64};

use super::*;

/// Node 1 of site 0 was started anew, while all others but the speaker of its site are away: it knows them and has not heard them.
const VICTIM: usize = 1;

/// Puts somebody at the stranger's address who counts what comes there, and says nothing.
fn watch_stranger(sites: &mut Sites) {
    let listener = MeshConfig { ring: ring(&[99]), seeds: Vec::new(), ..config(70, 1) };
    sites.net.start_at(stranger(), listener, Authority::Claims);
}

/// What came to the stranger's address: datagrams and bytes.
fn came(sites: &Sites) -> (u64, u64) {
    let host = sites.net.net.host(stranger()).unwrap();
    (host.mesh.counters().received, host.mesh.counters().received_bytes)
}

/// Hands a datagram to the victim as if it came from the stranger, and asserts that the stranger gets no more than it was, by itself
/// and with the headers of IPv6 and UDP, at once or later. Returns whether anything came.
fn assert_bounded(sites: &mut Sites, datagram: &[u8], what: &str) -> bool {
    let before = came(sites);
    let _ = sites.net.inject(stranger(), VICTIM, datagram);
    sites.run(Duration::from_millis(2200));
    let after = came(sites);
    let (count, length) = (after.0 - before.0, after.1 - before.1);
    let sent = datagram.len() as u64;
    let seed = sites.net.seed;
    assert!(length <= sent, "{what}: {length} bytes for {sent}; WEFT_SEED={seed}");
    assert!(length + 48 * count <= sent + 48, "{what}: {count} datagrams; WEFT_SEED={seed}");
    count > 0
}

fn words() -> Vec<PathWord> {
    let place: SocketAddr = "192.0.2.7:40000".parse().unwrap();
    vec![
        PathWord::Observed(place),
        PathWord::Call { endpoints: vec![place; MAX_CALLED], answers: false },
        PathWord::RelayAsk(name(5)),
        PathWord::RelayGrant(name(5), 51_900),
        PathWord::RelayRefuse(name(5), RelayRefusal::Full),
    ]
}

/// Two sites in which much happens while everything to the victim is recorded; then it starts anew, and all but its teacher are gone.
fn victim_that_has_heard_nobody(test: &str) -> (Sites, Vec<Vec<u8>>) {
    let mut sites = Sites::up(test, 2);
    sites.net.net.gather(usize::MAX);
    let token = sites.invite(0, hour());
    assert_eq!(sites.join(1, token), Ok(site(0)));
    sites.run_until("one mesh", seconds(60), |sites| sites.all_route(&[0, 1]) && sites.one_ring(&[0, 1]));
    for word in words() {
        sites.net.with(6, |mesh, now| mesh.say(&name(VICTIM), &word, now)).unwrap();
    }
    sites.renew(1);
    // Somebody who is silent: others are asked to ask.
    sites.stop(3);
    sites.run(seconds(60));
    let from_others = [2, 4, 5, 6, 7].map(address);
    let seen = sites.net.net.gathered().iter();
    let recorded = seen.filter(|seen| seen.to == address(VICTIM) && from_others.contains(&seen.from));
    let recorded: Vec<Vec<u8>> = recorded.map(|seen| seen.datagram.to_vec()).collect();
    sites.net.net.gather(0);
    [2, 4, 5, 6, 7].into_iter().for_each(|node| sites.stop(node));
    sites.restart(VICTIM, 2);
    sites.run_until("it knows them all", seconds(60), |sites| sites.net.mesh(VICTIM).members().count() >= 6);
    sites.run(seconds(30));
    watch_stranger(&mut sites);
    (sites, recorded)
}

#[test]
fn a_node_that_has_just_started_sends_no_more_than_it_gets_to_whoever_repeats_what_it_heard_before() {
    let (mut sites, recorded) = victim_that_has_heard_nobody("a_node_that_has_just_started");
    assert!(recorded.len() > 100, "{}", recorded.len());
    let mut answered = 0;
    for datagram in &recorded {
        answered += usize::from(assert_bounded(&mut sites, datagram, "repeated"));
    }
    println!("{} datagrams repeated, {answered} were answered", recorded.len());
    assert!(answered > 0, "who is there would be asked back");
    let heard = |member: &MemberView<'_>| member.state == MemberState::Alive;
    assert_eq!(sites.net.mesh(VICTIM).members().filter(heard).count(), 1, "nobody came back to life");
}

/// The kinds of bodies that the documented messages have, by tag.
fn kinds() -> Vec<(u32, String)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../wire/proto");
    let set = protox::compile([directory.join("mesh.proto")], [directory]).unwrap();
    let messages = set.file.into_iter().flat_map(|file| file.message_type);
    let datagram = messages.into_iter().find(|message| message.name() == "Datagram").unwrap();
    let bodies = datagram.field.iter().filter(|field| field.oneof_index.is_some());
    bodies.map(|field| (field.number() as u32, field.name().to_owned())).collect()
}

/// A content with a body, of a node that has announced itself or of one that has not.
fn content(session: u64, announced: bool, kind: u32, body: &Vec<u8>) -> Vec<u8> {
    let mut content = Vec::new();
    string::encode(1, &name(6).to_string(), &mut content);
    string::encode(2, &name(VICTIM).to_string(), &mut content);
    fixed64::encode(3, &session, &mut content);
    uint64::encode(4, &(1 << 28), &mut content);
    for tag in (5..7).filter(|_| announced) {
        uint64::encode(tag, &(1 << 32), &mut content);
    }
    bytes::encode(kind, body, &mut content);
    content
}

/// Bodies that ask for as much as they can: by the name of their kind, else an empty one.
fn bodies(kind: &str) -> Vec<Vec<u8>> {
    let mut body = Vec::new();
    match kind {
        "ping" => {
            fixed64::encode(1, &7, &mut body);
            uint32::encode(3, &500, &mut body);
        }
        "ack" => {
            fixed64::encode(1, &7, &mut body);
            fixed64::encode(4, &7, &mut body);
        }
        "ping_request" => {
            fixed64::encode(1, &7, &mut body);
            string::encode(2, &name(0).to_string(), &mut body);
        }
        "sync_root" => {
            fixed64::encode(1, &7, &mut body);
            uint32::encode(2, &900, &mut body);
            fixed64::encode(3, &7, &mut body);
        }
        "sync_buckets" => {
            bytes::encode(3, &vec![7; 128], &mut body);
            bytes::encode(4, &vec![99; 16], &mut body);
        }
        "sync_items" => {
            fixed64::encode(2, &u64::MAX, &mut body);
        }
        "observed" => bytes::encode(1, &vec![192, 0, 2, 7, 9, 9], &mut body),
        "relay_ask" | "relay_grant" | "relay_refuse" => {
            string::encode(1, &name(5).to_string(), &mut body);
            uint32::encode(2, &4, &mut body);
        }
        "forward" => {
            let mut ping = Vec::new();
            fixed64::encode(1, &7, &mut ping);
            bytes::encode(1, &content(u64::MAX >> 2, false, 8, &ping), &mut body);
        }
        _ => {}
    }
    vec![body, Vec::new()]
}

#[test]
fn no_message_that_there_is_gets_more_than_it_brings_from_who_has_not_heard_its_sender() {
    let (mut sites, _) = victim_that_has_heard_nobody("no_message_that_there_is");
    let ring = sites.net.mesh(VICTIM).ring().clone();
    let mut session = u64::MAX >> 8;
    let mut answered = Vec::new();
    for (tag, kind) in kinds() {
        for (body, announced) in
            bodies(&kind).into_iter().flat_map(|body| [(body.clone(), false), (body, true)])
        {
            // Each in a session of its own, later than the one before: nothing was heard in it.
            session += 1;
            let datagram = ring.seal(CLUSTER, [9; 24], &content(session, announced, tag, &body));
            if assert_bounded(&mut sites, &datagram, &kind) && !answered.contains(&kind) {
                answered.push(kind.clone());
            }
        }
    }
    let silent: Vec<_> = kinds().into_iter().filter(|(_, kind)| !answered.contains(kind)).collect();
    println!("who sent these is asked back whether it is there: {answered:?}; not these: {silent:?}");
    assert!(answered.len() > 10, "{answered:?}");
}
