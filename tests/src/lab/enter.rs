//! How to run a command somewhere in the lab, seen from the keeper and from outside.

use std::fmt;
use std::process::Command;
use std::str::FromStr;

use super::home::KeeperId;
use super::model::State;

/// Where in the lab a command runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// The switch between the nodes: everything they send each other passes here.
    Underlay,
    /// A node, or a router.
    Node(String),
    /// A pod of a node: the node's files, the pod's network.
    Pod(String, String),
}

impl FromStr for Place {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text.split_once('/') {
            Some((node, pod)) => Place::Pod(node.to_owned(), pod.to_owned()),
            None if text == "underlay" => Place::Underlay,
            None => Place::Node(text.to_owned()),
        })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Underlay => f.write_str("underlay"),
            Place::Node(node) => f.write_str(node),
            Place::Pod(node, pod) => write!(f, "{node}/{pod}"),
        }
    }
}

impl From<&str> for Place {
    fn from(text: &str) -> Self {
        text.parse().expect("every text names a place")
    }
}

impl From<&Place> for Place {
    fn from(place: &Place) -> Self {
        place.clone()
    }
}

/// Where executables are looked for inside a node.
pub(crate) fn path() -> String {
    let outer = std::env::var("PATH").unwrap_or_default();
    format!("/run/weft-lab/bin:{outer}:/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin:/usr/lib/cni")
}

/// The words that lead from the keeper into a place.
pub(crate) fn from_keeper(state: &State, place: &Place) -> anyhow::Result<Vec<String>> {
    let (node, pod) = match place {
        Place::Underlay => return Ok(Vec::new()),
        Place::Node(node) => (node, None),
        Place::Pod(node, pod) => (node, Some(pod)),
    };
    if let (Ok(router), None) = (state.router(node), pod) {
        let holder = router.holder.to_string();
        return Ok(["nsenter", "--net", "--target", &holder, "--"].map(str::to_owned).to_vec());
    }
    let view = state.node(node)?;
    let mut words: Vec<String> =
        ["nsenter", "--mount", "--net", "--uts", "--target"].iter().map(|word| (*word).to_owned()).collect();
    words.push(view.holder.to_string());
    words.push("--".into());
    if let Some(pod) = pod {
        view.pod(pod)?;
        words.extend(["nsenter".to_owned(), format!("--net=/run/netns/{pod}"), "--".into()]);
    }
    Ok(words)
}

/// The words that lead from outside to the keeper.
pub(crate) fn to_keeper(keeper: &KeeperId) -> Vec<String> {
    let pid = keeper.pid;
    let mut words = vec!["nsenter".to_owned(), "--target".into(), pid.to_string()];
    if keeper.user_namespace {
        words.extend(["--user".to_owned(), "--preserve-credentials".into()]);
    }
    words.extend([
        "--mount".to_owned(),
        "--net".into(),
        format!("--pid=/proc/{pid}/ns/pid_for_children"),
        "--".into(),
    ]);
    words
}

/// A command of these words, with the lab's executables on its path.
pub(crate) fn command(words: &[String]) -> Command {
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).env("PATH", path());
    command
}
