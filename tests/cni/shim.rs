//! The executable, called as a container runtime calls it.

use serde_json::{Value, json};

use crate::node::{Node, Pod, executable, possible};

fn with(mut config: Value, key: &str, value: Value) -> Value {
    config[key] = value;
    config
}

#[test]
fn every_verb_of_every_version_does_its_part() {
    if !possible() {
        return;
    }
    let node = Node::new();
    let before = node.links();
    for (version, container) in [("0.4.0", "c04"), ("1.0.0", "c10"), ("1.1.0", "c11")] {
        let (pod, config) = (Pod::new(), node.config(version));
        let call = |verb: &str, config: &Value| node.weft(verb, container, "eth0", &pod.netns(), config);
        let result = call("ADD", &config).expect("attached");
        assert_eq!(result["cniVersion"], version);
        assert_eq!(result["ips"].as_array().unwrap().len(), 2);
        assert_eq!(result["ips"][0]["version"], if version == "0.4.0" { json!("4") } else { Value::Null });
        assert_eq!(
            result["interfaces"][2]["mtu"],
            if version == "1.1.0" { json!(1450) } else { Value::Null }
        );
        assert_eq!(call("ADD", &config).expect("repeated"), result);
        let checked = with(config.clone(), "prevResult", result.clone());
        assert_eq!(call("CHECK", &checked), Ok(Value::Null));
        pod.run("ip link set eth0 down");
        let error = call("CHECK", &checked).expect_err("the interface is down");
        assert_eq!(error["code"], 100);
        assert!(error["msg"].as_str().unwrap().contains("eth0 is down"), "{error}");
        for _ in 0..2 {
            assert_eq!(call("DEL", &checked), Ok(Value::Null));
        }
        assert_eq!(call("CHECK", &checked).expect_err("gone")["code"], 3);
        for verb in ["STATUS", "GC"] {
            let outcome = node.weft(verb, "", "", "", &config);
            if version == "1.1.0" {
                assert_eq!(outcome, Ok(Value::Null));
            } else {
                assert_eq!(outcome.expect_err("not in this version")["code"], 1);
            }
        }
    }
    assert_eq!(node.links(), before);
}

#[test]
fn version_needs_no_daemon() {
    if !possible() {
        return;
    }
    let node = Node::without_bridge();
    let answer = node.weft("VERSION", "", "", "", &json!({"cniVersion": "1.0.0"})).expect("an answer");
    assert_eq!(answer, json!({"cniVersion": "1.0.0", "supportedVersions": ["0.4.0", "1.0.0", "1.1.0"]}));
}

#[test]
fn a_missing_daemon_is_named_with_what_to_do() {
    if !possible() {
        return;
    }
    let mut node = Node::new();
    let pod = Pod::new();
    node.stop();
    for (verb, code) in [("ADD", 11), ("DEL", 11), ("CHECK", 11), ("STATUS", 50)] {
        let config = with(node.config("1.1.0"), "prevResult", json!({}));
        let error = node.weft(verb, "c1", "eth0", &pod.netns(), &config).expect_err("nobody is there");
        assert_eq!(error["code"], code, "{verb}: {error}");
        assert!(error["msg"].as_str().unwrap().contains("systemctl start weftd"), "{error}");
    }
    assert_eq!(pod.json("ip -j link").as_array().unwrap().len(), 1);
}

#[test]
fn an_add_that_begins_before_the_daemon_succeeds_once_it_is_there() {
    if !possible() {
        return;
    }
    let mut node = Node::new();
    node.stop();
    let (pod, config) = (Pod::new(), node.config("1.1.0"));
    let waiting = node.begin(&executable("weft-cni"), "ADD", "c1", "eth0", &pod.netns(), &config);
    waiting.await_sleep();
    node.start();
    let result = waiting.answer().expect("attached");
    assert_eq!(result["ips"].as_array().unwrap().len(), 2);
    pod.run("ping -q -c1 -W1 10.32.4.1");
}

#[test]
fn an_add_waits_for_a_daemon_that_is_not_ready_or_ends_in_the_middle() {
    if !possible() {
        return;
    }
    let mut node = Node::new();
    let (pods, config) = ([Pod::new(), Pod::new()], node.config("1.1.0"));
    let begin = |node: &Node, container: &str, pod: &Pod| {
        node.begin(&executable("weft-cni"), "ADD", container, "eth0", &pod.netns(), &config)
    };
    *node.blocked.lock().unwrap() = "no pod subnet is leased yet".into();
    let waiting = begin(&node, "c1", &pods[0]);
    waiting.await_sleep();
    node.blocked.lock().unwrap().clear();
    waiting.answer().expect("attached once nothing is in the way");
    node.stop();
    let listener = std::os::unix::net::UnixListener::bind(node.socket()).unwrap();
    let waiting = begin(&node, "c2", &pods[1]);
    drop(listener.accept());
    drop(listener);
    std::fs::remove_file(node.socket()).unwrap();
    node.start();
    waiting.answer().expect("attached by the next daemon");
}

#[test]
fn an_add_that_is_killed_while_it_waits_leaves_nothing() {
    if !possible() {
        return;
    }
    let mut node = Node::new();
    let links = node.links();
    node.stop();
    let (pod, config) = (Pod::new(), node.config("1.1.0"));
    let waiting = node.begin(&executable("weft-cni"), "ADD", "c1", "eth0", &pod.netns(), &config);
    waiting.await_sleep();
    waiting.kill();
    node.start();
    assert_eq!(node.weft("DEL", "c1", "eth0", &pod.netns(), &config), Ok(Value::Null));
    assert_eq!(node.links(), links);
    assert_eq!(pod.json("ip -j link").as_array().unwrap().len(), 1);
    // The address that it would have had is still the next.
    let result = node.weft("ADD", "c2", "eth0", &pod.netns(), &config).expect("attached");
    assert_eq!(result["ips"][0]["address"], first_address());
}

/// The address that the first pod of a node of these tests gets.
fn first_address() -> Value {
    let (node, pod) = (Node::new(), Pod::new());
    let result = node.weft("ADD", "c1", "eth0", &pod.netns(), &node.config("1.1.0")).expect("attached");
    result["ips"][0]["address"].clone()
}

#[test]
fn a_daemon_that_ends_in_the_middle_is_no_result() {
    if !possible() {
        return;
    }
    let node = Node::without_bridge();
    let listener = std::os::unix::net::UnixListener::bind(node.socket()).unwrap();
    let thread = std::thread::spawn(move || drop(listener.accept()));
    let error = node.weft("STATUS", "", "", "", &node.config("1.1.0")).expect_err("no answer");
    assert_eq!(error["code"], 11);
    assert!(error["msg"].as_str().unwrap().contains("before it answered"), "{error}");
    thread.join().unwrap();
}

#[test]
fn bad_input_gets_the_specs_code_and_changes_nothing() {
    if !possible() {
        return;
    }
    let node = Node::new();
    let (pod, links) = (Pod::new(), node.links());
    let (netns, config) = (pod.netns(), node.config("1.0.0"));
    let gone = Pod::new().netns();
    let cases: [(&str, &str, &str, Value, u64, &str); 9] = [
        ("c1", "eth0", &netns, with(config.clone(), "cniVersion", json!("7.0.0")), 1, "7.0.0"),
        ("", "eth0", &netns, config.clone(), 4, "CNI_CONTAINERID"),
        ("c1", "a/b", &netns, config.clone(), 4, "CNI_IFNAME"),
        ("c1", "eth0", "", config.clone(), 4, "CNI_NETNS"),
        ("c1", "eth0", &gone, config.clone(), 3, "does not exist"),
        ("c1", "eth0", "/etc/hostname", config.clone(), 3, "no network namespace"),
        ("c1", "eth0", &netns, with(config.clone(), "name", json!("")), 7, "no name"),
        ("c1", "eth0", &netns, with(config.clone(), "mtu", json!(9000)), 7, "1450"),
        (
            "c1",
            "eth0",
            &netns,
            with(config.clone(), "runtimeConfig", json!({"ips": ["192.0.2.9"]})),
            101,
            "192.0.2.9",
        ),
    ];
    for (container, ifname, netns, config, code, words) in cases {
        let error = node.weft("ADD", container, ifname, netns, &config).expect_err(words);
        assert_eq!(error["code"], code, "{error}");
        assert!(error["msg"].as_str().unwrap().contains(words), "{error} does not say {words}");
    }
    let environment =
        [("CNI_COMMAND", "ADD"), ("CNI_CONTAINERID", "c1"), ("CNI_NETNS", &netns), ("CNI_IFNAME", "eth0")];
    let output = node.exec(&executable("weft-cni"), &[], &environment, b"{\"cniVersion\": \"1.0.0\",");
    assert_eq!(output.status.code(), Some(1));
    let error: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(error["code"], 6, "{error}");
    assert_eq!(node.links(), links);
    assert_eq!(pod.json("ip -j link").as_array().unwrap().len(), 1);
    // The pool lost nothing to all that: the first address is still the next.
    let result = node.weft("ADD", "c1", "eth0", &netns, &config).expect("attached");
    let first = result["ips"][0]["address"].clone();
    node.weft("DEL", "c1", "eth0", &netns, &config).unwrap();
    assert!(first.as_str().unwrap().starts_with("10.32.4."));
}

#[test]
fn a_duplicate_add_with_another_namespace_is_refused() {
    if !possible() {
        return;
    }
    let node = Node::new();
    let (first, second, config) = (Pod::new(), Pod::new(), node.config("1.1.0"));
    let result = node.weft("ADD", "c1", "eth0", &first.netns(), &config).expect("attached");
    let error = node.weft("ADD", "c1", "eth0", &second.netns(), &config).expect_err("in use");
    assert_eq!(error["code"], 102);
    assert!(error["msg"].as_str().unwrap().contains("DEL it first"), "{error}");
    let checked = with(config, "prevResult", result);
    assert_eq!(node.weft("CHECK", "c1", "eth0", &first.netns(), &checked), Ok(Value::Null));
}

#[test]
fn status_names_the_step_that_is_blocked() {
    if !possible() {
        return;
    }
    let node = Node::new();
    *node.blocked.lock().unwrap() = "no pod subnet is leased yet: the store is not reachable".into();
    let error = node.weft("STATUS", "", "", "", &node.config("1.1.0")).expect_err("blocked");
    assert_eq!(error["code"], 50);
    assert!(error["msg"].as_str().unwrap().contains("the store is not reachable"), "{error}");
    let pod = Pod::new();
    let error = node.weft("ADD", "c1", "eth0", &pod.netns(), &node.config("1.1.0")).expect_err("blocked");
    assert_eq!(error["code"], 11);
}

#[test]
fn gc_removes_what_the_runtime_does_not_list() {
    if !possible() {
        return;
    }
    let node = Node::new();
    let (pods, config) = ([Pod::new(), Pod::new(), Pod::new()], node.config("1.1.0"));
    let other = with(config.clone(), "name", json!("other"));
    let attach = |container: &str, pod: &Pod, config: &Value| {
        node.weft("ADD", container, "eth0", &pod.netns(), config).expect("attached")
    };
    attach("stays", &pods[0], &config);
    attach("goes", &pods[1], &config);
    attach("foreign", &pods[2], &other);
    let valid =
        json!([{"containerID": "stays", "ifname": "eth0"}, {"containerID": "unknown", "ifname": "eth0"}]);
    assert_eq!(
        node.weft("GC", "", "", "", &with(config, "cni.dev/valid-attachments", valid)),
        Ok(Value::Null)
    );
    let has_eth0 = |pod: &Pod| pod.try_run("ip link show eth0").status.success();
    assert_eq!(pods.each_ref().map(has_eth0), [true, false, true], "other networks are not this call's");
}

#[test]
fn a_pod_survives_a_restart_of_the_daemon() {
    if !possible() {
        return;
    }
    let mut node = Node::new();
    let (pod, next, config) = (Pod::new(), Pod::new(), node.config("1.0.0"));
    let result = node.weft("ADD", "c1", "eth0", &pod.netns(), &config).expect("attached");
    node.stop();
    pod.run("ping -q -c1 -W1 10.32.4.1");
    node.start();
    assert_eq!(node.weft("ADD", "c1", "eth0", &pod.netns(), &config).expect("repeated"), result);
    let other = node.weft("ADD", "c2", "eth0", &next.netns(), &config).expect("attached");
    assert_ne!(other["ips"][0]["address"], result["ips"][0]["address"]);
    node.weft("DEL", "c1", "eth0", "", &config).expect("without a namespace");
    assert!(!pod.try_run("ip link show eth0").status.success());
}

#[test]
fn a_chain_of_plugins_gets_the_result_and_dns_goes_through() {
    if !possible() {
        return;
    }
    let node = Node::new();
    let config = with(
        node.config("1.0.0"),
        "dns",
        json!({"nameservers": ["10.32.0.10"], "search": ["cluster.local"]}),
    );
    let pod = Pod::new();
    let result = node.weft("ADD", "c1", "eth0", &pod.netns(), &config).expect("attached");
    assert_eq!(result["dns"], json!({"nameservers": ["10.32.0.10"], "search": ["cluster.local"]}));
    let mut forward = json!({"cniVersion": "1.0.0", "name": "podnet", "type": "portmap", "capabilities": {"portMappings": true}});
    forward["runtimeConfig"] =
        json!({"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]});
    forward["prevResult"] = result.clone();
    let plugin = std::path::Path::new("/usr/lib/cni/portmap");
    if !plugin.exists() {
        return weft_tests::lab::skip("portmap is not installed (containernetworking-plugins)");
    }
    let after =
        node.cni(plugin, "ADD", "c1", "eth0", &pod.netns(), &forward).expect("portmap takes our result");
    assert_eq!(after["ips"], result["ips"]);
    let rules = node.run("iptables-save -t nat");
    let target = result["ips"][0]["address"].as_str().unwrap().split('/').next().unwrap();
    assert!(rules.contains(&format!("--to-destination {target}:80")), "{rules}");
    let checked = with(node.config("1.0.0"), "prevResult", after);
    assert_eq!(node.weft("CHECK", "c1", "eth0", &pod.netns(), &checked), Ok(Value::Null));
}

#[test]
fn the_shipped_executable_is_static() {
    let Some(dir) = std::env::var_os("WEFT_BIN_DIR") else {
        println!("SKIP: WEFT_BIN_DIR names no release build");
        return;
    };
    let path = std::path::Path::new(&dir).join("weft-cni");
    let headers = std::process::Command::new("ldd").arg(&path).output().expect("ldd is part of libc-bin");
    let said =
        String::from_utf8_lossy(&headers.stdout).into_owned() + &String::from_utf8_lossy(&headers.stderr);
    assert!(said.contains("statically linked") || said.contains("not a dynamic executable"), "{said}");
    assert!(std::fs::metadata(&path).unwrap().len() < 4 << 20, "it is started for every pod");
}
