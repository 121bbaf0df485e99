//! A cluster that a test owns: up with the test's options, and gone when the value is dropped.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::process::Output;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::authority::Authority;
use super::programs::Programs;
use super::server::Server;
use super::{cgroups, machine, plane};
use crate::lab::{Families, Lab, LabOptions, Place};

/// The CIDRs of pods, of Services, and the address of the cluster's DNS.
pub(crate) const POD_CIDRS: &str = "10.244.0.0/16,fd00:10:244::/48";
pub(crate) const SERVICE_CIDRS: &str = "10.96.0.0/16,fd00:96::/112";
pub(crate) const DNS_ADDRESS: &str = "10.96.0.10";

/// How kube-proxy directs what goes to Services.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proxy {
    /// Through iptables.
    Iptables,
    /// Through nftables.
    Nftables,
}

/// What a test wants of its cluster. Starts as two nodes, kube-proxy in nftables mode, and a CIDR for each node.
#[derive(Debug, Clone)]
pub struct ClusterOptions {
    /// Helps people; need not be unique between runs.
    pub name: String,
    /// How many nodes there are: `n1`, `n2`, ... The control plane is on a machine more.
    pub nodes: usize,
    /// The mode of kube-proxy.
    pub proxy: Proxy,
    /// Whether the controller manager allocates `spec.podCIDRs`.
    pub node_cidrs: bool,
}

impl ClusterOptions {
    /// A cluster for one test.
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), nodes: 2, proxy: Proxy::Nftables, node_cidrs: true }
    }
}

/// Waits until the check is true, and says how long that took. Each look may take a moment of its own, as kubectl does.
///
/// # Panics
/// When the bound passes first.
pub fn until(what: &str, bound: Duration, mut check: impl FnMut() -> bool) -> Duration {
    let began = Instant::now();
    while !check() {
        assert!(began.elapsed() < bound, "waited {bound:?} in vain until {what}");
        std::thread::sleep(Duration::from_millis(100));
    }
    began.elapsed()
}

/// A running cluster.
pub struct Cluster {
    /// None only while it is dropped.
    lab: Option<Lab>,
    programs: Programs,
    authority: Authority,
    options: ClusterOptions,
    /// By machine and program.
    servers: RefCell<BTreeMap<(String, String), Server>>,
    plane: String,
}

impl Cluster {
    /// Brings a cluster up: the control plane serves, the nodes are registered, and there is no pod network.
    ///
    /// # Panics
    /// When it does not come up; the message says why.
    pub fn up(options: ClusterOptions) -> Cluster {
        cgroups::remove_stale();
        let lab = LabOptions::new(&options.name)
            .nodes(options.nodes + 1)
            .started(0)
            .pods(0)
            .underlay(Families::Dual);
        let lab = Lab::up(lab);
        let plane = format!("n{}", options.nodes + 1);
        let authority =
            Authority::new(&lab.handle().shared()).expect("the cluster's certificates can be made");
        let cluster = Cluster {
            lab: Some(lab),
            programs: Programs::of_this_user(),
            authority,
            options,
            servers: RefCell::default(),
            plane,
        };
        cluster.start().unwrap_or_else(|error| panic!("the cluster did not come up: {error:#}"));
        cluster
    }

    fn start(&self) -> anyhow::Result<()> {
        let lab = self.lab();
        plane::certify(&self.authority, self.outside(), &self.nodes())?;
        self.keep(
            &self.plane,
            plane::start(lab, &self.programs, &self.authority, &self.options, &self.plane)?,
        );
        for node in self.nodes() {
            // Somewhere for what a Service's address is translated from: no packet leaves by it.
            for (family, via) in [("-4", true), ("-6", false)] {
                let address =
                    self.addresses(&self.plane).into_iter().find(|address| address.is_ipv4() == via);
                let address = address.expect("the underlay has both families").to_string();
                lab.run(node.as_str(), &["ip", family, "route", "add", "default", "via", &address]);
            }
            machine::prepare(lab, &self.options, &node, |file| self.authority.file(file))?;
            self.start_node(&node)?;
        }
        for node in self.nodes() {
            self.await_registered(&node);
        }
        Ok(())
    }

    /// Starts the programs of a node that is prepared.
    fn start_node(&self, node: &str) -> anyhow::Result<()> {
        self.keep(node, machine::start(self.lab(), &self.programs, node, |file| self.authority.file(file))?);
        Ok(())
    }

    fn await_registered(&self, node: &str) {
        until(&format!("{node} is registered"), Duration::from_secs(120), || {
            self.assert_servers_run();
            self.try_kubectl(&["get", "node", node]).status.success()
        });
    }

    fn keep(&self, place: &str, servers: Vec<Server>) {
        let mut all = self.servers.borrow_mut();
        all.extend(servers.into_iter().map(|server| ((place.to_owned(), server.name().to_owned()), server)));
    }

    fn assert_servers_run(&self) {
        for ((place, name), server) in self.servers.borrow_mut().iter_mut() {
            assert!(server.runs(), "{name} on {place} ended: see its log");
        }
    }

    /// Ends a program of a machine, such as `kube-apiserver`.
    ///
    /// # Panics
    /// When it does not run.
    pub fn stop(&self, place: &str, name: &str) {
        let server = self.servers.borrow_mut().remove(&(place.to_owned(), name.to_owned()));
        server.expect("the program runs").end(self.lab()).unwrap_or_else(|error| panic!("{error:#}"));
    }

    /// Starts kube-apiserver again, and waits until it serves.
    pub fn start_api(&self) {
        let server = plane::apiserver(self.lab(), &self.programs, &self.authority, &self.plane)
            .unwrap_or_else(|error| panic!("{error:#}"));
        let mut servers = [server];
        plane::await_api(self.lab(), &self.programs, &self.authority, &self.plane, &mut servers);
        self.keep(&self.plane, servers.into());
    }

    /// Gives a node an image, from a docker archive.
    pub fn import(&self, node: &str, image: &Path) {
        machine::import(self.lab(), &self.programs, node, image);
    }

    /// The kubeconfig of the administrator, as all machines see it.
    pub fn admin_config(&self) -> String {
        self.authority.file("admin.kubeconfig")
    }

    /// Starts the kubelet of a node again.
    pub fn start_kubelet(&self, node: &str) {
        self.start_kubelet_as(node, node);
    }

    /// Starts the kubelet of a machine under a name, as after the machine was renamed.
    pub fn start_kubelet_as(&self, place: &str, name: &str) {
        let config = self.authority.file(&format!("{name}.kubeconfig"));
        let server = plane::certify_node(&self.authority, self.outside(), name)
            .and_then(|()| machine::kubelet_server(self.lab(), &self.programs, place, name, &config))
            .unwrap_or_else(|error| panic!("{error:#}"));
        self.keep(place, vec![server]);
        self.await_registered(name);
    }

    /// Prints the end of every log.
    pub fn show_logs(&self) {
        crate::lab::show_logs(self.lab().handle());
    }

    /// The lab below.
    pub fn lab(&self) -> &Lab {
        self.lab.as_ref().expect("the lab is there until the cluster is dropped")
    }

    /// The names of the nodes.
    pub fn nodes(&self) -> Vec<String> {
        (1..=self.options.nodes).map(|index| format!("n{index}")).collect()
    }

    /// The machine of the control plane, which is outside of the pod network.
    pub fn plane(&self) -> &str {
        &self.plane
    }

    /// The addresses of a machine, IPv4 first.
    pub fn addresses(&self, place: &str) -> Vec<IpAddr> {
        self.lab().state().node(place).expect("a machine of the lab").underlay.clone()
    }

    /// The first address of the control plane's machine.
    fn outside(&self) -> IpAddr {
        self.addresses(&self.plane)[0]
    }

    /// Where an executable is, as all machines see it.
    pub fn program(&self, name: &str) -> String {
        self.programs.path(name).display().to_string()
    }

    fn kubectl_words<'a>(&self, words: &[&'a str]) -> Vec<std::borrow::Cow<'a, str>> {
        let config = format!("--kubeconfig={}", self.admin_config());
        let mut all = vec![self.program("kubectl").into(), config.into()];
        all.extend(words.iter().map(|word| std::borrow::Cow::from(*word)));
        all
    }

    /// Runs kubectl as the administrator, however it ends.
    pub fn try_kubectl(&self, words: &[&str]) -> Output {
        let words = self.kubectl_words(words);
        let words: Vec<&str> = words.iter().map(AsRef::as_ref).collect();
        self.lab().exec(Place::Node(self.plane.clone()), &words)
    }

    /// Runs kubectl as the administrator and returns what it wrote.
    ///
    /// # Panics
    /// When it fails.
    pub fn kubectl(&self, words: &[&str]) -> String {
        let output = self.try_kubectl(words);
        assert!(
            output.status.success(),
            "kubectl {words:?} failed: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Asks for objects as JSON.
    pub fn objects(&self, words: &[&str]) -> Value {
        let mut all = vec!["get", "-o", "json"];
        all.extend(words);
        serde_json::from_str(&self.kubectl(&all)).expect("kubectl writes JSON")
    }

    /// How many nodes say that they are Ready.
    pub fn ready_nodes(&self) -> usize {
        let nodes = self.objects(&["nodes"]);
        let conditions = nodes["items"].as_array().into_iter().flatten();
        let conditions =
            conditions.flat_map(|node| node["status"]["conditions"].as_array().into_iter().flatten());
        conditions.filter(|one| one["type"] == "Ready" && one["status"] == "True").count()
    }

    /// Applies a manifest, in YAML or JSON.
    ///
    /// # Panics
    /// When the API refuses it.
    pub fn apply(&self, manifest: &str) {
        let words = self.kubectl_words(&["apply", "-f", "-"]);
        let words: Vec<&str> = words.iter().map(AsRef::as_ref).collect();
        let output = self.lab().feed(Place::Node(self.plane.clone()), &words, manifest);
        assert!(
            output.status.success(),
            "kubectl apply failed: {}\n{manifest}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }

    /// Says what a person would look at first.
    pub fn describe(&self) -> String {
        let look = |words: &[&str]| String::from_utf8_lossy(&self.try_kubectl(words).stdout).into_owned();
        format!(
            "{}\n{}\n{}",
            look(&["get", "nodes", "-o", "wide"]),
            look(&["get", "pods", "-A", "-o", "wide"]),
            look(&["get", "events", "-A", "--sort-by=.lastTimestamp"])
        )
    }
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster").field("options", &self.options).finish_non_exhaustive()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some(lab) = self.lab.take() {
            let name = lab.handle().name().to_owned();
            drop(lab);
            cgroups::remove(&name);
        }
    }
}
