//! What a lab is asked to be, what it is, and what it can be told to do.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::nat::{self, Nat};
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
    /// What stands before each site, the first one first; nothing before those that are not named.
    #[serde(default)]
    pub nat: Vec<Nat>,
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
        nat::check(self)?;
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
    /// The routers of sites behind NAT.
    #[serde(default)]
    pub routers: Vec<RouterView>,
    /// Pairs on the public network that do not hear each other.
    pub cuts: Vec<(String, String)>,
    /// Pairs on the public network that hear no UDP of each other.
    #[serde(default)]
    pub udp_cuts: Vec<(String, String)>,
    /// What befalls frames on the public network, one entry a direction.
    pub impairments: Vec<Impairment>,
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

    /// Finds a router.
    ///
    /// # Errors
    /// A sentence that lists the routers there are.
    pub fn router(&self, name: &str) -> anyhow::Result<&RouterView> {
        self.routers.iter().find(|router| router.name == name).ok_or_else(|| {
            let there: Vec<_> = self.routers.iter().map(|router| router.name.as_str()).collect();
            anyhow::anyhow!("no router {name} in lab {}: it has {there:?}", self.options.name)
        })
    }

    /// Returns the hardware address on the public network of a node or a router.
    ///
    /// # Errors
    /// A sentence that says what is there, or which router the node is behind.
    pub(crate) fn public_mac(&self, name: &str) -> anyhow::Result<&str> {
        if let Ok(router) = self.router(name) {
            return Ok(&router.mac);
        }
        let node = self.node(name)?;
        if let Some(router) = self.routers.iter().find(|router| router.site == node.site) {
            anyhow::bail!("{name} is behind {0}: name {0}", router.name);
        }
        Ok(&node.mac)
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
    /// The number of its site.
    #[serde(default)]
    pub site: usize,
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

/// The router of a site behind NAT.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RouterView {
    /// `r2` before the second site.
    pub name: String,
    /// The number of the site.
    pub site: usize,
    /// How it translates.
    pub nat: Nat,
    /// The process that holds its network namespace, as the keeper sees it; of two routers, the inner one's.
    pub holder: u32,
    /// Its hardware address on the public network.
    pub mac: String,
    /// Its public addresses.
    pub addresses: Vec<IpAddr>,
}

/// What befalls frames from one to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Impairment {
    /// Who sends.
    pub from: String,
    /// Who receives.
    pub to: String,
    /// So much longer it takes, in milliseconds.
    pub ms: u64,
    /// So many frames of a hundred are lost.
    pub loss_percent: u8,
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
    /// Lets two no longer hear each other.
    Cut {
        /// One node or router.
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
    /// Lets two no longer hear the other's UDP.
    CutUdp {
        /// One node or router.
        a: String,
        /// The other.
        b: String,
    },
    /// Undoes that.
    HealUdp {
        /// One node or router.
        a: String,
        /// The other.
        b: String,
    },
    /// Delays what two send each other; 0 takes the delay away.
    Delay {
        /// One node or router.
        a: String,
        /// The other.
        b: String,
        /// How long each direction takes longer.
        ms: u64,
    },
    /// Delays and loses what one sends to another; neither of both takes the entry away.
    Impair(Impairment),
    /// Has a router translate in another way, and forget its mappings.
    Nat {
        /// The router.
        router: String,
        /// How.
        nat: Nat,
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
    /// Has the sites let each other in, as they do by themselves where all daemons run from the start.
    Befriend,
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
