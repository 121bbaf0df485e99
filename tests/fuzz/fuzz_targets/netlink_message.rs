//! Any bytes as the kernel's answer: reading ends, stays inside, and gives back what weft writes.
//!
//! The first byte says how the rest is read.
#![no_main]

use std::net::IpAddr;

use ipnet::IpNet;
use libfuzzer_sys::fuzz_target;
use weft_daemon::kernel::{fuzz, nft};
use weft_daemon::plan::model::{
    BRIDGE, DETOUR, Link, LinkKind, Op, Route, VXLAN_V4, VXLAN_V6, Vxlan, WIREGUARD, is_host_veth,
};
use weft_daemon::plan::table::{Table, VERSION};
use weft_wire::types::MacAddress;

/// Takes parts off the input; zeros follow its end.
struct Parts<'a>(&'a [u8]);

impl Parts<'_> {
    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        let (taken, rest) = self.0.split_at(N.min(self.0.len()));
        out[..taken.len()].copy_from_slice(taken);
        self.0 = rest;
        out
    }

    fn byte(&mut self) -> u8 {
        self.bytes::<1>()[0]
    }

    fn number(&mut self) -> u32 {
        u32::from_be_bytes(self.bytes())
    }

    fn address(&mut self, v4: bool) -> IpAddr {
        if v4 { self.bytes::<4>().into() } else { self.bytes::<16>().into() }
    }

    fn net(&mut self, v4: bool) -> IpNet {
        let address = self.address(v4);
        IpNet::new(address, self.byte() % if v4 { 33 } else { 129 }).expect("a length of the family")
    }

    fn some<T>(&mut self, read: impl FnOnce(&mut Self) -> T) -> Option<T> {
        (self.byte() % 2 == 1).then(|| read(self))
    }
}

/// What was found is what the rest of weft takes it for.
fn is_read_soundly(datagram: &[u8]) {
    let actual = fuzz::route(datagram);
    assert!(actual.veths.keys().all(|name| is_host_veth(name)));
    assert!(actual.state.links.keys().all(|name| [BRIDGE, VXLAN_V4, VXLAN_V6].contains(&name.as_str())));
    assert!(actual.state.fdb.keys().all(|(dev, _)| dev != BRIDGE));
}

/// Attributes lie in what holds them, one after the other.
fn are_inside(bytes: &[u8], depth: usize) {
    let mut at = bytes.as_ptr_range().start;
    for (kind, value) in fuzz::attrs(bytes) {
        let place = value.as_ptr_range();
        assert!(kind & 0xc000 == 0 && at < place.start && place.end <= bytes.as_ptr_range().end);
        at = place.end;
        if depth < 8 {
            are_inside(value, depth + 1);
        }
    }
}

/// A run of neighbours: the monitor tells if one of them is more than a cache entry.
fn are_told(parts: &mut Parts<'_>) {
    let mut datagram = Vec::new();
    let mut expected = false;
    while !parts.0.is_empty() {
        let how = parts.byte();
        let kind = if how % 4 == 0 { u16::from(parts.byte()) } else { 28 };
        let state = u16::from_be_bytes(parts.bytes());
        let more = usize::from(how >> 4);
        expected |= kind != 28 || state & 0x80 != 0;
        let start = datagram.len();
        datagram.extend_from_slice(&(28 + more as u32).to_ne_bytes());
        datagram.extend_from_slice(&kind.to_ne_bytes());
        datagram.resize(start + 24, 0);
        datagram.extend_from_slice(&state.to_ne_bytes());
        datagram.resize(start + (28 + more).next_multiple_of(4), how);
    }
    assert_eq!(fuzz::matters(&datagram), expected);
}

fn op(parts: &mut Parts<'_>) -> Op {
    let how = parts.byte();
    let v4 = how & 0x80 == 0;
    let dev = [VXLAN_V4, VXLAN_V6, BRIDGE][usize::from(parts.byte() % 3)].to_owned();
    let mac = MacAddress(parts.bytes());
    match how % 9 {
        0 => {
            let local = parts.address(v4);
            let port = u16::from_be_bytes(parts.bytes());
            let vxlan = Vxlan {
                vni: parts.number(),
                port,
                local,
                underlay: parts.number(),
                learning: how & 0x40 != 0,
            };
            let kind = if how & 0x20 == 0 { LinkKind::Vxlan(vxlan) } else { LinkKind::Bridge };
            Op::AddLink(dev, Link { kind, mtu: parts.number(), up: how & 0x10 != 0, mac })
        }
        1 => Op::AddAddress(dev, parts.net(v4)),
        2 => Op::DelAddress(dev, parts.net(v4)),
        3 => Op::SetNeighbour(dev, parts.address(v4), mac),
        4 => Op::DelNeighbour(dev, parts.address(v4)),
        5 => Op::SetFdb(dev, mac, parts.address(v4)),
        6 => Op::DelFdb(dev, mac, parts.address(v4)),
        kind => {
            let (prefix, metric) = (parts.net(v4), parts.number());
            let (via, source) = (parts.some(|p| p.address(v4)), parts.some(|p| p.address(v4)));
            let route = Route { dev, via, source, mtu: parts.some(Parts::number) };
            if kind == 7 { Op::SetRoute(prefix, metric, route) } else { Op::DelRoute(prefix, metric, route) }
        }
    }
}

/// What weft writes is read as the very same.
fn is_read_back(op: &Op) {
    let state = fuzz::route(&fuzz::written(op)).state;
    match op.clone() {
        Op::AddLink(name, link) => assert_eq!(state.links.get(&name), Some(&link)),
        Op::AddAddress(dev, net) | Op::DelAddress(dev, net) => {
            assert_eq!(state.addresses.into_iter().collect::<Vec<_>>(), [(dev, net)]);
        }
        Op::SetNeighbour(dev, to, mac) => assert_eq!(state.neighbours.get(&(dev, to)), Some(&mac)),
        Op::DelNeighbour(dev, to) => assert!(state.neighbours.contains_key(&(dev, to))),
        Op::SetFdb(dev, mac, to) | Op::DelFdb(dev, mac, to) => {
            let expected = (dev != BRIDGE).then_some(&to);
            assert_eq!(state.fdb.get(&(dev.clone(), mac)), expected);
        }
        Op::SetRoute(prefix, metric, route) | Op::DelRoute(prefix, metric, route) => {
            assert_eq!(state.routes.get(&(prefix, metric)), Some(&route));
        }
        other => unreachable!("{other} is not made here"),
    }
}

/// The table is read as it is written, and a changed byte never passes for another shape.
fn is_recognized(parts: &mut Parts<'_>) {
    let how = parts.byte();
    let (place, mask) = (parts.number() as usize, parts.byte());
    let nets = |parts: &mut Parts<'_>, count: u8| (0..count).map(|at| parts.net(at % 2 == 0)).collect();
    let table = Table {
        cluster: nets(parts, how % 4),
        except: nets(parts, how / 4 % 4),
        masquerade: how & 0x80 != 0,
        vxlan_port: u16::from_be_bytes(parts.bytes()).max(1),
        // Last: the seeds before it keep their meaning.
        sealed: nets(parts, how / 16 % 4),
        bridge: BRIDGE.to_owned(),
        tunnels: [WIREGUARD, DETOUR].map(str::to_owned),
        version: VERSION,
    };
    let mut bytes = fuzz::table(&table);
    let digest = table.digest();
    assert_eq!(fuzz::nft(&bytes).as_ref(), Some(&digest));
    let place = place % bytes.len();
    bytes[place] ^= mask;
    let shape = digest.rsplit('-').next().expect("a digest has parts");
    if let Some(seen) = fuzz::nft(&bytes) {
        assert!(seen == nft::CHANGED || seen.ends_with(shape), "{seen} after byte {place} of {digest}");
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((how, rest)) = bytes.split_first() else { return };
    let mut parts = Parts(rest);
    match how % 7 {
        0 => is_read_soundly(rest),
        1 => are_inside(rest, 0),
        2 => drop(fuzz::nft(rest)),
        3 => drop(fuzz::matters(rest)),
        4 => are_told(&mut parts),
        5 => is_read_back(&op(&mut parts)),
        _ => is_recognized(&mut parts),
    }
});
