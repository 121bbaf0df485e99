//! What a lab is asked to be, what it is, and what it can be told to do.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::sites;

/// Which address families a network has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Families {
    /// IPv4 alone.
    V4,
    /// IPv6 alone.
    V6,
    /// Both.
    Dual,
}

impl Families {
    pub(crate) fn v4(self) -> bool {
        self != Families::V6
    }

    pub(crate) fn v6(self) -> bool {
        self != Families::V4
    }
}

/// How pod traffic crosses between nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// The kernel's VXLAN device.
    Vxlan,
    /// Encrypted tunnels.
    Wireguard,
    /// What weft chooses for each pair of nodes.
    Auto,
}

/// Where the nodes keep their leases.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Store {
    /// One SQLite file that all nodes of the lab share.
    Sqlite,
    /// The lab names each node's subnets.
    Static,
    /// An etcd on a machine of its own, which can be stopped and started like a node's daemon: `etcd`.
    Etcd,
}

/// What a lab is asked to be.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// Names the lab, so that several can run at once.
    pub name: String,
    /// How many nodes there are.
    pub nodes: usize,
    /// How many of them run their daemon from the start; the others wait for `start`.
    pub started: usize,
    /// How many pods every started node gets: `a`, `b`, ...
    pub pods: usize,
    /// How many sites the nodes are spread over.
    pub sites: usize,
    /// How pod traffic crosses.
    pub backend: Backend,
    /// Where leases are kept.
    pub store: Store,
    /// The families of the network between the nodes.
    pub underlay: Families,
    /// The families of the pods.
    pub overlay: Families,
    /// Merged into the configuration of every node.
    pub config: toml::Table,
    /// Merged into the configuration of one node, after `config`.
    pub node_config: BTreeMap<String, toml::Table>,
    /// Directory of `weftd`, `weft` and `weft-cni`.
    pub bin_dir: std::path::PathBuf,
}

impl Options {
    /// Checks what this lab can do.
    ///
    /// # Errors
    /// One sentence that names the option and what to use instead.
    pub fn check(&self) -> anyhow::Result<()> {
        let name_is_plain = !self.name.is_empty()
            && self.name.len() <= 32
            && self.name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        anyhow::ensure!(name_is_plain, "--name {}: use up to 32 letters, digits and dashes", self.name);
        anyhow::ensure!((1..=200).contains(&self.nodes), "--nodes {}: use 1 to 200", self.nodes);
        anyhow::ensure!(self.pods <= 26, "--pods {}: use 0 to 26", self.pods);
        anyhow::ensure!(
            self.started <= self.nodes,
            "--started {}: there are only {} nodes",
            self.started,
            self.nodes
        );
        let most = self.nodes.min(sites::MOST);
        anyhow::ensure!((1..=most).contains(&self.sites), "--sites {}: use 1 to {most}", self.sites);
        anyhow::ensure!(
            self.sites == 1 || self.store == Store::Sqlite,
            "--sites {}: each site has its own SQLite store; leave --store out",
            self.sites
        );
        anyhow::ensure!(
            self.backend != Backend::Auto,
            "--backend auto: name vxlan, which encrypts between sites, or wireguard, which encrypts all"
        );
        Ok(())
    }
}

/// What a lab is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    /// What it was asked to be.
    pub options: Options,
    /// False until every started node answers and has its pods.
    pub ready: bool,
    /// The nodes, `n1` first.
    pub nodes: Vec<NodeView>,
    /// Pairs of nodes that do not hear each other.
    pub cuts: Vec<(String, String)>,
    /// Pairs of nodes with the delay that each direction between them has, in milliseconds.
    pub delays: Vec<(String, String, u64)>,
    /// Pairs of nodes with the longest packet that passes between them, in bytes.
    #[serde(default)]
    pub floors: Vec<(String, String, u32)>,
}

impl State {
    /// Finds a node.
    ///
    /// # Errors
    /// A sentence that lists the nodes there are.
    pub fn node(&self, name: &str) -> anyhow::Result<&NodeView> {
        self.nodes.iter().find(|node| node.name == name).ok_or_else(|| {
            anyhow::anyhow!("no node {name} in lab {}: it has n1 to n{}", self.options.name, self.nodes.len())
        })
    }

    pub(crate) fn node_mut(&mut self, name: &str) -> anyhow::Result<&mut NodeView> {
        self.node(name)?;
        Ok(self.nodes.iter_mut().find(|node| node.name == name).expect("the node was just found"))
    }

    /// Lists every pod with the node it is on.
    pub fn pods(&self) -> impl Iterator<Item = (&NodeView, &PodView)> {
        self.nodes.iter().flat_map(|node| node.pods.iter().map(move |pod| (node, pod)))
    }
}

/// One node of a lab.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NodeView {
    /// `n1`, `n2`, ...
    pub name: String,
    /// The process that holds the node's namespaces, as the keeper sees it.
    pub holder: u32,
    /// The hardware address of the node's `eth0`.
    pub mac: String,
    /// The addresses of the node's `eth0`.
    pub underlay: Vec<IpAddr>,
    /// The daemon's process, as the keeper sees it; none when it does not run.
    pub daemon: Option<u32>,
    /// The node's pods.
    pub pods: Vec<PodView>,
}

impl NodeView {
    /// Finds a pod.
    ///
    /// # Errors
    /// A sentence that lists the pods there are.
    pub fn pod(&self, name: &str) -> anyhow::Result<&PodView> {
        self.pods.iter().find(|pod| pod.name == name).ok_or_else(|| {
            let there: Vec<_> = self.pods.iter().map(|pod| pod.name.as_str()).collect();
            anyhow::anyhow!("no pod {name} on node {}: it has {there:?}", self.name)
        })
    }
}

/// One pod of a node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PodView {
    /// The pod's name, which also names its network namespace.
    pub name: String,
    /// The container id the CNI plugin was called with.
    pub container: String,
    /// What the CNI plugin answered.
    pub result: serde_json::Value,
    /// The pod's addresses, from that answer.
    pub ips: Vec<IpAddr>,
}

impl PodView {
    /// The pod's IPv4 address, if it has one.
    pub fn v4(&self) -> Option<IpAddr> {
        self.ips.iter().copied().find(IpAddr::is_ipv4)
    }

    /// The pod's IPv6 address, if it has one.
    pub fn v6(&self) -> Option<IpAddr> {
        self.ips.iter().copied().find(IpAddr::is_ipv6)
    }
}

/// What a running lab can be told to do. The answer to each is the [`State`] after it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum Request {
    /// Says what the lab is.
    Status,
    /// Makes a pod and calls the CNI plugin with ADD.
    PodAdd {
        /// The node to make it on.
        node: String,
        /// The name of the pod.
        pod: String,
    },
    /// Calls the CNI plugin with DEL and removes the pod.
    PodRemove {
        /// The node it is on.
        node: String,
        /// The name of the pod.
        pod: String,
    },
    /// Lets two nodes no longer hear each other.
    Cut {
        /// One node.
        a: String,
        /// The other.
        b: String,
    },
    /// Undoes a cut.
    Heal {
        /// One node.
        a: String,
        /// The other.
        b: String,
    },
    /// Delays what two nodes send each other; 0 takes the delay away.
    Delay {
        /// One node.
        a: String,
        /// The other.
        b: String,
        /// How long each direction takes longer.
        ms: u64,
    },
    /// Lets no longer packet pass between two nodes; 0 lets all pass again.
    Floor {
        /// One node.
        a: String,
        /// The other.
        b: String,
        /// What a packet of the underlay may have at most.
        bytes: u32,
    },
    /// Ends a daemon with SIGKILL.
    Kill {
        /// The node.
        node: String,
    },
    /// Ends a daemon with SIGTERM and waits for it.
    Stop {
        /// The node.
        node: String,
    },
    /// Starts a daemon that does not run, and waits until it answers.
    Start {
        /// The node.
        node: String,
        /// By how many seconds its clocks are ahead of the machine's: those that do not show the time of day.
        #[serde(default)]
        ahead_s: u64,
    },
    /// Ends the lab.
    Down,
}

/// The underlay's addresses of the node with this number.
pub(crate) fn underlay_addresses(families: Families, index: usize) -> Vec<IpAddr> {
    let host = u8::try_from(index).expect("a lab has at most 200 nodes");
    let mut addresses = Vec::new();
    if families.v4() {
        addresses.push(IpAddr::V4(Ipv4Addr::new(192, 0, 2, host)));
    }
    if families.v6() {
        addresses.push(IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, host.into())));
    }
    addresses
}
