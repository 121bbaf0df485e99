//! Twelve nodes that come, go, part and meet again; judged by the routes in every kernel.

use std::time::Duration;

use weft_tests::lab::{Lab, LabOptions, Request, wait_until};

const PATIENCE: Duration = Duration::from_secs(90);

fn settle(lab: &Lab, what: &str, nodes: &[&str]) {
    let mut wrong = Vec::new();
    let began = std::time::Instant::now();
    while began.elapsed() < PATIENCE {
        wrong = lab.wrong_routes(nodes);
        if wrong.is_empty() {
            println!(
                "{what}: every route of {} nodes right after {:.1} s",
                nodes.len(),
                began.elapsed().as_secs_f32()
            );
            return;
        }
    }
    panic!("{what}: routes still wrong after {PATIENCE:?}:\n{}", wrong.join("\n"));
}

fn alive(lab: &Lab, node: &str) -> u64 {
    lab.weft(node, &["status"])["peers"]["alive"].as_u64().expect("status counts peers")
}

#[test]
fn twelve_nodes_join_leave_part_and_meet_with_every_route_right() {
    let all: Vec<String> = (1..=12).map(|index| format!("n{index}")).collect();
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    let lab = Lab::up(LabOptions::new("churn").nodes(12).started(4).pods(1));
    settle(&lab, "four nodes", &all[..4]);

    for node in &all[4..11] {
        lab.start(node);
    }
    settle(&lab, "seven joined", &all[..11]);
    lab.ping_all();

    // n11 leaves in order: its routes go everywhere, and nothing of weft's stays on it.
    assert!(!lab.exec("n11", &["weft", "leave"]).status.success(), "n11 left while it had a pod");
    lab.ping_all();
    lab.tell(Request::PodRemove { node: "n11".into(), pod: "a".into() });
    lab.run("n11", &["weft", "leave"]);
    settle(&lab, "n11 left", &all[..10]);
    wait_until("nothing of weft's is left on n11", PATIENCE, || {
        let picture = lab.picture("n11");
        ["links", "addresses", "neighbours", "fdb", "routes", "nft"]
            .iter()
            .all(|part| picture[*part].as_array().is_some_and(Vec::is_empty))
    });

    // A partition: n1 to n5 here, n6 to n10 there, and n12 joins there while nobody here can hear it.
    let (here, there) = (&all[..5], ["n6", "n7", "n8", "n9", "n10", "n12"]);
    for a in here {
        for b in there {
            lab.cut(a, b);
        }
    }
    wait_until("both sides have noticed", PATIENCE, || alive(&lab, "n1") == 4 && alive(&lab, "n10") == 4);
    lab.start("n12");
    let within = lab.ip("n3", "a");
    assert!(lab.ping("n1/a", within), "the partition hit a neighbour on the same side");
    for a in here {
        for b in there {
            lab.heal(a, b);
        }
    }
    let members: Vec<&str> = all.iter().copied().filter(|node| *node != "n11").collect();
    settle(&lab, "healed", &members);
    wait_until("everybody is alive again", PATIENCE, || members.iter().all(|node| alive(&lab, node) == 10));
    lab.ping_all();

    // A node that dies keeps its routes: its pods may well live on.
    lab.kill("n4");
    wait_until("n4 is noticed", PATIENCE, || alive(&lab, "n1") == 9);
    settle(&lab, "n4 died", &members);
    lab.start("n4");
    wait_until("n4 is back", PATIENCE, || alive(&lab, "n1") == 10);
    settle(&lab, "n4 came back", &members);
    lab.ping_all();
}
