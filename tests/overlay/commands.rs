//! What people ask of sites in a lab, and how they see that it worked.
#![allow(dead_code)]

use std::time::{Duration, Instant};

use serde_json::Value;
use weft_tests::lab::{Lab, wait_until};

pub const PATIENCE: Duration = Duration::from_secs(90);

/// All that a command writes.
pub fn said(lab: &Lab, node: &str, command: &str) -> String {
    let output = lab.exec(node, &["sh", "-c", command]);
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

pub fn reaches(lab: &Lab, from: &str, to: &str) -> bool {
    lab.ping(format!("{from}/a").as_str(), lab.ip(to, "a"))
}

pub fn all_reach(lab: &Lab, from: &[&str], to: &[&str]) -> bool {
    from.iter().all(|from| to.iter().all(|to| from == to || reaches(lab, from, to)))
}

/// The ids of a node's cluster keys, the one that it seals with first.
pub fn ids(lab: &Lab, node: &str) -> Vec<String> {
    let listed: Value = lab.weft(node, &["cluster-key", "list"]);
    serde_json::from_value(listed["ids"].clone()).expect("a list of ids")
}

/// Makes a token.
pub fn invite(lab: &Lab, node: &str, options: &str) -> String {
    let token = said(lab, node, &format!("weft site invite {options}")).trim().to_owned();
    assert!(token.starts_with("weft1."), "{token}");
    token
}

/// Brings a site in, and waits until it seals with the key that the mesh has.
pub fn join(lab: &Lab, inviter: &str, joiner: &str) {
    let joined = said(lab, joiner, &format!("weft join {}", invite(lab, inviter, "")));
    assert!(joined.starts_with("this site has joined"), "{joined}");
    wait_until("they seal with one key", PATIENCE, || ids(lab, inviter)[0] == ids(lab, joiner)[0]);
}

/// Asserts that the doctor of a node finds something wrong and says so in these words.
pub fn assert_diagnosed(lab: &Lab, node: &str, finding: &str, words: &str) {
    let began = Instant::now();
    let finding = format!("FAIL {finding}");
    loop {
        let doctor = said(lab, node, "weft doctor");
        // A finding is one line, and its advice the next.
        if doctor.lines().any(|line| line.starts_with(&finding) && line.contains(words)) {
            return;
        }
        assert!(began.elapsed() < PATIENCE, "the doctor of {node} does not say {words:?}:\n{doctor}");
    }
}
