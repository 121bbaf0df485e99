//! Anti-entropy: two members find what one of them lacks, at a cost that follows the difference.
//!
//! Every member is an item at its name hash, and the items are summed up (xor) in a tree of 16 x 16 buckets.
//! One side sends its root; who differs answers with its next level, and at the leaves with items. No side
//! keeps state about an exchange. Invariant: a datagram is answered with a bounded number of datagrams.

use std::ops::RangeInclusive;

use super::api::MeshEvent;
use super::gossip::{forgotten, stated};
use super::membership::{Id, below};
use super::proto::{self, Body, Liveness};
use super::timer::Timer;
use super::{Mesh, Output, Rejected};

/// So few items are sent as they are, without another level.
const FEW_ITEMS: u32 = 24;
/// The most items of one datagram: 40 bytes each at most.
const PAGE: usize = 24;
/// What is sent through a keeper has less room: so many bytes of updates, and so many items.
const FORWARDED: (usize, usize) = (super::ROOM - 160, 18);
/// Into how many differing buckets an answer descends.
const DESCEND: usize = 6;
/// The most datagrams of records that answer one datagram.
const BURST: usize = 8;
/// Records fit a datagram at least one at a time; three or four of the usual size do.
const MOST_RECORDS: usize = BURST * 4;
/// Forgotten members that one answer tells of: each takes at most 90 bytes.
const MOST_BURIED: usize = 8;

/// What anti-entropy compares of a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Item {
    pub(super) hash: u64,
    pub(super) version: u64,
    pub(super) tag: u32,
    pub(super) incarnation: u64,
    pub(super) dead: bool,
}

impl Item {
    fn digest(&self) -> u64 {
        let liveness = self.incarnation << 1 | u64::from(self.dead);
        let parts = [self.version, u64::from(self.tag), liveness];
        parts.into_iter().fold(mix(self.hash), |digest, part| mix(digest ^ part))
    }
}

/// The finalizer of SplitMix64: spreads every input bit over the output.
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Sum {
    hash: u64,
    count: u32,
}

/// The sums of the buckets: level 0 has 16, level 1 has 256.
#[derive(Debug)]
pub(super) struct Sums {
    root: Sum,
    levels: [Box<[Sum]>; 2],
}

impl Default for Sums {
    fn default() -> Self {
        let level = |size| vec![Sum::default(); size].into_boxed_slice();
        Self { root: Sum::default(), levels: [level(16), level(256)] }
    }
}

impl Sums {
    /// Adds an item or takes it out.
    pub(super) fn toggle(&mut self, item: &Item, add: bool) {
        let digest = item.digest();
        let [coarse, fine] = &mut self.levels;
        let sums =
            [&mut self.root, &mut coarse[(item.hash >> 60) as usize], &mut fine[(item.hash >> 56) as usize]];
        for sum in sums {
            sum.hash ^= digest;
            sum.count = if add { sum.count + 1 } else { sum.count - 1 };
        }
    }

    /// The sums of the 16 children of the root (depth 0) or of bucket `prefix` (depth 1).
    fn children(&self, depth: u32, prefix: u32) -> Option<&[Sum]> {
        match (depth, prefix) {
            (0, 0) => Some(&self.levels[0]),
            (1, 0..16) => Some(&self.levels[1][prefix as usize * 16..][..16]),
            _ => None,
        }
    }
}

/// The name hashes of a bucket.
fn range_of(depth: u32, bucket: u32) -> RangeInclusive<u64> {
    let bits = 60 - 4 * depth;
    let first = u64::from(bucket) << bits;
    first..=first | ((1 << bits) - 1)
}

impl Mesh {
    pub(super) fn on_sync_timer(&mut self) {
        let interval = self.sync_pause;
        self.sync_pause = (interval * 2).min(self.config.timing.sync_interval);
        // Spread over time, so that a cluster that started at once does not compare at once.
        let jitter = interval.mul_f64(below(&mut self.rng, 256) as f64 / 1024.0);
        self.arm_sync(self.now + interval - interval / 8 + jitter);
        if let Some(id) = self.table.sample(&mut self.rng, 1).pop() {
            self.sync_with(id);
        }
    }

    fn arm_sync(&mut self, at: std::time::Instant) {
        self.sync_at = at;
        self.timers.set(at, Timer::Sync);
    }

    /// Compares again soon, and some times more: who learns something may lack more, and one partner may lack the same.
    pub(super) fn sync_soon(&mut self) {
        let fast = self.config.timing.sync_fast;
        self.sync_pause = fast * 2;
        let at = self.now + fast;
        if at < self.sync_at {
            self.arm_sync(at);
        }
    }

    pub(super) fn sync_with(&mut self, id: Id) {
        self.counters.syncs += 1;
        let root = self.root(false);
        self.send_to_member(id, Body::SyncRoot(root), Vec::new());
    }

    fn root(&self, answers: bool) -> proto::SyncRoot {
        let Sum { hash, count } = self.table.sums.root;
        proto::SyncRoot { hash, count, statements: self.sites.sum(), answers }
    }

    pub(super) fn on_sync_root(&mut self, reply: &super::ReplyTo, root: &proto::SyncRoot) {
        if root.statements != 0 && self.sites.judges() && root.statements != self.sites.sum() {
            self.push_statements(reply);
            if !root.answers {
                // Which side lacks something no sum tells.
                let root = self.root(true);
                self.reply(reply, Body::SyncRoot(root), Vec::new());
            }
        }
        if root.answers {
            return;
        }
        let sum = self.table.sums.root;
        if (sum.hash, sum.count) == (root.hash, root.count) {
            return;
        }
        if sum.count.max(root.count) <= FEW_ITEMS {
            self.send_items(reply, 0..=u64::MAX);
        } else {
            self.send_buckets(reply, 0, 0);
        }
    }

    fn send_buckets(&mut self, reply: &super::ReplyTo, depth: u32, prefix: u32) {
        let Some(sums) = self.table.sums.children(depth, prefix) else { return };
        let hashes = sums.iter().map(|sum| sum.hash).collect();
        let counts = sums.iter().map(|sum| sum.count).collect();
        self.reply(
            reply,
            Body::SyncBuckets(proto::SyncBuckets { depth, prefix, hashes, counts }),
            Vec::new(),
        );
    }

    pub(super) fn check_buckets(&self, buckets: &proto::SyncBuckets) -> Result<(), Rejected> {
        let known = self.table.sums.children(buckets.depth, buckets.prefix).is_some();
        let complete = buckets.hashes.len() == 16 && buckets.counts.len() == 16;
        if known && complete { Ok(()) } else { Err(Rejected::Malformed) }
    }

    pub(super) fn on_sync_buckets(&mut self, reply: &super::ReplyTo, theirs: &proto::SyncBuckets) {
        let Some(ours) = self.table.sums.children(theirs.depth, theirs.prefix) else { return };
        let start = below(&mut self.rng, 16);
        let differing: Vec<(u32, u32)> = (0..16)
            .map(|place| (start + place) % 16)
            .filter(|place| {
                (ours[*place].hash, ours[*place].count) != (theirs.hashes[*place], theirs.counts[*place])
            })
            .map(|place| (theirs.prefix * 16 + place as u32, ours[place].count.max(theirs.counts[place])))
            .take(DESCEND)
            .collect();
        for (bucket, count) in differing {
            if theirs.depth == 1 || count <= FEW_ITEMS {
                self.send_items(reply, range_of(theirs.depth, bucket));
            } else {
                self.send_buckets(reply, theirs.depth + 1, bucket);
            }
        }
    }

    /// Sends the items of a range, in pages that together cover it.
    fn send_items(&mut self, reply: &super::ReplyTo, range: RangeInclusive<u64>) {
        let page = if reply.forwarded { FORWARDED.1 } else { PAGE };
        let items: Vec<proto::SyncItem> = self
            .table
            .range(range.clone())
            .take(page * BURST)
            .map(|(_, member)| {
                let Item { hash, version, tag, incarnation, dead } = member.item();
                proto::SyncItem { name_hash: hash, version, tag, incarnation, dead }
            })
            .collect();
        let all = items.len() < page * BURST;
        let mut first = *range.start();
        let mut pages = items.chunks(page).peekable();
        if pages.peek().is_none() {
            let empty = proto::SyncItems { first, last: *range.end(), items: Vec::new() };
            self.reply(reply, Body::SyncItems(empty), Vec::new());
        }
        while let Some(page) = pages.next() {
            let end = page.last().map_or(first, |item| item.name_hash);
            let last = if pages.peek().is_none() && all { *range.end() } else { end };
            let body = Body::SyncItems(proto::SyncItems { first, last, items: page.to_vec() });
            self.reply(reply, body, Vec::new());
            first = last.saturating_add(1);
        }
    }

    pub(super) fn check_items(page: &proto::SyncItems) -> Result<(), Rejected> {
        let rising = page.items.windows(2).all(|pair| pair[0].name_hash < pair[1].name_hash);
        let inside = page.items.iter().all(|item| (page.first..=page.last).contains(&item.name_hash));
        let sane = page.items.iter().all(|item| item.incarnation < super::MOST && item.version < super::MOST);
        if rising && inside && sane && page.first <= page.last { Ok(()) } else { Err(Rejected::Malformed) }
    }

    pub(super) fn on_sync_items(&mut self, reply: &super::ReplyTo, page: &proto::SyncItems) {
        let (mut push, mut want, mut lives) = (Vec::new(), Vec::new(), Vec::new());
        let mut buried = Vec::new();
        let mut ours = self.table.range(page.first..=page.last).peekable();
        for theirs in &page.items {
            while let Some((id, _)) = ours.next_if(|(_, member)| member.hash < theirs.name_hash) {
                push.push(id);
            }
            match ours.next_if(|(_, member)| member.hash == theirs.name_hash) {
                None => {
                    let stone = self.table.tombstones.get(&theirs.name_hash).filter(|stone| {
                        theirs.version <= stone.version && theirs.incarnation <= stone.incarnation
                    });
                    match stone {
                        None => want.push(theirs.name_hash),
                        // The rumour passed them by.
                        Some(stone) if theirs.dead => buried.push(forgotten(stone)),
                        Some(_) => {}
                    }
                }
                Some((id, member)) => {
                    let item = member.item();
                    let (a, b) = ((item.version, item.tag), (theirs.version, theirs.tag));
                    let liveness = ((item.incarnation, item.dead), (theirs.incarnation, theirs.dead));
                    if a < b {
                        want.push(theirs.name_hash);
                    } else if a > b || liveness.0 > liveness.1 {
                        push.push(id);
                    }
                    if liveness.0 < liveness.1 {
                        let state = if theirs.dead { Liveness::Dead } else { Liveness::Alive };
                        lives.push((id, theirs.incarnation, state));
                    }
                }
            }
        }
        push.extend(ours.map(|(id, _)| id));
        for (id, incarnation, state) in lives {
            if self.merge_liveness(id, incarnation, state, &[]) {
                self.sync_soon();
            }
        }
        buried.truncate(MOST_BURIED);
        if !buried.is_empty() {
            self.reply(reply, Body::Push(proto::Push { sync: true }), buried);
        }
        self.push_records(reply, push);
        want.truncate(MOST_RECORDS);
        if !want.is_empty() {
            self.counters.sync_differences += want.len() as u64;
            self.reply(reply, Body::SyncWant(proto::SyncWant { name_hashes: want }), Vec::new());
        }
    }

    pub(super) fn on_sync_want(&mut self, reply: &super::ReplyTo, want: &proto::SyncWant) {
        let ids = want.name_hashes.iter().take(MOST_RECORDS).filter_map(|hash| self.table.find(*hash));
        let ids = ids.collect();
        self.push_records(reply, ids);
    }

    /// Sends what sites say: all of it, or as much as an answer holds, beginning anywhere.
    fn push_statements(&mut self, reply: &super::ReplyTo) {
        let mut updates: Vec<_> = self.sites.all().map(|signed| stated(signed)).collect();
        if !updates.is_empty() {
            let start = below(&mut self.rng, updates.len());
            updates.rotate_left(start);
        }
        self.push_updates(reply, updates);
    }

    fn push_records(&mut self, reply: &super::ReplyTo, mut ids: Vec<Id>) {
        ids.truncate(MOST_RECORDS);
        self.counters.sync_differences += ids.len() as u64;
        let updates: Vec<_> = ids.into_iter().map(|id| self.full_update(id)).collect();
        self.push_updates(reply, updates);
    }

    /// Sends updates, several in a datagram, in a bounded number of datagrams.
    fn push_updates(&mut self, reply: &super::ReplyTo, updates: Vec<proto::Update>) {
        let room = if reply.forwarded { FORWARDED.0 } else { super::ROOM };
        let (mut batch, mut used, mut sent) = (Vec::new(), 0, 0);
        for update in updates {
            let length = super::gossip::framed_len(&update);
            if used + length > room && !batch.is_empty() {
                self.reply(reply, Body::Push(proto::Push { sync: true }), std::mem::take(&mut batch));
                used = 0;
                sent += 1;
                if sent == BURST {
                    return;
                }
            }
            used += length;
            batch.push(update);
        }
        if !batch.is_empty() {
            self.reply(reply, Body::Push(proto::Push { sync: true }), batch);
        }
    }

    pub(super) fn on_member_changed(&mut self, id: Id) {
        let member = self.table.at(id);
        let event = MeshEvent::MemberChanged { node: member.name().clone(), state: member.state() };
        self.outputs.push_back(Output::Event(event));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_a_level_cover_every_hash_once() {
        for depth in 0..2 {
            let mut next = 0u64;
            for bucket in 0..16u32.pow(depth + 1) {
                let range = range_of(depth, bucket);
                assert_eq!(*range.start(), next);
                next = range.end().wrapping_add(1);
            }
            assert_eq!(next, 0, "the last range ends at the last hash");
        }
    }

    #[test]
    fn sums_do_not_depend_on_the_order_and_forget_what_is_taken_out() {
        let item =
            |hash| Item { hash, version: hash ^ 5, tag: 7, incarnation: 9, dead: hash.is_multiple_of(2) };
        let (mut a, mut b) = (Sums::default(), Sums::default());
        let hashes: Vec<u64> = (0..100).map(|n: u64| mix(n)).collect();
        hashes.iter().for_each(|hash| a.toggle(&item(*hash), true));
        hashes.iter().rev().for_each(|hash| b.toggle(&item(*hash), true));
        assert_eq!((a.root, &a.levels), (b.root, &b.levels));
        hashes.iter().for_each(|hash| a.toggle(&item(*hash), false));
        assert_eq!(a.root, Sum::default());
    }
}
