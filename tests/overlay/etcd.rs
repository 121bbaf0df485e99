//! A cluster with its leases in a real etcd, which goes and comes back.

use std::time::Duration;

use serde_json::Value;
use weft_tests::lab::{Lab, LabOptions, Ping, Request, Store, executable, skip, wait_until};

const PATIENCE: Duration = Duration::from_secs(60);

const NODES: [&str; 3] = ["n1", "n2", "n3"];

fn healthy(lab: &Lab, node: &str) -> bool {
    lab.weft(node, &["status"])["store"]["healthy"] == true
}

/// What etcd holds, told by its own gateway to a plain HTTP request.
fn keys_in_etcd(lab: &Lab) -> usize {
    // {"key": "/weft/v1/leases/", "range_end": "/weft/v1/leases0", "count_only": true}
    let body =
        r#"{"key":"L3dlZnQvdjEvbGVhc2VzLw==","range_end":"L3dlZnQvdjEvbGVhc2VzMA==","count_only":true}"#;
    let script = format!(
        "exec 3<>/dev/tcp/192.0.2.254/2379; printf 'POST /v3/kv/range HTTP/1.0\\r\\nContent-Length: {}\\r\\n\\r\\n%s' '{body}' >&3; cat <&3",
        body.len()
    );
    let answer = lab.run("n1", &["bash", "-c", &script]);
    let body = answer.split_once("\r\n\r\n").expect("an answer of HTTP").1;
    let answer: Value = serde_json::from_str(body).expect("the gateway answers in JSON");
    answer["count"].as_str().map_or(0, |count| count.parse().expect("a number"))
}

#[test]
fn etcd_goes_and_comes_back_while_pods_talk() {
    if std::process::Command::new("etcd").arg("--version").output().is_err() {
        return skip("etcd is not installed: run `make deps`");
    }
    let lab = Lab::up(LabOptions::new("etcd").pods(1).store(Store::Etcd));
    lab.ping_all();
    assert_eq!(keys_in_etcd(&lab), lab.leases("n1").len());
    wait_until("all know the same leases", PATIENCE, || {
        NODES.iter().all(|node| lab.leases(node) == lab.leases("n1"))
    });
    let before = lab.leases("n1");
    assert!(before.len() >= 3, "{before:?}");
    let pings: Vec<Ping> =
        [("n1/a", "n2"), ("n3/a", "n1")].map(|(from, to)| lab.background_ping(from, lab.ip(to, "a"))).into();

    lab.kill("etcd");
    wait_until("status says that etcd is gone", PATIENCE, || NODES.iter().all(|node| !healthy(&lab, node)));
    let said = lab.weft("n1", &["status"])["store"]["error"].to_string();
    assert_eq!(
        said,
        "\"etcd at http://192.0.2.254:2379 cannot be reached (Connection refused (os error 111)): start it, or correct store.endpoints\""
    );
    let doctor = String::from_utf8_lossy(&lab.exec("n1", &["weft", "doctor"]).stdout).into_owned();
    assert!(doctor.contains("etcd at http://192.0.2.254:2379 cannot be reached"), "{doctor}");

    // Pods still come and go, and a daemon still starts from what it knows.
    lab.tell(Request::PodAdd { node: "n2".into(), pod: "x".into() });
    lab.kill("n3");
    lab.start("n3");
    lab.tell(Request::PodAdd { node: "n3".into(), pod: "x".into() });
    wait_until("n3 is back without etcd", PATIENCE, || lab.weft("n3", &["status"])["peers"]["alive"] == 2);
    assert!(lab.routes_are_right(&NODES), "{:?}", lab.wrong_routes(&NODES));
    lab.ping_all();

    lab.start("etcd");
    wait_until("status says that etcd is back", PATIENCE, || NODES.iter().all(|node| healthy(&lab, node)));
    wait_until("the leases are as before", PATIENCE, || lab.leases("n1") == before);
    assert_eq!(keys_in_etcd(&lab), before.len());
    for ping in pings {
        let (sent, lost) = ping.stop();
        println!("{} of {sent} pings lost", lost.len());
        assert!(lost.is_empty(), "no answer to {lost:?} of {sent}");
    }
    lab.ping_all();

    // A node that leaves gives its leases back.
    for pod in ["a", "x"] {
        lab.tell(Request::PodRemove { node: "n3".into(), pod: pod.into() });
    }
    lab.run("n3", &["weft", "leave"]);
    wait_until("the leases of n3 are gone", PATIENCE, || keys_in_etcd(&lab) < before.len());
}

#[test]
fn a_file_that_etcd_needs_and_is_not_there_ends_the_daemon_in_a_sentence() {
    let directory = std::env::temp_dir().join(format!("weft-etcd-config-{}", std::process::id()));
    std::fs::create_dir(&directory).expect("a new directory");
    let file = directory.join("weft.toml");
    let ca = directory.join("ca.pem");
    let text = format!(
        "[cluster]\ncidrs = [{{ cidr = \"10.32.0.0/12\", node_prefix = 24 }}]\n[store]\ntype = \"etcd\"\nendpoints = [\"https://192.0.2.1:2379\"]\nca_file = {ca:?}\n"
    );
    std::fs::write(&file, text).expect("a file");
    let check = || {
        let mut command = std::process::Command::new(executable("weftd"));
        let output = command.arg("--check-config").arg("--config").arg(&file).output().expect("weftd runs");
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let missing = check();
    std::fs::write(&ca, "no certificate").expect("a file");
    let broken = check();
    std::fs::remove_dir_all(&directory).expect("our own");
    let ca = ca.display();
    let expected = [
        format!(
            "weftd: store.ca_file {ca} cannot be read (No such file or directory (os error 2)): put it there, or name another file\n"
        ),
        format!(
            "weftd: store.ca_file {ca} holds no certificate in PEM: name a file with BEGIN CERTIFICATE\n"
        ),
    ];
    assert_eq!([missing, broken], expected.map(|sentence| (false, sentence)));
}
