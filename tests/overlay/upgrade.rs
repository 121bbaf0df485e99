//! A daemon that takes over from another loses no packet, and one that ends in the middle of it leaves a node that works.

mod relayed;
mod surge;

use std::time::Duration;

use serde_json::Value;
use weft_tests::lab::{Backend, Background, CLEAR, Lab, LabOptions, Ping, Request, wait_until};

const PATIENCE: Duration = Duration::from_secs(30);
const CONFIG: &str = "/etc/weft/weft.toml";

/// The daemons of a node, by the kernel's word: processes of that name in its network.
fn daemons(lab: &Lab, node: &str) -> Vec<String> {
    let script = "own=$(readlink /proc/self/ns/net); for pid in $(pgrep -x weftd); do \
                  [ \"$(readlink /proc/$pid/ns/net)\" = \"$own\" ] && echo $pid; done; true";
    lab.sh(node, script).lines().map(str::to_owned).collect()
}

/// A daemon that a test started itself, and what it logs.
struct Later<'a> {
    lab: &'a Lab,
    node: &'a str,
    log: String,
    process: Background,
}

impl<'a> Later<'a> {
    fn start(lab: &'a Lab, node: &'a str, config: &str) -> Self {
        // A directory of the node's own, gone with the lab.
        let log = "/run/weft/later.log".to_owned();
        let script = format!("exec weftd --config {config} --take-over >{log} 2>&1");
        lab.sh(node, &format!("rm -f {log}"));
        Self { lab, node, process: lab.background(node, &["sh", "-c", &script]), log }
    }

    fn said(&self, what: &str) -> bool {
        self.lab.exec(self.node, &["grep", "-q", what, &self.log]).status.success()
    }

    fn log(&self) -> String {
        String::from_utf8_lossy(&self.lab.exec(self.node, &["cat", &self.log]).stdout).into_owned()
    }

    /// Waits until it is the node's only daemon.
    fn alone(self) -> Background {
        let before = daemons(self.lab, self.node);
        wait_until("the later daemon says that it has started", PATIENCE, || self.said("weftd started"));
        wait_until("one daemon is left", PATIENCE, || daemons(self.lab, self.node).len() == 1);
        assert!(!self.log().contains("ERROR"), "{}", self.log());
        assert!(!before.is_empty());
        self.lab.sh(self.node, &format!("rm {}", self.log));
        self.process
    }
}

/// Takes over on a node and returns the new daemon.
fn take_over(lab: &Lab, node: &str) -> Background {
    let before = daemons(lab, node);
    assert_eq!(before.len(), 1, "one daemon before: {before:?}");
    let later = Later::start(lab, node, CONFIG).alone();
    let after = daemons(lab, node);
    assert!(after.len() == 1 && after != before, "{before:?} gave way to {after:?}");
    later
}

/// Who listens, by the kernel's word: the process of each of a daemon's sockets.
fn listeners(lab: &Lab, node: &str) -> Vec<String> {
    let text = lab.run(node, &["ss", "-Hlntuxp"]);
    let ports = [":7117", ":7118", "/run/weft/weft.sock", ":51820"];
    let of_weft = text.lines().filter(|line| ports.iter().any(|port| line.contains(port)));
    of_weft
        .map(|line| line.split("pid=").nth(1).unwrap_or(line).split(',').next().unwrap_or(line).to_owned())
        .collect()
}

fn pings(lab: &Lab) -> Vec<(String, Ping)> {
    let mut all = Vec::new();
    for (from, to) in [("n1", "n2"), ("n2", "n1")] {
        for ip in lab.ips(to, "a") {
            all.push((format!("{from} to {ip}"), lab.background_ping(format!("{from}/a").as_str(), ip)));
        }
    }
    all
}

fn nothing_lost(lab: &Lab, pings: Vec<(String, Ping)>) {
    // They go on for a while after whatever happened.
    let to = lab.ip("n2", "a").to_string();
    lab.run("n1/a", &["ping", "-n", "-q", "-i", "0.01", "-c", "100", &to]);
    nothing_lost_but(0, pings);
}

/// Nothing, but for answers to the last ones, which are still under way.
fn nothing_lost_but(last: u64, pings: Vec<(String, Ping)>) {
    let mut losses = Vec::new();
    for (what, ping) in pings {
        let (sent, mut lost) = ping.stop();
        lost.retain(|sequence| sequence + last < sent);
        println!("{what}: {} of {sent} lost", lost.len());
        if !lost.is_empty() || sent < last + 30 {
            losses.push(format!("{what}: {lost:?} of {sent}"));
        }
    }
    assert!(losses.is_empty(), "{losses:#?}");
}

/// tcpdump on a node's underlay, counting what a filter finds.
fn capture<'a>(lab: &'a Lab, node: &'a str, filter: &str) -> (Background, String) {
    let path = "/run/weft/underlay.pcap".to_owned();
    let words = ["tcpdump", "-Z", "root", "-i", "eth0", "-U", "-w", &path, filter];
    let tcpdump = lab.background(node, &words);
    wait_until("tcpdump captures", PATIENCE, || lab.exec(node, &["test", "-s", &path]).status.success());
    (tcpdump, path)
}

fn count(lab: &Lab, node: &str, path: &str, filter: &str) -> usize {
    let script = format!("tcpdump -nn -r {path} '{filter}' 2>/dev/null | wc -l");
    lab.sh(node, &script).trim().parse().expect("wc counts")
}

fn upgrade_both(name: &str, backend: Backend) {
    let lab = Lab::up(LabOptions::new(name).nodes(2).pods(1).backend(backend));
    let server = lab.background("n2/a", &["iperf3", "-s", "-1", "-J"]);
    wait_until("the server listens", PATIENCE, || lab.run("n2/a", &["ss", "-Hltn"]).contains("5201"));
    let (tcpdump, pcap) = capture(&lab, "n1", "");
    let pings = pings(&lab);
    let to = lab.ip("n2", "a").to_string();
    let flow = lab.background("n1/a", &["iperf3", "-J", "-b", "8M", "-t", "20", "-c", &to]);
    let mut later = Vec::new();
    for node in ["n1", "n2", "n1"] {
        later.push(take_over(&lab, node));
        assert_eq!(lab.weft(node, &["status"])["ready"], true);
        let (one, who) = (daemons(&lab, node), listeners(&lab, node));
        assert!(who.len() >= 3 && who.iter().all(|pid| *pid == one[0]), "{one:?} has every socket: {who:?}");
    }
    nothing_lost(&lab, pings);
    let report: Value = serde_json::from_str(&flow.finish()).expect("iperf3 reports in JSON");
    server.finish();
    let sum =
        |what: &str, name: &str| report["end"][what][name].as_u64().unwrap_or_else(|| panic!("{report:#}"));
    // A pause makes TCP probe (RFC 8985 s7): what it sends again then arrives twice, which the other end tells (RFC 2883).
    let stat = |name: &str| {
        let text = lab.run("n1/a", &["nstat", "-asz", name]);
        let line =
            text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{text}")).to_owned();
        line.split_ascii_whitespace()
            .nth(1)
            .and_then(|count| count.parse::<u64>().ok())
            .expect("nstat counts")
    };
    let (again, twice) = (stat("TcpRetransSegs"), stat("TcpExtTCPDSACKRecvSegs"));
    println!("TCP: {again} segments sent again, {twice} arrived twice");
    assert!(again <= twice, "{again} segments sent again, and {twice} of them were not lost");
    assert_eq!(sum("sum_sent", "bytes") / 1000, sum("sum_received", "bytes") / 1000, "the flow ends whole");
    tcpdump.interrupt();
    let clear = count(&lab, "n1", &pcap, CLEAR);
    assert_eq!(clear == 0, backend == Backend::Wireguard, "{clear} packets in clear");
    assert!(count(&lab, "n1", &pcap, "") > 1000);
    lab.sh("n1", &format!("rm {pcap}"));
}

#[test]
fn encrypted_traffic_loses_nothing_while_daemons_are_upgraded() {
    upgrade_both("upwg", Backend::Wireguard);
}

#[test]
fn tunnelled_traffic_loses_nothing_while_daemons_are_upgraded() {
    upgrade_both("upvx", Backend::Vxlan);
}

#[test]
fn both_ends_of_a_long_way_are_upgraded_at_once() {
    let lab = Lab::up(LabOptions::new("upfar").nodes(2).pods(1).backend(Backend::Wireguard));
    lab.meet();
    // A handshake takes longer than what may wait for one lasts: only the earlier daemon can seal meanwhile.
    lab.tell(Request::Delay { a: "n1".into(), b: "n2".into(), ms: 200 });
    let pings = pings(&lab);
    let before = ["n1", "n2"].map(|node| daemons(&lab, node));
    let later = ["n1", "n2"].map(|node| Later::start(&lab, node, CONFIG));
    let later = later.map(Later::alone);
    assert!(["n1", "n2"].map(|node| daemons(&lab, node)) != before);
    nothing_lost_but(60, pings);
    drop(later);
}

#[test]
fn ten_daemons_take_over_one_after_the_other() {
    let lab = Lab::up(LabOptions::new("upten").nodes(2).pods(1).backend(Backend::Wireguard));
    let pings = pings(&lab);
    let mut later = None;
    for _ in 0..10 {
        later = Some(take_over(&lab, "n1"));
    }
    nothing_lost(&lab, pings);
    assert_eq!(lab.weft("n1", &["status"])["peers"]["alive"], 1);
    drop(later);
}

#[test]
fn pods_come_and_go_while_a_daemon_takes_over() {
    let lab = Lab::up(LabOptions::new("upcni").nodes(2).pods(1).backend(Backend::Wireguard));
    let before = daemons(&lab, "n1");
    let later = Later::start(&lab, "n1", CONFIG);
    let mut calls = 0;
    while daemons(&lab, "n1") == before || daemons(&lab, "n1").len() > 1 {
        let (node, pod) = ("n1".to_owned(), format!("x{calls}"));
        // Each fails the test if the plugin does.
        lab.tell(Request::PodAdd { node: node.clone(), pod: pod.clone() });
        assert_eq!(lab.exec("n1", &["weft", "status"]).status.code(), Some(0));
        lab.tell(Request::PodRemove { node, pod });
        calls += 1;
        assert!(calls < 200, "the daemon does not take over: {}", later.log());
    }
    println!("{calls} pods came and went");
    assert!(calls > 0 && daemons(&lab, "n1") != before);
    lab.ping_all();
}

#[test]
fn a_daemon_that_cannot_start_leaves_the_one_that_runs_as_it_is() {
    let lab = Lab::up(LabOptions::new("upbad").nodes(2).pods(1).backend(Backend::Wireguard));
    let before = daemons(&lab, "n1");
    // Without the word it is a mistake.
    let second = lab.exec("n1", &["weftd", "--config", CONFIG]);
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(second.status.code() == Some(1) && said.contains("another weftd already runs"), "{said}");
    let pings = pings(&lab);
    lab.sh("n1", &format!("sed 's|^socket = .*||; s|^\\[node\\]|[node]\\nsocket = \"/proc/none/weft.sock\"|' {CONFIG} >/run/weft/bad.toml"));
    let third = lab.exec("n1", &["weftd", "--config", "/run/weft/bad.toml", "--take-over"]);
    let said = String::from_utf8_lossy(&third.stderr).into_owned();
    assert!(third.status.code() == Some(1) && said.contains("/proc/none/weft.sock"), "{said}");
    lab.tell(Request::PodAdd { node: "n1".into(), pod: "x".into() });
    assert_eq!(lab.weft("n1", &["status"])["ready"], true);
    nothing_lost(&lab, pings);
    assert_eq!(daemons(&lab, "n1"), before);
    lab.ping_all();
}

#[test]
fn whichever_daemon_is_killed_in_the_middle_the_other_goes_on() {
    let lab = Lab::up(LabOptions::new("upkill").nodes(2).pods(1).backend(Backend::Wireguard));
    let reach = || lab.ping("n1/a", lab.ip("n2", "a")) && lab.ping("n2/a", lab.ip("n1", "a"));
    assert!(reach());
    for step in ["weftd started", "tunnels taken over"] {
        // The later one.
        let before = daemons(&lab, "n1");
        let traffic = pings(&lab);
        let later = Later::start(&lab, "n1", CONFIG);
        wait_until(step, PATIENCE, || later.said(step));
        drop(later);
        wait_until("the earlier daemon goes on", PATIENCE, || {
            daemons(&lab, "n1") == before && lab.weft("n1", &["status"])["ready"] == true && reach()
        });
        drop(traffic);
        lab.tell(Request::PodAdd { node: "n1".into(), pod: "x".into() });
        lab.tell(Request::PodRemove { node: "n1".into(), pod: "x".into() });
    }
    // The earlier one. A test's own daemon is the earlier one the second time.
    let mut running: Option<Background> = None;
    for step in ["weftd started", "tunnels taken over"] {
        let before = daemons(&lab, "n1");
        let traffic = pings(&lab);
        let later = Later::start(&lab, "n1", CONFIG);
        wait_until(step, PATIENCE, || later.said(step));
        match running.take() {
            None => lab.kill("n1"),
            Some(earlier) => drop(earlier),
        }
        let after = daemons(&lab, "n1");
        assert!(after.len() == 1 && after != before, "{before:?}, {after:?}");
        wait_until("the later daemon goes on", PATIENCE, || {
            reach() && lab.weft("n1", &["status"])["ready"] == true
        });
        drop(traffic);
        running = Some(later.process);
    }
    let last = take_over(&lab, "n1");
    lab.ping_all();
    drop((running, last));
}

#[test]
fn a_daemon_that_is_stopped_in_the_middle_is_not_followed_by_the_one_before() {
    let lab = Lab::up(LabOptions::new("upstop").nodes(2).pods(1).backend(Backend::Wireguard));
    lab.meet();
    let before = daemons(&lab, "n1");
    let later = Later::start(&lab, "n1", CONFIG);
    wait_until("it has taken over", PATIENCE, || later.said("tunnels taken over"));
    let both = daemons(&lab, "n1");
    let own = both.iter().find(|pid| !before.contains(pid)).expect("the later daemon runs");
    lab.run("n1", &["kill", "-TERM", own]);
    wait_until("no daemon is left", PATIENCE, || daemons(&lab, "n1").is_empty());
    assert!(later.log().contains("stopped"), "{}", later.log());
    lab.start("n1");
    // The other node hears of the new session a round trip later.
    wait_until("pods reach each other", PATIENCE, || lab.ping("n2/a", lab.ip("n1", "a")));
    lab.ping_all();
}

#[test]
fn a_daemon_that_starts_asks_for_its_sessions_without_waiting_for_traffic() {
    let lab = Lab::up(LabOptions::new("upcold").nodes(2).pods(1).backend(Backend::Wireguard));
    lab.ping_all();
    let known = || lab.exec("n1", &["grep", "-qx", "n2", "/var/lib/weft/tunnels.active"]).status.success();
    for end in [Lab::kill, Lab::stop] {
        wait_until("the daemon has written down whom it talks to", PATIENCE, known);
        end(&lab, "n1");
        // A handshake is of type 1 (whitepaper s5.4.2), data of type 4.
        let (tcpdump, pcap) = capture(&lab, "n1", "udp port 51820");
        let sent = |kind: u8| count(&lab, "n1", &pcap, &format!("src 192.0.2.1 and udp[8] = {kind}"));
        lab.start("n1");
        wait_until("it asks", PATIENCE, || sent(1) > 0);
        wait_until("there is a session", PATIENCE, || {
            lab.weft("n1", &["peers"]).to_string().contains("handshake_ms\":")
        });
        let words = |to| {
            vec![
                "ping".to_owned(),
                "-n".into(),
                "-i".into(),
                "0.01".into(),
                "-c".into(),
                "100".into(),
                "-q".into(),
                to,
            ]
        };
        for (from, to) in [("n1/a", lab.ip("n2", "a")), ("n2/a", lab.ip("n1", "a"))] {
            let words = words(to.to_string());
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            let text = lab.run(from, &words);
            assert!(text.contains(" 0% packet loss"), "{text}");
        }
        tcpdump.interrupt();
        lab.sh("n1", &format!("rm {pcap}"));
    }
}
