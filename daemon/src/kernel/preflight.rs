//! What must be true of the machine before weft changes anything on it. It looks and changes nothing.

use std::net::IpAddr;

use ipnet::IpNet;

use super::netlink::{Conn, Refusal};
use super::rtnl;
use crate::plan::model::is_host_veth;

/// CAP_NET_ADMIN (linux/capability.h).
const NET_ADMIN: u32 = 12;

/// Something that is wrong with the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Whether a node must not start on it.
    pub fatal: bool,
    /// What is wrong and what to do.
    pub sentence: String,
}

/// Returns why the process may not program the kernel; `None` where it may.
pub fn missing_capability() -> Option<String> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    let effective = u64::from_str_radix(line.trim(), 16).ok()?;
    (effective & (1 << NET_ADMIN) == 0).then(|| {
        "weftd lacks the capability CAP_NET_ADMIN; run it as root, or grant the capability (in Kubernetes: securityContext.capabilities.add)".into()
    })
}

/// Looks for addresses, routes and DNS servers of the machine inside the cluster's ranges.
///
/// # Errors
/// Where the kernel does not answer.
pub fn overlaps(conn: &mut Conn, cluster: &[IpNet]) -> Result<Vec<Finding>, Refusal> {
    let links = rtnl::links(conn)?;
    let foreign = |index: u32| {
        let name = links.iter().find(|link| link.index == index).map_or("", |link| link.name.as_str());
        (!rtnl::is_ours(name) && !is_host_veth(name)).then_some(name)
    };
    let mut used = Vec::new();
    for (index, address) in rtnl::addresses(conn)? {
        if let Some(device) = foreign(index) {
            used.push((address.trunc(), format!("{} is an address of {device}", address.addr())));
        }
    }
    for (index, prefix) in rtnl::foreign_routes(conn)? {
        if let Some(device) = foreign(index) {
            used.push((prefix, format!("{prefix} is routed to {device}")));
        }
    }
    used.extend(
        dns_servers().into_iter().map(|server| (IpNet::from(server), format!("{server} is a DNS server"))),
    );
    Ok(judge(cluster, &used))
}

fn judge(cluster: &[IpNet], used: &[(IpNet, String)]) -> Vec<Finding> {
    let mut findings: Vec<Finding> = Vec::new();
    for cidr in cluster {
        for (prefix, what) in used {
            let inside = cidr.contains(&prefix.network()) && prefix.prefix_len() >= cidr.prefix_len();
            let around = prefix.contains(cidr) && !inside;
            let sentence = if inside {
                format!(
                    "the cluster CIDR {cidr} overlaps this machine's network: {what} (in {prefix}); choose cluster.cidrs that nothing else uses, or reserve the range there"
                )
            } else if around {
                format!(
                    "the cluster CIDR {cidr} hides a part of {prefix}: {what}; choose cluster.cidrs that nothing else uses"
                )
            } else {
                continue;
            };
            if !findings.iter().any(|finding| finding.sentence == sentence) {
                findings.push(Finding { fatal: inside, sentence });
            }
        }
    }
    findings
}

fn dns_servers() -> Vec<IpAddr> {
    let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let servers = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver"));
    servers.filter_map(|server| server.trim().parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(cluster: &str, used: &str) -> Option<bool> {
        let used: IpNet = used.parse().unwrap();
        judge(&[cluster.parse().unwrap()], &[(used, "it".into())]).first().map(|finding| finding.fatal)
    }

    #[test]
    fn what_lies_inside_the_cluster_is_fatal_and_what_lies_around_it_is_told() {
        assert_eq!(judged("10.32.0.0/12", "10.33.0.53/32"), Some(true));
        assert_eq!(judged("10.32.0.0/12", "10.32.0.0/12"), Some(true));
        assert_eq!(judged("10.32.0.0/12", "10.0.0.0/8"), Some(false));
        assert_eq!(judged("10.32.0.0/12", "192.0.2.0/24"), None);
        assert_eq!(judged("fd00:32::/48", "fd00:32:0:5::/64"), Some(true));
    }
}
