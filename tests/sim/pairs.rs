//! The secrets that two sites share: each pair has one that no third site gets, and it changes without a pair of nodes in between that
//! has none.
#![allow(clippy::unwrap_used)]

mod meetings;

use std::collections::BTreeSet;
use std::time::Duration;

use meetings::*;
use weft_tests::sim::meshes::*;
use weft_wire::pair::{self, PairSecret};
use weft_wire::seal::{KeyId, KeyRing};
use weft_wire::site::SignedStatement;
use weft_wire::types::PublicKey;

/// So long a secret that was replaced is kept, with a little more.
const OVERLAP: Duration = Duration::from_secs(605);

/// What a node that ends has on its disk.
struct Disk {
    ring: KeyRing,
    statements: Vec<SignedStatement>,
    secrets: Vec<(PublicKey, Vec<PairSecret>)>,
}

fn disk(sites: &Sites, node: usize) -> Disk {
    let mesh = sites.net.mesh(node);
    let secrets = mesh.pair_secrets().map(|(other, secrets)| (other, secrets.to_vec())).collect();
    Disk { ring: mesh.ring().clone(), statements: mesh.statements().cloned().collect(), secrets }
}

/// Starts a node from its disk; a speaker speaks again.
fn boot(sites: &mut Sites, node: usize, starts: u64, disk: Disk) {
    let signer = node.is_multiple_of(SIZE).then(|| site_key(node / SIZE));
    sites.start_again(node, starts, disk.ring, disk.statements, signer);
    sites.net.with(node, |mesh, now| mesh.set_pair_secrets(disk.secrets, now));
}

/// The secret that a node uses with a node of another site, as the daemon chooses it.
fn used(sites: &Sites, node: usize, other: usize) -> Option<KeyId> {
    let mesh = sites.net.mesh(node);
    let announced = &mesh.record()?.facts.tunnel.as_ref()?.pairs;
    let own = mesh.pair_secrets_with(&site(other / SIZE)).iter();
    let own: Vec<PairSecret> = own.filter(|secret| announced.contains(&secret.id())).cloned().collect();
    let theirs = mesh.member(&name(other))?.record.facts.tunnel.clone()?.pairs;
    pair::common(&own, &theirs).map(PairSecret::id)
}

/// The pairs of running nodes of different sites among these.
fn pairs(sites: &Sites, of: &[usize]) -> Vec<(usize, usize)> {
    let running = || of.iter().flat_map(|site| nodes(*site)).filter(|node| sites.net.runs(*node));
    let all = running().flat_map(|node| running().map(move |other| (node, other)));
    all.filter(|(node, other)| node / SIZE != other / SIZE).collect()
}

/// Whether the nodes of each pair use the same secret, and all nodes of two sites the same.
fn paired(sites: &Sites, of: &[usize]) -> bool {
    pairs(sites, of).into_iter().all(|(node, other)| {
        let used_here = used(sites, node, other);
        let of_speakers = latest(sites, node / SIZE, other / SIZE);
        used_here.is_some() && used_here == used(sites, other, node) && used_here == of_speakers
    })
}

/// The latest secret of two sites, as the first of its running nodes knows it.
fn latest(sites: &Sites, one: usize, other: usize) -> Option<KeyId> {
    let node = nodes(one).find(|node| sites.net.runs(*node))?;
    sites.net.mesh(node).pair_secrets_with(&site(other)).first().map(PairSecret::id)
}

/// Every secret that the nodes of a site have, of whichever pair.
fn held(sites: &Sites, of: usize) -> BTreeSet<KeyId> {
    let running = nodes(of).filter(|node| sites.net.runs(*node));
    let of_node = |node| sites.net.mesh(node).pair_secrets().flat_map(|(_, secrets)| secrets);
    running.flat_map(of_node).map(PairSecret::id).collect()
}

fn of_both(sites: &Sites, one: usize, other: usize) -> BTreeSet<KeyId> {
    held(sites, one).into_iter().chain(held(sites, other)).collect()
}

/// Three sites of which the first let the others in, and each pair of nodes has a secret.
fn three(test: &str) -> Sites {
    let mut sites = Sites::joined(test, 3).with_tunnels();
    sites.run_until("secrets", seconds(60), |sites| paired(sites, &[0, 1, 2]));
    sites
}

/// The site of two whose nodes that speak for it make the secret.
fn maker(one: usize, other: usize) -> usize {
    if pair::makes(&site_key(one).public(), &site_key(other).public()) { one } else { other }
}

#[test]
fn each_pair_of_sites_has_a_secret_and_the_third_site_has_none_of_it() {
    let sites = three("each_pair_of_sites_has_a_secret");
    let all: BTreeSet<_> = [(0, 1), (0, 2), (1, 2)].map(|(one, other)| latest(&sites, one, other)).into();
    assert_eq!(all.len(), 3, "each pair has one of its own");
    for (one, other, third) in [(0, 1, 2), (0, 2, 1), (1, 2, 0)] {
        assert!(!held(&sites, third).contains(&latest(&sites, one, other).unwrap()));
    }
}

#[test]
fn a_site_that_comes_in_has_a_secret_with_each_other_within_seconds_of_its_certificates() {
    let mut sites = Sites::up("a_site_that_comes_in_has_a_secret", 2).with_tunnels();
    let token = sites.invite(0, hour());
    assert_eq!(sites.join(1, token), Ok(site(0)));
    sites.run_until("one mesh", seconds(120), |sites| sites.all_route(&[0, 1]));
    let took = sites.run_until("secrets", seconds(60), |sites| paired(sites, &[0, 1]));
    println!("after {took:?}");
}

#[test]
fn a_change_of_the_cluster_key_changes_every_secret_and_no_pair_of_nodes_is_without_one() {
    let mut sites = three("a_change_of_the_cluster_key");
    let before: BTreeSet<KeyId> = (0..3).flat_map(|site| held(&sites, site)).collect();
    sites.renew(1);
    let mut without = Vec::new();
    let gaps = |sites: &Sites, without: &mut Vec<(usize, usize)>| {
        without.extend(
            pairs(sites, &[0, 1, 2]).into_iter().filter(|(node, other)| used(sites, *node, *other).is_none()),
        );
    };
    sites.run_until("other secrets", seconds(120), |sites| {
        gaps(sites, &mut without);
        let fresh = |(one, other)| latest(sites, one, other).is_some_and(|id| !before.contains(&id));
        paired(sites, &[0, 1, 2]) && [(0, 1), (0, 2), (1, 2)].into_iter().all(fresh)
    });
    assert_eq!(without, [], "pairs of nodes without a secret; WEFT_SEED={}", sites.net.seed);
    // What was replaced is forgotten everywhere.
    sites.run(OVERLAP);
    let now: BTreeSet<KeyId> = (0..3).flat_map(|site| held(&sites, site)).collect();
    assert!(now.is_disjoint(&before) && now.len() == 3, "{now:?} after {before:?}");
    assert!(paired(&sites, &[0, 1, 2]));
}

#[test]
fn secrets_change_on_schedule() {
    let mut sites = three("secrets_change_on_schedule");
    for site in 0..3 {
        sites.with_speaker(site, |mesh, _| mesh.rotate_pair_secrets_after(seconds(60)));
    }
    // The schedule counts from the next secret on.
    sites.renew(0);
    sites.run(seconds(40));
    let before: BTreeSet<KeyId> = (0..3).flat_map(|site| held(&sites, site)).collect();
    let took = sites.run_until("the next secrets", seconds(120), |sites| {
        let fresh = |(one, other)| latest(sites, one, other).is_some_and(|id| !before.contains(&id));
        [(0, 1), (0, 2), (1, 2)].into_iter().all(fresh)
    });
    assert!(took < seconds(60), "{took:?}");
}

#[test]
fn while_who_makes_the_secrets_is_away_they_stay_and_who_forgot_one_does_without_until_it_is_back() {
    let mut sites = three("who_makes_the_secrets_is_away");
    let (maker, other) = (maker(0, 1), 1 - maker(0, 1));
    let (speaker, late) = (speaker(maker), nodes(other).last().unwrap());
    let (left, forgetful) = (disk(&sites, speaker), disk(&sites, late));
    sites.stop(speaker);
    sites.run(seconds(30));
    let secret = latest(&sites, maker, other);
    assert!(paired(&sites, &[0, 1]), "WEFT_SEED={}", sites.net.seed);
    // A node that lost its memory: its peers and it agree that there is none, and fall back together.
    sites.stop(late);
    boot(&mut sites, late, 2, Disk { secrets: Vec::new(), ..forgetful });
    sites.run(seconds(30));
    for node in nodes(maker).filter(|node| *node != speaker) {
        assert_eq!([used(&sites, node, late), used(&sites, late, node)], [None, None]);
    }
    boot(&mut sites, speaker, 2, left);
    sites.run_until("the secret for all", seconds(60), |sites| paired(sites, &[0, 1]));
    assert_eq!(latest(&sites, maker, other), secret, "it is the one from before");
}

#[test]
fn a_node_that_starts_again_uses_what_it_remembers_at_once() {
    let mut sites = three("a_node_that_starts_again");
    let node = nodes(2).last().unwrap();
    let kept = disk(&sites, node);
    let secrets: Vec<_> = (0..2).map(|site| latest(&sites, site, 2)).collect();
    sites.stop(node);
    // Nobody offers it anything: the other two speakers are away, and its own.
    let away: Vec<(usize, Disk)> = (0..3).map(|site| (speaker(site), disk(&sites, speaker(site)))).collect();
    away.iter().for_each(|(speaker, _)| sites.stop(*speaker));
    boot(&mut sites, node, 2, kept);
    let peers: Vec<usize> = (0..2).flat_map(|site| nodes(site).skip(1)).collect();
    sites.run_until("the same secrets", seconds(60), |sites| {
        peers.iter().all(|peer| {
            used(sites, node, *peer) == secrets[*peer / SIZE]
                && used(sites, *peer, node) == secrets[*peer / SIZE]
        })
    });
}

#[test]
fn who_makes_the_secrets_and_lost_them_makes_later_ones_and_all_go_there() {
    let mut sites = three("who_makes_the_secrets_and_lost_them");
    let maker = maker(0, 1);
    let speaker = speaker(maker);
    // Some generations that the next ones must not fall behind.
    for _ in 0..3 {
        sites.renew(maker);
        sites.run(seconds(20));
    }
    let before = sites.net.mesh(speaker).pair_secrets_with(&site(1 - maker)).first().unwrap().generation();
    let lost = Disk { secrets: Vec::new(), ..disk(&sites, speaker) };
    sites.stop(speaker);
    boot(&mut sites, speaker, 2, lost);
    sites.run_until("one secret", seconds(120), |sites| {
        let latest = sites.net.mesh(speaker).pair_secrets_with(&site(1 - maker)).first();
        latest.is_some_and(|latest| latest.generation() > before) && paired(sites, &[0, 1])
    });
}

#[test]
fn what_was_shared_with_a_site_that_is_expelled_is_forgotten_and_it_gets_no_later_secret() {
    let mut sites = three("what_was_shared_with_a_site_that_is_expelled");
    let key = site_key(2).public();
    let before = of_both(&sites, 0, 1);
    sites.with_speaker(0, |mesh, now| mesh.expel(site(2), key, now)).unwrap();
    sites.renew(0);
    let took = sites.run_until("forgotten", seconds(30), |sites| {
        nodes(0)
            .chain(nodes(1))
            .all(|node| sites.net.mesh(node).pair_secrets().all(|(other, _)| other != key))
    });
    assert!(took < seconds(10), "{took:?}");
    sites.run_until("another secret", seconds(120), |sites| {
        paired(sites, &[0, 1]) && latest(sites, 0, 1).is_some_and(|id| !before.contains(&id))
    });
    sites.run(seconds(60));
    assert!(held(&sites, 2).is_disjoint(&of_both(&sites, 0, 1)));
}

#[test]
fn two_nodes_that_speak_for_one_site_end_with_one_secret() {
    let mut sites = Sites::joined("two_nodes_that_speak_for_one_site", 2);
    let maker = maker(0, 1);
    let second = nodes(maker).nth(1).unwrap();
    let kept = disk(&sites, second);
    sites.stop(second);
    sites.start_again(second, 2, kept.ring, kept.statements, Some(site_key(maker)));
    sites.run_until("one mesh", seconds(60), |sites| sites.all_route(&[0, 1]));
    let mut sites = sites.with_tunnels();
    sites.run_until("one secret", seconds(60), |sites| paired(sites, &[0, 1]));
    sites.run(OVERLAP);
    let settled = held(&sites, 0);
    assert_eq!((settled.len(), &settled), (1, &held(&sites, 1)));
    sites.run(OVERLAP);
    assert_eq!(held(&sites, 0), settled, "nothing goes on changing");
}
