//! Sites behind NAT: a router before each of them, between the site's own network and the public one.
//!
//! All such sites have the same network inside, as private networks do. Mapping and filtering are RFC 4787's terms. The
//! mapping of all kinds but the symmetric one is fixed (a public port for each of a node's ports), since what the kernel
//! calls masquerading maps two nodes with one port by destination. No kind sends back what comes from inside (hairpinning).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::ensure;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::machine::Machine;
use super::model::{Families, Options, RouterView, underlay_addresses};
use super::tools::{feed, said};
use super::{sites, underlay};

/// How a site's router translates UDP. IPv6 is never translated: the routers let in what belongs to a flow from inside.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Nat {
    /// There is no router: the nodes are on the public network.
    #[default]
    None,
    /// One mapping for all destinations; everybody may send to it.
    FullCone,
    /// One mapping for all destinations; addresses that were sent to within 30 s may send to it.
    AddressRestricted,
    /// One mapping for all destinations; addresses and ports that were sent to may send to it.
    PortRestricted,
    /// Another mapping, at a random port, for each destination, which alone may send to it.
    Symmetric,
    /// Two port-restricted routers, one behind the other.
    Double,
}

/// The network inside of every site behind NAT: node i has .i.
const INSIDE: [u8; 3] = [198, 51, 100];
/// The router's address there.
const GATEWAY: u8 = 254;
/// The network between the two routers of a double NAT.
const BETWEEN: &str = "203.0.113";
/// The UDP ports of a node that have a fixed mapping: gossip, tunnels, the tunnels' second port.
const PORTS: [u16; 3] = [7117, 51820, 51821];
/// Added to a site's number: the router's public address.
const ROUTERS: usize = 200;
/// The device of the network inside.
const LAN: &str = "lan0";

/// Returns how a site's router translates.
pub(crate) fn of_site(options: &Options, site: usize) -> Nat {
    options.nat.get(site - 1).copied().unwrap_or_default()
}

/// Returns whether a node is behind a router.
pub(crate) fn is_behind(options: &Options, node: usize) -> bool {
    of_site(options, sites::site_of(options, node)) != Nat::None
}

/// Checks that the lab can be.
pub(crate) fn check(options: &Options) -> anyhow::Result<()> {
    ensure!(options.nat.len() <= options.sites, "--nat: name at most one kind a site, {}", options.sites);
    let any = options.nat.iter().any(|nat| *nat != Nat::None);
    let open = (1..=options.sites).any(|site| of_site(options, site) == Nat::None);
    ensure!(!any || open, "--nat: leave one site without (none), so that the others have whom to turn to");
    ensure!(!any || options.underlay.v4(), "--nat translates IPv4: leave --underlay v6 out");
    Ok(())
}

/// The addresses of a node's `eth0`.
pub(crate) fn node_addresses(options: &Options, node: usize) -> Vec<IpAddr> {
    if is_behind(options, node) {
        inside(options.underlay, sites::site_of(options, node), node)
    } else {
        underlay_addresses(options.underlay, node)
    }
}

/// Whom a node turns to first: nodes on the public network, and the first of its own site.
pub(crate) fn seeds(options: &Options, node: usize) -> Vec<IpAddr> {
    let mut seeds: Vec<usize> =
        (1..=options.nodes).filter(|seed| !is_behind(options, *seed)).take(3).collect();
    if is_behind(options, node) {
        let own = sites::site_of(options, node);
        seeds.extend((1..=options.nodes).find(|other| sites::site_of(options, *other) == own));
    }
    if options.apart {
        let own = sites::site_of(options, node);
        let near = |seed: &usize| sites::site_of(options, *seed) == own;
        seeds = (1..=options.nodes).filter(near).take(3).collect();
    }
    let others = seeds.into_iter().filter(|seed| *seed != node);
    others.filter_map(|seed| node_addresses(options, seed).into_iter().next()).collect()
}

/// The routes of a node to all that is outside of its own link: those behind it to the public network, the others to the
/// IPv6 networks of those behind.
pub(crate) fn routes(options: &Options, node: usize) -> Vec<String> {
    if !is_behind(options, node) {
        return inward_routes(options, None);
    }
    let gateways = inside(options.underlay, sites::site_of(options, node), GATEWAY.into());
    let outward = |gateway: &IpAddr| match gateway {
        IpAddr::V4(_) => format!("192.0.2.0/24 via {gateway}"),
        IpAddr::V6(_) => format!("2001:db8::/32 via {gateway}"),
    };
    gateways.iter().map(outward).collect()
}

/// The routes to the IPv6 networks behind routers, but for one of them.
fn inward_routes(options: &Options, but: Option<usize>) -> Vec<String> {
    let behind = |site: &usize| of_site(options, *site) != Nat::None && Some(*site) != but;
    let sites = (1..=options.sites).filter(|_| options.underlay.v6()).filter(behind);
    sites.map(|site| format!("2001:db8:0:{site:x}::/64 via 2001:db8::{:x}", ROUTERS + site)).collect()
}

fn inside(families: Families, site: usize, host: usize) -> Vec<IpAddr> {
    let host = u8::try_from(host).expect("a lab has at most 200 nodes");
    let site = u16::try_from(site).expect("a lab has at most 13 sites");
    let v4 = families.v4().then(|| Ipv4Addr::new(INSIDE[0], INSIDE[1], INSIDE[2], host).into());
    let v6 = families.v6().then(|| Ipv6Addr::new(0x2001, 0xdb8, 0, site, 0, 0, 0, host.into()).into());
    v4.into_iter().chain(v6).collect()
}

/// The router of a site, and the one before it where there are two.
#[derive(Debug)]
pub(crate) struct Router {
    inner: Machine,
    outer: Option<Machine>,
    /// What people see of it.
    pub(crate) view: RouterView,
}

impl Router {
    /// Makes the router of a site behind NAT: its network inside is ready for nodes.
    pub(crate) fn start(options: &Options, site: usize) -> anyhow::Result<Self> {
        let name = format!("r{site}");
        let nat = of_site(options, site);
        let mac = format!("02:4c:42:00:01:{site:02x}");
        // Two routers, one behind the other, are a matter of IPv4.
        let families = if nat == Nat::Double { Families::V4 } else { options.underlay };
        let addresses = underlay_addresses(families, ROUTERS + site);
        let inner = Machine::start(&name)?;
        let outer = (nat == Nat::Double).then(|| Machine::start(&name)).transpose()?;
        let view = RouterView { name, site, nat, holder: inner.holder(), mac, addresses };
        let router = Self { inner, outer, view };
        router.link(options)?;
        router.translate(options)?;
        Ok(router)
    }

    /// Makes devices, addresses and routes.
    fn link(&self, options: &Options) -> anyhow::Result<()> {
        let (inner, view) = (&self.inner, &self.view);
        let public = self.outer.as_ref().unwrap_or(inner);
        underlay::plug(&view.name, public.holder(), &view.mac)?;
        underlay::skip_dad(|line| public.tool(line), "eth0")?;
        inner.tool(&format!("ip link add {LAN} type bridge stp_state 0 forward_delay 0 mcast_snooping 0"))?;
        underlay::skip_dad(|line| inner.tool(line), LAN)?;
        for address in inside(options.underlay, view.site, GATEWAY.into()) {
            add_address(inner, address, LAN)?;
        }
        for address in &view.addresses {
            add_address(public, *address, "eth0")?;
        }
        if let Some(outer) = &self.outer {
            let holder = inner.holder();
            outer.tool(&format!("ip link add {LAN} type veth peer name eth0 netns {holder}"))?;
            outer.tool(&format!("ip address add {BETWEEN}.254/24 dev {LAN}"))?;
            inner.tool(&format!("ip address add {BETWEEN}.1/24 dev eth0"))?;
        }
        for machine in self.machines() {
            machine.tool("sysctl -q -w net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")?;
            machine.tool(&format!("ip link set {LAN} up"))?;
            machine.tool("ip link set eth0 up")?;
        }
        let outward = format!("192.0.2.0/24 via {BETWEEN}.254");
        let routes =
            if self.outer.is_some() { vec![outward] } else { inward_routes(options, Some(view.site)) };
        routes.iter().try_for_each(|route| inner.tool(&format!("ip route add {route}")).map(drop))
    }

    /// The machines that it is made of.
    pub(crate) fn machines(&self) -> impl Iterator<Item = &Machine> {
        self.outer.iter().chain([&self.inner])
    }

    /// Plugs a node into the network inside. The node's end is `eth0`.
    pub(crate) fn plug(&self, node: &str, holder: u32, mac: &str) -> anyhow::Result<()> {
        let port = underlay::port(node);
        let link = format!("ip link add {port} type veth peer name eth0 address {mac} netns {holder}");
        self.inner.tool(&link)?;
        self.inner.tool(&format!("ip link set {port} addrgenmode none master {LAN} up"))?;
        Ok(())
    }

    /// Translates in another way from now on, and forgets every mapping, as a router that starts anew.
    pub(crate) fn change(&mut self, options: &Options, nat: Nat) -> anyhow::Result<()> {
        let is_one = |nat: Nat| !matches!(nat, Nat::None | Nat::Double);
        let name = &self.view.name;
        ensure!(
            nat == self.view.nat || (is_one(nat) && is_one(self.view.nat)),
            "{name} cannot change between one router, two and none: bring another lab up"
        );
        self.view.nat = nat;
        self.translate(options)?;
        self.machines().try_for_each(|machine| machine.tool("conntrack -F").map(drop))
    }

    fn translate(&self, options: &Options) -> anyhow::Result<()> {
        let site = self.view.site;
        let nodes = (1..=options.nodes).filter(|node| sites::site_of(options, *node) == site);
        let address = self.view.addresses.first().filter(|_| self.outer.is_none());
        let address = address.map_or_else(|| format!("{BETWEEN}.1"), IpAddr::to_string);
        load(&self.inner, &rules(self.view.nat, &address, &nodes.collect::<Vec<_>>()))?;
        // A port that comes to the outer one is one node's port already, and the kernel keeps it.
        self.outer.as_ref().map_or(Ok(()), |outer| load(outer, &rules(Nat::PortRestricted, "", &[])))
    }
}

fn add_address(machine: &Machine, address: IpAddr, device: &str) -> anyhow::Result<()> {
    let rest = if address.is_ipv4() { "/24" } else { "/64 nodad" };
    machine.tool(&format!("ip address add dev {device} {address}{rest}")).map(drop)
}

fn load(machine: &Machine, rules: &str) -> anyhow::Result<()> {
    let output = feed(machine.within().args(["nft", "-f", "-"]), rules)?;
    ensure!(output.status.success(), "nft refused {rules}: {}", said(&output));
    Ok(())
}

/// The tables of a router with this public address before these nodes.
fn rules(nat: Nat, address: &str, nodes: &[usize]) -> String {
    let [a, b, c] = INSIDE;
    let ports = || nodes.iter().flat_map(|node| PORTS.iter().enumerate().map(move |port| (node, port)));
    let public = |node: usize, slot: usize| 10_000 + 10 * node + slot;
    let outward = ports().map(|(node, (slot, port))| {
        format!("{a}.{b}.{c}.{node} . {port} : {address} . {}", public(*node, slot))
    });
    let inward =
        ports().map(|(node, (slot, port))| format!("{} : {a}.{b}.{c}.{node} . {port}", public(*node, slot)));
    let elements = |all: Vec<String>| match all.is_empty() {
        true => String::new(),
        false => format!("elements = {{ {} }};", all.join(", ")),
    };
    let (outward, inward) = (elements(outward.collect()), elements(inward.collect()));
    let dnat = "dnat ip addr . port to udp dport map @inward;";
    let lets_in = match nat {
        Nat::FullCone => format!("iifname eth0 {dnat}"),
        Nat::AddressRestricted => format!("iifname eth0 ip saddr . udp dport @heard {dnat}"),
        Nat::None | Nat::PortRestricted | Nat::Symmetric | Nat::Double => String::new(),
    };
    let translates = match nat {
        Nat::Symmetric => "oifname eth0 masquerade fully-random;",
        _ => {
            "oifname eth0 snat ip addr . port to ip saddr . udp sport map @outward; oifname eth0 masquerade;"
        }
    };
    format!(
        "table ip lab; delete table ip lab; table ip6 lab; delete table ip6 lab;
         table ip lab {{
           map outward {{ type ipv4_addr . inet_service : ipv4_addr . inet_service; {outward} }}
           map inward {{ type inet_service : ipv4_addr . inet_service; {inward} }}
           set heard {{ type ipv4_addr . inet_service; flags dynamic,timeout; timeout 30s; size 65536; }}
           chain before {{ type nat hook prerouting priority dstnat; {lets_in} }}
           chain after {{ type nat hook postrouting priority srcnat; {translates} }}
           chain listen {{ type filter hook postrouting priority 200; oifname eth0 update @heard {{ ip daddr . udp sport }}; }}
           chain pass {{ type filter hook forward priority 0; iifname eth0 ct state new ct status & dnat == 0 drop; }}
           chain own {{ type filter hook input priority 0; iifname eth0 ip protocol udp drop; }}
         }}
         table ip6 lab {{
           chain pass {{ type filter hook forward priority 0; iifname eth0 ct state new drop; }}
         }}"
    )
}
