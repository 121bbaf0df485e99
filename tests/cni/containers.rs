//! Real containers: containerd and runc start them, and their network comes from weft-cni.

use std::time::Duration;

use serde_json::Value;
use weft_tests::lab::{Backend, Background, Lab, LabOptions, Request, skip, wait_until};

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

/// Says why containers cannot be made here.
fn impossible() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("containerd needs root".into());
    }
    let missing = ["containerd", "ctr", "runc", "busybox"].into_iter().find(|tool| {
        let search = format!("PATH=$PATH:/usr/sbin command -v {tool}");
        !std::process::Command::new("sh").args(["-c", &search]).output().unwrap().status.success()
    });
    missing.map(|tool| format!("{tool} is not installed (make deps)"))
}

fn pods(lab: &Lab, node: &str) -> Vec<Value> {
    lab.weft(node, &["pods"])["pods"].as_array().unwrap().clone()
}

#[test]
fn a_container_of_one_node_pings_a_container_of_another() {
    if let Some(reason) = impossible() {
        return skip(&reason);
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

/// The capabilities that `ctr run` gives.
const DEFAULT_CAPABILITIES: [&str; 14] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];

/// A root file system with the executables alone, and what they are linked to where they are not static.
const MAKE_ROOT: &str = r#"
set -eu
root=/run/engine/weft
mkdir -p "$root/usr/local/bin"
for name in weftd weft weft-cni; do
    path=$(command -v "$name"); cp -L "$path" "$root/usr/local/bin/"
    { ldd "$path" 2>/dev/null || true; } | grep -o '/[^ ]*' | while read -r library; do
        mkdir -p "$root$(dirname "$library")"; cp -L "$library" "$root$library"
    done
done
# As on a machine with systemd.
mount --make-rshared /run
"#;

/// The words for `ctr run` that make a container like one of a DaemonSet, and the command.
fn like_the_manifest(container: &Value, volumes: &Value, drop: &str) -> (Vec<String>, Vec<String>) {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_else(|| panic!("{value}")).to_owned();
    let security = &container["securityContext"];
    assert_eq!(security["capabilities"]["drop"][0], "ALL");
    assert!(security["privileged"].is_null() && security["readOnlyRootFilesystem"] == true);
    let added: Vec<String> = list(&security["capabilities"]["add"]).iter().map(text).collect();
    let mut words: Vec<String> = ["--read-only", "--net-host", "--seccomp"].map(str::to_owned).into();
    for name in DEFAULT_CAPABILITIES.into_iter().filter(|name| !added.iter().any(|added| added == name)) {
        words.extend(["--cap-drop".to_owned(), format!("CAP_{name}")]);
    }
    for name in added.iter().filter(|name| *name != drop) {
        words.extend(["--cap-add".to_owned(), format!("CAP_{name}")]);
    }
    for variable in list(&container["env"]) {
        // The rest differs by node, and is in the lab's configuration.
        if let Some(value) = variable["value"].as_str() {
            words.extend(["--env".to_owned(), format!("{}={value}", text(&variable["name"]))]);
        }
    }
    for mount in list(&container["volumeMounts"]) {
        let volume = list(volumes).into_iter().find(|volume| volume["name"] == mount["name"]).unwrap();
        // What is a ConfigMap in the cluster is a directory of the lab's node.
        let source = volume["hostPath"]["path"].as_str().unwrap_or("/etc/weft").to_owned();
        let slave = if mount["mountPropagation"] == "HostToContainer" { "rslave" } else { "rprivate" };
        let access = if mount["readOnly"] == true { "ro" } else { "rw" };
        let target = text(&mount["mountPath"]);
        words.extend([
            "--mount".to_owned(),
            format!("type=bind,src={source},dst={target},options=rbind:{slave}:{access}"),
        ]);
    }
    let command = list(&container["command"]).iter().chain(&list(&container["args"])).map(text).collect();
    (words, command)
}

/// The pods of deploy/, as a container of a lab's node.
fn contained(name: &str, backend: Backend, manifest: &str) {
    if let Some(reason) = impossible() {
        return skip(&reason);
    }
    let objects = weft_tests::manifest::objects(manifest);
    let pod =
        &objects.iter().find(|object| object["kind"] == "DaemonSet").unwrap()["spec"]["template"]["spec"];
    assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
    let lab = Lab::up(LabOptions::new(name).nodes(2).pods(1).backend(backend));
    let engine = Engine::start(&lab, "n1");
    lab.sh("n1", MAKE_ROOT);
    let run = |container: &Value, name: &str, drop: &str, more: &[&str]| {
        let (options, command) = like_the_manifest(container, &pod["volumes"], drop);
        let cgroup = engine.cgroup(name);
        let mut words = vec!["ctr", "-a", "/run/engine/socket", "run", "--cgroup", &cgroup];
        words.extend(more);
        words.extend(options.iter().map(String::as_str));
        words.extend(["--env", "WEFT_INSTANCE=a-pod", "--rootfs", "/run/engine/weft", name]);
        words.extend(command.iter().map(String::as_str));
        lab.exec("n1", &words)
    };
    let said = |output: &std::process::Output| {
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
    };

    // The init container: no capability at all.
    lab.sh("n1", "rm /etc/cni/net.d/10-weft.conflist /opt/cni/bin/weft-cni; cp -L /usr/lib/cni/* /opt/cni/bin/ 2>/dev/null || true");
    lab.sh("n1", "cat > /etc/weft/10-weft.conflist <<'END'\n{\"cniVersion\":\"1.0.0\",\"name\":\"weft\",\"plugins\":[{\"type\":\"weft-cni\"}]}\nEND");
    let installed = run(&pod["initContainers"][0], "install", "", &["--rm"]);
    assert!(installed.status.success(), "{}", said(&installed));
    lab.sh(
        "n1",
        "test -x /opt/cni/bin/weft-cni; cmp /etc/weft/10-weft.conflist /etc/cni/net.d/10-weft.conflist",
    );

    // Without either of its capabilities the daemon says which one is missing.
    let weftd = &pod["containers"][0];
    let shared = "type=bind,src=/run/weft-lab/shared,dst=/run/weft-lab/shared,options=rbind:rw";
    let refused = run(weftd, "unable", "NET_ADMIN", &["--rm", "--mount", shared]);
    assert!(!refused.status.success() && said(&refused).contains("CAP_NET_ADMIN"), "{}", said(&refused));

    // It takes over from the lab's own daemon, from the host into a container and its namespace of processes.
    let pings: Vec<_> = lab.ips("n2", "a").into_iter().map(|ip| lab.background_ping("n1/a", ip)).collect();
    let log = "file:///run/engine/weftd.log";
    let started = run(weftd, "weftd", "", &["--detach", "--log-uri", log, "--mount", shared]);
    assert!(started.status.success(), "{}", said(&started));
    let ready = || {
        let words = [
            "ctr",
            "-a",
            "/run/engine/socket",
            "tasks",
            "exec",
            "--exec-id",
            "ready",
            "weftd",
            "/usr/local/bin/weft",
            "ready",
        ];
        lab.exec("n1", &words).status.success()
    };
    let log = || lab.sh("n1", "cat /run/engine/weftd.log 2>/dev/null || true");
    wait_until("the daemon of the container serves", Duration::from_secs(30), ready);
    assert_eq!(lab.weft("n1", &["status"])["instance"], "a-pod", "{}", log());
    for ping in pings {
        let (sent, lost) = ping.stop();
        assert!(lost.is_empty() && sent > 10, "{lost:?} of {sent}: {}", log());
    }
    // Pods whose namespaces are newer than the container.
    lab.tell(Request::PodAdd { node: "n1".into(), pod: "new".into() });
    lab.meet();
    // A container's own /proc/sys is read-only.
    let path = "/proc/sys/net/ipv6/conf/weft0/accept_ra";
    lab.sh("n1", &format!("echo 1 >{path}; ip link set weft0 down; ip link set weft0 up"));
    wait_until("the setting is mended", Duration::from_secs(30), || {
        lab.sh("n1", &format!("cat {path}")) == "0\n"
    });
    let status = lab.weft("n1", &["status"]);
    assert!(
        status["reconcile"]["last_ok"] == true && status["warnings"].as_array().unwrap().is_empty(),
        "{status:#}"
    );
    lab.tell(Request::PodRemove { node: "n1".into(), pod: "new".into() });
    // Process 1 of a container has no default actions for signals.
    engine.ctr("tasks kill --signal SIGTERM weftd");
    let stopped =
        || engine.ctr("tasks ls").lines().any(|line| line.contains("weftd") && line.contains("STOPPED"));
    wait_until("it stops when told to", Duration::from_secs(30), stopped);
    assert!(log().contains("stopped, the data plane stays"), "{}", log());
    engine.ctr("tasks rm weftd");
    engine.ctr("containers rm weftd");
    // The lab's own daemon keeps its sessions for some seconds after it handed over.
    wait_until("the daemon before has ended", Duration::from_secs(30), || {
        let pid = lab.state().node("n1").expect("a node").daemon;
        !pid.is_some_and(runs)
    });
    lab.start("n1");
}

/// Whether a process runs; one that only waits to be reaped does not.
fn runs(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

#[test]
fn the_pod_of_the_manifest_serves_a_node_with_two_capabilities() {
    contained("podvx", Backend::Vxlan, include_str!("../../deploy/weft.yaml"));
}

#[test]
fn the_pod_of_the_wireguard_overlay_carries_tunnels() {
    let Some(kustomize) = weft_tests::manifest::tool("kustomize") else { return };
    let overlay = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/kubernetes/overlays/wireguard");
    let output = std::process::Command::new(kustomize).args(["build", overlay]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    contained("podwg", Backend::Wireguard, &String::from_utf8(output.stdout).unwrap());
}
