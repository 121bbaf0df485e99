//! A site whose gateways carry what it exchanges with others: who carries whom, and what happens when one dies.

use std::time::Duration;

use weft_tests::lab::{Capture, Families, Lab, LabOptions, wait_until};

const PATIENCE: Duration = Duration::from_secs(60);
/// Nodes n1 to n4 are site s1, each for itself; n5 to n8 are s2, of which n5 and n6 are gateways.
const FIRST: [&str; 4] = ["n1", "n2", "n3", "n4"];
const SECOND: [&str; 4] = ["n5", "n6", "n7", "n8"];

fn lab(name: &str) -> Lab {
    let gateways = "[site]\ngateways = { n5 = 100, n6 = 100 }";
    let options = LabOptions::new(name).nodes(8).sites(2).pods(1).overlay(Families::Dual);
    Lab::up(SECOND.into_iter().fold(options, |options, node| options.node_config(node, gateways)))
}

/// The gateway by which a node reaches another's pods.
fn gateway(lab: &Lab, node: &str, other: &str) -> Option<String> {
    let routes = lab.weft(node, &["routes"])["routes"].as_array().cloned().unwrap_or_default();
    let route = routes.into_iter().find(|route| route["node"] == other)?;
    let reason = route["reason"].as_str()?.strip_prefix("by gateway ")?.to_owned();
    Some(reason.split(':').next()?.to_owned())
}

/// The device by which a node's kernel sends to the first pod of another.
fn device(lab: &Lab, node: &str, other: &str) -> String {
    let answer = lab.json(node, &["ip", "-j", "route", "get", &lab.ip(other, "a").to_string()]);
    answer[0]["dev"].as_str().unwrap_or_default().to_owned()
}

fn all_reach(lab: &Lab, first: &[&str], second: &[&str]) -> bool {
    let pairs = first.iter().flat_map(|one| second.iter().map(move |other| (*one, *other)));
    pairs.into_iter().all(|(one, other)| {
        let reaches = |from: &str, to: &str| {
            lab.ips(to, "a").into_iter().all(|ip| lab.ping(format!("{from}/a").as_str(), ip))
        };
        reaches(one, other) && reaches(other, one)
    })
}

#[test]
fn gateways_carry_a_site_both_ends_agree_and_another_takes_over_within_seconds() {
    let lab = lab("gateways");
    wait_until("all pods reach each other", PATIENCE, || all_reach(&lab, &FIRST, &SECOND));

    // Nodes behind a gateway have no tunnel of their own to the other site, and it takes both directions.
    for node in ["n7", "n8"] {
        assert_eq!(device(&lab, node, "n1"), "weft-vx4");
        let chosen = gateway(&lab, node, "n1").expect("it is reached by a gateway");
        assert!(["n5", "n6"].contains(&chosen.as_str()), "{chosen}");
        assert!(
            FIRST.iter().all(|far| gateway(&lab, far, node).as_ref() == Some(&chosen)),
            "{node}: {chosen}"
        );
        assert_eq!(device(&lab, "n1", node), "weft-wg");
    }
    assert_eq!((gateway(&lab, "n5", "n1"), device(&lab, "n5", "n1")), (None, "weft-wg".into()));
    let capture = Capture::start(&lab, "n7", "eth0");
    assert!(all_reach(&lab, &["n1"], &["n7"]));
    assert_eq!(capture.finish_with("udp port 8472", &["udp port 51820"]), [0], "n7 has tunnels of its own");

    // The gateway of n7 is cut off from everybody at once, as a machine that lost its power.
    let dies = gateway(&lab, "n7", "n1").expect("a gateway");
    let lives = if dies == "n5" { "n6" } else { "n5" };
    let ping = lab.background_ping("n7/a", lab.ip("n1", "a"));
    let flow = lab.background_flow("n7/a", "n1/a", lab.ip("n1", "a"));
    flow.await_more("the flow goes by the gateway", PATIENCE);
    lab.sh(&*dies, "ip link set eth0 down");
    wait_until("the other gateway carries it", PATIENCE, || {
        gateway(&lab, "n7", "n1").as_deref() == Some(lives)
            && gateway(&lab, "n1", "n7").as_deref() == Some(lives)
    });
    wait_until("n7 is reached again", PATIENCE, || all_reach(&lab, &FIRST, &["n7", "n8"]));
    let (sent, lost) = ping.stop();
    flow.await_more("the flow goes by the other gateway", PATIENCE);
    let pause = flow.longest_pause();
    println!(
        "gateway failover: {} of {sent} pings lost, longest pause of the TCP flow {pause:.2?}",
        lost.len()
    );
    assert!(pause < Duration::from_secs(20), "the flow stood for {pause:.1?}");
    assert!(!lost.is_empty(), "the gateway that died carried nothing");

    // It comes back and is used again, and nobody does anything.
    lab.sh(&*dies, "ip link set eth0 up");
    wait_until("the first gateway is back", PATIENCE, || {
        gateway(&lab, "n7", "n1").as_ref() == Some(&dies) && all_reach(&lab, &FIRST, &SECOND)
    });
}

#[test]
fn a_gateway_that_is_drained_gives_all_to_the_others() {
    let lab = lab("drained");
    wait_until("all pods reach each other", PATIENCE, || all_reach(&lab, &FIRST, &SECOND));
    let drained = gateway(&lab, "n7", "n1").expect("a gateway");
    let ping = lab.background_ping("n7/a", lab.ip("n1", "a"));
    // Only the gateway itself announces its weight.
    lab.sh(&*drained, &format!("sed -i 's/{drained} = 100/{drained} = 0/' /etc/weft/weft.toml"));
    assert!(lab.sh(&*drained, "cat /etc/weft/weft.toml").contains(&format!("{drained} = 0")));
    lab.kill(&drained);
    lab.start(&drained);
    wait_until("nobody goes by it", PATIENCE, || {
        ["n7", "n8"].into_iter().all(|node| {
            let ways = [gateway(&lab, node, "n1"), gateway(&lab, "n1", node)];
            ways.iter().all(|way| way.as_ref().is_some_and(|way| *way != drained))
        })
    });
    wait_until("all pods reach each other", PATIENCE, || all_reach(&lab, &FIRST, &SECOND));
    let (sent, lost) = ping.stop();
    println!("a drained gateway: {} of {sent} pings lost", lost.len());
}
