//! Attaches pods in a real kernel, inside network namespaces of the test's own, judged by `ip -j` and ping.

#![allow(clippy::unwrap_used, reason = "a test that unwraps names its line")]

mod netns;

use std::collections::BTreeSet;
use std::fs::File;
use std::path::PathBuf;
use std::process::Command as Process;
use std::sync::mpsc;
use std::thread::JoinHandle;

use netns::Netns;
use nix::sched::{CloneFlags, unshare};
use serde_json::Value;
use weft_daemon::attach::{
    self, AddPlan, Attachment, CheckPlan, CheckRequest, CniError, CniRequest, CniResult, Code, Command,
    Condition, Network, PodAddress, PodRequest,
};

const BRIDGE: &str = "weft0";

/// Runs a test on a thread with a network namespace of its own, which has a bridge like a node's.
fn on_a_node(test: impl FnOnce() + Send + 'static) {
    let Some(node) = Netns::new() else { return };
    node.run(move || {
        ip("link add weft0 address 02:00:00:00:00:fe mtu 1450 type bridge");
        std::fs::write("/proc/sys/net/ipv6/conf/weft0/accept_dad", "0").expect("IPv6 is on");
        ip("addr add 10.32.4.1/24 dev weft0");
        ip("addr add fd00:32:4::1/64 dev weft0 nodad");
        ip("link set weft0 up");
        test();
    });
}

/// A network namespace that a parked thread keeps.
struct Pod {
    path: PathBuf,
    stop: mpsc::Sender<()>,
    thread: Option<JoinHandle<()>>,
}

impl Pod {
    fn new() -> Self {
        let (stop, stopped) = mpsc::channel();
        let (tell, told) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("root may unshare");
            tell.send(nix::unistd::gettid()).expect("the test waits");
            let _ = stopped.recv();
        });
        let tid = told.recv().expect("the thread starts");
        let path = format!("/proc/{}/task/{tid}/ns/net", std::process::id()).into();
        Self { path, stop, thread: Some(thread) }
    }

    /// Runs `ip -j` inside.
    fn ip(&self, arguments: &str) -> Value {
        json(&self.run(&format!("ip -j -d {arguments}")))
    }

    fn run(&self, command: &str) -> String {
        let netns = format!("--net={}", self.path.display());
        let words: Vec<&str> = ["nsenter", &netns].into_iter().chain(command.split(' ')).collect();
        run(&words)
    }

    fn end(mut self) -> PathBuf {
        self.stop();
        self.path.clone()
    }

    fn stop(&mut self) {
        let _ = self.stop.send(());
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the pod's thread does nothing");
        }
        // A joined thread may still be on its way out of the kernel, with its namespace in its hands.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while self.path.exists() {
            assert!(std::time::Instant::now() < deadline, "{} does not go away", self.path.display());
            std::thread::yield_now();
        }
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        self.stop();
    }
}

fn run(words: &[&str]) -> String {
    let output = Process::new(words[0]).args(&words[1..]).output().expect("the tool is installed");
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

fn ip(arguments: &str) -> String {
    run(&["ip"].into_iter().chain(arguments.split(' ')).collect::<Vec<_>>())
}

fn json(text: &str) -> Value {
    if text.trim().is_empty() { Value::Array(Vec::new()) } else { serde_json::from_str(text).expect("JSON") }
}

fn host_links() -> BTreeSet<String> {
    json(&ip("-j link"))
        .as_array()
        .expect("a list")
        .iter()
        .map(|l| l["ifname"].as_str().expect("text").to_owned())
        .collect()
}

fn call(verb: &str, container: &str, ifname: &str, netns: &str, stdin: &Value) -> CniRequest {
    CniRequest {
        verb: verb.into(),
        container_id: container.into(),
        netns: netns.into(),
        ifname: ifname.into(),
        args: "K8S_POD_NAMESPACE=default;K8S_POD_NAME=web".into(),
        path: "/opt/cni/bin".into(),
        stdin: serde_json::to_vec(stdin).expect("JSON"),
    }
}

fn config() -> Value {
    serde_json::json!({"cniVersion": "1.1.0", "name": "podnet", "type": "weft-cni"})
}

fn request(container: &str, ifname: &str, pod: &Pod) -> PodRequest {
    let call = call("ADD", container, ifname, &pod.path.to_string_lossy(), &config());
    match attach::parse(&call).expect("a valid call") {
        Command::Add(request) => request,
        other => panic!("{other:?}"),
    }
}

fn network() -> Network {
    Network { bridge: BRIDGE.into(), mtu: 1450, hairpin: true }
}

fn addresses(last: u8) -> Vec<PodAddress> {
    vec![
        PodAddress {
            address: format!("10.32.4.{last}/24").parse().unwrap(),
            gateway: "10.32.4.1".parse().unwrap(),
        },
        PodAddress {
            address: format!("fd00:32:4::{last:x}/64").parse().unwrap(),
            gateway: "fd00:32:4::1".parse().unwrap(),
        },
    ]
}

fn plan(container: &str, ifname: &str, pod: &Pod, last: u8) -> AddPlan {
    let request = request(container, ifname, pod);
    let admission = attach::admit(&request, None).expect("the namespace exists");
    AddPlan::new(request, admission, network(), addresses(last), 1_700_000_000).expect("a valid plan")
}

fn check_plan(plan: &AddPlan, result: &CniResult) -> CheckPlan {
    let attachment = plan.attachment().clone();
    let mut config = config();
    config["prevResult"] =
        serde_json::from_slice(&result.to_json(attach::SpecVersion::V1_1_0)).expect("a result is JSON");
    let id = &attachment.id;
    let call = call("CHECK", id.container(), id.ifname(), &attachment.netns.to_string_lossy(), &config);
    let Command::Check(request) = attach::parse(&call).expect("a valid call") else { panic!("CHECK") };
    let _: &CheckRequest = &request;
    CheckPlan { request, network: network(), attachment }
}

fn refused(outcome: Result<impl std::fmt::Debug, CniError>, code: Code, words: &str) -> CniError {
    let error = outcome.expect_err("must be refused");
    assert_eq!(error.code, code, "{error}");
    assert!(error.to_string().contains(words), "{error:?} does not say {words:?}");
    error
}

#[test]
fn an_added_pod_has_its_addresses_routes_and_mtu_and_answers_at_once() {
    on_a_node(|| {
        let pod = Pod::new();
        let plan = plan("c1", "eth0", &pod, 2);
        let result = attach::add(&plan).expect("attached");
        // Both families at once, in both directions: no duplicate address detection, no lost first packet.
        for target in ["10.32.4.2", "fd00:32:4::2"] {
            run(&["ping", "-q", "-c1", "-W1", target]);
        }
        for target in ["10.32.4.1", "fd00:32:4::1"] {
            pod.run(&format!("ping -q -c1 -W1 {target}"));
        }
        let link = &pod.ip("link show eth0")[0];
        assert_eq!(link["mtu"], 1450);
        assert_eq!(link["operstate"], "UP");
        assert_eq!(link["address"], result.interfaces[2].mac.as_str());
        let held: Vec<String> = pod.ip("addr show dev eth0")[0]["addr_info"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|a| a["scope"] == "global")
            .map(|a| format!("{}/{}", a["local"].as_str().unwrap(), a["prefixlen"]))
            .collect();
        assert_eq!(held, ["10.32.4.2/24", "fd00:32:4::2/64"]);
        assert_eq!(pod.ip("route show default")[0]["gateway"], "10.32.4.1");
        assert_eq!(pod.ip("-6 route show default")[0]["gateway"], "fd00:32:4::1");
        let host = &json(&ip(&format!("-j -d link show {}", plan.attachment().host_ifname())))[0];
        assert_eq!(host["master"], BRIDGE);
        assert_eq!(host["linkinfo"]["info_slave_data"]["hairpin"], true);
        assert_eq!(host["mtu"], 1450);
        assert_eq!(host["ifalias"], "weft pod c1/eth0");
        assert_eq!(host["address"], result.interfaces[1].mac.as_str());
        let names: Vec<&str> = result.interfaces.iter().map(|i| i.name.as_str()).collect();
        assert_eq!(names, [BRIDGE, &plan.attachment().host_ifname(), "eth0"]);
        assert_eq!(result.interfaces[2].sandbox.as_deref(), Some(&*pod.path.to_string_lossy()));
        attach::check(&check_plan(&plan, &result)).expect("CHECK agrees");
    });
}

#[test]
fn a_repeated_add_gives_the_same_result_and_mends_what_was_lost() {
    on_a_node(|| {
        let pod = Pod::new();
        let plan = plan("c1", "eth0", &pod, 2);
        let first = attach::add(&plan).expect("attached");
        let index = pod.ip("link show eth0")[0]["ifindex"].clone();
        assert_eq!(attach::add(&plan).expect("repeated"), first);
        pod.run("ip addr del 10.32.4.2/24 dev eth0");
        pod.run("ip link set eth0 mtu 1300 down");
        ip(&format!("link set {} nomaster", plan.attachment().host_ifname()));
        assert_eq!(attach::add(&plan).expect("mended"), first);
        attach::check(&check_plan(&plan, &first)).expect("as new");
        assert_eq!(pod.ip("link show eth0")[0]["ifindex"], index, "the interface was not made anew");
    });
}

#[test]
fn a_container_in_another_namespace_is_refused_while_the_first_is_attached() {
    on_a_node(|| {
        let (first, second) = (Pod::new(), Pod::new());
        let attached = plan("c1", "eth0", &first, 2);
        attach::add(&attached).expect("attached");
        let request = request("c1", "eth0", &second);
        refused(attach::admit(&request, Some(attached.attachment())), Code::Conflict, "is attached in");
        assert!(attach::admit(&attached_request(&first), Some(attached.attachment())).unwrap().repeated);
        // The runtime lost the DEL, the first container is gone: the id is free.
        first.end();
        wait_until(|| attach::survey(&[attached.attachment().clone()]).unwrap() == [Condition::Gone]);
        let admission = attach::admit(&request, Some(attached.attachment())).expect("free again");
        assert!(!admission.repeated);
        let again = AddPlan::new(request, admission, network(), addresses(2), 0).unwrap();
        attach::add(&again).expect("attached anew");
    });
}

fn attached_request(pod: &Pod) -> PodRequest {
    request("c1", "eth0", pod)
}

/// Waits for a condition that the kernel brings about, with a bound that only a defect reaches.
fn wait_until(mut condition: impl FnMut() -> bool) {
    for _ in 0..1000 {
        if condition() {
            return;
        }
        std::thread::park_timeout(std::time::Duration::from_millis(10));
    }
    panic!("never happened");
}

#[test]
fn a_failed_add_leaves_nothing_behind() {
    on_a_node(|| {
        let before = host_links();
        let unchanged = |pod: &Pod, inside: usize| {
            assert_eq!(host_links(), before);
            assert_eq!(pod.ip("link").as_array().unwrap().len(), inside, "{}", pod.ip("link"));
        };
        // The name is taken inside.
        let pod = Pod::new();
        pod.run("ip link add eth0 type bridge");
        refused(attach::add(&plan("c1", "eth0", &pod, 2)), Code::Conflict, "has an interface eth0 already");
        unchanged(&pod, 2);
        // The host's name is taken by something that is not weft's.
        let taken = plan("c2", "eth0", &pod, 2).attachment().host_ifname();
        ip(&format!("link add {taken} type bridge"));
        let foreign = ip(&format!("-j -d link show {taken}"));
        refused(attach::add(&plan("c2", "eth0", &Pod::new(), 2)), Code::Conflict, "not made by weft");
        assert_eq!(ip(&format!("-j -d link show {taken}")), foreign, "what is not weft's is not touched");
        ip(&format!("link del {taken}"));
        unchanged(&pod, 2);
        // There is no bridge to join.
        let mut network = network();
        network.bridge = "weft9".into();
        let pod = Pod::new();
        let asked = request("c3", "eth0", &pod);
        let admission = attach::admit(&asked, None).unwrap();
        let unbridged = AddPlan::new(asked.clone(), admission, network, addresses(2), 0).unwrap();
        refused(attach::add(&unbridged), Code::TryAgainLater, "weft9 is not there yet");
        unchanged(&pod, 1);
        // The kernel refuses a step inside the pod, after the pair was made.
        let mut bad = addresses(2);
        bad[0].gateway = "192.0.2.1".parse().unwrap();
        let unroutable = AddPlan::new(asked, admission, self::network(), bad, 0).unwrap();
        refused(attach::add(&unroutable), Code::Kernel, "default route");
        unchanged(&pod, 1);
        // The namespace ends between the admission and the ADD.
        let plan = plan("c4", "eth0", &pod, 2);
        pod.end();
        refused(attach::add(&plan), Code::ContainerUnknown, "does not exist");
        assert_eq!(host_links(), before);
    });
}

#[test]
fn a_namespace_that_is_none_is_refused_before_anything_changes() {
    on_a_node(|| {
        let mut asked = request("c1", "eth0", &Pod::new());
        refused(attach::admit(&asked, None), Code::ContainerUnknown, "does not exist");
        asked.netns = "/proc/self/ns/mnt".into();
        let mnt = attach::admit(&asked, None).unwrap();
        let plan = AddPlan::new(asked.clone(), mnt, network(), addresses(2), 0).unwrap();
        refused(attach::add(&plan), Code::InvalidEnvironment, "must be a network namespace");
        asked.netns = "/etc/hostname".into();
        refused(attach::admit(&asked, None), Code::ContainerUnknown, "no network namespace is mounted on it");
        asked.netns = "/proc/thread-self/ns/net".into();
        refused(attach::admit(&asked, None), Code::InvalidEnvironment, "the node's own");
    });
}

#[test]
fn del_removes_both_ends_and_never_fails_for_what_is_gone() {
    on_a_node(|| {
        let before = host_links();
        let pod = Pod::new();
        let plan = plan("c1", "eth0", &pod, 2);
        attach::add(&plan).expect("attached");
        let id = &plan.attachment().id;
        attach::del(id).expect("removed");
        assert_eq!(host_links(), before);
        assert_eq!(pod.ip("link").as_array().unwrap().len(), 1);
        attach::del(id).expect("a second DEL has nothing to do");
        attach::add(&plan).expect("attached again");
        let namespace = File::open(&pod.path).expect("held open: the device lives on");
        pod.end();
        attach::del(id).expect("the namespace's path is gone");
        drop(namespace);
        assert_eq!(host_links(), before);
    });
}

#[test]
fn check_names_the_first_thing_that_is_wrong() {
    on_a_node(|| {
        let pod = Pod::new();
        let plan = plan("c1", "eth0", &pod, 2);
        let result = attach::add(&plan).expect("attached");
        let check = check_plan(&plan, &result);
        attach::check(&check).expect("fine");
        let host = plan.attachment().host_ifname();
        let inside = |command: &str| drop(pod.run(command));
        let outside = |command: &str| drop(ip(command));
        let breaks: [(&dyn Fn(), &str); 13] = [
            (&|| inside("ip link set eth0 down"), "eth0 is down"),
            (&|| inside("ip link set eth0 mtu 1300"), "has MTU 1300 and not 1450"),
            (&|| inside("ip link set eth0 address 02:00:00:00:00:01"), "has address 02:00:00:00:00:01"),
            (&|| inside("ip addr del 10.32.4.2/24 dev eth0"), "does not hold 10.32.4.2/24"),
            (&|| inside("ip addr del fd00:32:4::2/64 dev eth0"), "does not hold fd00:32:4::2/64"),
            (&|| inside("ip route del default"), "has no route 0.0.0.0/0 via 10.32.4.1"),
            (&|| inside("ip -6 route del default"), "has no route ::/0 via fd00:32:4::1"),
            (
                &|| inside("ip neigh replace 10.32.4.1 lladdr 02:00:00:00:00:02 nud permanent dev eth0"),
                "believes that its gateway at 10.32.4.1 is 02:00:00:00:00:02",
            ),
            (
                &|| outside("neigh replace 10.32.4.2 lladdr 02:00:00:00:00:03 nud permanent dev weft0"),
                "believes that the pod at 10.32.4.2 is 02:00:00:00:00:03",
            ),
            (&|| outside(&format!("link set {host} nomaster")), "is not on the bridge weft0"),
            (&|| outside(&format!("link set {host} mtu 1400")), "has MTU 1400 and not 1450"),
            (&|| outside(&format!("link set {host} type bridge_slave hairpin off")), "hairpin"),
            (&|| outside(&format!("link set {host} down")), "is down"),
        ];
        for (break_it, words) in breaks {
            break_it();
            refused(attach::check(&check), Code::CheckFailed, words);
            let _ = Process::new("ip").args("neigh del 10.32.4.2 dev weft0".split(' ')).output();
            attach::del(&plan.attachment().id).expect("removed");
            attach::add(&plan).expect("attached anew");
            attach::check(&check).unwrap_or_else(|error| panic!("after {words}: {error}"));
        }
        outside("addr del 10.32.4.1/24 dev weft0");
        refused(attach::check(&check), Code::CheckFailed, "weft0 does not hold 10.32.4.1");
        attach::del(&plan.attachment().id).unwrap();
        refused(attach::check(&check), Code::CheckFailed, "no interface eth0");
        pod.end();
        refused(attach::check(&check), Code::ContainerUnknown, "does not exist");
    });
}

#[test]
fn a_container_may_have_several_attachments() {
    on_a_node(|| {
        let pod = Pod::new();
        let (first, second) = (plan("c1", "eth0", &pod, 2), plan("c1", "net1", &pod, 3));
        let results = [attach::add(&first).expect("first"), attach::add(&second).expect("second")];
        for target in ["10.32.4.2", "10.32.4.3", "fd00:32:4::2", "fd00:32:4::3"] {
            run(&["ping", "-q", "-c1", "-W1", target]);
        }
        attach::check(&check_plan(&first, &results[0])).expect("first");
        attach::check(&check_plan(&second, &results[1])).expect("second");
        attach::del(&second.attachment().id).expect("removed");
        attach::check(&check_plan(&first, &results[0])).expect("the first stays");
    });
}

#[test]
fn ipv6_is_turned_on_where_the_runtime_turned_it_off() {
    on_a_node(|| {
        let pod = Pod::new();
        pod.run("sysctl -q -w net.ipv6.conf.default.disable_ipv6=1");
        attach::add(&plan("c1", "eth0", &pod, 2)).expect("attached");
        run(&["ping", "-q", "-c1", "-W1", "fd00:32:4::2"]);
    });
}

#[test]
fn neighbours_learn_the_new_owner_of_an_address() {
    on_a_node(|| {
        let (other, pod) = (Pod::new(), Pod::new());
        attach::add(&plan("c0", "eth0", &other, 9)).expect("attached");
        let plan = plan("c1", "eth0", &pod, 2);
        for address in ["10.32.4.2", "fd00:32:4::2"] {
            ip(&format!("neigh replace {address} lladdr 02:00:00:00:00:09 nud reachable dev weft0"));
            other.run(&format!("ip neigh replace {address} lladdr 02:00:00:00:00:09 nud reachable dev eth0"));
        }
        let mac = attach::add(&plan).expect("attached").interfaces[2].mac.clone();
        for address in ["10.32.4.2", "fd00:32:4::2"] {
            wait_until(|| {
                json(&ip(&format!("-j neigh show {address} dev weft0")))[0]["lladdr"] == mac.as_str()
            });
            wait_until(|| other.ip(&format!("neigh show {address} dev eth0"))[0]["lladdr"] == mac.as_str());
        }
    });
}

#[test]
fn leaked_interfaces_are_found_and_foreign_ones_stay() {
    on_a_node(|| {
        let pods = [Pod::new(), Pod::new()];
        let plans = [plan("c1", "eth0", &pods[0], 2), plan("c2", "eth0", &pods[1], 3)];
        plans.iter().for_each(|plan| drop(attach::add(plan).expect("attached")));
        ip("link add weftcafebabe type veth peer name other");
        ip("link set weftcafebabe master weft0");
        let known = BTreeSet::from([plans[0].attachment().host_ifname()]);
        let removed = attach::sweep(BRIDGE, &known).expect("swept");
        assert_eq!(removed, [plans[1].attachment().host_ifname()]);
        assert!(host_links().contains("weftcafebabe"));
        let attachments: Vec<Attachment> = plans.iter().map(|plan| plan.attachment().clone()).collect();
        assert_eq!(attach::survey(&attachments).unwrap(), [Condition::Attached, Condition::Detached]);
        let [_, second] = pods;
        second.end();
        wait_until(|| attach::survey(&attachments).unwrap() == [Condition::Attached, Condition::Gone]);
    });
}

#[test]
fn an_mtu_that_does_not_fit_is_refused() {
    on_a_node(|| {
        let pod = Pod::new();
        let mut asked = request("c1", "eth0", &pod);
        let admission = attach::admit(&asked, None).unwrap();
        let mut with = |mtu| {
            asked.wishes.mtu = Some(mtu);
            AddPlan::new(asked.clone(), admission, network(), addresses(2), 0)
        };
        refused(with(1500), Code::InvalidConfiguration, "more than the 1450");
        refused(with(1000), Code::InvalidConfiguration, "too small for IPv6");
        attach::add(&with(1400).unwrap()).expect("attached");
        assert_eq!(pod.ip("link show eth0")[0]["mtu"], 1400);
    });
}

#[test]
fn many_pods_attach_at_the_same_time() {
    on_a_node(|| {
        let pods: Vec<Pod> = (0..16).map(|_| Pod::new()).collect();
        let plans: Vec<AddPlan> =
            pods.iter().zip(0..).map(|(pod, i)| plan(&format!("c{i}"), "eth0", pod, 10 + i)).collect();
        std::thread::scope(|scope| {
            for plan in &plans {
                scope.spawn(move || {
                    let result = attach::add(plan).expect("attached");
                    attach::check(&check_plan(plan, &result)).expect("fine");
                    attach::del(&plan.attachment().id).expect("removed");
                });
            }
        });
        assert_eq!(host_links(), BTreeSet::from(["lo".to_owned(), BRIDGE.to_owned()]));
    });
}
