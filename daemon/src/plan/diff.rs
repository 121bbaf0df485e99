//! From what should be and what is to the changes between them, in an order that breaks no traffic that works:
//! what is new comes before what goes, and what changes is replaced in place.

use std::collections::BTreeSet;

use ipnet::IpNet;

use super::model::{Actual, Desired, LinkKind, Op, Route, State, VethState};

/// Computes the changes; none for a kernel that is as desired.
pub fn diff(desired: &Desired, actual: &Actual) -> Vec<Op> {
    let replaced = replaced_links(&desired.state, &actual.state);
    // What hangs on a device that is replaced goes with it, and a device that changes its Ethernet address
    // forgets its neighbours.
    let mut left = without(&actual.state, &replaced);
    left.neighbours.retain(|(dev, _), _| {
        let macs = (desired.state.links.get(dev), actual.state.links.get(dev));
        !matches!(macs, (Some(wanted), Some(found)) if wanted.mac != found.mac)
    });
    let mut ops: Vec<Op> = replaced.iter().map(|name| Op::DelLink(name.clone())).collect();
    add_links(&desired.state, &left, &mut ops);
    amend_settings(desired, &left, &mut ops);
    add_settings(&desired.state, &left, &mut ops);
    set_nft(desired, actual, &mut ops);
    // Routes to tunnels come before those tunnels' peers that packets leave by this go, and after those that they need; all of
    // it after the table that keeps clear packets back.
    set_routes(&desired.state, &left, &mut ops, |route| keeps_tunnels(&desired.state, &left, &route.dev));
    set_tunnels(&desired.state, &left, &mut ops);
    add_paths(&desired.state, &left, &mut ops);
    set_routes(&desired.state, &left, &mut ops, |route| !keeps_tunnels(&desired.state, &left, &route.dev));
    mend_veths(desired, actual, &replaced, &mut ops);
    remove(desired, actual, &left, &mut ops);
    ops
}

fn replaced_links(desired: &State, actual: &State) -> BTreeSet<String> {
    let differs =
        |name: &String, kind: &LinkKind| actual.links.get(name).is_some_and(|found| found.kind != *kind);
    let wanted = desired.links.iter();
    wanted.filter(|(name, link)| differs(name, &link.kind)).map(|(name, _)| name.clone()).collect()
}

fn without(state: &State, gone: &BTreeSet<String>) -> State {
    let mut left = state.clone();
    left.links.retain(|name, _| !gone.contains(name));
    left.addresses.retain(|(dev, _)| !gone.contains(dev));
    left.neighbours.retain(|(dev, _), _| !gone.contains(dev));
    left.fdb.retain(|(dev, _), _| !gone.contains(dev));
    left.routes.retain(|_, route| !gone.contains(&route.dev));
    left.tunnels.retain(|dev, _| !gone.contains(dev));
    left.offloads.retain(|dev, _| !gone.contains(dev));
    left.sysctls.retain(|path, _| !gone.iter().any(|dev| path.contains(&format!("/{dev}/"))));
    left
}

fn add_links(desired: &State, left: &State, ops: &mut Vec<Op>) {
    for (name, link) in &desired.links {
        match left.links.get(name) {
            None => ops.push(Op::AddLink(name.clone(), link.clone())),
            Some(found) if found != link => ops.push(Op::SetLink(name.clone(), link.clone())),
            Some(_) => {}
        }
    }
}

/// Before the other settings: these keep what works from suffering by them.
fn amend_settings(desired: &Desired, left: &State, ops: &mut Vec<Op>) {
    for (path, (from, to)) in &desired.amend {
        if left.sysctls.get(path) == Some(from) {
            ops.push(Op::SetSysctl(path.clone(), to.clone()));
        }
    }
}

fn add_settings(desired: &State, left: &State, ops: &mut Vec<Op>) {
    for (dev, on) in &desired.offloads {
        if left.offloads.get(dev) != Some(on) {
            ops.push(Op::SetOffload(dev.clone(), *on));
        }
    }
    for (path, value) in &desired.sysctls {
        if left.sysctls.get(path) != Some(value) {
            ops.push(Op::SetSysctl(path.clone(), value.clone()));
        }
    }
    for (dev, address) in desired.addresses.difference(&left.addresses) {
        ops.push(Op::AddAddress(dev.clone(), *address));
    }
}

fn add_paths(desired: &State, left: &State, ops: &mut Vec<Op>) {
    for (key, endpoint) in &desired.fdb {
        if left.fdb.get(key) != Some(endpoint) {
            ops.push(Op::SetFdb(key.0.clone(), key.1, *endpoint));
        }
    }
    for (key, mac) in &desired.neighbours {
        if left.neighbours.get(key) != Some(mac) {
            ops.push(Op::SetNeighbour(key.0.clone(), key.1, *mac));
        }
    }
}

/// Whether a device of the tunnels is there and stays as it is.
fn keeps_tunnels(desired: &State, left: &State, dev: &str) -> bool {
    let wanted = desired.tunnels.get(dev);
    wanted.is_some() && left.links.contains_key(dev) && left.tunnels.get(dev) == wanted
}

fn set_routes(desired: &State, left: &State, ops: &mut Vec<Op>, which: impl Fn(&Route) -> bool) {
    let differs =
        |(key, route): &(&(IpNet, u32), &Route)| left.routes.get(key) != Some(route) && which(route);
    let routes = desired.routes.iter().filter(differs);
    ops.extend(routes.map(|(key, route)| Op::SetRoute(key.0, key.1, route.clone())));
}

fn mend_veths(desired: &Desired, actual: &Actual, replaced: &BTreeSet<String>, ops: &mut Vec<Op>) {
    let bridge_lost = replaced.contains(super::model::BRIDGE);
    for (name, mtu) in &desired.veths {
        let wanted = VethState { bridged: true, hairpin: desired.hairpin, up: true, mtu: *mtu };
        if actual.veths.get(name).is_some_and(|found| *found != wanted || bridge_lost) {
            ops.push(Op::SetVeth(name.clone(), wanted));
        }
    }
}

fn set_tunnels(desired: &State, left: &State, ops: &mut Vec<Op>) {
    for (dev, tunnels) in &desired.tunnels {
        // A device that is not there takes the tunnels with it.
        let found = left.tunnels.get(dev).filter(|_| left.links.contains_key(dev));
        if found != Some(tunnels) {
            ops.push(Op::SetTunnel(dev.clone(), tunnels.clone()));
        }
    }
}

fn set_nft(desired: &Desired, actual: &Actual, ops: &mut Vec<Op>) {
    match (&desired.nft, &actual.state.nft) {
        (Some(table), found) if found.as_ref() != desired.state.nft.as_ref() => {
            ops.push(Op::SetNft(table.clone()))
        }
        (None, Some(_)) => ops.push(Op::DelNft),
        _ => {}
    }
}

fn remove(desired: &Desired, actual: &Actual, left: &State, ops: &mut Vec<Op>) {
    let wanted = &desired.state;
    let gone = |dev: &str| !wanted.links.contains_key(dev) && left.links.contains_key(dev);
    for (key, route) in &left.routes {
        if !wanted.routes.contains_key(key) {
            ops.push(Op::DelRoute(key.0, key.1, route.clone()));
        }
    }
    // Only once no route leads there.
    let ended = left.tunnels.keys().filter(|dev| !wanted.tunnels.contains_key(*dev));
    ops.extend(ended.map(|dev| Op::DelTunnel(dev.clone())));
    for (dev, address) in left.neighbours.keys() {
        if !wanted.neighbours.contains_key(&(dev.clone(), *address)) && !gone(dev) {
            ops.push(Op::DelNeighbour(dev.clone(), *address));
        }
    }
    for ((dev, mac), endpoint) in &left.fdb {
        if !wanted.fdb.contains_key(&(dev.clone(), *mac)) && !gone(dev) {
            ops.push(Op::DelFdb(dev.clone(), *mac, *endpoint));
        }
    }
    for (dev, address) in left.addresses.difference(&wanted.addresses) {
        if !gone(dev) {
            ops.push(Op::DelAddress(dev.clone(), *address));
        }
    }
    for name in actual.veths.keys().filter(|name| desired.strays.contains(*name)) {
        ops.push(Op::DelVeth(name.clone()));
    }
    for name in left.links.keys().filter(|name| !wanted.links.contains_key(*name)) {
        ops.push(Op::DelLink(name.clone()));
    }
}
