//! A daemon that ends, in whatever way, takes nothing down with it.

use std::time::Duration;

use serde_json::Value;
use weft_tests::lab::{Background, Lab, LabOptions, Place, differences, wait_until};

const PATIENCE: Duration = Duration::from_secs(30);

/// Sends UDP from one pod to another for some seconds and reports how many datagrams were lost of how many.
struct Stream {
    server: Background,
    client: Background,
}

impl Stream {
    fn start(lab: &Lab, from: &str, to: (&str, &str), seconds: u32) -> Self {
        let receiver = Place::Pod(to.0.into(), to.1.into());
        let server = lab.background(&receiver, &["iperf3", "-s", "-1", "-J"]);
        wait_until("the server listens", PATIENCE, || {
            lab.run(&receiver, &["ss", "-Hltn", "sport = :5201"]).contains("5201")
        });
        let address = lab.ip(to.0, to.1).to_string();
        // Small and slow enough that a busy machine never fills a socket buffer: what is lost is lost on the way.
        let seconds = seconds.to_string();
        let client = lab.background(
            from,
            &["iperf3", "-J", "-u", "-b", "4M", "-l", "400", "-t", &seconds, "-c", &address],
        );
        Stream { server, client }
    }

    fn finish(self) -> (u64, u64) {
        let report: Value = serde_json::from_str(&self.client.finish())
            .expect("iperf3 reports in JSON when it is not cut off");
        self.server.finish();
        let sum = &report["end"]["sum"];
        let number = |name: &str| sum[name].as_u64().unwrap_or_else(|| panic!("no {name}: {report:#}"));
        (number("lost_packets"), number("packets"))
    }
}

/// Ends and starts the daemons of both ends while traffic flows between them.
fn nothing_is_lost(lab: &Lab, end: impl Fn(&str)) {
    let mut pings = Vec::new();
    for ip in lab.ips("n2", "a") {
        pings.push((format!("n1/a -> n2/a ({ip})"), lab.background_ping("n1/a", ip)));
    }
    pings.push(("n3/a -> n1/b".to_owned(), lab.background_ping("n3/a", lab.ip("n1", "b"))));
    pings.push(("node n3 -> n2/b".to_owned(), lab.background_ping("n3", lab.ip("n2", "b"))));
    let stream = Stream::start(lab, "n1/b", ("n2", "b"), 8);

    let before = lab.picture("n1");
    for node in ["n1", "n2", "n1"] {
        let pods = lab.weft(node, &["pods"]);
        end(node);
        assert_eq!(
            lab.exec(node, &["weft", "status"]).status.code(),
            Some(3),
            "the daemon of {node} still answers"
        );
        lab.start(node);
        let addresses = |pods: &Value| -> Vec<Value> {
            let list = pods["pods"].as_array().cloned().unwrap_or_default();
            let mut ips: Vec<Value> = list.iter().map(|pod| pod["ips"].clone()).collect();
            ips.sort_by_key(Value::to_string);
            ips
        };
        assert_eq!(addresses(&lab.weft(node, &["pods"])), addresses(&pods), "{node} forgot pods");
        wait_until("the peers are back", PATIENCE, || {
            lab.weft(node, &["status"])["peers"]["alive"].as_u64() == Some(2)
        });
    }
    let mut losses = Vec::new();
    let (lost, sent) = stream.finish();
    println!("iperf3 n1/b -> n2/b: {lost} of {sent} lost");
    if lost > 0 {
        losses.push(format!("iperf3 lost {lost} of {sent}"));
    }
    for (what, ping) in pings {
        let (sent, missing) = ping.stop();
        println!("ping {what}: {} of {sent} lost", missing.len());
        if !missing.is_empty() {
            losses.push(format!("{what}: no answer to {missing:?} of {sent}"));
        }
    }
    assert!(losses.is_empty(), "{losses:#?}");
    assert_eq!(differences(&before, &lab.picture("n1")), [""; 0], "a restart changed what the kernel holds");
}

#[test]
fn a_killed_daemon_that_starts_again_loses_no_packet() {
    let lab = Lab::up(LabOptions::new("killed"));
    nothing_is_lost(&lab, |node| lab.kill(node));
}

#[test]
fn a_stopped_daemon_that_starts_again_loses_no_packet() {
    let lab = Lab::up(LabOptions::new("stopped"));
    nothing_is_lost(&lab, |node| lab.stop(node));
}

#[test]
fn traffic_goes_on_while_no_daemon_runs_at_all() {
    let lab = Lab::up(LabOptions::new("headless").pods(1));
    let pings: Vec<_> = lab.ips("n2", "a").into_iter().map(|ip| lab.background_ping("n1/a", ip)).collect();
    for node in ["n1", "n2", "n3"] {
        lab.kill(node);
    }
    lab.ping_all();
    for ping in pings {
        let (sent, missing) = ping.stop();
        assert!(missing.is_empty(), "no answer to {missing:?} of {sent}");
    }
}

#[test]
fn objects_that_vanish_while_the_daemon_is_down_are_back_after_it_starts() {
    let lab = Lab::up(LabOptions::new("adopt").pods(1));
    let whole = lab.picture("n1");
    lab.kill("n1");
    lab.sh(
        "n1",
        "ip link del weft-vx4; ip link set weft0 mtu 1280; ip route add 10.47.0.0/24 dev weft0 proto 117",
    );
    lab.start("n1");
    let mut picture = Value::Null;
    let began = std::time::Instant::now();
    while picture != whole && began.elapsed() < PATIENCE {
        picture = lab.picture("n1");
    }
    assert_eq!(differences(&whole, &picture), [""; 0], "n1 is not whole");
    lab.ping_all();
}
