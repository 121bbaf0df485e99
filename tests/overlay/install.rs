//! A node gets the shim and the network list in an order that never lets a pod start without them, and is given back as it was.

use std::time::Duration;

use weft_tests::lab::{Lab, LabOptions, Request, wait_until};

const PATIENCE: Duration = Duration::from_secs(30);
const ONLY_WEFT: &str = r#"{"cniVersion":"1.0.0","name":"weft","plugins":[{"type":"weft-cni"}]}"#;

/// Runs `weft` and returns its exit code and everything it wrote.
fn weft(lab: &Lab, node: &str, words: &str) -> (Option<i32>, String) {
    let mut all = vec!["weft"];
    all.extend(words.split_ascii_whitespace());
    let output = lab.exec(node, &all);
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(!said.contains("panicked"), "{said}");
    (output.status.code(), said)
}

fn ok(lab: &Lab, node: &str, words: &str) -> String {
    let (code, said) = weft(lab, node, words);
    assert_eq!(code, Some(0), "{words}: {said}");
    said
}

/// Refused with these words in one sentence.
fn refused(lab: &Lab, node: &str, words: &str, expected: &[&str]) {
    let (code, said) = weft(lab, node, words);
    assert_eq!(code, Some(1), "{words}: {said}");
    assert_eq!(said.trim_end().lines().count(), 1, "{said}");
    for word in expected {
        assert!(said.contains(word), "{words} does not say {word:?}: {said}");
    }
}

#[test]
fn shim_and_network_list_are_installed_whole_in_order_and_once() {
    let lab = Lab::up(LabOptions::new("incni").nodes(1).started(0).pods(0));
    let node = "n1";
    let sh = |script: &str| lab.sh(node, script);
    sh(&format!("mkdir /run/t; echo '{ONLY_WEFT}' >/run/t/list"));
    let to = "--bin-dir /run/t/bin --conf-dir /run/t/conf";
    let installed = "ls -A /run/t/bin /run/t/conf";

    // The default list calls plugins, which are looked for before anything is written.
    refused(&lab, node, &format!("install-cni {to}"), &["/run/t/bin has no portmap and no bandwidth"]);
    assert!(!sh(installed).contains("weft"));
    sh("touch /run/t/bin/portmap /run/t/bin/bandwidth");
    ok(&lab, node, &format!("install-cni {to}"));
    let stat = || sh("cd /run/t; stat -c '%n %a %s %i %y' bin/weft-cni conf/10-weft.conflist");
    let first = stat();
    assert!(first.contains("bin/weft-cni 755") && first.contains("conf/10-weft.conflist 644"), "{first}");
    sh(
        "cmp $(readlink -f $(command -v weft-cni)) /run/t/bin/weft-cni; ! ls -A /run/t/bin /run/t/conf | grep -e '[.]new'",
    );
    // What is right is not written again; what is not, is.
    assert!(ok(&lab, node, &format!("install-cni {to}")).contains("everything is in its place"));
    assert_eq!(stat(), first);
    sh("chmod 600 /run/t/conf/10-weft.conflist; : >/run/t/bin/weft-cni");
    let said = ok(&lab, node, &format!("install-cni {to} --conflist /run/t/list"));
    assert!(said.contains("weft-cni is written") && said.contains("10-weft.conflist is written"), "{said}");
    sh("cmp /run/t/list /run/t/conf/10-weft.conflist; [ $(stat -c %a /run/t/conf/10-weft.conflist) = 644 ]");
    sh("cmp $(readlink -f $(command -v weft-cni)) /run/t/bin/weft-cni");

    // Wrong from the start: nothing is written.
    sh(
        "rm -r /run/t/bin /run/t/conf; touch /run/t/file; echo '{}' >/run/t/none; echo '{\"plugins\":[{\"type\":\"bridge\"}]}' >/run/t/foreign",
    );
    let list = "--conflist /run/t/list";
    refused(
        &lab,
        node,
        &format!("install-cni {list} --bin-dir /run/t/file --conf-dir /run/t/conf"),
        &["/run/t/file is not a directory", "--bin-dir"],
    );
    refused(
        &lab,
        node,
        &format!("install-cni {list} --bin-dir /run/t/bin --conf-dir /run/t/file/net.d"),
        &["/run/t/file/net.d is not a directory", "--conf-dir"],
    );
    refused(
        &lab,
        node,
        &format!("install-cni {to} --conflist /run/t/none"),
        &["/run/t/none is no network list", "plugins"],
    );
    refused(
        &lab,
        node,
        &format!("install-cni {to} --conflist /run/t/foreign"),
        &["its first plugin is not weft-cni"],
    );
    refused(
        &lab,
        node,
        &format!("install-cni {to} {list} --shim /run/t/nothing"),
        &["cannot read /run/t/nothing", "--shim"],
    );
    sh("rm -rf /run/t/bin /run/t/conf; mkdir -p /run/t/bin /run/t/conf");

    // A full disk under the plugins: no half of a shim, and no list that would call it.
    sh("mount -t tmpfs -o size=64k none /run/t/bin");
    refused(&lab, node, &format!("install-cni {to} {list}"), &["/run/t/bin/weft-cni", "No space left"]);
    assert_eq!(
        sh("ls -A /run/t/bin /run/t/conf").split_whitespace().collect::<Vec<_>>(),
        ["/run/t/bin:", "/run/t/conf:"]
    );
    sh("umount /run/t/bin; mount -t tmpfs none /run/t/conf; mount -o remount,ro none /run/t/conf");
    // The shim may be there without a list, not the other way round.
    refused(&lab, node, &format!("install-cni {to} {list}"), &["/run/t/conf", "Read-only file system"]);
    sh("cmp $(readlink -f $(command -v weft-cni)) /run/t/bin/weft-cni; umount /run/t/conf; rm -r /run/t");
}

#[test]
fn another_network_of_the_machine_is_named_and_set_aside_only_on_request() {
    let lab = Lab::up(LabOptions::new("inother").nodes(1).started(0).pods(0));
    let node = "n1";
    let sh = |script: &str| lab.sh(node, script);
    sh(&format!("mkdir -p /run/t/conf; echo '{ONLY_WEFT}' >/run/t/list"));
    sh("cd /run/t/conf; echo one >05-bridge.conflist; echo two >99-loopback.conf; echo three >README");
    let to = "--bin-dir /run/t/bin --conf-dir /run/t/conf";
    let install = format!("install-cni {to} --conflist /run/t/list");
    let said = ok(&lab, node, &install);
    assert!(said.contains("warning: /run/t/conf/05-bridge.conflist sorts before 10-weft.conflist"), "{said}");
    assert!(!said.contains("99-loopback") && !said.contains("README"), "{said}");
    let names = || sh("ls /run/t/conf").split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(names(), "05-bridge.conflist 10-weft.conflist 99-loopback.conf README");
    ok(&lab, node, &format!("{install} --exclusive"));
    let aside = "05-bridge.conflist.weft-disabled 10-weft.conflist 99-loopback.conf.weft-disabled README";
    assert_eq!(names(), aside);
    assert!(ok(&lab, node, &format!("{install} --exclusive")).contains("everything is in its place"));
    assert_eq!(names(), aside);
    // Given back, but not over what came meanwhile.
    sh("echo new >/run/t/conf/99-loopback.conf");
    let said = ok(&lab, node, &format!("uninstall {to} --state-dir /run/t/none"));
    assert!(
        said.contains("05-bridge.conflist is put back")
            && said.contains("99-loopback.conf.weft-disabled stays aside"),
        "{said}"
    );
    assert_eq!(names(), "05-bridge.conflist 99-loopback.conf 99-loopback.conf.weft-disabled README");
    assert_eq!(
        sh("cat /run/t/conf/05-bridge.conflist /run/t/conf/99-loopback.conf; ls /run/t/bin"),
        "one\nnew\n"
    );
    // A list of that name that is not weft's stays.
    sh("echo '{}' >/run/t/conf/10-weft.conflist");
    let said = ok(&lab, node, &format!("uninstall {to} --state-dir /run/t/none"));
    assert!(said.contains("10-weft.conflist does not call weft-cni and is left alone"), "{said}");
    sh("rm -r /run/t");
}

/// What the kernel has, without what follows from forwarding (anycast addresses of routers), which stays on.
fn kernel(lab: &Lab, node: &str) -> String {
    lab.sh(
        node,
        "{ ip -br link; ip -br address; ip route show table all; ip -6 route show table all; ip rule; ip -6 rule; \
         bridge fdb show | grep -v eth0; nft list ruleset; ls /run/weft 2>/dev/null; } | grep -v ^anycast",
    )
}

#[test]
fn a_node_is_restored_with_a_daemon_and_without_one() {
    let lab = Lab::up(LabOptions::new("unin").nodes(2).started(1).pods(0));
    let (node, all) = ("n2", "uninstall --purge");
    wait_until("addresses are no longer tentative", PATIENCE, || {
        lab.run(node, &["ip", "address", "show", "tentative"]).is_empty()
    });
    let before = kernel(&lab, node);
    let busy = || {
        ok(&lab, node, "install-cni");
        lab.start(node);
        wait_until("the node is ready", PATIENCE, || lab.weft(node, &["status"])["ready"] == true);
        lab.tell(Request::PodAdd { node: node.into(), pod: "a".into() });
        assert!(kernel(&lab, node).contains("weft0"));
    };
    let idle = || drop(lab.tell(Request::PodRemove { node: node.into(), pod: "a".into() }));
    let restored = |said: &str| {
        assert_eq!(kernel(&lab, node), before, "{said}");
        lab.sh(node, "! ls /opt/cni/bin/weft-cni /etc/cni/net.d/10-weft.conflist 2>/dev/null");
    };
    let of_node = || lab.leases("n1").iter().filter(|lease| lease[1] == node).count();

    // With a daemon: it leaves, so that its leases are free at once.
    busy();
    refused(&lab, node, all, &["1 pods are attached", "drain the node"]);
    refused(&lab, node, &format!("{all} --force"), &["a weftd runs on this node; stop it first"]);
    assert!(lab.weft(node, &["status"])["ready"] == true && kernel(&lab, node).contains("weft0"));
    lab.sh(node, "test -e /etc/cni/net.d/10-weft.conflist");
    idle();
    wait_until("the other node knows the leases", PATIENCE, || of_node() == 2);
    restored(&ok(&lab, node, "uninstall"));
    // The keys: peers know the node by them if it comes back at once.
    lab.sh(node, "test -e /var/lib/weft/node.key");
    wait_until("the leases are free", PATIENCE, || of_node() == 0);
    let daemons = "own=$(readlink /proc/self/ns/net); for pid in $(pgrep -x weftd); do \
                   [ \"$(readlink /proc/$pid/ns/net)\" = \"$own\" ] && echo $pid; done; true";
    wait_until("the daemon has ended", PATIENCE, || lab.sh(node, daemons).is_empty());

    // Without one.
    busy();
    lab.kill(node);
    refused(&lab, node, all, &["1 pods are attached", "--force"]);
    idle_without_daemon(&lab, node);
    let said = ok(&lab, node, all);
    assert!(said.contains("every kernel object of weft is removed"), "{said}");
    restored(&said);
    lab.sh(node, "! test -e /var/lib/weft");
    assert!(said.contains("forwarding stays"), "{said}");
    assert!(ok(&lab, node, all).contains("every kernel object of weft is removed"), "it can be repeated");
}

/// Ends a pod whose DEL nobody answers: its namespace goes, and the kernel takes the veth with it.
fn idle_without_daemon(lab: &Lab, node: &str) {
    lab.start(node);
    lab.tell(Request::PodRemove { node: node.into(), pod: "a".into() });
    lab.kill(node);
}

#[test]
fn pods_are_cut_off_only_by_force_and_a_hung_daemon_is_no_reason() {
    let lab = Lab::up(LabOptions::new("unforce").nodes(1).pods(1));
    let node = "n1";
    // A daemon that holds its state and answers nothing here.
    refused(&lab, node, "uninstall --socket /run/weft/none", &["a weftd runs on this node", "stop it first"]);
    lab.kill(node);
    assert!(lab.sh(node, "ip -br link show master weft0").contains("weft"));
    let said = ok(&lab, node, "uninstall --force");
    assert!(said.contains("/var/lib/weft stays, with the node's keys"), "{said}");
    lab.sh(node, "test -e /var/lib/weft/node.key; ! ip link show weft0 2>/dev/null; ! nft list table inet weft 2>/dev/null");
    assert_eq!(lab.sh(&format!("{node}/a") as &str, "ip -br link | grep -c eth0 || true").trim(), "0");
    // Whoever may not touch the kernel is told before anything is removed.
    lab.sh(node, "mkdir -p /run/t/conf; echo '{}' >/run/t/conf/x.conf.weft-disabled");
    let words = [
        "setpriv",
        "--bounding-set=-net_admin",
        "--inh-caps=-net_admin",
        "weft",
        "uninstall",
        "--conf-dir",
        "/run/t/conf",
    ];
    let output = lab.exec(node, &words);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && said.contains("CAP_NET_ADMIN"), "{said}");
    lab.sh(node, "test -e /run/t/conf/x.conf.weft-disabled; rm -r /run/t");
}
