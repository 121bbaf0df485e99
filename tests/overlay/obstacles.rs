//! What a node cannot mend by itself it names: a foreign firewall, a kernel that breaks an offload.

use std::time::Duration;

use weft_tests::lab::{Lab, LabOptions, wait_until};

const PATIENCE: Duration = Duration::from_secs(30);

fn tx_checksum(lab: &Lab) -> bool {
    lab.run("n1", &["ethtool", "-k", "weft-vx4"]).contains("tx-checksum-ip-generic: on")
}

#[test]
fn a_foreign_forward_policy_of_drop_is_named_by_status_and_doctor_until_it_goes() {
    let lab = Lab::up(LabOptions::new("fwdrop").nodes(2).pods(1));
    let warnings = || lab.weft("n1", &["status"])["warnings"].to_string();
    assert_eq!(warnings(), "[]");
    lab.sh(
        "n1",
        "nft add table inet fence; nft add chain inet fence guard '{ type filter hook forward priority 5; policy drop; }'",
    );
    assert!(!lab.ping("n1/a", lab.ip("n2", "a")), "the firewall does cut pods off");
    wait_until("status names the chain", PATIENCE, || warnings().contains("fence"));
    let output = lab.exec("n1", &["weft", "doctor"]);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("FAIL forwarding") && said.contains("fence"), "{said}");
    lab.sh("n1", "nft delete table inet fence");
    wait_until("status is calm again", PATIENCE, || warnings() == "[]");
    lab.ping_all();
}

#[test]
fn checksum_offload_goes_off_only_where_packets_arrive_without_it() {
    let lab = Lab::up(LabOptions::new("txsum").nodes(2).started(1).pods(1));
    // A kernel that breaks the offload, played by a rule: what the tunnel carries is lost while the offload is on.
    let rule = "nft add table inet broken; nft add chain inet broken out '{ type filter hook output priority 0; }'; \
                nft add rule inet broken out udp dport 7119 drop";
    lab.sh("n1", rule);
    lab.start("n2");
    wait_until("the node tries without the offload", PATIENCE, || !tx_checksum(&lab));
    lab.sh("n1", "nft delete table inet broken");
    wait_until("the answer without it decides", PATIENCE, || {
        lab.weft("n1", &["status"])["tx_checksum"].to_string().contains("off (a probe came back only")
    });
    assert!(!tx_checksum(&lab));
    // The other node's kernel is in order.
    wait_until("the other node keeps it", PATIENCE, || {
        lab.weft("n2", &["status"])["tx_checksum"].to_string().contains("on (a probe through")
    });
    // What was found holds across a restart, and for a device made anew.
    lab.kill("n1");
    lab.start("n1");
    lab.sh("n1", "ip link del weft-vx4");
    wait_until("the device is back without it", PATIENCE, || {
        lab.exec("n1", &["ip", "link", "show", "weft-vx4"]).status.success() && !tx_checksum(&lab)
    });
    lab.ping_all();
}
