//! The veth pair of one pod.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, BridgePortState, In6AddrGenMode, InfoBridgePort, InfoData, InfoKind,
    InfoPortData, InfoPortKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::route::{
    RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::errno::Errno;
use weft_wire::cni::{AttachmentId, CniError, CniResult, Code, Interface, IpConfig, RouteEntry};
use weft_wire::types::MacAddress;

use super::netns::{self, Netns};
use super::rtnl::{Conn, Refusal, Step};
use super::{AddPlan, Attachment, Condition, PodAddress};
use crate::kernel::sysctl;

/// How long ADD waits for the bridge to forward on a new port before it goes on regardless.
const FORWARDING_WITHIN: Duration = Duration::from_millis(50);

pub(super) fn add(plan: &AddPlan) -> Result<CniResult, CniError> {
    let attachment = &plan.attachment;
    let netns = netns::open(&attachment.netns)?;
    if netns.id != attachment.netns_id {
        return Err(netns::gone(&attachment.netns));
    }
    let mut host = Conn::open()?;
    let bridge = link(&mut host, &plan.network.bridge)?.ok_or_else(|| {
        CniError::new(
            Code::TryAgainLater,
            format!(
                "the bridge {} is not there yet; `weft status` names the step that is blocked",
                plan.network.bridge
            ),
        )
    })?;
    let fresh = create(&mut host, plan, &bridge, &netns)?;
    match configure(plan, &netns) {
        Ok(pod) => {
            await_forwarding(&mut host, &attachment.host_ifname());
            pod.announce();
            Ok(result(plan, &bridge))
        }
        Err(error) => {
            // What was there before this call stays; a repeated ADD changed nothing that it did not find.
            if fresh && let Err(left) = delete(&mut host, &attachment.host_ifname()) {
                tracing::error!(container = %attachment.id, err = %left, "veth of a failed ADD cannot be removed");
            }
            Err(error)
        }
    }
}

pub(super) fn del(id: &AttachmentId) -> Result<(), CniError> {
    let mut host = Conn::open()?;
    let name = id.host_ifname();
    match link(&mut host, &name)? {
        None => Ok(()),
        Some(found) if !found.veth || found.other_than(id) => {
            // Not what this id made: by the rule that weft touches nothing else, it stays.
            tracing::warn!(container = %id, iface = %name, "interface is not of this attachment and stays");
            Ok(())
        }
        Some(_) => delete(&mut host, &name).map_err(CniError::from),
    }
}

pub(super) fn condition(host: &mut Conn, attachment: &Attachment) -> Result<Condition, CniError> {
    if link(host, &attachment.host_ifname())?
        .is_some_and(|found| found.veth && !found.other_than(&attachment.id))
    {
        return Ok(Condition::Attached);
    }
    let alive = netns::open(&attachment.netns).is_ok_and(|netns| netns.id == attachment.netns_id);
    Ok(if alive { Condition::Detached } else { Condition::Gone })
}

pub(super) fn sweep(bridge: &str, known: &BTreeSet<String>) -> Result<Vec<String>, CniError> {
    let mut host = Conn::open()?;
    let Some(bridge) = link(&mut host, bridge)? else { return Ok(Vec::new()) };
    let mut removed = Vec::new();
    for message in host.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))? {
        let RouteNetlinkMessage::NewLink(message) = message else { continue };
        let found = Link::read(&message);
        let marked = found.alias.as_deref().is_some_and(|alias| alias.starts_with(ALIAS_MARK));
        if found.veth && marked && found.master == Some(bridge.index) && !known.contains(&found.name) {
            delete(&mut host, &found.name)?;
            removed.push(found.name);
        }
    }
    Ok(removed)
}

/// What weft looks at in a link.
#[derive(Debug, Clone, Default)]
pub(super) struct Link {
    pub index: u32,
    pub name: String,
    pub mac: Option<MacAddress>,
    pub mtu: u32,
    pub up: bool,
    pub veth: bool,
    pub alias: Option<String>,
    pub master: Option<u32>,
    /// The other end's index, in its own namespace.
    pub peer: Option<u32>,
    pub hairpin: Option<bool>,
    pub forwarding: bool,
}

impl Link {
    fn read(message: &LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            up: message.header.flags.contains(LinkFlags::Up),
            ..Self::default()
        };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::IfAlias(alias) => link.alias = Some(alias.clone()),
                LinkAttribute::Address(mac) => link.mac = mac.as_slice().try_into().ok().map(MacAddress),
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                LinkAttribute::Controller(index) => link.master = Some(*index),
                LinkAttribute::Link(index) => link.peer = Some(*index),
                LinkAttribute::LinkInfo(infos) => link.read_infos(infos),
                _ => {}
            }
        }
        link
    }

    fn read_infos(&mut self, infos: &[LinkInfo]) {
        for info in infos {
            match info {
                LinkInfo::Kind(kind) => self.veth = *kind == InfoKind::Veth,
                LinkInfo::PortData(InfoPortData::BridgePort(port)) => {
                    for item in port {
                        match item {
                            InfoBridgePort::HairpinMode(on) => self.hairpin = Some(*on),
                            InfoBridgePort::State(state) => {
                                self.forwarding = *state == BridgePortState::Forwarding
                            }
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
    }

    /// Returns whether the link says that it belongs to another attachment (two ids with one hash).
    fn other_than(&self, id: &AttachmentId) -> bool {
        self.alias.as_deref().is_some_and(|alias| alias != alias_of(id))
    }
}

/// Looks a link up by its name.
pub(super) fn link(conn: &mut Conn, name: &str) -> Result<Option<Link>, CniError> {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.into()));
    Ok(match conn.get(RouteNetlinkMessage::GetLink(message))? {
        Some(RouteNetlinkMessage::NewLink(found)) => Some(Link::read(&found)),
        _ => None,
    })
}

const ALIAS_MARK: &str = "weft pod ";

/// The alias of the host's end: for people who read `ip link`, and against two ids with one hash.
fn alias_of(id: &AttachmentId) -> String {
    // IFALIASZ is 256 with the closing zero.
    let mut alias = format!("{ALIAS_MARK}{id}");
    alias.truncate(255);
    alias
}

/// Makes the pair; returns whether it is new (`false`: an earlier ADD of this id made it).
fn create(host: &mut Conn, plan: &AddPlan, bridge: &Link, netns: &Netns) -> Result<bool, CniError> {
    let attachment = &plan.attachment;
    let name = attachment.host_ifname();
    for _ in 0..2 {
        // On its own: behind a refusal the kernel would apply the rest to whatever bears the name.
        let refusal = match host.change(&[new_pair(plan, netns)]) {
            Ok(()) => {
                return match host.change(&set_port(plan, bridge)) {
                    Ok(()) => Ok(true),
                    Err(refusal) => {
                        delete(host, &name)?;
                        Err(refusal.into())
                    }
                };
            }
            Err(refusal) => refusal,
        };
        if refusal.errno != Errno::EEXIST {
            return Err(creation_error(refusal, netns));
        }
        // One of the two names is taken.
        let Some(found) = link(host, &name)? else {
            return Err(CniError::new(
                Code::Conflict,
                format!(
                    "the container has an interface {} already, which weft did not make; remove it or choose another CNI_IFNAME",
                    attachment.id.ifname()
                ),
            ));
        };
        if !found.veth || found.other_than(&attachment.id) {
            return Err(CniError::new(
                Code::Conflict,
                format!(
                    "the host's interface {name} belongs to something else ({}); remove it with `ip link del {name}` if it is not in use",
                    found.alias.as_deref().unwrap_or("not made by weft")
                ),
            ));
        }
        if wired(&found, attachment, netns)? {
            host.change(&set_port(plan, bridge))?;
            return Ok(false);
        }
        // Left by an earlier container of this id: its namespace lives on somewhere, but the journal has let it go.
        delete(host, &name)?;
    }
    Err(CniError::new(
        Code::TryAgainLater,
        format!("something else makes the interface {name} at the same time; try again"),
    ))
}

fn creation_error(refusal: Refusal, netns: &Netns) -> CniError {
    match refusal.errno {
        // A namespace of another kind, if entering it says so too.
        Errno::EINVAL => netns.run(|| Ok(())).err().unwrap_or_else(|| refusal.into()),
        Errno::EOPNOTSUPP => CniError::new(
            Code::Kernel,
            "this kernel cannot make veth pairs; load the module veth (`modprobe veth`) or use a kernel with CONFIG_VETH",
        )
        .with_details(refusal),
        _ => refusal.into(),
    }
}

/// Returns whether `host` is the other end of this attachment's interface in `netns`.
fn wired(host: &Link, attachment: &Attachment, netns: &Netns) -> Result<bool, CniError> {
    let ifname = attachment.id.ifname();
    let pod = netns.run(|| link(&mut Conn::open()?, ifname))?;
    Ok(pod.is_some_and(|pod| pod.veth && pod.peer == Some(host.index) && host.peer == Some(pod.index)))
}

fn new_pair(plan: &AddPlan, netns: &Netns) -> Step {
    let attachment = &plan.attachment;
    let mut pod = LinkMessage::default();
    pod.attributes = vec![
        LinkAttribute::IfName(attachment.id.ifname().into()),
        LinkAttribute::Mtu(attachment.mtu),
        LinkAttribute::Address(attachment.mac.0.to_vec()),
        LinkAttribute::NetNsFd(netns.file.as_raw_fd()),
    ];
    let mut host = LinkMessage::default();
    host.attributes = vec![
        LinkAttribute::IfName(attachment.host_ifname()),
        LinkAttribute::Mtu(attachment.mtu),
        LinkAttribute::Address(attachment.id.host_mac().0.to_vec()),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(pod))),
        ]),
    ];
    Step {
        what: "make the pod's veth pair",
        message: RouteNetlinkMessage::NewLink(host),
        flags: NLM_F_CREATE | NLM_F_EXCL,
        tolerated: None,
    }
}

/// The host's end gets no IPv6 address of its own, joins the bridge and comes up.
fn set_port(plan: &AddPlan, bridge: &Link) -> [Step; 3] {
    let end = |attributes: Vec<LinkAttribute>| {
        let mut message = LinkMessage::default();
        message.attributes = vec![LinkAttribute::IfName(plan.attachment.host_ifname())];
        message.attributes.extend(attributes);
        message
    };
    let no_addresses = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
    let quiet = end(vec![LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![no_addresses])])]);
    let mut join = end(vec![
        LinkAttribute::IfAlias(alias_of(&plan.attachment.id)),
        LinkAttribute::Mtu(plan.attachment.mtu),
        LinkAttribute::Controller(bridge.index),
    ]);
    join.header.flags = LinkFlags::Up;
    join.header.change_mask = LinkFlags::Up;
    // The port's own settings exist only after it joined, so they need a message of their own.
    let hairpin = end(vec![LinkAttribute::LinkInfo(vec![
        LinkInfo::PortKind(InfoPortKind::Bridge),
        LinkInfo::PortData(InfoPortData::BridgePort(vec![InfoBridgePort::HairpinMode(plan.network.hairpin)])),
    ])]);
    let step = |what, message, tolerated| Step { what, message, flags: 0, tolerated };
    [
        // Without IPv6 there is nothing to keep quiet.
        step(
            "keep IPv6 addresses off the host's end of the pod's veth pair",
            RouteNetlinkMessage::SetLink(quiet),
            Some(Errno::EAFNOSUPPORT),
        ),
        step(
            "join the host's end of the pod's veth pair to the bridge",
            RouteNetlinkMessage::SetLink(join),
            None,
        ),
        step("set the hairpin mode of the pod's bridge port", RouteNetlinkMessage::NewLink(hairpin), None),
    ]
}

/// The pod's end, with a socket in its namespace.
struct PodEnd {
    conn: Conn,
    index: u32,
    mac: MacAddress,
}

/// Settings of the pod's end for life on a bridge with others. A kernel without the knob, or a read-only
/// `/proc/sys`, costs neighbours at most their own timeout.
const ON_A_SHARED_SEGMENT: [(&str, &str); 4] = [
    // Neighbours that knew an earlier pod under this address are told: see `announce`.
    ("ipv4/conf/{}/arp_notify", "1"),
    ("ipv6/conf/{}/ndisc_notify", "1"),
    // A container with two attachments speaks for each address on its own interface only.
    ("ipv4/conf/{}/arp_ignore", "1"),
    ("ipv4/conf/{}/arp_announce", "2"),
];

/// Gives the pod's end its addresses and routes and brings it up; doing it again changes nothing.
fn configure(plan: &AddPlan, netns: &Netns) -> Result<PodEnd, CniError> {
    let attachment = &plan.attachment;
    netns.run(|| {
        let mut conn = Conn::open()?;
        let Some(pod) = link(&mut conn, attachment.id.ifname())? else {
            return Err(CniError::new(
                Code::Kernel,
                format!("the interface {} vanished from the container while it was set up", attachment.id.ifname()),
            ));
        };
        for (knob, value) in ON_A_SHARED_SEGMENT {
            let _ = set_sysctl(knob, attachment.id.ifname(), value);
        }
        let steps = pod_steps(attachment, pod.index);
        let refused = match conn.change(&steps) {
            // Container runtimes turn IPv6 off where they know of no IPv6 address; here is one.
            Err(refusal) if is_ipv6_off(&refusal) => {
                set_sysctl("ipv6/conf/{}/disable_ipv6", attachment.id.ifname(), "0").map_err(|error| {
                    CniError::new(
                        Code::Kernel,
                        "IPv6 is off in the container or in this kernel, and the pod has an IPv6 address; boot without ipv6.disable=1, or give weft no IPv6 cluster CIDR",
                    )
                    .with_details(error)
                })?;
                conn.change(&steps).err()
            }
            outcome => outcome.err(),
        };
        match refused {
            Some(refusal) => Err(refusal.into()),
            None => Ok(PodEnd { conn, index: pod.index, mac: attachment.mac }),
        }
    })
}

impl PodEnd {
    /// Has the kernel send a gratuitous ARP and an unsolicited neighbour advertisement, by giving the
    /// interface the Ethernet address that it has: with `arp_notify` and `ndisc_notify` that announces it.
    fn announce(mut self) {
        let mut message = LinkMessage::default();
        message.header.index = self.index;
        message.attributes = vec![LinkAttribute::Address(self.mac.0.to_vec())];
        let step = Step {
            what: "announce the pod's addresses",
            message: RouteNetlinkMessage::SetLink(message),
            flags: 0,
            tolerated: None,
        };
        if let Err(refusal) = self.conn.change(&[step]) {
            tracing::debug!(err = %refusal, "pod is not announced to its neighbours");
        }
    }
}

fn is_ipv6_off(refusal: &Refusal) -> bool {
    refusal.what == ADD_ADDRESS_V6
        && matches!(refusal.errno, Errno::EACCES | Errno::EPERM | Errno::EAFNOSUPPORT | Errno::EOPNOTSUPP)
}

const ADD_ADDRESS_V4: &str = "give the pod its IPv4 address";
const ADD_ADDRESS_V6: &str = "give the pod its IPv6 address";

fn pod_steps(attachment: &Attachment, index: u32) -> Vec<Step> {
    let mut up = LinkMessage::default();
    up.header.index = index;
    up.header.flags = LinkFlags::Up;
    up.header.change_mask = LinkFlags::Up;
    up.attributes = vec![LinkAttribute::Mtu(attachment.mtu)];
    let mut steps = vec![Step {
        what: "bring the pod's interface up",
        message: RouteNetlinkMessage::SetLink(up),
        flags: 0,
        tolerated: None,
    }];
    for pod in &attachment.addresses {
        steps.push(Step {
            what: if pod.gateway.is_ipv4() { ADD_ADDRESS_V4 } else { ADD_ADDRESS_V6 },
            message: RouteNetlinkMessage::NewAddress(address_message(pod, index)),
            flags: NLM_F_CREATE | NLM_F_REPLACE,
            tolerated: None,
        });
    }
    for pod in &attachment.addresses {
        steps.push(Step {
            what: "give the pod its default route",
            message: RouteNetlinkMessage::NewRoute(default_route(pod, index)),
            flags: NLM_F_CREATE | NLM_F_EXCL,
            // The container's first attachment keeps the default route, as with the reference plugins.
            tolerated: Some(Errno::EEXIST),
        });
    }
    steps
}

fn address_message(pod: &PodAddress, index: u32) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.index = index;
    message.header.prefix_len = pod.address.prefix_len();
    message.header.scope = AddressScope::Universe;
    message.header.family = family(pod.gateway);
    let address = pod.address.addr();
    message.attributes = vec![AddressAttribute::Local(address), AddressAttribute::Address(address)];
    match pod.address {
        ipnet::IpNet::V4(net) => {
            if net.prefix_len() < 31 {
                message.attributes.push(AddressAttribute::Broadcast(net.broadcast()));
            }
        }
        ipnet::IpNet::V6(_) => {
            // The pool hands an address out once, so there is no duplicate to detect: usable at once.
            message.header.flags = AddressHeaderFlags::Nodad;
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
    }
    message
}

fn default_route(pod: &PodAddress, index: u32) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: family(pod.gateway),
        table: RouteHeader::RT_TABLE_MAIN,
        protocol: RouteProtocol::Boot,
        scope: RouteScope::Universe,
        kind: RouteType::Unicast,
        ..RouteHeader::default()
    };
    message.attributes = vec![RouteAttribute::Gateway(pod.gateway.into()), RouteAttribute::Oif(index)];
    message
}

pub(super) fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

/// Writes below `/proc/sys/net` of the calling thread's namespace; `{}` in `knob` stands for the interface.
fn set_sysctl(knob: &str, ifname: &str, value: &str) -> std::io::Result<()> {
    use std::io::Write;
    // Open, not create: a knob that this kernel does not have must not become a file anywhere.
    let mut file =
        std::fs::File::options().write(true).open(sysctl::net().join(knob.replace("{}", ifname)))?;
    file.write_all(value.as_bytes())
}

/// Waits until the bridge forwards what the pod sends: the kernel opens a new port from a work queue, and
/// the first neighbour solicitation of a pod that is faster would be lost and repeated a second later.
fn await_forwarding(host: &mut Conn, name: &str) {
    let deadline = Instant::now() + FORWARDING_WITHIN;
    while let Ok(Some(port)) = link(host, name) {
        if port.forwarding || Instant::now() >= deadline {
            return;
        }
        std::thread::sleep(Duration::from_micros(100));
    }
}

fn delete(host: &mut Conn, name: &str) -> Result<(), Refusal> {
    let mut message = LinkMessage::default();
    message.attributes = vec![LinkAttribute::IfName(name.into())];
    host.change(&[Step {
        what: "remove the pod's veth pair",
        message: RouteNetlinkMessage::DelLink(message),
        flags: 0,
        // The pod's end went with its namespace, and ours with it.
        tolerated: Some(Errno::ENODEV),
    }])
}

/// Bridge, host's end and pod's end, in the order of the bridge plugin.
fn result(plan: &AddPlan, bridge: &Link) -> CniResult {
    let attachment = &plan.attachment;
    CniResult {
        interfaces: vec![
            Interface {
                name: plan.network.bridge.clone(),
                mac: bridge.mac.map(|mac| mac.to_string()).unwrap_or_default(),
                mtu: Some(plan.network.mtu),
                sandbox: None,
            },
            Interface {
                name: attachment.host_ifname(),
                mac: attachment.id.host_mac().to_string(),
                mtu: Some(attachment.mtu),
                sandbox: None,
            },
            Interface {
                name: attachment.id.ifname().into(),
                mac: attachment.mac.to_string(),
                mtu: Some(attachment.mtu),
                sandbox: Some(attachment.netns.to_string_lossy().into_owned()),
            },
        ],
        ips: attachment
            .addresses
            .iter()
            .map(|pod| IpConfig {
                version: None,
                interface: Some(2),
                address: pod.address,
                gateway: Some(pod.gateway),
            })
            .collect(),
        routes: attachment
            .addresses
            .iter()
            .map(|pod| RouteEntry { dst: any(pod.gateway), gw: Some(pod.gateway) })
            .collect(),
        dns: plan.request.dns.clone(),
    }
}

/// The prefix of all addresses of a family.
pub(super) fn any(family_of: IpAddr) -> ipnet::IpNet {
    match family_of {
        IpAddr::V4(_) => ipnet::IpNet::V4(ipnet::Ipv4Net::default()),
        IpAddr::V6(_) => ipnet::IpNet::V6(ipnet::Ipv6Net::default()),
    }
}
