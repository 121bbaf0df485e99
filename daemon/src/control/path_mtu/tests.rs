use std::cell::Cell;

use proptest::prelude::*;

use super::*;

const PATIENCE: Duration = Duration::from_millis(200);
const RTT: Duration = Duration::from_millis(10);
const SMALL: u32 = 92;

/// A path that carries packets up to a size, in virtual time.
struct Path {
    search: Search,
    now: Instant,
    sent: u32,
    /// When the limit changed last.
    changed: Instant,
}

impl Path {
    fn new(ceiling: u32, (overhead, align): (u32, u32)) -> Self {
        let now = Instant::now();
        Self { search: Search::new(ceiling, (overhead, align), None, now), now, sent: 0, changed: now }
    }

    /// Runs until nothing is due for `quiet`; `passes` says which sizes arrive.
    fn settle(&mut self, quiet: Duration, passes: impl Fn(u32) -> bool) {
        let mut answers: Vec<(Instant, u32)> = Vec::new();
        for _ in 0..1000 {
            let before = self.search.limit();
            if let Some(ask) = self.search.poll(PATIENCE, self.now) {
                self.sent += ask.sizes.iter().sum::<u32>() + if ask.small { SMALL } else { 0 };
                let sizes = ask.sizes.into_iter().chain(ask.small.then_some(SMALL));
                answers.extend(sizes.filter(|size| passes(*size)).map(|size| (self.now + RTT, size)));
            }
            if self.search.limit() != before {
                self.changed = self.now;
            }
            let wake = self.search.wake().filter(|wake| *wake <= self.now + quiet);
            match answers.iter().map(|(at, _)| *at).min() {
                Some(at) if wake.is_none_or(|wake| at <= wake) => {
                    self.now = self.now.max(at);
                    let due: Vec<_> = answers.extract_if(.., |(due, _)| *due <= self.now).collect();
                    due.iter().for_each(|(_, size)| self.search.handle_answer(*size, self.now));
                }
                _ => match wake {
                    Some(wake) => self.now = self.now.max(wake),
                    None => return,
                },
            }
        }
        panic!("the search does not come to rest: {:?}", self.search);
    }
}

#[test]
fn a_path_that_carries_everything_is_asked_once_and_gets_no_limit() {
    let mut path = Path::new(1450, (50, 1));
    path.settle(Duration::from_secs(3600), |_| true);
    assert_eq!((path.search.limit(), path.search.measured()), (None, Some(1450)));
    assert_eq!(path.sent, 1450 + SMALL);
    assert_eq!(path.search.wake(), None, "and never again");
}

#[test]
fn floors_of_clouds_are_found_to_the_byte_within_a_second() {
    for (floor, vxlan, wireguard) in [(1280, 1230, 1216), (1296, 1246, 1232), (1368, 1318, 1296)] {
        let mut path = Path::new(1450, (50, 1));
        let began = path.now;
        path.settle(Duration::from_secs(1), |size| size + 50 <= floor);
        assert_eq!(path.search.limit(), Some(vxlan));
        assert!(path.changed - began < Duration::from_secs(3), "{:?}", path.changed - began);
        // WireGuard pads to 16 bytes, and not past the device's own MTU.
        let mut path = Path::new(1440, (60, 16));
        path.settle(Duration::from_secs(1), |size| size.next_multiple_of(16).min(1440) + 60 <= floor);
        assert_eq!(path.search.limit(), Some(wireguard));
    }
}

#[test]
fn a_peer_that_answers_nothing_teaches_nothing_and_costs_little() {
    let mut path = Path::new(1450, (50, 1));
    let mut pauses = Vec::new();
    for _ in 0..9 {
        path.settle(SILENT.0 / 2, |_| false);
        assert_eq!((path.search.limit(), path.search.is_closed()), (None, false));
        pauses.push((path.search.wake().expect("it is asked again") - path.now).as_secs());
        path.now = path.search.wake().expect("it is asked again");
    }
    assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
}

#[test]
fn a_remembered_limit_stays_until_the_path_proves_wider() {
    let now = Instant::now();
    let search = Search::new(1450, (50, 1), Some(1230), now);
    assert_eq!(search.limit(), Some(1230));
    let mut path = Path { search, now, sent: 0, changed: now };
    path.settle(Duration::from_secs(1), |size| size < 1300);
    assert_eq!(path.search.limit(), Some(1298));
    path.settle(Duration::from_secs(3600), |_| true);
    assert_eq!(path.search.limit(), None);
}

#[test]
fn a_floor_that_falls_is_a_black_hole_and_heals_within_a_second() {
    let mut path = Path::new(1450, (50, 1));
    path.settle(Duration::from_secs(1), |_| true);
    let began = path.now;
    path.search.doubt(path.now);
    path.settle(Duration::from_secs(1), |size| size + 50 <= 1296);
    assert_eq!(path.search.limit(), Some(1246));
    assert!(path.changed - began < Duration::from_secs(1), "{:?}", path.changed - began);
}

#[test]
fn one_lost_probe_and_a_peer_that_went_away_narrow_nothing() {
    let mut path = Path::new(1450, (50, 1));
    path.settle(Duration::from_secs(1), |_| true);
    path.search.doubt(path.now);
    path.settle(Duration::from_secs(1), |_| true);
    assert_eq!(path.search.limit(), None);
    path.search.doubt(path.now);
    path.settle(Duration::from_secs(1), |_| false);
    assert_eq!(path.search.limit(), None);
}

#[test]
fn a_path_that_stays_narrow_is_asked_ever_less_often_and_at_least_every_ten_minutes() {
    let mut path = Path::new(1450, (50, 1));
    let passes = |size: u32| size + 50 <= 1280;
    path.settle(Duration::from_secs(1), passes);
    let mut last = Duration::ZERO;
    for _ in 0..12 {
        let pause = path.search.wake().expect("a narrow path is asked again") - path.now;
        assert!(pause >= last && pause <= RAISE.1, "{pause:?} after {last:?}");
        last = pause;
        path.now += pause;
        path.settle(Duration::from_secs(1), passes);
        assert_eq!(path.search.limit(), Some(1230));
    }
    assert_eq!(last, RAISE.1);
    path.now += last;
    path.settle(Duration::from_secs(1), |_| true);
    assert_eq!(path.search.limit(), None, "a floor that rose is found");
}

#[test]
fn a_large_packet_from_the_peer_brings_the_next_question_forward_and_a_flood_of_them_no_further() {
    let mut path = Path::new(1450, (50, 1));
    path.settle(Duration::from_secs(1), |size| size + 50 <= 1280);
    for _ in 0..10 {
        path.now = path.search.wake().expect("a narrow path is asked again");
        path.settle(Duration::from_secs(1), |size| size + 50 <= 1280);
    }
    let now = path.now;
    path.search.hint(1230, now);
    assert_eq!(path.search.wake(), Some(now + RAISE.1), "it carries no more than is known");
    for second in 0..10 {
        path.search.hint(1450, now + Duration::from_secs(second));
        assert_eq!(path.search.wake(), Some(now + RAISE.1 / HINT));
    }
}

#[test]
fn a_path_that_carries_only_small_packets_is_told_as_closed() {
    let mut path = Path::new(1450, (50, 1));
    path.settle(Duration::from_secs(1), |size| size < 300);
    assert!(path.search.is_closed());
    assert_eq!(path.search.limit(), None);
}

proptest! {
    #[test]
    fn the_search_ends_close_below_any_floor(
        ceiling in 600u32..9000, floor in 600u32..9200, lossy in proptest::collection::vec(any::<bool>(), 40),
        wireguard in any::<bool>(),
    ) {
        let shape = if wireguard { (60, 16) } else { (50, 1) };
        let mut path = Path::new(ceiling, shape);
        let passes = |size: u32| {
            let padded = size.next_multiple_of(shape.1).min(ceiling.max(size));
            padded + shape.0 <= floor
        };
        // Every third packet of the first ones may be lost; each size gets three tries.
        let count = Cell::new(0);
        let lost = |_| { count.set(count.get() + 1); count.get() % 3 == 1 && lossy.get(count.get()) == Some(&true) };
        path.settle(Duration::from_secs(1), |size| passes(size) && (size == SMALL || !lost(size)));
        for _ in 0..3 {
            path.now = path.search.wake().unwrap_or(path.now);
            path.settle(Duration::from_secs(1), |size| passes(size) || size == SMALL);
        }
        let limit = path.search.limit().unwrap_or(ceiling);
        if path.search.measured().is_some() {
            prop_assert!(passes(limit), "{limit} over {floor}");
            prop_assert!(passes(ceiling) == (limit == ceiling));
            if limit < ceiling {
                prop_assert!(!passes(limit + 2 * CLOSE + 1), "{limit} is far below {floor}");
            }
        }
    }
}
