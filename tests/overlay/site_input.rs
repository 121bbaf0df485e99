//! What people get wrong about sites, by their commands: each is named where they see it, by the command itself and by `weft doctor`,
//! and what worked goes on.

mod commands;

use commands::*;
use serde_json::Value;
use weft_tests::lab::{Families, Lab, LabOptions, Ping, wait_until};

/// What the daemon of a node reads.
const CONFIG: &str = "/etc/weft/weft.toml";
/// More than a day.
const AHEAD: &str = "87000";
/// Encrypted by the daemon, which tries paths and relays.
const TUNNELS: &str = "[encryption]\npolicy = \"cross-site\"\nimplementation = \"user-space\"";

/// Pings from pod to pod that must not be lost.
fn watch(lab: &Lab, pairs: &[(&str, &str)]) -> Vec<Ping> {
    let watch =
        |(from, to): &(&str, &str)| lab.background_ping(format!("{from}/a").as_str(), lab.ip(to, "a"));
    pairs.iter().map(watch).collect()
}

fn assert_unharmed(pings: Vec<Ping>) {
    for ping in pings {
        let (sent, lost) = ping.stop();
        assert!(sent > 0 && lost.is_empty(), "no answer to {lost:?} of {sent}");
    }
}

/// Changes the configuration of nodes by sed, and starts their daemons anew, one after the other.
fn restart_with(lab: &Lab, nodes: &[&str], change: &str) {
    for node in nodes {
        lab.sh(*node, &format!("sed -i '{change}' {CONFIG}"));
        lab.kill(node);
        lab.start(node);
    }
    for node in nodes {
        wait_until("the node is ready", PATIENCE, || lab.weft(node, &["status"])["ready"] == true);
    }
}

/// Joins in vain; the command says why, and so do doctors.
fn assert_refused(lab: &Lab, joiner: &str, token: &str, words: &str, doctors: &[&str]) {
    let refusal = said(lab, joiner, &format!("weft join {token}"));
    assert!(refusal.starts_with("weft: ") && refusal.contains(words), "{words}: {refusal}");
    for node in doctors {
        assert_diagnosed(lab, node, "sites", words);
    }
}

#[test]
fn a_token_that_cannot_be_used_is_named_where_it_is_used_and_by_the_doctor_on_both_sides() {
    let lab = Lab::up(
        LabOptions::new("tokens")
            .nodes(2)
            .sites(2)
            .apart()
            .pods(1)
            .overlay(Families::V4)
            .node_config("n2", "[cluster]\ncidrs = [{ cidr = \"10.40.0.0/16\", node_prefix = 24 }]"),
    );
    let token = invite(&lab, "n1", "");
    let overlap = said(&lab, "n2", &format!("weft join {token}"));
    let words = "10.40.0.0/16 overlaps 10.32.0.0/12 of site s1";
    assert!(overlap.contains(words), "{overlap}");
    for node in ["n1", "n2"] {
        let doctor = said(&lab, node, "weft doctor");
        assert!(doctor.contains("FAIL sites") && doctor.contains(words), "{node}: {doctor}");
        assert!(said(&lab, node, "weft sites").contains("no other site is let in"));
    }
    let changed = format!("{}A", &token[..token.len() - 1]);
    let damaged = said(&lab, "n2", &format!("weft join {changed}"));
    assert!(damaged.contains("the token is damaged") || changed == token, "{damaged}");
    assert!(said(&lab, "n2", "weft join hello").contains("a token begins with \"weft1.\""));
    assert!(said(&lab, "n1", &format!("weft join {token}")).contains("the token was made by this site, s1"));
    assert!(said(&lab, "n2", "weft site leave").contains("this site is with no other"));
    // A daemon that was restarted does not know its tokens any more.
    lab.kill("n1");
    lab.start("n1");
    let void = said(&lab, "n2", &format!("weft join {token}"));
    assert!(void.contains("no answer from site s1 at 192.0.2.1:7117"), "{void}");
    assert!(reaches(&lab, "n1", "n1"));
}

#[test]
fn a_site_that_may_not_join_is_told_why_and_so_is_the_one_that_invited_it() {
    let options = LabOptions::new("siteinput").nodes(6).sites(3).apart().pods(1).overlay(Families::V4);
    let lab = Lab::up(options);
    let used = invite(&lab, "n1", "");
    let joined = said(&lab, "n3", &format!("weft join {used}"));
    assert!(joined.starts_with("this site has joined"), "{joined}");
    wait_until("two sites are one", PATIENCE, || all_reach(&lab, &["n1", "n2"], &["n3", "n4"]));
    wait_until("they seal with one key", PATIENCE, || ids(&lab, "n2")[0] == ids(&lab, "n4")[0]);
    // Of those who do nothing wrong: a site that is renamed node by node is two sites meanwhile.
    let pings = watch(&lab, &[("n1", "n2"), ("n2", "n4")]);

    // A token that was used.
    assert_refused(&lab, "n5", &used, "the token was used already, by site s2", &["n5", "n1"]);
    // One whose time is over: until then it is for another site.
    let short = invite(&lab, "n1", "s9 --valid 1s");
    let over = || said(&lab, "n5", &format!("weft join {short}")).contains("expired");
    wait_until("the token has expired", PATIENCE, over);
    assert_refused(&lab, "n5", &short, "the token has expired", &["n5", "n1"]);
    // Two sites of one name: of the name of who is in, and of the name of who invites.
    let (twin, own) = (invite(&lab, "n1", ""), invite(&lab, "n1", ""));
    restart_with(&lab, &["n5", "n6"], "s/^site = .*/site = \"s2\"/");
    assert_refused(&lab, "n5", &twin, "a site named s2 is in already", &["n5", "n1"]);
    restart_with(&lab, &["n5", "n6"], "s/^site = .*/site = \"s1\"/");
    assert_refused(&lab, "n5", &own, "two sites are named s1", &["n5"]);
    // Another mesh's token.
    restart_with(&lab, &["n5", "n6"], "s/^site = .*/site = \"s3\"/; s/^id = .*/id = \"elsewhere\"/");
    assert_refused(&lab, "n5", &own, "the token is of the foreign mesh", &["n5"]);

    // None of it changed anything, and in the end the site comes in.
    let id = lab.handle().name().to_owned();
    assert!(said(&lab, "n5", "weft sites").contains("no other site is let in"));
    restart_with(&lab, &["n5", "n6"], &format!("s/^id = .*/id = \"{id}\"/"));
    assert_unharmed(pings);
    join(&lab, "n1", "n5");
    wait_until("three sites are one", PATIENCE, || all_reach(&lab, &["n1", "n4", "n6"], &["n1", "n4", "n6"]));
}

#[test]
fn clocks_a_day_apart_and_a_node_in_two_sites_are_named_and_nothing_stops() {
    let options = LabOptions::new("siteclocks").nodes(4).sites(2).apart().pods(1).overlay(Families::V4);
    let lab = Lab::up(options.node_config("n4", "[node]\nname = \"n2\""));
    let inside = watch(&lab, &[("n1", "n2")]);
    // The speaker of the other site lives a day later.
    let program = "/run/wall-clock";
    let build = lab.feed("n3", &["cc", "-o", program, "-x", "c", "-"], include_str!("wall_clock.c"));
    assert!(build.status.success(), "{}", String::from_utf8_lossy(&build.stderr));
    let ahead = lab.sh("n3", &format!("{program} {AHEAD} date +%s; date +%s"));
    let dates: Vec<i64> = ahead.lines().map(|line| line.parse().expect("date writes seconds")).collect();
    assert!((86_990..=87_000).contains(&(dates[0] - dates[1])), "{dates:?}");
    lab.kill("n3");
    let daemon = lab.background("n3", &[program, AHEAD, "weftd", "--config", CONFIG]);
    wait_until("the daemon is ready", PATIENCE, || {
        let status = lab.exec("n3", &["weft", "-o", "json", "status"]).stdout;
        serde_json::from_slice(&status).is_ok_and(|status: Value| status["ready"] == true)
    });
    join(&lab, "n1", "n3");
    wait_until("the sites reach each other", PATIENCE, || {
        reaches(&lab, "n1", "n3") && reaches(&lab, "n3", "n1")
    });
    assert_diagnosed(&lab, "n1", "sites", "the clocks of site s2 and of this node are 24 hours apart");
    assert_diagnosed(&lab, "n3", "sites", "the clocks of site s1 and of this node are 24 hours apart");
    // Each site keeps its own node of the name that both have.
    for (node, own, other) in [("n1", "s1", "s2"), ("n3", "s2", "s1")] {
        let words = format!(
            "a node n2 is in two sites, {own} and {other}: only that of {own} is reached; give one of the two another node.name"
        );
        assert_diagnosed(&lab, node, "sites", &words);
    }
    for node in ["n2", "n4"] {
        assert_diagnosed(&lab, node, "identity", "n2");
    }
    assert!(reaches(&lab, "n1", "n2") && reaches(&lab, "n3", "n4") && reaches(&lab, "n1", "n3"));
    assert_unharmed(inside);
    drop(daemon);
}

#[test]
fn a_relay_that_says_it_is_reached_and_is_not_is_named_by_both_whom_it_promised_to_carry() {
    let options = LabOptions::new("siteliar").nodes(4).sites(4).pods(1).overlay(Families::V4).config(TUNNELS);
    // Only n3 offers to relay at first.
    let lab = Lab::up(options.node_config("n4", "[relay]\nenabled = false"));
    lab.befriend_sites();
    wait_until("pods reach each other", PATIENCE, || all_reach(&lab, &["n1", "n2"], &["n1", "n2"]));
    let pings = watch(&lab, &[("n1", "n3"), ("n2", "n3")]);
    // It promises ports that nothing gets to.
    let closed = "table inet closed { chain in { type filter hook input priority -10; udp dport 51900-51963 drop; }; }";
    assert!(lab.feed("n3", &["nft", "-f", "-"], closed).status.success());
    for (node, other) in [("n1", "192.0.2.2"), ("n2", "192.0.2.1")] {
        let cut = format!(
            "table inet cut {{ chain in {{ type filter hook input priority -10; ip saddr {other} udp dport 51820 drop; }}; }}"
        );
        assert!(lab.feed(node, &["nft", "-f", "-"], &cut).status.success());
    }
    // Traffic wants a path, at both: who sends nothing misses none.
    let wanted = [("n1/a", "n2"), ("n2/a", "n1")]
        .map(|(from, to)| lab.background(from, &["ping", "-n", "-i", "0.2", &lab.ip(to, "a").to_string()]));
    assert_diagnosed(&lab, "n1", "relays", "relay n3 gave a port for n2, and no packet came through it");
    assert_diagnosed(&lab, "n2", "relays", "relay n3 gave a port for n1, and no packet came through it");
    assert!(!reaches(&lab, "n1", "n2"), "nothing else carries them");
    assert_unharmed(pings);
    // An honest one is found.
    restart_with(&lab, &["n4"], "s/^enabled = false/enabled = true/");
    wait_until("another relay carries", PATIENCE, || reaches(&lab, "n1", "n2"));
    for ping in wanted {
        ping.interrupt();
    }
}
