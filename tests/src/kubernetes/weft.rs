//! weft as the pod network of a cluster: its image, and the files in deploy/, and nothing else.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::cluster::Cluster;
use super::network::Network;

/// weft as an overlay of deploy/ configures it, with both families.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weft {
    /// VXLAN, and blocks that weft chooses.
    Vxlan,
    /// Everything between nodes is encrypted.
    Encrypted,
    /// VXLAN, and the blocks in `spec.podCIDRs` of each Node.
    NodePodCidr,
}

/// What deploy/ gives its DaemonSet to run.
pub const WEFT_IMAGE: &str = concat!("ghcr.io/weft-net/weft:", env!("CARGO_PKG_VERSION"));

impl Network for Weft {
    fn name(&self) -> &str {
        match self {
            Self::Vxlan => "weft",
            Self::Encrypted => "weft, encrypted",
            Self::NodePodCidr => "weft, node-podcidr",
        }
    }

    fn wants_node_cidrs(&self) -> bool {
        *self == Self::NodePodCidr
    }

    fn deliver(&self, cluster: &Cluster) {
        let image = image(cluster);
        for node in cluster.nodes() {
            cluster.import(&node, &image);
        }
    }

    fn install(&self, cluster: &Cluster) {
        cluster.kubectl(&["apply", "-k", &self.kustomization(cluster).display().to_string()]);
    }

    fn joined(&self, _: &Cluster, _: &str) {}

    fn left(&self, _: &Cluster, _: &str) {}

    fn lead_the_plane(&self, cluster: &Cluster) {
        let leases = cluster.objects(&["podsubnets"]);
        for lease in leases["items"].as_array().expect("a list") {
            let text = |field: &str| lease["spec"][field].as_str().expect("a PodSubnet has it").to_owned();
            let (subnet, node) = (text("subnet"), text("node"));
            let via = cluster.addresses(&node).into_iter().find(|via| via.is_ipv6() == subnet.contains(':'));
            let via = via.expect("the underlay has both families").to_string();
            cluster.lab().run(cluster.plane(), &["ip", "route", "replace", &subnet, "via", &via]);
        }
    }

    fn addresses_in_use(&self, cluster: &Cluster, node: &str) -> usize {
        let pods = cluster.lab().weft(node, &["pods"]);
        let pods = pods["pods"].as_array().cloned().unwrap_or_default();
        pods.iter().map(|pod| pod["ips"].as_array().map_or(0, Vec::len)).sum()
    }
}

impl Weft {
    /// The directory that is applied: the dual-stack overlay of deploy/, or another one with that one's ranges.
    fn kustomization(&self, cluster: &Cluster) -> PathBuf {
        let overlays = root().join("deploy/kubernetes/overlays");
        let (overlay, more) = match self {
            Self::Vxlan => return overlays.join("dual-stack"),
            Self::Encrypted => ("wireguard", "\n[encryption]\npolicy = \"always\"\n"),
            // The last table of the file is the store's.
            Self::NodePodCidr => ("node-podcidr", "mode = \"node-podcidr\"\n"),
        };
        let directory = cluster.lab().handle().dir().join("weft");
        fs::create_dir_all(&directory).expect("the lab's directory takes another");
        let dual = fs::read_to_string(overlays.join("dual-stack/weft.toml"))
            .expect("deploy/ has a dual-stack overlay");
        fs::write(directory.join("weft.toml"), dual + more).expect("a file");
        // kustomize takes no absolute path.
        let up: PathBuf = directory.components().skip(1).map(|_| "..").collect();
        let base = up.join(overlays.join(overlay).strip_prefix("/").expect("an absolute path"));
        let text = format!(
            "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources: [{}]\n\
             configMapGenerator:\n- {{ name: weft, namespace: weft-system, behavior: merge, files: [weft.toml] }}\n\
             generatorOptions: {{ disableNameSuffixHash: true }}\n",
            base.display()
        );
        fs::write(directory.join("kustomization.yaml"), text).expect("a file");
        directory
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ is below the root")
}

/// Makes the image as deploy/ does, of the executables that the lab has.
fn image(cluster: &Cluster) -> PathBuf {
    let lab = cluster.lab();
    let file = lab.handle().dir().join("weft.tar");
    let made =
        Command::new(root().join("deploy/image")).arg(&lab.state().options.bin_dir).arg(&file).output();
    let made = made.expect("deploy/image runs");
    assert!(made.status.success(), "deploy/image: {}", String::from_utf8_lossy(&made.stderr));
    file
}
