//! What reaches a node about paths: words in gossip, messages at a port that it relays at, probes of a path's MTU (RFC 8899). What is
//! read is in range and has one meaning; a relay sends what it got, once, and to who sent something; no answer is longer than its probe.
#![no_main]

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use weft_daemon::control::{PROBE_LENGTH, ProbeKind, parse_probe, probe_message};
use weft_daemon::relay::pair::{Member, Pair, Step};
use weft_wire::handshake::{COOKIE, INITIATION, LEAST_DATA, Mac1Key, RESPONSE};
use weft_wire::mesh::{MAX_CALLED, PathWord, fuzz};
use weft_wire::types::TunnelKey;

fn word(content: &[u8]) {
    let Some(Some(word)) = fuzz::word(content) else { return };
    match &word {
        PathWord::Call { endpoints, .. } => assert!(endpoints.len() <= MAX_CALLED),
        PathWord::RelayGrant(_, port) => assert!(*port > 0),
        PathWord::Observed(_) | PathWord::RelayAsk(_) | PathWord::RelayRefuse(..) => {}
    }
    assert_eq!(fuzz::word(&fuzz::said(&word)), Some(Some(word)), "it is read as it was said");
}

fn member(number: u8) -> Member {
    Member { node: format!("n{number}").parse().expect("a name"), keys: vec![TunnelKey([number; 32])] }
}

/// A message of a kind, with two indices, and the first MAC for one of the two or for a third.
fn message(kind: u8, indices: [u8; 2], receiver: u8) -> Vec<u8> {
    let kind = kind % 4 + 1;
    let length = match kind {
        1 => INITIATION,
        2 => RESPONSE,
        3 => COOKIE,
        _ => LEAST_DATA + usize::from(indices[1]),
    };
    let mut bytes = vec![0; length];
    (bytes[0], bytes[4], bytes[8]) = (kind, indices[0], indices[1]);
    if kind < 3 {
        let mac = Mac1Key::of(&TunnelKey([receiver % 3 + 1; 32])).mac(&bytes[..length - 32]);
        bytes[length - 32..length - 16].copy_from_slice(&mac);
    }
    bytes
}

/// Each step: when, from where, and what.
fn relay(steps: &[u8]) {
    let mut now = Instant::now();
    let mut pair = Pair::new([member(1), member(2)], 50_000, now);
    let (mut senders, mut taken) = (BTreeSet::new(), Vec::new());
    let (mut sent, mut bytes) = (0, 0);
    for step in steps.chunks_exact(6).take(80) {
        let [pause, from, kind, one, two, receiver] = step.try_into().expect("six bytes");
        now += Duration::from_millis(u64::from(pause) * 20);
        let from = SocketAddr::from(([192, 0, 2, from % 5], 51820));
        let message = if kind < 240 { message(kind, [one % 4, two % 4], receiver) } else { step.to_vec() };
        senders.insert(from);
        taken.push(message.clone());
        let (to, held) = match pair.handle(from, &message, now) {
            Step::Forward { to, held } => (Some(to), held),
            Step::Hold { held } => (None, held),
            Step::Drop(_) => (None, None),
        };
        if let Some(to) = to {
            assert!(senders.contains(&to), "nobody spoke from {to}");
            (sent, bytes) = (sent + 1, bytes + message.len());
            let place = taken.iter().position(|taken| *taken == message).expect("it came");
            taken.remove(place);
        }
        if let Some(held) = held {
            let place = taken.iter().position(|taken| *taken == held).expect("what is held came, and once");
            taken.remove(place);
            (sent, bytes) = (sent + 1, bytes + held.len());
        }
        assert!(pair.legs().iter().flatten().all(|leg| senders.contains(leg)));
        assert_eq!((pair.counts.forwarded, pair.counts.bytes), (sent, bytes as u64));
        let state = pair.state(now);
        assert_eq!(
            Pair::resume(state.clone(), 50_000, now).state(now),
            state,
            "another daemon goes on with it"
        );
    }
}

fn probe(token: [u8; 8], bytes: &[u8]) {
    let framed = [&probe_message(ProbeKind::Echo, 0, 0)[..8], bytes].concat();
    for datagram in [bytes, &framed[..]] {
        let Some((kind, token)) = parse_probe(datagram) else { continue };
        assert!(
            datagram.len() >= PROBE_LENGTH && (kind == ProbeKind::Echo || datagram.len() == PROBE_LENGTH)
        );
        let answer = probe_message(ProbeKind::EchoAnswer, token, PROBE_LENGTH);
        assert!(answer.len() <= datagram.len(), "an answer is no longer");
        assert_eq!(parse_probe(&answer), Some((ProbeKind::EchoAnswer, token)));
    }
    let (token, size) = (u64::from_be_bytes(token), bytes.len() * 37);
    let written = probe_message(ProbeKind::Echo, token, size);
    assert_eq!(
        (written.len(), parse_probe(&written)),
        (size.max(PROBE_LENGTH), Some((ProbeKind::Echo, token)))
    );
    assert_eq!(parse_probe(&written[..PROBE_LENGTH - 1]), None);
}

// The input: what it is, the rest.
fuzz_target!(|bytes: &[u8]| {
    let Some((kind, bytes)) = bytes.split_first() else { return };
    match kind % 3 {
        0 => word(bytes),
        1 => relay(bytes),
        _ => {
            let Some((token, bytes)) = bytes.split_first_chunk::<8>() else { return };
            probe(*token, bytes);
        }
    }
});
