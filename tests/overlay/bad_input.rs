//! What people and machines get wrong: each is answered with a sentence that names it, and nothing that ran is lost.

use std::process::Output;
use std::time::Duration;

use serde_json::Value;
use weft_tests::lab::{Families, Lab, LabOptions, Request, wait_until};

const PATIENCE: Duration = Duration::from_secs(30);

const NETWORK: &str = r#"{"cniVersion":"1.0.0","name":"weft","type":"weft-cni"}"#;

/// Everything a command wrote.
fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Runs a daemon that is expected to refuse, and returns what it wrote.
fn refused(lab: &Lab, node: &str, command: &[&str]) -> String {
    let mut words = vec!["timeout", "-k", "5", "20"];
    words.extend(command);
    let output = lab.exec(node, &words);
    let said = text(&output);
    let code = output.status.code();
    assert!(
        code.is_some_and(|code| code != 0 && code < 124),
        "{command:?} did not refuse ({}): {said}",
        output.status
    );
    assert!(!said.contains("panicked"), "{said}");
    said
}

/// Runs a daemon with a configuration that was changed by sed, and returns why it refused.
fn refused_with(lab: &Lab, change: &str) -> String {
    lab.run("n1", &["sh", "-c", &format!("sed '{change}' /etc/weft/weft.toml > /run/bad.toml")]);
    refused(lab, "n1", &["weftd", "--config", "/run/bad.toml"])
}

fn assert_names(said: &str, words: &[&str]) {
    let lower = said.to_lowercase();
    for word in words {
        assert!(lower.contains(&word.to_lowercase()), "the answer does not name {word:?}: {said}");
    }
}

/// Calls the CNI plugin by hand; the exit code and the JSON it wrote.
fn cni(lab: &Lab, verb: &str, container: &str, netns: &str, input: &str) -> (i32, Value) {
    let environment = [
        format!("CNI_COMMAND={verb}"),
        format!("CNI_CONTAINERID={container}"),
        format!("CNI_NETNS={netns}"),
        "CNI_IFNAME=eth0".to_owned(),
        "CNI_PATH=/opt/cni/bin".to_owned(),
    ];
    let mut words = vec!["env"];
    words.extend(environment.iter().map(String::as_str));
    words.push("weft-cni");
    let output = lab.feed("n1", &words, input);
    let answer = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
    (output.status.code().unwrap_or(-1), answer)
}

/// The host ends of pods on n1.
fn ports(lab: &Lab) -> usize {
    lab.json("n1", &["ip", "-j", "link", "show", "master", "weft0"]).as_array().map_or(0, Vec::len)
}

fn pods(lab: &Lab) -> usize {
    lab.weft("n1", &["pods"])["pods"].as_array().map_or(0, Vec::len)
}

#[test]
fn a_configuration_that_cannot_work_is_refused_before_anything_is_touched() {
    let lab = Lab::up(LabOptions::new("badconf").nodes(1).started(0));
    let untouched = lab.run("n1", &["ip", "-o", "link", "show"]);

    // The cluster's addresses must not hide what the machine already talks to.
    let said = refused_with(&lab, "s#10.32.0.0/12#192.0.0.0/16#");
    assert_names(&said, &["192.0.0.0/16", "192.0.2.0/24"]);
    lab.sh("n1", "rm -f /etc/resolv.conf; echo nameserver 10.33.0.53 > /etc/resolv.conf");
    let said = refused_with(&lab, "");
    assert_names(&said, &["10.33.0.53", "10.32.0.0/12"]);
    lab.sh("n1", "rm -f /etc/resolv.conf");

    let said = refused_with(&lab, "s/node_prefix = 24/node_prefix = 8/");
    assert_names(&said, &["10.32.0.0/12", "8"]);
    let said = refused_with(&lab, "s/^device = /devise = /");
    assert_names(&said, &["devise", "device"]);
    let said = refused(&lab, "n1", &["weftd", "--config", "/run/none.toml"]);
    assert_names(&said, &["/run/none.toml"]);
    let said = refused_with(&lab, "s#^key_file.*#key_file = \"/run/none.key\"#");
    assert_names(&said, &["/run/none.key"]);
    assert_eq!(lab.run("n1", &["ip", "-o", "link", "show"]), untouched, "a refused start left something");

    // The same file, unchanged, works.
    lab.start("n1");
}

#[test]
fn a_missing_capability_is_named() {
    let lab = Lab::up(LabOptions::new("nocap").nodes(1).started(0));
    let said = refused(
        &lab,
        "n1",
        &[
            "setpriv",
            "--inh-caps",
            "-net_admin",
            "--bounding-set",
            "-net_admin",
            "weftd",
            "--config",
            "/etc/weft/weft.toml",
        ],
    );
    assert_names(&said, &["CAP_NET_ADMIN"]);
}

#[test]
fn a_second_daemon_on_one_node_is_refused_and_the_first_goes_on() {
    let lab = Lab::up(LabOptions::new("second").nodes(2).pods(1));
    let ping = lab.background_ping("n1/a", lab.ip("n2", "a"));
    let said = refused(&lab, "n1", &["weftd", "--config", "/etc/weft/weft.toml"]);
    assert_names(&said, &["already"]);
    assert_eq!(lab.weft("n1", &["status"])["peers"]["alive"], 1);
    let (sent, lost) = ping.stop();
    assert!(lost.is_empty(), "{lost:?} of {sent} lost");
}

#[test]
fn a_cidr_too_small_for_the_nodes_leaves_the_last_one_waiting_and_saying_so() {
    let small = "[cluster]\ncidrs = [{ cidr = \"10.32.0.0/23\", node_prefix = 24 }]";
    let lab =
        Lab::up(LabOptions::new("small").nodes(3).started(2).pods(1).overlay(Families::V4).config(small));
    let ping = lab.background_ping("n1/a", lab.ip("n2", "a"));
    // It keeps running: a block may become free.
    let _third = lab.background("n3", &["weftd", "--config", "/etc/weft/weft.toml"]);
    wait_until("the third node says what is wrong", PATIENCE, || {
        let output = lab.exec("n3", &["weft", "-o", "json", "status"]);
        let status: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        status["warnings"].to_string().contains("10.32.0.0/23")
    });
    let config = r#"{"cniVersion":"1.1.0","name":"weft","type":"weft-cni"}"#;
    let output = lab.feed("n3", &["env", "CNI_COMMAND=STATUS", "CNI_PATH=/opt/cni/bin", "weft-cni"], config);
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    assert_eq!(answer["code"], 50, "{answer}");
    let (sent, lost) = ping.stop();
    assert!(lost.is_empty(), "the nodes with a block were disturbed: {lost:?} of {sent} lost");
    // A node that leaves makes room.
    lab.tell(Request::PodRemove { node: "n2".into(), pod: "a".into() });
    lab.run("n2", &["weft", "leave"]);
    wait_until("the third node has the block", PATIENCE, || !lab.subnets("n3").is_empty());
}

#[test]
fn an_exhausted_pool_refuses_one_more_pod_and_serves_again_after_one_went() {
    let tiny = "[cluster]\ncidrs = [{ cidr = \"10.32.0.0/24\", node_prefix = 29 }]";
    let lab = Lab::up(LabOptions::new("tiny").nodes(2).pods(1).overlay(Families::V4).config(tiny));
    let add = |pod: &str| lab.handle().request(&Request::PodAdd { node: "n1".into(), pod: pod.into() });
    let mut made = vec!["a".to_owned()];
    let said = loop {
        assert!(made.len() < 8, "a /29 gave {} addresses", made.len());
        let pod = format!("p{}", made.len());
        match add(&pod) {
            Ok(_) => made.push(pod),
            Err(error) => break format!("{error:#}"),
        }
    };
    // Eight less the network, the gateway and the broadcast address.
    assert_eq!(made.len(), 5, "{said}");
    assert_names(&said, &["10.32.0."]);
    assert_eq!(ports(&lab), made.len(), "the refused pod left something");
    lab.ping_all();
    lab.tell(Request::PodRemove { node: "n1".into(), pod: "p1".into() });
    add("again").expect("there is room again");
    lab.ping_all();
}

#[test]
fn what_a_runtime_gets_wrong_is_answered_with_the_specs_codes() {
    let lab = Lab::up(LabOptions::new("badcni").nodes(2).pods(1));
    let before = (ports(&lab), pods(&lab));
    let ping = lab.background_ping("n1/a", lab.ip("n2", "a"));

    let (code, answer) = cni(&lab, "ADD", "x1", "/run/netns/a", "{ this is not JSON");
    assert_ne!(code, 0);
    assert_eq!(answer["code"], 6, "broken JSON: {answer}");

    let (code, answer) = cni(&lab, "ADD", "x2", "/run/netns/a", &NETWORK.replace("1.0.0", "9.9.9"));
    assert_ne!(code, 0);
    assert_eq!(answer["code"], 1, "unknown version: {answer}");
    assert_names(&answer.to_string(), &["9.9.9"]);

    let (code, answer) = cni(&lab, "ADD", "x3", "/run/netns/gone", NETWORK);
    assert_ne!(code, 0);
    assert_names(&answer.to_string(), &["/run/netns/gone"]);
    let (code, answer) = cni(&lab, "DEL", "x3", "/run/netns/gone", NETWORK);
    assert_eq!(code, 0, "DEL after the netns vanished: {answer}");
    let (code, answer) = cni(&lab, "DEL", "never-seen", "", NETWORK);
    assert_eq!(code, 0, "DEL of the unknown: {answer}");

    lab.sh("n1", "ip netns add one; ip netns add two");
    let (code, first) = cni(&lab, "ADD", "x4", "/run/netns/one", NETWORK);
    assert_eq!(code, 0, "{first}");
    let (code, again) = cni(&lab, "ADD", "x4", "/run/netns/one", NETWORK);
    assert_eq!((code, &again["ips"]), (0, &first["ips"]), "a repeated ADD has the same result");
    let (code, answer) = cni(&lab, "ADD", "x4", "/run/netns/two", NETWORK);
    assert_ne!(code, 0, "a duplicate ADD with another netns: {answer}");
    assert_names(&answer.to_string(), &["x4"]);
    assert_eq!(
        lab.run("n1", &["ip", "-n", "two", "-o", "link"]).lines().count(),
        1,
        "the refused netns got a device"
    );

    // A pod whose netns goes without DEL, as after a crash of the runtime.
    lab.sh("n1", "ip netns del one; ip netns del two");
    let (code, answer) = cni(&lab, "DEL", "x4", "/run/netns/one", NETWORK);
    assert_eq!(code, 0, "{answer}");
    wait_until("nothing is left of it", PATIENCE, || (ports(&lab), pods(&lab)) == before);
    let (sent, lost) = ping.stop();
    assert!(lost.is_empty(), "{lost:?} of {sent} lost");
}

#[test]
fn without_a_daemon_the_plugin_says_try_again_later() {
    let lab = Lab::up(LabOptions::new("nodaemon").nodes(1).pods(1));
    lab.kill("n1");
    lab.sh("n1", "ip netns add late");
    let (code, answer) = cni(&lab, "ADD", "x5", "/run/netns/late", NETWORK);
    assert_ne!(code, 0);
    assert_eq!(answer["code"], 11, "{answer}");
    lab.start("n1");
    let (code, answer) = cni(&lab, "ADD", "x5", "/run/netns/late", NETWORK);
    assert_eq!(code, 0, "{answer}");
    lab.ping_all();
}

#[test]
fn a_node_with_another_cluster_key_is_left_out_and_both_sides_say_why() {
    let lab = Lab::up(
        LabOptions::new("wrongkey").nodes(3).started(2).pods(1).store(weft_tests::lab::Store::Static),
    );
    lab.sh(
        "n3",
        "head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n' > /run/other.key; chmod 600 /run/other.key
         sed -i 's#^key_file.*#key_file = \"/run/other.key\"#' /etc/weft/weft.toml",
    );
    lab.start("n3");
    let told =
        |node: &str| lab.weft(node, &["status"])["warnings"].to_string().to_lowercase().contains("key");
    wait_until("n3 says that keys differ", PATIENCE, || told("n3"));
    wait_until("n1 says that keys differ", PATIENCE, || told("n1"));
    assert_eq!(lab.weft("n1", &["status"])["peers"]["alive"], 1);
    assert!(lab.routes_are_right(&["n1", "n2"]), "{:?}", lab.wrong_routes(&["n1", "n2"]));
    assert!(lab.weft_routes("n3").is_empty(), "n3 believed somebody");
}

#[test]
fn a_second_node_of_the_same_name_is_refused_and_the_first_keeps_its_traffic() {
    let lab = Lab::up(
        LabOptions::new("twin").nodes(3).started(2).pods(1).node_config("n3", "[node]\nname = \"n2\""),
    );
    let ping = lab.background_ping("n1/a", lab.ip("n2", "a"));
    let routes = lab.weft_routes("n1");
    let log = "/run/twin.log";
    let _twin =
        lab.background("n3", &["sh", "-c", &format!("exec weftd --config /etc/weft/weft.toml > {log} 2>&1")]);
    wait_until("the twin says that its name is taken", PATIENCE, || {
        let output = lab.exec("n3", &["weft", "-o", "json", "status"]);
        let said = text(&output) + &lab.run("n3", &["cat", log]);
        said.contains("n2") && said.to_lowercase().contains("name")
    });
    let (sent, lost) = ping.stop();
    assert!(lost.is_empty(), "{lost:?} of {sent} lost");
    assert_eq!(lab.weft_routes("n1"), routes, "the twin moved routes");
}

#[test]
fn a_full_disk_under_the_journal_refuses_new_pods_and_keeps_the_old_ones() {
    let lab = Lab::up(LabOptions::new("full").nodes(2).started(0).pods(1));
    lab.sh("n1", "mount -t tmpfs -o size=2m,mode=0700 small /var/lib/weft");
    lab.start("n1");
    lab.start("n2");
    wait_until("both nodes have routes to each other", PATIENCE, || {
        ["n1", "n2"].iter().all(|node| {
            lab.weft(node, &["routes"])["routes"].as_array().is_some_and(|routes| !routes.is_empty())
        })
    });
    lab.ping_all();
    let before = (ports(&lab), pods(&lab));
    lab.sh("n1", "dd if=/dev/zero of=/var/lib/weft/filler bs=4k 2>/dev/null || true");
    let add = |pod: &str| lab.handle().request(&Request::PodAdd { node: "n1".into(), pod: pod.into() });
    // What SQLite had already allocated may take a few more pods.
    let mut made = 0;
    let said = loop {
        assert!(made < 200, "the disk is full and pods go on being made");
        match add(&format!("f{made}")) {
            Ok(_) => made += 1,
            Err(error) => break format!("{error:#}"),
        }
    };
    assert!(["full", "space"].iter().any(|word| said.to_lowercase().contains(word)), "{said}");
    assert_eq!(
        (ports(&lab), pods(&lab)),
        (before.0 + made, before.1 + made),
        "the refused pod left something"
    );
    lab.ping_all();
    lab.sh("n1", "rm /var/lib/weft/filler");
    add("after").expect("there is room again");
    lab.ping_all();
}
