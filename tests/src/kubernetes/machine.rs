//! A machine of the lab made into what a kubelet expects, and the three programs of a node.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use super::cgroups::PARENT;
use super::cluster::{ClusterOptions, DNS_ADDRESS, Proxy};
use super::programs::{IMAGES, Programs};
use super::server::Server;
use crate::lab::Lab;

/// Makes the directories, mounts and cgroups of a node. Arguments: the parent of all clusters' cgroups, cluster, node.
///
/// The lab's own preparations for weft are undone: it is installed by its DaemonSet, or not at all. What kubelet wants to find
/// under /proc/sys is the machine's, not a network namespace's, so it is given files of the node instead.
const SETUP: &str = r#"
set -eu
parent=$1 cluster=$2 node=$3
mount --make-rshared /
rm -rf /etc/cni/net.d/* /etc/weft /opt/cni/bin/weft-cni
# The lab's are links, which lead nowhere inside a container that has the directory mounted.
for plugin in /opt/cni/bin/*; do cp --remove-destination "$(readlink -f "$plugin")" "$plugin"; done
rm -f /etc/machine-id
head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n' > /etc/machine-id
mkdir -p /var/lib/kubelet /etc/kubernetes /run/weft-lab/log /run/weft-lab/sys
: > /etc/kubernetes/resolv.conf
mount --bind /run/weft-lab/log /var/log
while read -r value path; do
    copy=/run/weft-lab/sys/$(basename "$path")
    echo "$value" > "$copy"
    mount --bind "$copy" "/proc/sys/$path"
done <<END
1 vm/overcommit_memory
0 vm/panic_on_oom
10 kernel/panic
1 kernel/panic_on_oops
1000000 kernel/keys/root_maxkeys
25000000 kernel/keys/root_maxbytes
END
for root in /sys/fs/cgroup/*/; do
    [ -e "$root/cgroup.procs" ] && [ ! -L "${root%/}" ] && [ ! -e "$root/cgroup.controllers" ] || continue
    here=${root%/}
    for part in "$parent" "$cluster" "$node"; do
        mkdir -p "$here/$part"
        # A cpuset begins with no processor and no memory.
        if [ -e "$here/cpuset.cpus" ]; then
            cat "$here/cpuset.cpus" > "$here/$part/cpuset.cpus"
            cat "$here/cpuset.mems" > "$here/$part/cpuset.mems"
        fi
        here=$here/$part
    done
    echo $$ > "$here/cgroup.procs"
done
exec unshare --cgroup -- sh -euc '
    mount -t tmpfs -o mode=0755 cgroup /sys/fs/cgroup
    while IFS=: read -r _ controllers _; do
        [ -n "$controllers" ] || continue
        mkdir "/sys/fs/cgroup/${controllers#name=}"
        case $controllers in name=*) controllers=none,$controllers;; esac
        mount -t cgroup -o "$controllers" cgroup "/sys/fs/cgroup/$(echo "${controllers#none,}" | sed s/^name=//)"
    done < /proc/self/cgroup
    touch /run/weft-lab/cgroups
'
"#;

const CONTAINERD: &str = r#"
version = 3
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
address = "/run/containerd/containerd.sock"
[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = "registry.k8s.io/pause:3.10.2"
[plugins.'io.containerd.cri.v1.runtime']
# Some machines have no CAP_SYS_RESOURCE to give.
restrict_oom_score_adj = true
[plugins.'io.containerd.cri.v1.runtime'.containerd]
default_runtime_name = "runc"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
SystemdCgroup = false
[plugins.'io.containerd.cri.v1.runtime'.cni]
bin_dirs = ["/opt/cni/bin"]
conf_dir = "/etc/cni/net.d"
"#;

/// What a node's file is called in its own /etc/kubernetes.
fn own(file: &str) -> String {
    format!("/etc/kubernetes/{file}")
}

/// Prepares a machine: directories, cgroups, configuration.
pub(crate) fn prepare(
    lab: &Lab,
    options: &ClusterOptions,
    node: &str,
    pki: impl Fn(&str) -> String,
) -> anyhow::Result<()> {
    let output = lab.exec(node, &["sh", "-c", SETUP, "sh", PARENT, lab.handle().name(), node]);
    ensure!(
        output.status.success(),
        "cannot make {node} a machine for kubelet: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    let kubelet = kubelet(&pki("ca.pem"));
    let proxy = proxy(options, node, &pki("kube-proxy.kubeconfig"));
    for (file, text) in [
        ("containerd.toml", CONTAINERD.to_owned()),
        ("kubelet.json", kubelet.to_string()),
        ("kube-proxy.json", proxy.to_string()),
    ] {
        let output = lab.feed(node, &["sh", "-c", "cat > \"$0\"", &own(file)], &text);
        ensure!(output.status.success(), "cannot write {file} on {node}");
    }
    Ok(())
}

/// Starts the node's programs, `containerd` first.
pub(crate) fn start(
    lab: &Lab,
    programs: &Programs,
    node: &str,
    pki: impl Fn(&str) -> String,
) -> anyhow::Result<Vec<Server>> {
    let mut servers = vec![containerd(lab, programs, node)?];
    for image in IMAGES {
        import(lab, programs, node, &programs.image(image));
    }
    servers.push(kubelet_server(lab, programs, node, node, &pki(&format!("{node}.kubeconfig")))?);
    let config = format!("--config={}", own("kube-proxy.json"));
    servers.push(Server::start(lab, programs, node, "kube-proxy", &[config])?);
    Ok(servers)
}

/// Gives a node an image.
pub(crate) fn import(lab: &Lab, programs: &Programs, node: &str, image: &Path) {
    let ctr = programs.path("ctr").display().to_string();
    let image = image.display().to_string();
    lab.run(node, &[&ctr, "-n", "k8s.io", "images", "import", "--local", &image]);
}

fn containerd(lab: &Lab, programs: &Programs, node: &str) -> anyhow::Result<Server> {
    let mut server =
        Server::start(lab, programs, node, "containerd", &["--config".into(), own("containerd.toml")])?;
    let ctr = programs.path("ctr").display().to_string();
    super::cluster::until(&format!("containerd of {node} answers"), Duration::from_secs(60), || {
        assert!(server.runs(), "containerd of {node} ended: see its log");
        lab.exec(node, &[&ctr, "version"]).status.success()
    });
    Ok(server)
}

/// Starts the kubelet alone, under a name that is that of the machine or another.
pub(crate) fn kubelet_server(
    lab: &Lab,
    programs: &Programs,
    node: &str,
    name: &str,
    kubeconfig: &str,
) -> anyhow::Result<Server> {
    let state = lab.state();
    let addresses: Vec<String> = state.node(node)?.underlay.iter().map(IpAddr::to_string).collect();
    let args = [
        format!("--config={}", own("kubelet.json")),
        format!("--kubeconfig={kubeconfig}"),
        format!("--hostname-override={name}"),
        format!("--node-ip={}", addresses.join(",")),
    ];
    Server::start(lab, programs, node, "kubelet", &args).context("kubelet")
}

fn kubelet(ca: &str) -> Value {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "failCgroupV1": false,
        "cgroupDriver": "cgroupfs",
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "authentication": { "anonymous": { "enabled": false }, "webhook": { "enabled": true }, "x509": { "clientCAFile": ca } },
        "authorization": { "mode": "Webhook" },
        "clusterDNS": [DNS_ADDRESS],
        "clusterDomain": "cluster.local",
        "resolvConf": own("resolv.conf"),
        "volumePluginDir": "/var/lib/kubelet/plugins-exec",
        "failSwapOn": false,
        "enforceNodeAllocatable": ["none"],
        // The machine's disk is not the cluster's business.
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "evictionHard": {
            "memory.available": "1Mi", "nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "0%",
        },
        "localStorageCapacityIsolation": false,
        "serializeImagePulls": false,
    })
}

fn proxy(options: &ClusterOptions, node: &str, kubeconfig: &str) -> Value {
    let mode = match options.proxy {
        Proxy::Iptables => "iptables",
        Proxy::Nftables => "nftables",
    };
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": mode,
        "hostnameOverride": node,
        "clientConnection": { "kubeconfig": kubeconfig },
        "clusterCIDR": super::cluster::POD_CIDRS,
        "detectLocalMode": "ClusterCIDR",
        // The size of the conntrack table is the machine's.
        "conntrack": { "maxPerCore": 0, "min": 0 },
    })
}
