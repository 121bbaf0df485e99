//! Real containers: containerd and runc start them, and their network comes from weft-cni.

use std::time::Duration;

use serde_json::Value;
use weft_tests::lab::{Background, Lab, LabOptions, skip, wait_until};

/// Where a node's container engine keeps everything, inside the node.
const HOME: &str = "/run/engine";
const IMAGE: &str = "docker.io/local/busybox:1";

const CONFIG: &str = r#"
version = 2
root = "/run/engine/root"
state = "/run/engine/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
address = "/run/engine/socket"
[ttrpc]
address = "/run/engine/socket.ttrpc"
"#;

/// Makes an image of busybox alone, in the form of `docker save`.
const MAKE_IMAGE: &str = r#"
set -eu
mkdir -p /run/engine/image/bin && cd /run/engine
cp "$(command -v busybox)" image/bin/
tar -C image -cf layer.tar .
layer=$(sha256sum layer.tar | cut -d' ' -f1)
echo '{"architecture":"amd64","os":"linux","config":{"Env":["PATH=/bin"]},"rootfs":{"type":"layers","diff_ids":["sha256:'$layer'"]}}' > config.json
echo '[{"Config":"config.json","RepoTags":["local/busybox:1"],"Layers":["layer.tar"]}]' > manifest.json
tar -cf image.tar config.json layer.tar manifest.json
"#;

/// The container engine of one node.
struct Engine<'lab> {
    lab: &'lab Lab,
    node: &'static str,
    _daemon: Background,
}

impl<'lab> Engine<'lab> {
    fn start(lab: &'lab Lab, node: &'static str) -> Self {
        lab.sh(node, &format!("mkdir -p {HOME} && cat > {HOME}/config.toml <<'END'{CONFIG}END\n"));
        lab.sh(node, MAKE_IMAGE);
        let daemon = lab
            .background(node, &["sh", "-c", "exec containerd -c /run/engine/config.toml 2>/run/engine/log"]);
        let engine = Self { lab, node, _daemon: daemon };
        let answers = || lab.exec(node, &["ctr", "-a", "/run/engine/socket", "version"]).status.success();
        wait_until("containerd answers", Duration::from_secs(30), answers);
        engine.ctr("images import --snapshotter native /run/engine/image.tar");
        engine
    }

    fn ctr(&self, words: &str) -> String {
        let words: Vec<&str> =
            ["ctr", "-a", "/run/engine/socket"].into_iter().chain(words.split(' ')).collect();
        self.lab.run(self.node, &words)
    }

    /// Runs a container to its end and returns what it wrote.
    fn run(&self, name: &str, words: &str) -> String {
        self.ctr(&format!(
            "run --rm --cni --snapshotter native --cgroup {} {IMAGE} {name} {words}",
            self.cgroup(name)
        ))
    }

    /// Starts a container that stays until it is removed.
    fn start_container(&self, name: &str) {
        self.ctr(&format!(
            "run --detach --cni --snapshotter native --cgroup {} {IMAGE} {name} /bin/busybox sleep 3600",
            self.cgroup(name)
        ));
    }

    fn exec(&self, name: &str, words: &str) -> String {
        self.ctr(&format!("tasks exec --exec-id {} {name} {words}", words.len()))
    }

    /// The network configuration of a container that runs, from the inside.
    fn addresses(&self, name: &str) -> Vec<String> {
        let text = self.exec(name, "/bin/busybox ip addr show dev eth0 scope global");
        let mut words = text.split_whitespace();
        let mut found = Vec::new();
        while let Some(word) = words.next() {
            if let ("inet" | "inet6", Some(address)) = (word, words.clone().next()) {
                found.push(address.split('/').next().unwrap().to_owned());
            }
        }
        found
    }

    /// One level, so that nothing is left when the container goes.
    fn cgroup(&self, name: &str) -> String {
        format!("/weft-{}-{}-{name}", std::process::id(), self.node)
    }

    /// The process id of a container, as the node's processes see it.
    fn process(&self, name: &str) -> String {
        let tasks = self.ctr("tasks ls");
        let line = tasks.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{tasks}"));
        line.split_whitespace().nth(1).unwrap().to_owned()
    }

    fn stop_container(&self, name: &str) {
        self.ctr(&format!("tasks kill --signal SIGKILL {name}"));
        let ended =
            || !self.ctr("tasks ls").lines().any(|line| line.contains(name) && line.contains("RUNNING"));
        wait_until("the container ended", Duration::from_secs(30), ended);
        // It exits as the container did, which was killed.
        self.lab.exec(self.node, &["ctr", "-a", "/run/engine/socket", "tasks", "rm", name]);
        self.ctr(&format!("containers rm {name}"));
    }
}

fn pods(lab: &Lab, node: &str) -> Vec<Value> {
    lab.weft(node, &["pods"])["pods"].as_array().unwrap().clone()
}

#[test]
fn a_container_of_one_node_pings_a_container_of_another() {
    if !nix::unistd::geteuid().is_root() {
        return skip("containerd needs root");
    }
    let missing = ["containerd", "ctr", "runc", "busybox"].into_iter().find(|tool| {
        let search = format!("PATH=$PATH:/usr/sbin command -v {tool}");
        !std::process::Command::new("sh").args(["-c", &search]).output().unwrap().status.success()
    });
    if let Some(tool) = missing {
        return skip(&format!("{tool} is not installed (make deps)"));
    }
    let lab = Lab::up(LabOptions::new("containers").nodes(2).pods(0));
    let [first, second] = ["n1", "n2"].map(|node| Engine::start(&lab, node));
    second.start_container("server");
    let targets = second.addresses("server");
    assert_eq!(targets.len(), 2, "{targets:?}: one address a family");
    let known = pods(&lab, "n2");
    assert_eq!(known.len(), 1, "{known:?}");
    assert!(
        targets.iter().all(|target| known[0]["ips"].to_string().contains(target)),
        "{known:?} {targets:?}"
    );
    for target in &targets {
        wait_until("the nodes know each other's pods", Duration::from_secs(30), || {
            lab.exec("n1", &["ping", "-c1", "-W1", target]).status.success()
        });
        let said = first.run("client", &format!("/bin/busybox ping -c 3 {target}"));
        assert!(said.contains("3 packets received"), "{said}");
        assert_eq!(pods(&lab, "n1"), Vec::<Value>::new(), "ctr called DEL when the container ended");
    }
    // The server sees the caller's own address: there is no NAT between pods.
    first.start_container("caller");
    let callers = first.addresses("caller");
    let server = second.process("server");
    for (target, caller) in targets.iter().zip(&callers) {
        let requests = "icmp[icmptype]=8 or (icmp6 and ip6[40]=128)";
        let inside = [
            "nsenter", "--net", "--target", &server, "timeout", "60", "tcpdump", "-n", "-l", "-c1", requests,
        ];
        let witness = lab.background("n2", &inside);
        // The first of them may pass before the witness looks.
        first.exec("caller", &format!("/bin/busybox ping -c 5 {target}"));
        let seen = witness.finish();
        assert!(seen.contains(&format!("{caller} > {target}")), "{caller} is seen as {seen}");
    }
    first.stop_container("caller");
    second.stop_container("server");
}
