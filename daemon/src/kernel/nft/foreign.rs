//! What other programs' chains do to forwarded traffic. Reads, and changes nothing.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{Conn, DROP, GET_CHAIN, GET_RULE, INET, NftError, TABLE, interface};
use crate::kernel::tlv::{attrs, find, find_be32, find_text};
use crate::plan::table::{ACCEPT, HOOK_FORWARD, IPV4, IPV6, META_IIFNAME, META_NFPROTO, META_OIFNAME};

/// What else in the kernel drops forwarded traffic and so may cut pods off: a sentence each, with what to do.
///
/// A chain that accepts the bridge in both directions, or the cluster CIDRs in both, is not named. What is seen
/// is the policy of base chains at the forward hook, not a drop by a rule.
///
/// # Errors
/// The kernel's refusal.
pub fn foreign_drops(conn: &mut Conn, bridge: &str, cluster: &[IpNet]) -> Result<Vec<String>, NftError> {
    let mut out = Vec::new();
    for (family, chain) in conn.dump(GET_CHAIN, 0, |_| {})? {
        let Some(word) = (match family {
            INET => Some("inet"),
            IPV4 => Some("ip"),
            IPV6 => Some("ip6"),
            _ => None,
        }) else {
            continue;
        };
        let hook = find(&chain, 4).unwrap_or_default();
        let table = find_text(&chain, 1).unwrap_or_default();
        let name = find_text(&chain, 3).unwrap_or_default();
        if find_be32(hook, 1) != Some(HOOK_FORWARD)
            || find_be32(&chain, 5) != Some(DROP)
            || (family == INET && table == TABLE)
        {
            continue;
        }
        let rules = conn.dump(GET_RULE, family, |writer| {
            writer.text(1, &table);
            writer.text(2, &name);
        })?;
        let accepted: Vec<Accepted> = rules
            .iter()
            .filter(|(_, rule)| {
                find_text(rule, 1).as_deref() == Some(&table) && find_text(rule, 2).as_deref() == Some(&name)
            })
            .filter_map(|(_, rule)| accepts(find(rule, 4).unwrap_or_default()))
            .collect();
        if passes(&accepted, family, bridge, cluster) {
            continue;
        }
        let advice = if family != INET && table == "filter" && name == "FORWARD" {
            let tool = if family == IPV4 { "iptables" } else { "ip6tables" };
            format!("{tool} -I FORWARD -i {bridge} -j ACCEPT` and `{tool} -I FORWARD -o {bridge} -j ACCEPT")
        } else {
            format!(
                "nft insert rule {word} {table} {name} iifname {bridge} accept` and `nft insert rule {word} {table} {name} oifname {bridge} accept"
            )
        };
        out.push(format!(
            "chain {name} of the nftables table {word} {table} drops forwarded traffic by its policy, which cuts pods off: allow the pods' bridge by `{advice}`"
        ));
    }
    out.extend(legacy_drop(bridge));
    Ok(out)
}

/// What one rule accepts, if it is simple enough to tell.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::kernel) enum Accepted {
    /// Everything from (`true`) or to an interface whose name starts so; ended by a zero byte if it is whole.
    Interface { from: bool, name: Vec<u8> },
    /// Everything from (`true`) or to a network: where the address is compared, and with what.
    Network { from: bool, v6: bool, address: Vec<u8>, mask: Vec<u8> },
    /// Everything.
    All,
}

pub(in crate::kernel) fn accepts(expressions: &[u8]) -> Option<Accepted> {
    let mut rest = attrs(expressions)
        .filter_map(|(_, expr)| Some((find_text(expr, 1)?, find(expr, 2).unwrap_or_default())))
        .filter(|(name, _)| name != "counter")
        .peekable();
    let verdict = |data: &[u8]| {
        find_be32(data, 1) == Some(0)
            && find(data, 2).and_then(|data| find(data, 2)).and_then(|data| find_be32(data, 1))
                == Some(ACCEPT)
    };
    let (name, data) = rest.next()?;
    let equal = |name: &str, data: &[u8]| -> Option<Vec<u8>> {
        if name != "cmp" || find_be32(data, 2) != Some(0) {
            return None;
        }
        Some(find(find(data, 3)?, 1)?.to_vec())
    };
    let accepted = match name.as_str() {
        "immediate" => return (verdict(data) && rest.next().is_none()).then_some(Accepted::All),
        "meta" => {
            let from = match find_be32(data, 2)? {
                META_IIFNAME => true,
                META_OIFNAME => false,
                META_NFPROTO => {
                    // `ip saddr` in an inet table starts by the protocol: what follows tells the family anyway.
                    rest.next()?;
                    let (name, data) = rest.next()?;
                    return network(&name, data, &mut rest).filter(|_| {
                        rest.next().is_some_and(|(name, data)| name == "immediate" && verdict(data))
                            && rest.next().is_none()
                    });
                }
                _ => return None,
            };
            let (name, data) = rest.next()?;
            Accepted::Interface { from, name: equal(&name, data)? }
        }
        _ => network(&name, data, &mut rest)?,
    };
    let (name, data) = rest.next()?;
    (name == "immediate" && verdict(data) && rest.next().is_none()).then_some(accepted)
}

fn network<'a>(
    name: &str,
    data: &[u8],
    rest: &mut impl Iterator<Item = (String, &'a [u8])>,
) -> Option<Accepted> {
    if name != "payload" || find_be32(data, 2) != Some(1) {
        return None;
    }
    let len = find_be32(data, 4)? as usize;
    let (from, v6) = match find_be32(data, 3)? {
        12 if len <= 4 => (true, false),
        16 if len <= 4 => (false, false),
        8 if len <= 16 => (true, true),
        24 if len <= 16 => (false, true),
        _ => return None,
    };
    let (mut name, mut data) = rest.next()?;
    let mut mask = vec![0xff; len];
    if name == "bitwise" {
        mask = find(find(data, 4)?, 1)?.to_vec();
        (name, data) = rest.next()?;
    }
    if name != "cmp" || find_be32(data, 2) != Some(0) {
        return None;
    }
    Some(Accepted::Network { from, v6, address: find(find(data, 3)?, 1)?.to_vec(), mask })
}

/// Whether these rules let the pods of the chain's families through, in both directions.
pub(in crate::kernel) fn passes(accepted: &[Accepted], family: u8, bridge: &str, cluster: &[IpNet]) -> bool {
    let whole = interface(bridge);
    let both = |test: &dyn Fn(bool) -> bool| test(true) && test(false);
    if accepted.contains(&Accepted::All) {
        return true;
    }
    if both(&|wanted| {
        accepted.iter().any(|one| {
            matches!(one, Accepted::Interface { from, name } if *from == wanted && whole.starts_with(name))
        })
    }) {
        return true;
    }
    let mut relevant =
        cluster.iter().filter(|net| family == INET || (family == IPV6) == net.addr().is_ipv6()).peekable();
    relevant.peek().is_some()
        && relevant.all(|net| both(&|wanted| accepted.iter().any(|one| covers(one, wanted, net))))
}

fn covers(accepted: &Accepted, wanted: bool, net: &IpNet) -> bool {
    let Accepted::Network { from, v6, address, mask } = accepted else { return false };
    let bytes = match net.network() {
        IpAddr::V4(addr) => addr.octets().to_vec(),
        IpAddr::V6(addr) => addr.octets().to_vec(),
    };
    let bits: u32 = mask.iter().map(|byte| byte.count_ones()).sum();
    *from == wanted
        && *v6 == net.addr().is_ipv6()
        && bits <= u32::from(net.prefix_len())
        && mask.len() == address.len()
        && mask.iter().zip(address).zip(&bytes).all(|((mask, address), byte)| byte & mask == *address)
}

/// The policy of FORWARD in the tables of the old iptables, which netlink does not show: read through its own
/// tool if the table is loaded and the tool is there, else passed over.
fn legacy_drop(bridge: &str) -> Vec<String> {
    let mut out = Vec::new();
    for (names, tool) in [("ip_tables_names", "iptables-legacy"), ("ip6_tables_names", "ip6tables-legacy")] {
        let loaded = std::fs::read_to_string(format!("/proc/thread-self/net/{names}")).unwrap_or_default();
        if !loaded.lines().any(|line| line == "filter") {
            continue;
        }
        let Ok(output) = std::process::Command::new(tool).args(["-S", "FORWARD"]).output() else { continue };
        let text = String::from_utf8_lossy(&output.stdout);
        let has = |line: &str| text.lines().any(|found| found == line);
        if has("-P FORWARD DROP")
            && !(has(&format!("-A FORWARD -i {bridge} -j ACCEPT"))
                && has(&format!("-A FORWARD -o {bridge} -j ACCEPT")))
        {
            out.push(format!(
                "chain FORWARD of {tool}, table filter, drops forwarded traffic by its policy, which cuts pods off: allow the pods' bridge by `{tool} -I FORWARD -i {bridge} -j ACCEPT` and `{tool} -I FORWARD -o {bridge} -j ACCEPT`"
            ));
        }
    }
    out
}
