//! What a peer does with an implementation of sessions, whichever it is.

use std::collections::VecDeque;

use super::*;
use crate::tunnel::Batch;

/// Sessions without cryptography: data is 4 and the packet, a request is 1, an answer 2, a cookie 3; 9 is a forged one.
#[derive(Default)]
struct Plain {
    session: bool,
    kept: VecDeque<Vec<u8>>,
    expired: bool,
}

fn data(packet: &[u8], room: &mut [u8]) -> Sealed {
    room[0] = DATA;
    room[1..=packet.len()].copy_from_slice(packet);
    Sealed::Data(1 + packet.len())
}

impl Noise for Plain {
    fn new(_: &TunnelSecret, _: TunnelKey, _: Option<&PresharedKey>, _: u32) -> Self {
        Self::default()
    }

    fn seal(&mut self, packet: &[u8], room: &mut [u8]) -> Sealed {
        if self.session {
            return data(packet, room);
        }
        self.kept.push_back(packet.to_vec());
        room[0] = 1;
        Sealed::Kept(usize::from(self.kept.len() == 1))
    }

    fn seal_kept(&mut self, room: &mut [u8]) -> Option<Sealed> {
        self.kept.pop_front().map(|packet| data(&packet, room))
    }

    fn open(
        &mut self,
        from: IpAddr,
        datagram: &[u8],
        room: &mut [u8],
    ) -> Result<Option<(usize, IpAddr)>, Reason> {
        if datagram.get(1) == Some(&9) {
            return Err(Reason::Forged);
        }
        self.session = true;
        let packet = &datagram[1..];
        room[..packet.len()].copy_from_slice(packet);
        Ok((!packet.is_empty()).then_some((packet.len(), from)))
    }

    fn shake(&mut self, _: IpAddr, datagram: &[u8], room: &mut [u8]) -> Result<Shaken, Reason> {
        match datagram[0] {
            1 => {
                room[0] = 2;
                Ok(Shaken::Answered(1))
            }
            2 => {
                self.session = true;
                room[0] = DATA;
                Ok(Shaken::Confirmed(1))
            }
            3 => Ok(Shaken::Cookie),
            _ => Err(Reason::Forged),
        }
    }

    fn initiate(&mut self, room: &mut [u8]) -> usize {
        room[0] = 1;
        1
    }

    fn tick(&mut self, _: &mut [u8]) -> Due {
        if self.expired { Due::Expired } else { Due::Send(0) }
    }

    fn age(&self) -> Option<Duration> {
        self.session.then_some(Duration::ZERO)
    }
}

fn address(number: u8) -> SocketAddr {
    ([192, 0, 2, number], 51820).into()
}

fn session() -> Session<Plain> {
    let wanted = TunnelPeer {
        node: "n2".parse().expect("a name"),
        key: TunnelSecret::from_bytes([2; 32]).public(),
        endpoint: address(2),
        prefixes: Vec::new(),
        preshared: None,
    };
    Session::new(&wanted, 7, TunnelSecret::from_bytes([1; 32]))
}

/// Opens a datagram; returns what it gave and what is answered.
fn open(session: &mut Session<Plain>, from: u8, datagram: &[u8]) -> (Opened, Vec<u8>) {
    let mut answers = Batch::default();
    let opened = session.open(address(from), datagram, &mut [0; 256], &mut answers);
    (opened, answers.bytes)
}

#[test]
fn so_many_packets_wait_and_go_in_order_once_there_is_a_session() {
    let (mut session, counters, mut batch) = (session(), Counters::default(), Batch::default());
    for number in 0..100 {
        session.seal(&[number; PADDING], 1400, &mut batch, &counters);
    }
    assert_eq!(batch.bytes, [1], "one request");
    assert_eq!((session.waiting(), session.ready()), (WAITING, false));
    assert!(counters.drops().contains(&(Reason::NoSession, 100 - WAITING as u64)), "{:?}", counters.drops());
    let (_, answers) = open(&mut session, 2, &[2]);
    let (confirmation, released) = answers.split_first().expect("an answer");
    assert_eq!((*confirmation, session.ready(), session.waiting()), (DATA, true, 0));
    let first: Vec<u8> = released.chunks(1 + PADDING).map(|datagram| datagram[1]).collect();
    assert_eq!(first, (0..WAITING as u8).collect::<Vec<_>>());
}

#[test]
fn a_packet_asks_again_once_the_last_request_had_its_time() {
    let (mut session, counters, mut batch) = (session(), Counters::default(), Batch::default());
    session.initiate(&mut batch);
    session.seal(&[0; PADDING], 1400, &mut batch, &counters);
    assert_eq!(batch.bytes, [1], "the answer may be on the way");
    session.asked = Instant::now().checked_sub(Duration::from_secs(5)).map(|at| (at, 0));
    session.seal(&[1; PADDING], 1400, &mut batch, &counters);
    assert_eq!((batch.bytes, session.waiting()), (vec![1, 1], 2));
}

#[test]
fn what_waits_goes_after_what_came_when_the_session_had_just_ended() {
    let (mut session, counters, mut batch) = (session(), Counters::default(), Batch::default());
    open(&mut session, 2, &[2]);
    session.noise().session = false;
    for number in 0..3 {
        session.seal(&[number; PADDING], 1400, &mut batch, &counters);
    }
    assert_eq!((batch.bytes, session.waiting(), session.ready()), (vec![1], 2, false));
    let (_, answers) = open(&mut session, 2, &[2]);
    let order: Vec<u8> = answers[1..].chunks(1 + PADDING).map(|datagram| datagram[1]).collect();
    assert_eq!((order, session.ready()), (vec![0, 1, 2], true));
}

#[test]
fn a_session_that_the_peer_asked_for_is_used_once_it_was_heard_under_it() {
    let mut session = session();
    let (_, answers) = open(&mut session, 2, &[1]);
    assert_eq!((answers, session.ready()), (vec![2], false), "answered, and nothing to seal with yet");
    let (opened, _) = open(&mut session, 2, &[DATA, 0x45]);
    assert!(matches!(opened, Opened::Packet(1, _)), "{opened:?}");
    assert!(session.ready());
}

#[test]
fn a_peer_is_where_its_last_genuine_message_came_from() {
    let mut session = session();
    for (from, datagram, expected) in [
        (3, &[9][..], 2),
        (4, &[3], 2),
        (5, &[DATA, 9], 2),
        (6, &[1], 6),
        (7, &[DATA, 0x45], 7),
        (8, &[DATA], 8),
    ] {
        open(&mut session, from, datagram);
        assert_eq!(session.endpoint(), address(expected), "{datagram:?} from {from}");
    }
    session.follow(address(2));
    assert_eq!(session.endpoint(), address(8), "an announcement that says nothing new changes nothing");
    session.follow(address(9));
    assert_eq!(session.endpoint(), address(9));
}

#[test]
fn sessions_that_are_too_old_are_forgotten() {
    let mut session = session();
    open(&mut session, 2, &[2]);
    session.noise().expired = true;
    session.tick(&mut Batch::default());
    assert!(!session.ready() && session.noise.is_none() && !session.is_asked());
}
