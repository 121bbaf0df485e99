//! Where a peer may be reached, by what both nodes say of themselves.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use weft_wire::mesh::{TunnelMapping, TunnelReach};

use super::Party;

/// Whether an endpoint is where a party's record says that it is.
pub(super) fn is_known_at(party: &Party, endpoint: SocketAddr) -> bool {
    if party.is_translated() {
        party.reach.reflexive.contains(&endpoint)
    } else {
        party.tunnels().contains(&endpoint)
    }
}

/// Returns the member at whose address an endpoint of a pair is, though not where its own tunnels are: it relays for the two.
pub(super) fn relay_at_address<'a>(
    endpoint: SocketAddr,
    pair: [&Party; 2],
    members: &'a [Party],
) -> Option<&'a Party> {
    let ip = endpoint.ip();
    if pair.iter().any(|end| end.addresses.contains(&ip)) {
        return None;
    }
    let relays = |member: &&Party| {
        member.is_open() && member.addresses.contains(&ip) && !member.tunnels().contains(&endpoint)
    };
    members.iter().find(relays)
}

/// Whether no packet of one can come through what stands before the other: both expect another port than the one that the other's
/// packets come from.
pub(super) fn is_hopeless(own: &Party, party: &Party) -> bool {
    own.reach.mapping == TunnelMapping::Dependent && party.reach.mapping == TunnelMapping::Dependent
}

/// Returns the places where a peer may be reached without help, the best first.
pub(super) fn direct(
    own: &Party,
    mine: &TunnelReach,
    party: &Party,
    named: impl Iterator<Item = SocketAddr>,
) -> Vec<SocketAddr> {
    let families: BTreeSet<bool> = own.addresses.iter().map(IpAddr::is_ipv4).collect();
    let mut places = Vec::new();
    let translated =
        |at: &SocketAddr| party.reach.reflexive.iter().any(|other| other.is_ipv4() == at.is_ipv4());
    // A private address of another site is a way to it only within the same network: then both seem to be at one address.
    let neighbours =
        party.reach.reflexive.iter().any(|theirs| mine.reflexive.iter().any(|ours| ours.ip() == theirs.ip()));
    let mut addresses: Vec<_> =
        party.tunnels().into_iter().filter(|at| neighbours || !translated(at)).collect();
    // Where IPv4 is translated at either end, IPv6 has the better prospects.
    let behind = |v4: bool| mine.reflexive.iter().any(|at| at.is_ipv4() == v4);
    addresses.sort_by_key(|at| (behind(at.is_ipv4()), !at.is_ipv4()));
    places.extend(addresses);
    places.extend(party.reach.reflexive.iter().copied());
    places.extend(named);
    let mut known = BTreeSet::new();
    places.retain(|at| families.contains(&at.is_ipv4()) && known.insert(*at) && is_usable(at));
    places
}

/// Whether packets may be sent there because a peer says so: to a port of one host that is not this one.
fn is_usable(at: &SocketAddr) -> bool {
    let broadcast = matches!(at.ip(), IpAddr::V4(ip) if ip.is_broadcast());
    at.port() > 0
        && !at.ip().is_loopback()
        && !at.ip().is_unspecified()
        && !at.ip().is_multicast()
        && !broadcast
}
