//! The Node of this node, as far as weft looks at it, and what its `spec.podCIDRs` mean.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::Node;
use kube::api::Api;
use kube::{Client, ResourceExt};
use tokio::sync::{mpsc, watch};
use weft_ipam::carve::{Carver, Family};
use weft_wire::types::Subnet;

use super::follow::Answer;
use super::trouble::{self, Subject, Troubles};
use super::{DEADLINE, News, condition, follow};

/// What weft looks at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeView {
    /// Tells this Node from an earlier one of the same name.
    pub uid: String,
    /// `spec.podCIDRs`, as they are written.
    pub pod_cidrs: Vec<String>,
    /// The addresses that the cluster knows the node by.
    pub addresses: Vec<IpAddr>,
    /// The condition that weft keeps.
    pub(super) network: Option<condition::Shown>,
}

impl NodeView {
    fn of(node: &Node) -> Self {
        let spec = node.spec.clone().unwrap_or_default();
        // Both fields hold the first one; the older may stand alone.
        let pod_cidrs = match spec.pod_cidrs {
            Some(cidrs) if !cidrs.is_empty() => cidrs,
            _ => spec.pod_cidr.into_iter().filter(|cidr| !cidr.is_empty()).collect(),
        };
        let addresses = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
        let internal = addresses.filter(|address| address.type_ == "InternalIP");
        Self {
            uid: node.uid().unwrap_or_default(),
            pod_cidrs,
            addresses: internal.filter_map(|address| address.address.parse().ok()).collect(),
            network: condition::shown(node),
        }
    }
}

/// Follows the Node for ever.
pub(super) async fn follow(
    client: Client,
    name: String,
    news: mpsc::Sender<News>,
    seen: watch::Sender<Option<NodeView>>,
    troubles: watch::Sender<Troubles>,
) {
    let api: Api<Node> = Api::all(client);
    let (tell, mut hear) = mpsc::channel::<Answer<Node>>(1);
    let take = async move {
        let mut last = None;
        while let Some(answer) = hear.recv().await {
            trouble::note(&troubles, Subject::Node, answer.as_ref().err().cloned());
            let Ok(node) = answer else { continue };
            let view = node.as_ref().map(NodeView::of);
            seen.send_replace(view.clone());
            // The kubelet writes its heartbeat into the Node all the time.
            if last.as_ref() == Some(&view) {
                continue;
            }
            last = Some(view.clone());
            if news.send(News::Node(view.map(Box::new))).await.is_err() {
                return;
            }
        }
    };
    tokio::join!(follow::follow(api, &name, "nodes", tell), take);
}

/// Returns the Node's uid, if it is there and can be read.
pub(super) async fn uid(client: &Client, name: &str) -> Option<String> {
    let api: Api<Node> = Api::all(client.clone());
    tokio::time::timeout(DEADLINE, api.get_opt(name)).await.ok()?.ok()??.uid()
}

/// Reads `spec.podCIDRs`: the subnets that weft can use, and a sentence for each thing that is wrong.
pub fn pod_cidrs(node: &str, cidrs: &[String], carver: &Carver) -> (Vec<Subnet>, Vec<String>) {
    let (mut subnets, mut wrong): (Vec<Subnet>, Vec<String>) = (Vec::new(), Vec::new());
    if cidrs.is_empty() {
        wrong.push(format!(
            "Node {node} has no spec.podCIDRs: run kube-controller-manager with --allocate-node-cidrs=true and --cluster-cidr, or set store.mode = \"weft-ipam\""
        ));
        return (subnets, wrong);
    }
    for text in cidrs {
        let Ok(subnet) = text.parse::<Subnet>() else {
            wrong.push(format!("{text:?} in spec.podCIDRs of Node {node} is no subnet: make the Node anew"));
            continue;
        };
        if !carver.allows(subnet) {
            wrong.push(format!(
                "{subnet} in spec.podCIDRs of Node {node} is outside cluster.cidrs, or reserved there: write the --cluster-cidr of kube-controller-manager into cluster.cidrs of every node"
            ));
        } else if let Some(other) = subnets.iter().find(|other| Family::of(**other) == Family::of(subnet)) {
            wrong.push(format!(
                "spec.podCIDRs of Node {node} has {other} and {subnet}, and weft uses one subnet of each family: {subnet} is left alone"
            ));
        } else {
            subnets.push(subnet);
        }
    }
    for family in Family::ALL {
        let wanted = carver.family(family).next().is_some();
        if wanted && !subnets.is_empty() && !subnets.iter().any(|subnet| Family::of(*subnet) == family) {
            wrong.push(format!(
                "spec.podCIDRs of Node {node} has no {family} subnet though cluster.cidrs has {family} ranges: give kube-controller-manager a --cluster-cidr of both families and make the Node anew, or remove those ranges; pods here have no {family} until then"
            ));
        }
    }
    (subnets, wrong)
}

/// Returns a sentence where the cluster knows the node by other addresses than those in use.
///
/// `follows`: where the machine has the others, they are used soon.
pub fn moved(node: &str, said: &[IpAddr], used: &[IpAddr], follows: bool) -> Option<String> {
    // Of a family that only one side has nothing can be said.
    let other = |address: &&IpAddr| {
        let same_family = |used: &&IpAddr| used.is_ipv4() == address.is_ipv4();
        used.iter().any(|used| same_family(&used))
            && !used.contains(address)
            && !said.iter().filter(|said| said.is_ipv4() == address.is_ipv4()).any(|said| used.contains(said))
    };
    let address = said.iter().find(other)?;
    let mine = used.iter().find(|used| used.is_ipv4() == address.is_ipv4())?;
    Some(if follows {
        format!(
            "Node {node} has the address {address}, which its underlay has not, and weft uses {mine}: correct the kubelet's --node-ip, or give the machine that address; weft follows"
        )
    } else {
        format!(
            "Node {node} has the address {address} and weft uses {mine}: correct underlay.address and start weft anew, or correct the kubelet's --node-ip"
        )
    })
}

#[cfg(test)]
mod tests {
    use weft_ipam::carve::ClusterCidr;

    use super::*;

    fn carver(cidrs: &[(&str, u8)]) -> Carver {
        let cidr = |&(cidr, node_prefix): &(&str, u8)| ClusterCidr {
            cidr: cidr.parse().expect("a prefix"),
            node_prefix,
            reserved: Vec::new(),
        };
        Carver::new(cidrs.iter().map(cidr).collect()).expect("valid CIDRs")
    }

    fn read(cidrs: &[&str], ranges: &[(&str, u8)]) -> (Vec<String>, Vec<String>) {
        let cidrs: Vec<_> = cidrs.iter().map(ToString::to_string).collect();
        let (subnets, wrong) = pod_cidrs("n1", &cidrs, &carver(ranges));
        (subnets.iter().map(ToString::to_string).collect(), wrong)
    }

    #[test]
    fn each_trouble_of_pod_cidrs_is_a_sentence_and_what_can_be_used_is() {
        let v4: &[(&str, u8)] = &[("10.32.0.0/12", 24)];
        let dual: &[(&str, u8)] = &[("10.32.0.0/12", 24), ("fd00:32::/48", 64)];
        assert_eq!(read(&["10.32.4.0/24"], v4), (vec!["10.32.4.0/24".into()], vec![]));
        // The controller's prefix length is its own matter.
        assert_eq!(read(&["10.32.4.0/25"], v4).1, Vec::<String>::new());
        assert_eq!(read(&["10.32.4.0/24", "fd00:32:0:4::/64"], dual).0.len(), 2);
        for (cidrs, ranges, used, said) in [
            (&[][..], v4, 0, "has no spec.podCIDRs"),
            (&["10.32.4.0/33"][..], v4, 0, "is no subnet"),
            (&["10.32.4.1/24"][..], v4, 0, "is no subnet"),
            (&["10.244.1.0/24"][..], v4, 0, "outside cluster.cidrs"),
            (&["10.32.4.0/24", "10.32.5.0/24"][..], v4, 1, "one subnet of each family"),
            (&["10.32.4.0/24"][..], dual, 1, "has no IPv6 subnet"),
            (&["fd00:32:0:4::/64"][..], dual, 1, "has no IPv4 subnet"),
        ] {
            let (subnets, wrong) = read(cidrs, ranges);
            assert_eq!(subnets.len(), used, "{cidrs:?}");
            assert!(wrong.len() == 1 && wrong[0].contains(said), "{cidrs:?}: {wrong:?}");
        }
    }

    #[test]
    fn only_an_address_of_a_family_in_use_can_have_moved() {
        let ips = |texts: &[&str]| -> Vec<IpAddr> {
            texts.iter().map(|text| text.parse().expect("an address")).collect()
        };
        let said = |said: &[&str], used: &[&str]| moved("n1", &ips(said), &ips(used), false);
        assert_eq!(said(&["192.0.2.1"], &["192.0.2.1"]), None);
        assert_eq!(said(&["192.0.2.1", "2001:db8::1"], &["192.0.2.1"]), None);
        assert_eq!(said(&["192.0.2.1", "192.0.2.9"], &["192.0.2.9"]), None);
        assert_eq!(said(&[], &["192.0.2.1"]), None);
        assert_eq!(said(&["192.0.2.1"], &[]), None);
        let sentence = said(&["192.0.2.7", "2001:db8::1"], &["192.0.2.1", "2001:db8::1"]).expect("moved");
        assert!(
            sentence.starts_with("Node n1 has the address 192.0.2.7 and weft uses 192.0.2.1: "),
            "{sentence}"
        );
    }
}
