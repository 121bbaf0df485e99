//! What accounts hold, and what a mesh takes in of a site that has more nodes than it may.

use std::sync::Arc;
use std::time::Instant;

use proptest::collection::vec;
use proptest::prelude::*;

use super::super::merge::Checked;
use super::super::proto::{Liveness, Update};
use super::*;
use crate::mesh::{Facts, LeasedSubnet, MeshConfig, NodeKey, SignedRecord, Timing, Trust};
use crate::record::{BadSignature, ClaimedRecord, Each, Verify};
use crate::seal::{ClusterKey, KeyRing};
use crate::site::{Certified, SiteKey, SiteRecord, Statement};
use crate::types::{Epoch, NodeName, PublicKey, Subnet};

const CLUSTER: &str = "test";

fn site(number: usize) -> SiteName {
    format!("s{number}").parse().expect("a name")
}

#[test]
fn a_site_finds_its_places_whatever_all_others_have() {
    let mut quotas = Quotas::default();
    for number in 0..512 {
        let account = Account::Site(site(number));
        while quotas.has_room(&account) {
            quotas.enter(&account);
        }
        assert!(quotas.sites[&site(number)] >= SURE);
    }
    while quotas.has_room(&Account::Uncertified) {
        quotas.enter(&Account::Uncertified);
    }
    assert_eq!(quotas.sites[&site(0)], MOST_OF_SITE);
    assert_eq!(quotas.sites[&site(511)], SURE);
    assert_eq!(quotas.shared, SHARED);
    let all = quotas.sites.values().sum::<usize>() + quotas.uncertified;
    assert!(all < MAX_MEMBERS * 4 / 5, "{all}: the rest is for the own site");
    assert!(quotas.has_room(&Account::Own));
}

proptest! {
    #[test]
    fn whoever_leaves_gives_back_what_it_took(moves in vec((0..4usize, 1..80usize), 1..40)) {
        let account = |number| match number {
            0 => Account::Own,
            1 => Account::Uncertified,
            number => Account::Site(site(number)),
        };
        let mut quotas = Quotas::default();
        for (number, times) in &moves {
            (0..*times).for_each(|_| quotas.enter(&account(*number)));
        }
        let beyond: usize = quotas.sites.values().map(|count| count.saturating_sub(SURE)).sum();
        prop_assert_eq!(quotas.shared, beyond);
        for (number, times) in &moves {
            (0..*times).for_each(|_| quotas.leave(&account(*number)));
        }
        prop_assert_eq!((quotas.shared, quotas.uncertified, quotas.sites.len()), (0, 0, 0));
    }
}

/// Believes every node signature: here it is counted, not verified.
#[derive(Debug)]
struct Believing;

impl Verify for Believing {
    fn verify(&self, claimed: ClaimedRecord, cluster: &str) -> Result<Arc<SignedRecord>, BadSignature> {
        Each.verify(claimed, cluster)
    }

    fn verify_certificate(&self, _: &PublicKey, _: &str, record: &NodeRecord) -> bool {
        record.facts.certificate.is_some()
    }
}

fn prefix(number: usize) -> Subnet {
    format!("10.{}.0.0/12", 16 * number).parse().expect("a prefix")
}

/// A node of site 1 that lets in sites 2 and 3; each announces a prefix.
fn mesh_of_sites(now: Instant) -> (Mesh, [SiteKey; 2]) {
    let config = MeshConfig {
        cluster: CLUSTER.into(),
        node: "own".parse().expect("a name"),
        site: site(1),
        key: NodeKey::from_secret([7; 32]),
        ring: KeyRing::new(vec![ClusterKey::from_bytes([1; 32])]).expect("a ring"),
        seeds: Vec::new(),
        incarnation: 1,
        timing: Timing::default(),
        verify: Arc::new(Believing),
    };
    let mut mesh = Mesh::new(config, [3; 32], now);
    let own = SiteKey::from_secret([1; 32]);
    let trust = Trust { site: own.public(), prefixes: vec![prefix(1)], signer: Some(own) };
    mesh.set_trust(trust, Vec::new(), now).expect("it speaks");
    let others = [2, 3].map(|number| {
        let key = SiteKey::from_secret([number as u8; 32]);
        mesh.admit(site(number), key.public(), vec![prefix(number)], now).expect("it speaks");
        let record = SiteRecord {
            site: site(number),
            key: key.public(),
            version: 1,
            prefixes: vec![prefix(number)],
            least_serial: 0,
            void: Vec::new(),
            left: false,
        };
        let said = key.sign(CLUSTER, Statement::Site(record)).expect("a statement");
        assert!(mesh.merge_statement(Arc::new(said)));
        key
    });
    (mesh, others)
}

/// A node of a site, certified where there is a key.
fn update(number: usize, of: usize, key: Option<&SiteKey>) -> Update {
    let node: NodeName = format!("m{of}-{number}").parse().expect("a name");
    let node_key = NodeKey::from_secret([9; 32]);
    let subnet = format!("10.{}.{}.{}/32", 16 * of + (number >> 16), number >> 8 & 255, number & 255);
    let subnets = vec![LeasedSubnet { subnet: subnet.parse().expect("a subnet"), epoch: Epoch(1) }];
    let site = site(of);
    let certified = Certified { site: &site, node: &node, key: &node_key.public(), subnets: &subnets };
    let certificate = key.map(|key| key.certify(CLUSTER, 0, certified));
    let facts = Facts { subnets, certificate, ..Facts::default() };
    let record = SignedRecord::sign(&node_key, CLUSTER, node, site, 1, facts, false);
    Update { liveness: Liveness::Alive as i32, record: Some(record.to_proto()), ..Update::default() }
}

fn take(mesh: &mut Mesh, update: &Update) {
    let (checked, _) = mesh.check_update(update).expect("it is well formed");
    mesh.apply(checked, "192.0.2.9:7117".parse().expect("an address"), false);
    mesh.settle();
}

fn known(mesh: &Mesh, of: usize) -> usize {
    let site = site(of);
    mesh.members().filter(|member| *member.site == site).count()
}

#[test]
fn a_site_that_makes_nodes_up_leaves_the_others_their_room() {
    let now = Instant::now();
    let (mut mesh, [evil, good]) = mesh_of_sites(now);
    (0..20).for_each(|number| take(&mut mesh, &update(number, 3, Some(&good))));
    (0..MOST_OF_SITE + 50).for_each(|number| take(&mut mesh, &update(number, 2, Some(&evil))));
    assert_eq!((known(&mesh, 2), known(&mesh, 3)), (MOST_OF_SITE, 20));
    // A look ahead refuses without a look at the record's signature.
    let (checked, verified) = mesh.check_update(&update(9000, 2, Some(&evil))).expect("well formed");
    assert!(matches!(checked, Checked::TooMany(Bound::Site(site)) if site == self::site(2)) && !verified);
    (20..200).for_each(|number| take(&mut mesh, &update(number, 3, Some(&good))));
    assert_eq!(known(&mesh, 3), 200);
    assert_eq!((mesh.counters().refused_site, mesh.counters().refused_uncertified), (50, 0));
    let told = |event: &MeshEvent| matches!(event, MeshEvent::TooMany(Bound::Site(_)));
    let events = mesh.outputs.iter().filter(|output| matches!(output, Output::Event(event) if told(event)));
    assert_eq!(events.count(), 1, "one event for all of them");
    // Those who are in may go on to announce.
    assert!(mesh.members().filter(|member| *member.site == site(3)).all(|member| member.routed.is_some()));
}

#[test]
fn nodes_that_nobody_certified_are_few_and_who_is_certified_later_moves_over() {
    let now = Instant::now();
    let (mut mesh, [first, second]) = mesh_of_sites(now);
    for number in 0..MOST_UNCERTIFIED {
        // Of a site that is in, of one that nobody knows, and of the own one, whose store does not name them.
        take(&mut mesh, &update(number, [1, 2, 7][number % 3], None));
    }
    for of in [1, 2, 7] {
        take(&mut mesh, &update(MOST_UNCERTIFIED, of, None));
    }
    assert_eq!(mesh.members().count(), MOST_UNCERTIFIED);
    assert_eq!((mesh.counters().refused_uncertified, mesh.counters().refused_site), (3, 0));
    for number in 0..10 {
        take(&mut mesh, &update(number, 3, Some(&second)));
    }
    assert_eq!(known(&mesh, 3), 10, "certified ones have places of their own");
    // One of them is certified after all: its place is free for another.
    let mut later = update(1, 2, Some(&first));
    later.record = later.record.map(|_| {
        let node: NodeName = "m2-1".parse().expect("a name");
        let key = NodeKey::from_secret([9; 32]);
        let subnets =
            vec![LeasedSubnet { subnet: "10.32.0.1/32".parse().expect("a subnet"), epoch: Epoch(1) }];
        let site = site(2);
        let certified = Certified { site: &site, node: &node, key: &key.public(), subnets: &subnets };
        let certificate = Some(first.certify(CLUSTER, 0, certified));
        let facts = Facts { subnets, certificate, ..Facts::default() };
        SignedRecord::sign(&key, CLUSTER, node, site, 2, facts, false).to_proto()
    });
    take(&mut mesh, &later);
    take(&mut mesh, &update(MOST_UNCERTIFIED, 7, None));
    assert_eq!(mesh.members().count(), MOST_UNCERTIFIED + 11);
    take(&mut mesh, &update(MOST_UNCERTIFIED + 1, 7, None));
    assert_eq!(mesh.members().count(), MOST_UNCERTIFIED + 11);
}

#[test]
fn a_member_stays_where_it_counts_while_the_other_account_is_full() {
    let now = Instant::now();
    let (mut mesh, [first, _]) = mesh_of_sites(now);
    (0..40).for_each(|number| take(&mut mesh, &update(number, 2, Some(&first))));
    (0..MOST_UNCERTIFIED).for_each(|number| take(&mut mesh, &update(number, 7, None)));
    // Its certificates are void: they are of nobody now, and there is no room with nobody.
    let expelled = mesh.expel(site(2), first.public(), now);
    expelled.expect("it speaks");
    mesh.judge_all();
    assert_eq!(mesh.table.quotas().uncertified, MOST_UNCERTIFIED);
    assert_eq!(mesh.table.quotas().sites[&site(2)], 40);
    assert_eq!(known(&mesh, 2), 40, "nobody is put out for others");
}
