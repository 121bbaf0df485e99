//! What a relay forwards, and what it does not.

use proptest::prelude::*;
use weft_wire::handshake::{INITIATION, LEAST_DATA, RESPONSE};

use super::*;

const A: u8 = 1;
const B: u8 = 2;

pub(in crate::relay) fn member(number: u8) -> Member {
    Member { node: format!("n{number}").parse().expect("a name"), keys: vec![TunnelKey([number; 32])] }
}

fn at(last: u8) -> SocketAddr {
    ([192, 0, 2, last], 40_000).into()
}

fn handshake(kind: u8, length: usize, to: u8, indices: [u32; 2]) -> Vec<u8> {
    let mut message = vec![0; length];
    message[0] = kind;
    message[4..8].copy_from_slice(&indices[0].to_le_bytes());
    message[8..12].copy_from_slice(&indices[1].to_le_bytes());
    let mac = Mac1Key::of(&TunnelKey([to; 32])).mac(&message[..length - 32]);
    message[length - 32..length - 16].copy_from_slice(&mac);
    message
}

pub(in crate::relay) fn initiation(to: u8, sender: u32) -> Vec<u8> {
    handshake(1, INITIATION, to, [sender, 0])
}

pub(in crate::relay) fn response(to: u8, sender: u32, receiver: u32) -> Vec<u8> {
    handshake(2, RESPONSE, to, [sender, receiver])
}

pub(in crate::relay) fn data(receiver: u32) -> Vec<u8> {
    let mut message = vec![0; LEAST_DATA];
    message[0] = 4;
    message[4..8].copy_from_slice(&receiver.to_le_bytes());
    message
}

fn forwarded(to: SocketAddr) -> Step {
    Step::Forward { to, held: None }
}

/// A pair with a session: A at .1 has index 10, B at .2 has index 20.
fn met(now: Instant) -> Pair {
    let mut pair = Pair::new([member(A), member(B)], 1 << 30, now);
    assert_eq!(pair.handle(at(A), &initiation(B, 10), now), Step::Hold { held: None });
    let held = Some(initiation(B, 10));
    assert_eq!(pair.handle(at(B), &initiation(A, 20), now), Step::Hold { held });
    assert_eq!(pair.handle(at(B), &response(A, 20, 10), now), forwarded(at(A)));
    pair
}

#[test]
fn the_last_initiation_waits_for_the_other_end_which_answers_it_and_is_not_asked_itself() {
    let now = Instant::now();
    let mut pair = met(now);
    assert_eq!(pair.handle(at(A), &data(20), now), forwarded(at(B)));
    assert_eq!(pair.handle(at(B), &data(10), now), forwarded(at(A)));
}

#[test]
fn an_initiation_that_waited_for_long_may_be_forgotten_and_so_the_other_asks_too() {
    let now = Instant::now();
    let mut pair = Pair::new([member(A), member(B)], 1 << 30, now);
    assert_eq!(pair.handle(at(A), &initiation(B, 10), now), Step::Hold { held: None });
    let held = Some(initiation(B, 10));
    let asked = pair.handle(at(B), &initiation(A, 20), now + FRESH);
    assert_eq!(asked, Step::Forward { to: at(A), held });
}

#[test]
fn who_is_not_of_the_pair_is_not_served() {
    let now = Instant::now();
    let mut pair = met(now);
    for (message, why) in [
        (initiation(3, 30), Refused::NotOfThePair),
        (response(3, 30, 10), Refused::NotOfThePair),
        (data(30), Refused::Stranger),
        (vec![0; 100], Refused::NotWireguard),
        (Vec::new(), Refused::NotWireguard),
    ] {
        let before = pair.counts.refused[why as usize];
        assert_eq!(pair.handle(at(9), &message, now), Step::Drop(why));
        assert_eq!(pair.counts.refused[why as usize], before + 1);
    }
    assert_eq!((pair.counts.refused(), pair.counts.handshakes), (5, 3), "three made the session");
    assert_eq!(pair.legs(), [Some(at(A)), Some(at(B))]);
}

#[test]
fn a_stranger_who_knows_the_public_keys_takes_no_leg_until_the_other_end_answers_it() {
    let now = Instant::now();
    let mut pair = met(now);
    assert_eq!(pair.handle(at(9), &initiation(B, 66), now), forwarded(at(B)));
    assert_eq!(pair.legs()[0], Some(at(A)), "the forged initiation moves nobody");
    assert_eq!(pair.handle(at(B), &data(10), now), forwarded(at(A)));
    // B answers what A sent from its new place, and so A is there.
    assert_eq!(pair.handle(at(8), &initiation(B, 11), now), forwarded(at(B)));
    assert_eq!(pair.handle(at(B), &response(A, 21, 11), now), forwarded(at(8)));
    assert_eq!(pair.legs()[0], Some(at(8)));
}

#[test]
fn an_end_whose_port_changed_is_followed_by_its_index_once_the_old_one_is_silent() {
    let now = Instant::now();
    let mut pair = met(now);
    assert_eq!(pair.handle(at(7), &data(20), now), forwarded(at(B)), "what is of the session goes on");
    assert_eq!(pair.legs()[0], Some(at(A)), "but moves nobody who was heard just now");
    let later = now + MOVED;
    assert_eq!(pair.handle(at(7), &data(20), later), forwarded(at(B)));
    assert_eq!(pair.legs()[0], Some(at(7)));
    assert_eq!(pair.handle(at(B), &data(10), later), forwarded(at(7)));
}

#[test]
fn an_answer_to_nothing_goes_nowhere() {
    let now = Instant::now();
    let mut pair = Pair::new([member(A), member(B)], 1 << 30, now);
    assert_eq!(pair.handle(at(B), &response(A, 20, 10), now), Step::Drop(Refused::NotOfThePair));
    assert_eq!(pair.legs(), [None, None]);
}

#[test]
fn a_pair_keeps_its_limit_and_is_over_when_idle() {
    let now = Instant::now();
    let mut pair = Pair::new([member(A), member(B)], 1000, now);
    let mut sent = 0;
    while pair.handle(at(A), &initiation(B, 10), now) != Step::Drop(Refused::PairLimit) {
        sent += INITIATION;
    }
    assert!(sent <= 1 << 16, "{sent}");
    assert_eq!(pair.counts.refusals().find(|(_, count)| *count > 0), Some((Refused::PairLimit, 1)));
    let later = now + Duration::from_secs(1);
    assert_eq!(pair.handle(at(A), &initiation(B, 10), later), Step::Hold { held: None });
    assert!(!pair.is_over(later) && pair.is_over(now + UNUSED));
    let pair = met(now);
    assert!(!pair.is_over(now + UNUSED) && pair.is_over(now + IDLE));
}

#[test]
fn keys_that_changed_are_followed() {
    let now = Instant::now();
    let mut pair = met(now);
    assert_eq!(pair.handle(at(A), &initiation(5, 12), now), Step::Drop(Refused::NotOfThePair));
    pair.follow(&[member(A), Member { keys: vec![TunnelKey([5; 32])], ..member(B) }]);
    assert_eq!(pair.handle(at(A), &initiation(5, 12), now), forwarded(at(B)));
}

#[test]
fn a_pair_goes_on_where_another_daemon_was() {
    let now = Instant::now();
    let mut pair = met(now);
    // A is about to move, and B has not answered yet.
    assert_eq!(pair.handle(at(8), &initiation(B, 11), now), forwarded(at(B)));
    let later = now + Duration::from_millis(1500);
    let told = serde_json::to_vec(&pair.state(later)).expect("plain data");
    let state: state::PairState = serde_json::from_slice(&told).expect("as it was written");
    let mut pair = Pair::resume(state.clone(), 1 << 30, later);
    assert_eq!(pair.state(later), state);
    assert_eq!(pair.handle(at(B), &data(10), later), forwarded(at(A)));
    assert_eq!(pair.handle(at(7), &data(20), later), forwarded(at(B)), "by its session");
    assert_eq!(pair.legs()[0], Some(at(7)), "it had been silent for long enough");
    assert_eq!(pair.handle(at(B), &response(A, 21, 11), later), forwarded(at(8)));
    assert_eq!(pair.handle(at(A), &initiation(3, 12), later), Step::Drop(Refused::NotOfThePair));
    let pair = Pair::resume(met(now).state(now + UNUSED), 1 << 30, later);
    assert!(!pair.is_over(later) && pair.is_over(later + IDLE - UNUSED), "it ages on the way");
}

proptest! {
    /// Whatever comes from wherever: never more bytes or messages out than in, and only to addresses that sent a handshake of the
    /// pair or data of its sessions.
    #[test]
    fn nothing_is_amplified(
        steps in prop::collection::vec((0..6_u8, 0..4_u8, 0..4_u32, 0..4_u32, 1..4_u8), 0..200),
    ) {
        let mut now = Instant::now();
        let mut pair = Pair::new([member(A), member(B)], 1 << 30, now);
        let (mut messages, mut bytes) = (0_i64, 0_i64);
        let mut spoke = std::collections::BTreeSet::new();
        for (kind, from, sender, receiver, to) in steps {
            now += Duration::from_millis(200);
            let message = match kind {
                0 | 1 => initiation(to, sender),
                2 => response(to, sender, receiver),
                3 | 4 => data(receiver),
                _ => vec![4; 7],
            };
            messages += 1;
            bytes += message.len() as i64;
            let step = pair.handle(at(from), &message, now);
            if !matches!(step, Step::Drop(_)) {
                spoke.insert(at(from));
            }
            let (sent, held) = match step {
                Step::Forward { to, held } => {
                    prop_assert!(spoke.contains(&to));
                    (Some(message.len()), held)
                }
                Step::Hold { held } => (None, held),
                Step::Drop(_) => (None, None),
            };
            for length in sent.into_iter().chain(held.map(|held| held.len())) {
                messages -= 1;
                bytes -= length as i64;
            }
            prop_assert!(messages >= 0 && bytes >= 0);
        }
    }
}
