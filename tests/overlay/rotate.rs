//! Keys change and the store goes and comes, while traffic flows.

use std::time::Duration;

use weft_tests::lab::{Lab, LabOptions, Ping, wait_until};

const PATIENCE: Duration = Duration::from_secs(60);

const NODES: [&str; 3] = ["n1", "n2", "n3"];

fn traffic(lab: &Lab) -> Vec<Ping> {
    let mut pings: Vec<Ping> =
        lab.ips("n2", "a").into_iter().map(|ip| lab.background_ping("n1/a", ip)).collect();
    pings.push(lab.background_ping("n3/a", lab.ip("n1", "a")));
    pings
}

fn nothing_was_lost(pings: Vec<Ping>) {
    for ping in pings {
        let (sent, lost) = ping.stop();
        println!("{} of {sent} pings lost", lost.len());
        assert!(lost.is_empty(), "no answer to {lost:?} of {sent}");
    }
}

fn all_alive(lab: &Lab) -> bool {
    NODES.iter().all(|node| lab.weft(node, &["status"])["peers"]["alive"] == 2)
}

#[test]
fn the_cluster_key_is_changed_while_traffic_flows() {
    let lab = Lab::up(LabOptions::new("ringkey").pods(1));
    let pings = traffic(&lab);
    let ids = |node: &str| -> Vec<String> {
        let list = lab.weft(node, &["cluster-key", "list"])["ids"].as_array().cloned().unwrap_or_default();
        list.iter().filter_map(|id| Some(id.as_str()?.to_owned())).collect()
    };
    let old = ids("n1");
    let secret = lab.run("n1", &["weft", "cluster-key", "generate"]).trim().to_owned();
    let on_all = |words: &[&str]| NODES.iter().for_each(|node| drop(lab.run(*node, words)));
    on_all(&["weft", "cluster-key", "add", &secret]);
    let new = ids("n1").into_iter().find(|id| !old.contains(id)).expect("the new key is listed");
    on_all(&["weft", "cluster-key", "use", &new]);
    assert!(all_alive(&lab), "a member was lost while both keys are known");
    on_all(&["weft", "cluster-key", "remove", &old[0]]);
    for node in NODES {
        assert_eq!(ids(node), std::slice::from_ref(&new), "{node}");
    }
    // Members that no longer understood each other would suspect each other now, one probe after the other.
    for node in NODES {
        lab.run(node, &["weft", "ping"]);
    }
    assert!(all_alive(&lab), "a member was lost without the old key");
    nothing_was_lost(pings);
    // A restart knows the new ring.
    lab.kill("n2");
    lab.start("n2");
    wait_until("n2 is back in the new ring", PATIENCE, || all_alive(&lab));
    lab.ping_all();
}

#[test]
fn a_nodes_own_key_is_changed_while_traffic_flows() {
    let lab = Lab::up(LabOptions::new("nodekey").nodes(4).started(3).pods(1));
    let pings = traffic(&lab);
    let routes: Vec<_> = NODES.iter().map(|node| lab.weft_routes(node)).collect();
    lab.run("n2", &["weft", "rotate-key"]);
    lab.run("n2", &["weft", "rotate-key"]);
    // A node that joins afterwards believes the new key as well.
    lab.start("n4");
    let all = ["n1", "n2", "n3", "n4"];
    wait_until("every route is right", PATIENCE, || lab.routes_are_right(&all));
    for (node, before) in NODES.iter().zip(routes) {
        assert!(lab.weft_routes(node).is_superset(&before), "{node} lost a route");
    }
    nothing_was_lost(pings);
    lab.kill("n2");
    lab.start("n2");
    wait_until("n2 is back with its new key", PATIENCE, || {
        lab.weft("n1", &["status"])["peers"]["alive"] == 3
    });
    wait_until("every route is right", PATIENCE, || lab.routes_are_right(&all));
    lab.ping_all();
}

#[test]
fn the_store_goes_and_comes_back_while_traffic_flows() {
    let lab = Lab::up(LabOptions::new("storeless").pods(1));
    let pings = traffic(&lab);
    let before = lab.leases("n1");
    assert!(before.len() >= 3, "{before:?}");
    let healthy = |node: &str| lab.weft(node, &["status"])["store"]["healthy"] == true;
    // Every node sees this directory. A directory in its place cannot be opened as a store, nor be made anew.
    lab.sh("n1", "cd /run/weft-lab/shared && mkdir away && mv store.db* away/ && mkdir store.db");
    wait_until("status says that the store is gone", PATIENCE, || NODES.iter().all(|node| !healthy(node)));

    // Pods still come and go, and a daemon still starts from what it knows.
    lab.tell(weft_tests::lab::Request::PodAdd { node: "n3".into(), pod: "x".into() });
    lab.kill("n3");
    lab.start("n3");
    wait_until("n3 is back without the store", PATIENCE, || {
        lab.weft("n3", &["status"])["peers"]["alive"] == 2
    });
    assert!(lab.routes_are_right(&NODES), "{:?}", lab.wrong_routes(&NODES));
    lab.ping_all();

    lab.sh("n1", "cd /run/weft-lab/shared && rmdir store.db && mv away/store.db* . && rmdir away");
    wait_until("status says that the store is back", PATIENCE, || NODES.iter().all(|node| healthy(node)));
    wait_until("the leases are as before", PATIENCE, || lab.leases("n1") == before);
    nothing_was_lost(pings);
    lab.ping_all();
}
