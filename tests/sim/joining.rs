//! Sites that begin as meshes of their own, with cluster keys of their own, and become one by a token.
#![allow(clippy::unwrap_used)]

mod meetings;

use std::time::Duration;

use meetings::*;
use weft_tests::sim::meshes::*;
use weft_wire::mesh::*;
use weft_wire::types::SiteName;

/// What a person hears of a join that cannot be; nothing of it stays on either side.
fn refusal(sites: &mut Sites, inviter: usize, joiner: usize, token: weft_wire::invite::Token) -> String {
    let before = [inviter, joiner].map(|site| sites.standing(speaker(site)));
    let why = sites.join(joiner, token).unwrap_err();
    sites.run(seconds(5));
    assert_eq!(
        [inviter, joiner].map(|site| sites.standing(speaker(site))),
        before,
        "something was installed"
    );
    assert!(sites.routes(inviter, inviter) && sites.routes(joiner, joiner));
    why
}

#[test]
fn a_token_brings_a_whole_site_in_both_ways_and_loses_no_route_inside() {
    let mut sites = Sites::up("a_token_brings_a_whole_site_in", 2);
    let token = sites.invite(0, hour());
    assert_eq!(sites.join(1, token), Ok(site(0)));
    sites.run_until("one mesh", seconds(20), |sites| sites.all_route(&[0, 1]));
    sites.run_until("one ring", seconds(120), |sites| sites.one_ring(&[0, 1]));
    assert!(!sites.lost_inside, "a route inside a site was lost");
}

#[test]
fn a_site_that_leaves_is_out_within_seconds_and_keeps_its_inside() {
    let mut sites = Sites::joined("a_site_that_leaves", 3);
    sites.with_speaker(2, |mesh, now| mesh.leave_sites(now)).unwrap();
    sites.part_in(2, seconds(5));
    let took = sites.run_until("out", seconds(30), |sites| {
        (0..2).all(|other| sites.routes_nothing(other, 2) && sites.routes_nothing(2, other))
    });
    assert!(took < seconds(10), "{took:?}");
    assert_eq!(sites.standing(2), [(site(2), "left".to_owned()), (site(1), "member".to_owned())].into());
    sites.run_until("keys of its own", seconds(120), |sites| sites.no_common_key(&[0, 1], 2));
    assert!(sites.all_route(&[0, 1]) && sites.routes(2, 2) && !sites.lost_inside);
    // And it comes back by another token.
    let token = sites.invite(0, hour());
    assert_eq!(sites.join(2, token), Ok(site(0)));
    sites.run_until("in again", seconds(120), |sites| sites.all_route(&[0, 1, 2]));
}

#[test]
fn an_expelled_site_is_out_and_has_no_key_that_the_others_use_after_it() {
    let mut sites = Sites::joined("an_expelled_site", 3);
    let key = site_key(2).public();
    sites.with_speaker(0, |mesh, now| mesh.expel(site(2), key, now)).unwrap();
    sites.renew(0);
    let took =
        sites.run_until("out", seconds(30), |sites| (0..2).all(|other| sites.routes_nothing(other, 2)));
    assert!(took < seconds(10), "{took:?}");
    sites.run_until("another key", seconds(60), |sites| sites.no_common_key(&[0, 1], 2));
    assert!(sites.one_ring(&[0, 1]) && sites.all_route(&[0, 1]) && !sites.lost_inside);
}

/// A mesh of two sites comes into another of two, with so much time between the joins.
fn two_and_two(mut sites: Sites, apart: Duration) {
    for (inviter, joiner) in [(0, 1), (2, 3), (1, 2)] {
        let token = sites.invite(inviter, hour());
        assert_eq!(sites.join(joiner, token), Ok(site(inviter)), "WEFT_SEED={}", sites.net.seed);
        sites.run(apart);
    }
    sites.run_until("four sites", seconds(60), |sites| sites.all_route(&[0, 1, 2, 3]));
    sites.run_until("one ring", seconds(120), |sites| sites.one_ring(&[0, 1, 2, 3]));
    assert!(!sites.lost_inside, "a route inside a site was lost; WEFT_SEED={}", sites.net.seed);
}

#[test]
fn a_mesh_of_two_sites_comes_into_another_of_two_by_one_token() {
    two_and_two(Sites::up("a_mesh_of_two_sites", 4), seconds(120));
}

#[test]
fn joins_in_the_middle_of_a_change_of_keys_lose_no_site() {
    two_and_two(Sites::up("joins_in_the_middle_of_a_change", 4), seconds(20));
}

#[test]
fn joins_at_the_same_time_lose_no_site() {
    two_and_two(Sites::up("joins_at_the_same_time", 4), Duration::ZERO);
}

#[test]
fn runs_that_once_lost_a_site_lose_none() {
    for seed in [165_851_124, 1_268_837, 413_336_982, 545_531_452, 831_455_966] {
        two_and_two(Sites::up_from(seed, 4), seconds(20));
    }
}

#[test]
fn runs_that_once_took_long_to_meet_do_not() {
    for seed in [777_176_304, 294_279_612, 94_950_907] {
        let mut sites = Sites::up_from(seed, 2);
        let token = sites.invite(0, hour());
        assert_eq!(sites.join(1, token), Ok(site(0)));
        sites.run_until("one mesh", seconds(20), |sites| sites.all_route(&[0, 1]));
    }
}

#[test]
fn keys_that_come_back_while_they_are_being_forgotten_lose_no_site() {
    let mut sites = Sites::joined("keys_that_come_back", 3);
    let first = sites.net.mesh(0).ring().clone();
    for step in 0..6 {
        // Each change is known to all when the next one comes.
        let pause = seconds(5) + sites.some_seconds(60);
        sites.run(pause);
        if step % 2 == 0 {
            sites.renew(step % 3);
        } else {
            let ring = first.clone();
            sites.with_speaker(step % 3, |mesh, now| mesh.rekey(ring, now)).unwrap();
        }
    }
    sites.run_until("the first ring", seconds(180), |sites| {
        *sites.net.mesh(0).ring() == first && sites.one_ring(&[0, 1, 2])
    });
    assert!(sites.all_route(&[0, 1, 2]) && !sites.lost_inside);
}

#[test]
fn a_site_that_is_away_while_the_key_changes_comes_back_with_it() {
    let mut sites = Sites::joined("a_site_that_is_away", 3);
    sites.cut_off(2);
    sites.run(seconds(60));
    sites.renew(0);
    sites.run(seconds(240));
    assert!(!sites.one_ring(&[0, 1, 2]) && !sites.no_common_key(&[0, 1], 2));
    sites.join_up(2);
    sites.run_until("one ring", seconds(180), |sites| sites.one_ring(&[0, 1, 2]));
    assert!(sites.all_route(&[0, 1, 2]) && !sites.lost_inside);
}

#[test]
fn two_sites_that_change_the_key_at_the_same_time_end_with_one() {
    let mut sites = Sites::joined("two_sites_change_the_key", 3);
    sites.renew(0);
    sites.renew(1);
    sites.run(seconds(1));
    sites.renew(2);
    sites.run_until("one ring", seconds(120), |sites| sites.one_ring(&[0, 1, 2]));
    assert!(sites.all_route(&[0, 1, 2]) && !sites.lost_inside);
}

#[test]
fn what_cannot_be_joined_is_named_on_both_sides_and_changes_nothing() {
    let mut sites = Sites::up("what_cannot_be_joined", 4);
    // Used twice, by another site.
    let token = sites.invite(0, hour());
    assert_eq!(sites.join(1, token.clone()), Ok(site(0)));
    sites.run(seconds(20));
    let why = refusal(&mut sites, 0, 2, token);
    assert!(why.contains("the token was used already, by site s1"), "{why}");
    assert!(
        sites.told(0).iter().any(|told| told.contains("site s2 was not let in: the token was used already"))
    );
    // Expired, by the inviter's own clock.
    let token = sites.invite(0, Duration::from_secs(60));
    sites.run(seconds(61));
    let why = refusal(&mut sites, 0, 2, token);
    assert!(why.contains("the token has expired"), "{why}");
    // Of this site itself, and of a foreign mesh.
    let token = sites.invite(0, hour());
    let own = sites.with_speaker(0, |mesh, now| mesh.join(token.clone(), now)).unwrap_err();
    assert!(own.to_string().contains("made by this site, s0"), "{own}");
    let foreign = weft_wire::invite::Token { mesh: "other".into(), ..token };
    let foreign = sites.with_speaker(2, |mesh, now| mesh.join(foreign, now)).unwrap_err();
    assert!(foreign.to_string().contains("of the foreign mesh \"other\""), "{foreign}");
    // A node that does not speak for its site.
    let token = sites.invite(0, hour());
    let silent = sites.net.with(speaker(2) + 1, |mesh, now| mesh.join(token, now)).unwrap_err();
    assert!(silent.to_string().contains("does not have the key of its site"), "{silent}");
    // With a version of cluster keys that would end the numbers of all.
    sites.with_speaker(3, |mesh, now| mesh.set_wanted_ring(1 << 40, mesh.ring().clone(), now));
    let token = sites.invite(0, hour());
    let why = refusal(&mut sites, 0, 3, token);
    assert!(why.contains("its cluster keys have version 1099511627776"), "{why}");
    // For another site, and for other prefixes.
    let terms = Terms { site: Some("other".parse().unwrap()), ..terms(hour()) };
    let token = sites.invite_with(0, terms);
    let why = refusal(&mut sites, 0, 2, token);
    assert!(why.contains("the token is for site other, and this is site s2"), "{why}");
    let token =
        sites.invite_with(0, Terms { prefixes: vec!["10.99.0.0/16".parse().unwrap()], ..super_terms() });
    let why = refusal(&mut sites, 0, 2, token);
    assert!(why.contains("the token does not let a site in with"), "{why}");
}

fn super_terms() -> Terms {
    terms(hour())
}

#[test]
fn a_site_with_a_name_or_prefixes_that_another_has_is_refused_and_told_on_both_sides() {
    for (name, prefix, words) in [
        (site(0), prefix_of(1), "two sites are named s0: rename one of the two"),
        (
            site(1),
            prefix_of(0),
            "overlaps 10.32.0.0/22 of site s0: give one of the two sites another range first",
        ),
    ] {
        let mut sites = Sites::empty("a_name_or_prefixes_that_another_has");
        sites.start_site(0, site(0), prefix_of(0));
        sites.start_site(1, name, prefix);
        sites.run(seconds(20));
        let token = sites.invite(0, hour());
        let why = match sites.with_speaker(1, |mesh, now| mesh.join(token.clone(), now)) {
            Ok(()) => sites.ended(1).unwrap_err(),
            Err(error) => error.to_string(),
        };
        assert!(why.contains(words), "{why}");
        assert!(sites.standing(0).is_empty() && sites.standing(speaker(1)).is_empty());
        assert!(sites.inside_whole(0) && sites.inside_whole(1));
    }
}

#[test]
fn clocks_that_are_days_apart_are_told_of_and_change_nothing() {
    let mut sites = Sites::up("clocks_that_are_days_apart", 2);
    sites.with_speaker(0, |mesh, now| mesh.set_clock(1_800_000_000, now));
    sites.with_speaker(1, |mesh, now| mesh.set_clock(1_800_000_000 + 2 * 86_400, now));
    let token = sites.invite(0, hour());
    assert_eq!(sites.join(1, token), Ok(site(0)));
    sites.run_until("one mesh", seconds(60), |sites| sites.all_route(&[0, 1]));
    for (at, other) in [(0, site(1)), (1, site(0))] {
        let told = |event: &MeshEvent| matches!(event, MeshEvent::ClocksApart { site, seconds } if *site == other && seconds.abs_diff(172_800) < 5);
        assert!(sites.net.events(speaker(at)).iter().any(told), "site {at}");
    }
}

#[test]
fn a_node_whose_name_two_sites_certify_is_told_of_and_the_first_stays() {
    let mut sites = Sites::joined("a_name_in_two_sites", 2);
    // Node 6 of site 1 now calls itself n2, as one of site 0 does, under its own key and lease.
    let twin = sites.rename(6, 2);
    sites.run(seconds(40));
    let told = sites.net.events(1).iter().any(|event| {
        matches!(event, MeshEvent::TwoSites { node, kept, other }
            if *node == name(2) && *kept == site(0) && *other == site(1))
    });
    assert!(told, "WEFT_SEED={}", sites.net.seed);
    let kept: SiteName = sites.net.mesh(1).member(&name(2)).unwrap().site.clone();
    assert_eq!((kept, sites.net.verdict(1, 2)), (site(0), Some(Verdict::Accepted)));
    let _ = twin;
}
