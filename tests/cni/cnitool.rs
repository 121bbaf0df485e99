//! libcni, the library that container runtimes call plugins with, through its own command `cnitool`.

use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::{Value, json};

use crate::node::{Node, Pod, executable, possible};

const MODULE: &str = "github.com/containernetworking/cni/cnitool@v1.3.0";

/// Builds cnitool once into the user's cache; `None` where there is no Go or no module proxy.
fn cnitool() -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))?;
    let bin = cache.join("weft-tests/bin");
    let tool = bin.join("cnitool");
    if tool.exists() {
        return Some(tool);
    }
    let built = Command::new("go").args(["install", MODULE]).env("GOBIN", &bin).output();
    match built {
        Ok(output) if output.status.success() => Some(tool),
        Ok(output) => {
            println!("SKIP: cnitool cannot be built: {}", String::from_utf8_lossy(&output.stderr));
            None
        }
        Err(error) => {
            println!("SKIP: Go is not installed ({error}); it builds cnitool");
            None
        }
    }
}

/// A directory with the plugins, and one with the network.
fn set_up(node: &Node, plugins: &Value) -> (PathBuf, PathBuf) {
    let (bin, net) = (node.dir.join("bin"), node.dir.join("net.d"));
    std::fs::create_dir(&bin).unwrap();
    std::fs::create_dir(&net).unwrap();
    std::os::unix::fs::symlink(executable("weft-cni"), bin.join("weft-cni")).unwrap();
    for plugin in ["portmap", "bandwidth"] {
        std::os::unix::fs::symlink(format!("/usr/lib/cni/{plugin}"), bin.join(plugin)).unwrap();
    }
    let list = json!({"cniVersion": "1.1.0", "name": "podnet", "plugins": plugins});
    std::fs::write(net.join("10-podnet.conflist"), list.to_string()).unwrap();
    (bin, net)
}

#[test]
fn every_verb_goes_through_libcni() {
    if !possible() {
        return;
    }
    let Some(tool) = cnitool() else { return };
    let node = Node::new();
    let (bin, net) = set_up(&node, &json!([{"type": "weft-cni", "socket": node.socket()}]));
    let run = |verb: &str, netns: &str, ifname: &str| -> Output {
        let environment = [
            ("CNI_PATH", bin.to_str().unwrap()),
            ("NETCONFPATH", net.to_str().unwrap()),
            ("CNI_IFNAME", ifname),
            ("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web"),
        ];
        node.exec(&tool, &[verb, "podnet", netns], &environment, b"")
    };
    let succeeds = |verb: &str, netns: &str, ifname: &str| -> Value {
        let output = run(verb, netns, ifname);
        let said = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{verb}: {said}");
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    };
    let pod = Pod::new();
    let before = node.links();
    succeeds("status", &pod.netns(), "eth0");
    let result = succeeds("add", &pod.netns(), "eth0");
    assert_eq!(result["cniVersion"], "1.1.0");
    assert_eq!(result["interfaces"][2]["mtu"], 1450);
    pod.run("ping -q -c1 -W2 10.32.4.1");
    succeeds("check", &pod.netns(), "eth0");
    pod.run("ip route del default");
    let failed = run("check", &pod.netns(), "eth0");
    assert!(!failed.status.success());
    assert!(String::from_utf8_lossy(&failed.stderr).contains("has no route"), "{failed:?}");
    pod.run("ip route add default via 10.32.4.1");
    let second = succeeds("add", &pod.netns(), "net1");
    assert_ne!(second["ips"], result["ips"]);
    succeeds("check", &pod.netns(), "eth0");
    succeeds("check", &pod.netns(), "net1");
    succeeds("del", &pod.netns(), "net1");
    succeeds("check", &pod.netns(), "eth0");
    succeeds("del", &pod.netns(), "eth0");
    succeeds("del", &pod.netns(), "eth0");
    assert_eq!(node.links(), before);
    succeeds("add", &pod.netns(), "eth0");
    succeeds("gc", &pod.netns(), "eth0");
    assert_eq!(node.links(), before, "cnitool's gc names nothing as valid");
    *node.blocked.lock().unwrap() = "no pod subnet is leased yet".into();
    let blocked = run("status", &pod.netns(), "eth0");
    assert!(!blocked.status.success());
    assert!(String::from_utf8_lossy(&blocked.stderr).contains("no pod subnet is leased yet"), "{blocked:?}");
}

#[test]
fn portmap_and_bandwidth_follow_in_the_chain() {
    if !possible() {
        return;
    }
    let Some(tool) = cnitool() else { return };
    let plugin = |name: &str| std::path::Path::new("/usr/lib/cni").join(name).exists();
    if !plugin("portmap") || !plugin("bandwidth") {
        return weft_tests::lab::skip(
            "the reference plugins are not installed (containernetworking-plugins)",
        );
    }
    let node = Node::new();
    // Those plugins of Debian 12 know versions up to 1.0.0.
    let chain = json!([
        {"type": "weft-cni", "socket": node.socket()},
        {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true},
        {"type": "bandwidth", "capabilities": {"bandwidth": true}},
    ]);
    let (bin, net) = set_up(&node, &chain);
    let list = json!({"cniVersion": "1.0.0", "name": "podnet", "plugins": chain});
    std::fs::write(net.join("10-podnet.conflist"), list.to_string()).unwrap();
    let wishes = json!({
        "portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}],
        // Towards the pod only: the other direction would load the module ifb, which makes devices in the machine itself.
        "bandwidth": {"ingressRate": 10_000_000, "ingressBurst": 1_000_000},
    });
    let wishes = wishes.to_string();
    let pod = Pod::new();
    let before = node.links();
    // Not CHECK: portmap 1.1.1 looks for the IPv4 rules among the IPv6 ones, behind the bridge plugin too.
    for verb in ["add", "del"] {
        let environment = [
            ("CNI_PATH", bin.to_str().unwrap()),
            ("NETCONFPATH", net.to_str().unwrap()),
            ("CAP_ARGS", wishes.as_str()),
        ];
        let output = node.exec(&tool, &[verb, "podnet", &pod.netns()], &environment, b"");
        let said = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{verb}: {said}");
        let rules = node.run("iptables-save -t nat");
        let limited = node.run("tc qdisc show").contains("qdisc tbf");
        assert_eq!(limited, verb == "add", "{verb}");
        assert_eq!(rules.contains("--dport 8080"), verb == "add", "{verb}: {rules}");
    }
    assert_eq!(node.links(), before);
}
