//! The network between the nodes: one bridge in the keeper's network namespace, with no uplink.
//!
//! What two nodes send each other is cut, delayed and kept small here, by their hardware addresses, so the nodes themselves are left
//! as they are.

use std::process::Command;

use anyhow::bail;
use serde::Deserialize;

use super::enter::{self, Place};
use super::model::State;
use super::tools::{feed, run, said, tool};

/// The bridge.
const BRIDGE: &str = "lab0";

/// Makes the bridge and the rules that cut.
pub(crate) fn make() -> anyhow::Result<()> {
    tool("ip link set lo up")?;
    tool(&format!("ip link add {BRIDGE} type bridge stp_state 0 forward_delay 0 mcast_snooping 0"))?;
    // The bridge passes frames and takes no part: no address of its own, not even a link-local one.
    tool(&format!("ip link set {BRIDGE} addrgenmode none"))?;
    tool(&format!("ip link set {BRIDGE} up"))?;
    nft("table bridge lab {
           set cut { type ether_addr . ether_addr; }
           set cut_udp { type ether_addr . ether_addr; }
           map floor { type ether_addr . ether_addr : verdict; }
           chain forward {
             type filter hook forward priority 0; policy accept;
             ether saddr . ether daddr @cut drop
             meta l4proto udp ether saddr . ether daddr @cut_udp drop
             ether saddr . ether daddr vmap @floor
           }
         }")
}

/// Plugs a node's namespaces into the bridge. The node's end is `eth0`.
pub(crate) fn plug(node: &str, holder: u32, mac: &str) -> anyhow::Result<()> {
    let port = port(node);
    tool(&format!("ip link add {port} type veth peer name eth0 address {mac} netns {holder}"))?;
    tool(&format!("ip link set {port} addrgenmode none master {BRIDGE} up"))?;
    // Pinned, so that what comes back from the delay relay never teaches the bridge a wrong port.
    tool(&format!("bridge fdb replace {mac} dev {port} master static"))?;
    Ok(())
}

/// Has a device's own IPv6 address be one at once: while a router looks for duplicates of it, it asks nobody for a
/// neighbour's address, and forwards nothing to those that it has not met. Before the device is up.
pub(crate) fn skip_dad(run: impl Fn(&str) -> anyhow::Result<String>, device: &str) -> anyhow::Result<()> {
    run(&format!("sysctl -q -w net.ipv6.conf.{device}.accept_dad=0")).map(drop)
}

/// Names the devices that a tool, run where they are, does not see pass frames: the kernel puts off what a carrier's coming
/// changes by up to a second (`net/core/link_watch.c`) where many come and go.
pub(crate) fn not_up(run: impl Fn(&str) -> anyhow::Result<String>) -> anyhow::Result<Vec<String>> {
    let links: Vec<Link> = serde_json::from_str(&run("ip -j -d link show type veth")?)?;
    Ok(links.into_iter().filter(|link| !link.is_up()).map(|link| link.ifname).collect())
}

/// A device as `ip -j -d link` has it.
#[derive(Deserialize)]
struct Link {
    ifname: String,
    operstate: String,
    #[serde(default)]
    linkinfo: LinkInfo,
}

#[derive(Deserialize, Default)]
struct LinkInfo {
    #[serde(default)]
    info_slave_data: Port,
}

/// A bridge's port, where the device is one.
#[derive(Deserialize, Default)]
struct Port {
    state: Option<String>,
}

impl Link {
    fn is_up(&self) -> bool {
        let state = self.linkinfo.info_slave_data.state.as_deref();
        self.operstate == "UP" && state.is_none_or(|state| state == "forwarding")
    }
}

/// The bridge's port of a node.
pub(crate) fn port(node: &str) -> String {
    format!("u-{node}")
}

/// What of two machines' frames does not pass.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Cut {
    /// Nothing passes.
    All,
    /// All but UDP passes.
    Udp,
}

impl Cut {
    fn set(self) -> &'static str {
        match self {
            Cut::All => "cut",
            Cut::Udp => "cut_udp",
        }
    }
}

/// Lets it no longer pass between two machines.
pub(crate) fn cut(what: Cut, (a, b): &(String, String)) -> anyhow::Result<()> {
    nft(&format!("add element bridge lab {} {{ {a} . {b}, {b} . {a} }}", what.set()))
}

/// Undoes [`cut`].
pub(crate) fn heal(what: Cut, (a, b): &(String, String)) -> anyhow::Result<()> {
    nft(&format!("delete element bridge lab {} {{ {a} . {b}, {b} . {a} }}", what.set()))
}

/// Lets nothing pass between two nodes that is longer than so many bytes, Ethernet's header aside, and tells nobody.
pub(crate) fn floor((a, b): &(String, String), bytes: u32) -> anyhow::Result<()> {
    let chain = format!("over-{bytes}");
    nft(&format!(
        "add chain bridge lab {chain}; flush chain bridge lab {chain}; \
         add rule bridge lab {chain} meta length > {bytes} drop; \
         add element bridge lab floor {{ {a} . {b} : jump {chain}, {b} . {a} : jump {chain} }}"
    ))
}

/// Undoes [`floor`].
pub(crate) fn lift((a, b): &(String, String)) -> anyhow::Result<()> {
    nft(&format!("delete element bridge lab floor {{ {a} . {b}, {b} . {a} }}"))
}

/// Has packets leave a node as they are on a wire: a veth pair hands super-packets of 64 KiB over whole, and no floor would
/// let these pass.
pub(crate) fn segment(state: &State, node: &str) -> anyhow::Result<()> {
    let mut words = enter::from_keeper(state, &Place::Node(node.to_owned()))?;
    words.extend(
        ["ethtool", "-K", "eth0", "tso", "off", "gso", "off", "tx-udp-segmentation", "off"]
            .map(str::to_owned),
    );
    run(&mut enter::command(&words)).map(drop)
}

/// Feeds commands to nft.
pub(crate) fn nft(commands: &str) -> anyhow::Result<()> {
    let output = feed(Command::new("nft").args(["-f", "-"]), commands)?;
    if !output.status.success() {
        bail!("nft refused {commands:?}: {}", said(&output));
    }
    Ok(())
}
