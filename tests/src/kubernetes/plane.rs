//! The control plane: etcd, kube-apiserver, kube-controller-manager and kube-scheduler on a machine of their own.
//!
//! The machine is no node: no kubelet, no kube-proxy, no pods. So it serves as a client from outside the cluster too.

use std::net::IpAddr;
use std::time::Duration;

use super::authority::Authority;
use super::cluster::{ClusterOptions, POD_CIDRS, SERVICE_CIDRS, until};
use super::programs::Programs;
use super::server::Server;
use crate::lab::Lab;

/// Where the API is, given the address of the machine.
pub(crate) fn api(address: IpAddr) -> String {
    format!("https://{address}:6443")
}

/// Writes the certificates of the control plane, of every node, and of the person at the keyboard.
pub(crate) fn certify(authority: &Authority, address: IpAddr, nodes: &[String]) -> anyhow::Result<()> {
    let first_of_services: IpAddr = "10.96.0.1".parse().expect("an address");
    let names = [
        "localhost",
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
    ];
    authority.server("kube-apiserver", &[address, first_of_services], &names)?;
    let api = api(address);
    authority.user("admin", "admin", &["system:masters"], &api)?;
    authority.user("to-kubelets", "kube-apiserver", &["system:masters"], &api)?;
    for name in ["kube-controller-manager", "kube-scheduler", "kube-proxy"] {
        authority.user(name, &format!("system:{name}"), &[], &api)?;
    }
    nodes.iter().try_for_each(|node| certify_node(authority, address, node))
}

/// Writes the certificate of a node.
pub(crate) fn certify_node(authority: &Authority, address: IpAddr, node: &str) -> anyhow::Result<()> {
    authority.user(node, &format!("system:node:{node}"), &["system:nodes"], &api(address))
}

/// Starts all of it and waits until it serves.
pub(crate) fn start(
    lab: &Lab,
    programs: &Programs,
    authority: &Authority,
    options: &ClusterOptions,
    place: &str,
) -> anyhow::Result<Vec<Server>> {
    let mut servers = vec![etcd(lab, programs, place)?, apiserver(lab, programs, authority, place)?];
    await_api(lab, programs, authority, place, &mut servers);
    let config = |name: &str| format!("--kubeconfig={}", authority.file(&format!("{name}.kubeconfig")));
    let mut manager = vec![
        config("kube-controller-manager"),
        format!("--root-ca-file={}", authority.file("ca.pem")),
        format!("--service-account-private-key-file={}", authority.file("tokens.key")),
        "--use-service-account-credentials=true".into(),
        "--leader-elect=false".into(),
        "--bind-address=127.0.0.1".into(),
    ];
    if options.node_cidrs {
        manager.push("--allocate-node-cidrs=true".into());
        manager.push(format!("--cluster-cidr={POD_CIDRS}"));
        manager.push(format!("--service-cluster-ip-range={SERVICE_CIDRS}"));
    }
    servers.push(Server::start(lab, programs, place, "kube-controller-manager", &manager)?);
    let scheduler =
        [config("kube-scheduler"), "--leader-elect=false".into(), "--bind-address=127.0.0.1".into()];
    servers.push(Server::start(lab, programs, place, "kube-scheduler", &scheduler)?);
    Ok(servers)
}

/// Debian's, which is 3.4: kube-apiserver 1.36 does not insist on a newer one.
pub(crate) fn etcd(lab: &Lab, programs: &Programs, place: &str) -> anyhow::Result<Server> {
    // The machine's own /run is memory: nothing waits for a disk.
    let args = ["--data-dir=/run/etcd", "--logger=zap", "--log-level=warn"].map(str::to_owned);
    Server::start(lab, programs, place, "etcd", &args)
}

/// Starts kube-apiserver alone.
pub(crate) fn apiserver(
    lab: &Lab,
    programs: &Programs,
    authority: &Authority,
    place: &str,
) -> anyhow::Result<Server> {
    let state = lab.state();
    let address = state.node(place)?.underlay[0];
    let file = |flag: &str, name: &str| format!("--{flag}={}", authority.file(name));
    let args = [
        format!("--advertise-address={address}"),
        "--etcd-servers=http://127.0.0.1:2379".into(),
        format!("--service-cluster-ip-range={SERVICE_CIDRS}"),
        "--authorization-mode=Node,RBAC".into(),
        "--enable-admission-plugins=NodeRestriction".into(),
        "--allow-privileged=true".into(),
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local".into(),
        file("client-ca-file", "ca.pem"),
        file("tls-cert-file", "kube-apiserver.pem"),
        file("tls-private-key-file", "kube-apiserver.key"),
        file("kubelet-client-certificate", "to-kubelets.pem"),
        file("kubelet-client-key", "to-kubelets.key"),
        file("service-account-key-file", "tokens.pub"),
        file("service-account-signing-key-file", "tokens.key"),
        "--kubelet-preferred-address-types=InternalIP".into(),
    ];
    Server::start(lab, programs, place, "kube-apiserver", &args)
}

/// Waits until kube-apiserver says that it is ready.
pub(crate) fn await_api(
    lab: &Lab,
    programs: &Programs,
    authority: &Authority,
    place: &str,
    servers: &mut [Server],
) {
    let kubectl = programs.path("kubectl").display().to_string();
    let config = format!("--kubeconfig={}", authority.file("admin.kubeconfig"));
    until("kube-apiserver is ready", Duration::from_secs(120), || {
        assert!(servers.iter_mut().all(Server::runs), "the control plane ended: see the logs of {place}");
        lab.exec(place, &[&kubectl, &config, "get", "--raw", "/readyz"]).status.success()
    });
}
