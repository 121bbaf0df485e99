//! The lab keeps its own promises: no way out, nothing left behind, cuts and delays that are real.

use std::process::Command;

use weft_tests::lab::{Handle, Lab, LabOptions, Presence, Request, executable, skip};

/// What the machine's own network namespace holds.
fn machine() -> String {
    let links = Command::new("ip").args(["-o", "link"]).output().expect("ip runs");
    let routes = Command::new("ip").args(["route", "show", "table", "all"]).output().expect("ip runs");
    let names: Vec<String> = String::from_utf8_lossy(&links.stdout)
        .lines()
        .filter_map(|line| line.split(": ").nth(1).map(str::to_owned))
        .collect();
    format!("{names:?}\n{}", String::from_utf8_lossy(&routes.stdout))
}

#[test]
fn a_lab_has_no_way_out_and_leaves_nothing_behind() {
    let before = machine();
    let lab = Lab::up(LabOptions::new("traceless").nodes(2));
    let handle = lab.handle().clone();
    for place in ["underlay", "n1", "n2"] {
        let routes = lab.run(place, &["ip", "route", "show", "default"]);
        assert_eq!(routes.trim(), "", "{place} has a default route");
        assert!(
            !lab.exec(place, &["ip", "route", "get", "198.51.100.1"]).status.success(),
            "{place} has a way out"
        );
        assert!(
            !lab.exec(place, &["ip", "route", "get", "2606:4700::1"]).status.success(),
            "{place} has a way out"
        );
    }
    assert_eq!(machine(), before, "the lab shows in the machine's own network");
    assert_eq!(handle.presence(), Presence::Alive);
    drop(lab);
    assert_eq!(handle.presence(), Presence::Absent);
    assert_eq!(machine(), before);
}

#[test]
fn a_lab_ends_with_the_process_that_made_it() {
    let lab = Lab::up(LabOptions::new("orphan").nodes(1).pods(0));
    let handle = lab.handle().clone();
    let keeper =
        std::fs::read_to_string(handle.dir().join("keeper.json")).expect("a living lab names its keeper");
    let keeper: serde_json::Value = serde_json::from_str(&keeper).expect("keeper.json is JSON");
    let pid = keeper["pid"].as_u64().expect("a keeper has a process id").to_string();
    // As after a crash: nobody asks anything to end in order.
    let killed = Command::new("kill").args(["-KILL", &pid]).status().expect("kill runs");
    assert!(killed.success());
    weft_tests::lab::wait_until("the keeper is gone", std::time::Duration::from_secs(20), || {
        handle.presence() == Presence::Stale
    });
    drop(lab);
    assert!(handle.state().is_err(), "the lab is still there");
    assert!(!Handle::all().iter().any(|other| other.name() == handle.name()), "its files are still there");
}

#[test]
fn cut_nodes_do_not_hear_each_other_until_healed_and_a_delay_is_as_long_as_asked() {
    let lab = Lab::up(LabOptions::new("cut").nodes(3).pods(0));
    let ping = |from: &str, to: &str| lab.ping(from, to.parse().expect("an address"));
    assert!(ping("n1", "192.0.2.2"), "nothing passes before the cut");
    lab.cut("n1", "n2");
    assert!(!ping("n1", "192.0.2.2") && !ping("n2", "192.0.2.1"), "the cut lets pings through");
    assert!(ping("n1", "192.0.2.3") && ping("n3", "192.0.2.2"), "the cut hits a third node");
    lab.heal("n2", "n1");
    assert!(ping("n1", "192.0.2.2"), "the cut is not healed");

    lab.tell(Request::Delay { a: "n1".into(), b: "n2".into(), ms: 40 });
    let said = lab.run("n1", &["ping", "-n", "-q", "-c", "5", "-i", "0.2", "192.0.2.2"]);
    let least: f64 = said
        .split_once("rtt min/avg/max/mdev = ")
        .and_then(|(_, times)| times.split('/').next()?.parse().ok())
        .unwrap_or_else(|| panic!("no times: {said}"));
    assert!(least >= 80.0, "40 ms each way make at least 80 ms, not {least}");
    lab.tell(Request::Delay { a: "n1".into(), b: "n2".into(), ms: 0 });
    assert!(lab.state().impairments.is_empty());
    assert!(ping("n1", "192.0.2.2"));
}

#[test]
fn requests_that_make_no_sense_are_refused_with_a_sentence() {
    let lab = Lab::up(LabOptions::new("refuse").nodes(1).pods(1));
    let refused = |request: Request| lab.handle().request(&request).expect_err("the lab refuses").to_string();
    let no_node = refused(Request::Kill { node: "n9".into() });
    assert!(no_node.contains("no node n9"), "{no_node}");
    let same = refused(Request::Cut { a: "n1".into(), b: "n1".into() });
    assert!(same.contains("the same node"), "{same}");
    let twice = refused(Request::PodAdd { node: "n1".into(), pod: "a".into() });
    assert!(twice.contains("exists on n1 already"), "{twice}");
    let running = refused(Request::Start { node: "n1".into(), ahead_s: 0 });
    assert!(running.contains("runs already"), "{running}");
    assert!(lab.state().ready);
}

/// A directory of its own that anybody may read, gone when dropped.
struct Open(std::path::PathBuf);

impl Drop for Open {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).ok();
    }
}

#[test]
fn an_ordinary_user_brings_up_a_lab_uses_it_and_takes_it_down() {
    if !nix::unistd::geteuid().is_root() {
        // Then every other test shows it.
        return;
    }
    let nobody = |words: &[&str], open: &std::path::Path| {
        Command::new("setpriv")
            .args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--"])
            .args(words)
            .env("XDG_RUNTIME_DIR", open.join("run"))
            .env_remove("WEFT_BIN_DIR")
            .current_dir("/")
            .output()
            .expect("setpriv runs")
    };
    let open = Open(std::env::temp_dir().join(format!("weft-test-{}", std::process::id())));
    std::fs::create_dir_all(open.0.join("run")).expect("a directory can be made");
    if !nobody(&["unshare", "--user", "--map-root-user", "true"], &open.0).status.success() {
        return skip("this kernel does not let ordinary users make user namespaces");
    }
    for name in ["weftd", "weft", "weft-cni", "weft-lab"] {
        std::fs::copy(executable(name), open.0.join(name)).expect("the executable can be copied");
    }
    nix::unistd::chown(&open.0.join("run"), Some(65534.into()), Some(65534.into()))
        .expect("root may do this");
    let program = open.0.join("weft-lab");
    let program = program.to_str().expect("the path is text");
    let lab = |words: &[&str]| {
        let all: Vec<&str> = std::iter::once(program).chain(words.iter().copied()).collect();
        let output = nobody(&all, &open.0);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{words:?}: {said}");
        serde_json::from_slice::<serde_json::Value>(&output.stdout).expect("the lab answers in JSON")
    };
    let state = lab(&["--json", "up", "--nodes", "2", "--dual-stack"]);
    assert_eq!(state["nodes"].as_array().map(Vec::len), Some(2));
    assert_eq!(lab(&["--json", "ping"])["lost"], 0);
    let again = lab(&["--json", "up", "--nodes", "2", "--dual-stack"]);
    assert_eq!(again["nodes"], state["nodes"], "a second up changed something");
    lab(&["--json", "cut", "n1", "n2"]);
    lab(&["--json", "heal", "n1", "n2"]);
    assert_eq!(lab(&["--json", "down"])["down"], serde_json::json!(["lab"]));
    let left: Vec<_> = std::fs::read_dir(open.0.join("run")).expect("the directory is there").collect();
    assert!(left.is_empty(), "{left:?}");
}
