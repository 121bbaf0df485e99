//! The pod network of a cluster, which is whose turn it is to be tried.

use std::net::IpAddr;

use serde_json::{Value, json};

use super::cluster::Cluster;

/// A pod network that can be put on a cluster.
pub trait Network {
    /// What tests call it.
    fn name(&self) -> &str;

    /// Whether the cluster has to allocate a CIDR for every node.
    fn wants_node_cidrs(&self) -> bool;

    /// Gives the nodes the images that it runs, as a registry would. None, where it has none.
    fn deliver(&self, cluster: &Cluster);

    /// Installs it on nodes that have none. It need not be ready when this returns.
    fn install(&self, cluster: &Cluster);

    /// Is told of a node that came into the cluster after [`Network::install`].
    fn joined(&self, cluster: &Cluster, node: &str);

    /// Is told of a node that left the cluster for good, when its pods are gone: what a person does who takes a node out.
    fn left(&self, cluster: &Cluster, node: &str);

    /// Gives the machine of the control plane, which is no node, ways to the pods of all nodes, as the API server needs them that is
    /// asked to carry a request to a pod.
    fn lead_the_plane(&self, cluster: &Cluster);

    /// How many pod addresses it holds for given out on a node.
    fn addresses_in_use(&self, cluster: &Cluster, node: &str) -> usize;
}

/// The reference plugins, `bridge` with `host-local`, and routes between the nodes that the harness makes by hand.
///
/// What it shows is that a failure is not the harness's.
#[derive(Debug)]
pub struct Reference;

impl Network for Reference {
    fn name(&self) -> &str {
        "reference"
    }

    fn wants_node_cidrs(&self) -> bool {
        true
    }

    fn deliver(&self, _: &Cluster) {}

    fn install(&self, cluster: &Cluster) {
        for node in cluster.nodes() {
            self.joined(cluster, &node);
        }
    }

    fn joined(&self, cluster: &Cluster, node: &str) {
        let path = "jsonpath={.spec.podCIDRs}";
        super::cluster::until(&format!("{node} has its CIDRs"), std::time::Duration::from_secs(60), || {
            cluster.kubectl(&["get", "node", node, "-o", path]).len() > 2
        });
        let cidrs: Vec<String> = serde_json::from_str(&cluster.kubectl(&["get", "node", node, "-o", path]))
            .expect("a list of CIDRs");
        let ranges: Vec<Value> = cidrs.iter().map(|cidr| json!([{ "subnet": cidr }])).collect();
        let conflist = json!({
            "cniVersion": "1.0.0",
            "name": "reference",
            "plugins": [
                { "type": "bridge", "bridge": "cni0", "isDefaultGateway": true, "hairpinMode": true,
                  "ipam": { "type": "host-local", "ranges": ranges } },
                { "type": "portmap", "capabilities": { "portMappings": true } },
            ],
        });
        // Routes first: a conflist makes the node Ready.
        let state = cluster.lab().state();
        let addresses = state.node(node).expect("a node of the lab").underlay.clone();
        for other in state.nodes.iter().filter(|other| other.name != node) {
            for cidr in &cidrs {
                let via = addresses.iter().find(|address| address.is_ipv4() != cidr.contains(':'));
                let via = via.map(IpAddr::to_string).expect("the underlay has both families");
                cluster.lab().run(other.name.as_str(), &["ip", "route", "replace", cidr, "via", &via]);
            }
        }
        let script = "mkdir -p /etc/cni/net.d; cat > /etc/cni/net.d/.next; mv /etc/cni/net.d/.next /etc/cni/net.d/10-reference.conflist";
        let output = cluster.lab().feed(node, &["sh", "-c", script], &conflist.to_string());
        assert!(output.status.success(), "cannot write the conflist of {node}");
    }

    fn left(&self, cluster: &Cluster, node: &str) {
        // The bridge keeps its address, and the plugin refuses one of another CIDR.
        let script = "rm -rf /etc/cni/net.d/10-reference.conflist /var/lib/cni/networks; ip link delete cni0";
        cluster.lab().sh(node, script);
    }

    fn lead_the_plane(&self, _: &Cluster) {
        // `joined` gives the routes to every machine.
    }

    fn addresses_in_use(&self, cluster: &Cluster, node: &str) -> usize {
        let files = cluster.lab().sh(node, "ls /var/lib/cni/networks/reference 2>/dev/null || true");
        files.lines().filter(|file| file.parse::<IpAddr>().is_ok()).count()
    }
}
