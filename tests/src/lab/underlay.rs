//! The network between the nodes: one bridge in the keeper's network namespace, with no uplink.
//!
//! What two nodes send each other is cut and delayed here, by their hardware addresses, so the nodes themselves are left
//! as they are.

use std::process::Command;

use anyhow::bail;

use super::tools::{feed, said, tool};

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
           chain forward {
             type filter hook forward priority 0; policy accept;
             ether saddr . ether daddr @cut drop
             meta l4proto udp ether saddr . ether daddr @cut_udp drop
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

/// Feeds commands to nft.
pub(crate) fn nft(commands: &str) -> anyhow::Result<()> {
    let output = feed(Command::new("nft").args(["-f", "-"]), commands)?;
    if !output.status.success() {
        bail!("nft refused {commands:?}: {}", said(&output));
    }
    Ok(())
}
