//! Between the loop and a Kubernetes cluster: what its news mean here, and what it is told.

use std::net::IpAddr;
use std::time::Instant;

use tracing::{info, warn};
use weft_ipam::store::kubernetes::Mode;
use weft_wire::seal::KeyId;

use super::{Node, worker};
use crate::config::{StoreKind, first_of_each_family};
use crate::kubernetes::{Kubernetes, News, NodeView, Reason, Remark, Said, moved, pod_cidrs};

/// The cluster as it is known.
#[derive(Debug)]
pub(super) struct Cluster {
    pub(super) kubernetes: Kubernetes,
    view: Option<Box<NodeView>>,
    /// There is no Node, though there may have been one.
    gone: bool,
    /// What the Secret holds instead of keys.
    keys: Option<String>,
    /// The first of the keys that the Secret holds.
    first_key: Option<KeyId>,
    /// What the tasks found.
    remarks: Vec<Remark>,
}

impl Cluster {
    pub(super) fn new(kubernetes: Kubernetes) -> Self {
        Self { kubernetes, view: None, gone: false, keys: None, first_key: None, remarks: Vec::new() }
    }

    /// Returns what is wrong with the cluster, or between the cluster and the node.
    fn remarks(&self, node: &str, used: &[IpAddr], of_cluster: bool) -> Vec<Remark> {
        let mut remarks = self.remarks.clone();
        let mut add = |reason, sentence| remarks.push(Remark { reason, sentence });
        self.keys.iter().for_each(|sentence| add(Reason::ClusterKey, sentence.clone()));
        if let Some(sentence) =
            self.view.as_ref().and_then(|view| moved(node, &view.addresses, used, of_cluster))
        {
            add(Reason::NodeAddress, sentence);
        }
        if self.gone {
            let sentence = format!(
                "there is no Node {node} in the cluster: let its kubelet join, or stop weft here if the node has gone or has another name now"
            );
            add(Reason::ApiServer, sentence);
        }
        remarks
    }
}

impl Node {
    /// Takes what the cluster says.
    pub(super) fn handle_news(&mut self, news: News, now: Instant) {
        let Some(cluster) = &mut self.cluster else { return };
        match news {
            News::Keys(Ok(ring)) => {
                cluster.keys = None;
                cluster.first_key = Some(ring.first());
                // The word of the site comes before the Secret's: it is of the whole mesh.
                if self.control.memory.mesh_keys.is_none() {
                    self.control.follow_ring(0, ring, now);
                }
            }
            News::Keys(Err(sentence)) => {
                warn!("{sentence}");
                cluster.keys = Some(sentence);
            }
            News::Remarks(remarks) => {
                for remark in remarks.iter().filter(|remark| !cluster.remarks.contains(remark)) {
                    warn!("{}", remark.sentence);
                }
                cluster.remarks = remarks;
            }
            News::Node(view) => {
                cluster.gone = view.is_none();
                let before = cluster.view.as_ref().map(|view| view.uid.clone());
                match (&view, before) {
                    (None, _) => warn!("there is no Node of this node in the cluster"),
                    (Some(view), Some(before)) if view.uid != before => {
                        info!(uid = view.uid, "the Node of this node was made anew");
                    }
                    _ => {}
                }
                let StoreKind::Kubernetes(options) = &self.control.config.store.kind else { return };
                if let (Mode::NodePodCidr, Some(view)) = (options.mode, &view) {
                    let carver = &self.control.config.cluster.carver;
                    let (subnets, wrong) = pod_cidrs(options.node.as_str(), &view.pod_cidrs, carver);
                    self.control.handle_node_subnets(subnets, wrong, now);
                }
                // A Node that is gone leaves the last one's addresses: nothing can be said of them.
                if view.is_some() {
                    cluster.view = view;
                    self.follow_addresses(now);
                }
            }
        }
    }

    /// Has the underlay looked for where the Node says, if it was the cluster that said where it is.
    fn follow_addresses(&mut self, now: Instant) {
        let Some(view) = self.cluster.as_mut().and_then(|cluster| cluster.view.as_mut()) else { return };
        let addresses = first_of_each_family(&view.addresses);
        if !self.control.config.underlay.of_cluster || addresses.is_empty() {
            return;
        }
        self.jobs
            .send(worker::Job::Addresses(addresses))
            .expect("the kernel's thread lives as long as the loop");
        self.control.handle_kernel_change(now);
    }

    /// Tells the cluster whether pods can talk, and what an operator should hear.
    pub(super) fn tell_cluster(&self, now: Instant) {
        let Some(cluster) = &self.cluster else { return };
        let said = Said { ready: self.control.ready().map(drop), remarks: self.remarks(now) };
        cluster.kubernetes.say(said);
    }

    /// Returns what is wrong with the cluster, one sentence each.
    pub(super) fn cluster_warnings(&self) -> impl Iterator<Item = String> {
        self.cluster_remarks().into_iter().map(|remark| remark.sentence)
    }

    fn cluster_remarks(&self) -> Vec<Remark> {
        let Some(cluster) = &self.cluster else { return Vec::new() };
        let addresses = self.control.underlay.iter().flat_map(|underlay| &underlay.addresses);
        let used: Vec<_> = addresses.map(|net| net.addr()).collect();
        let config = &self.control.config;
        let mut remarks = cluster.remarks(config.node.name.as_str(), &used, config.underlay.of_cluster);
        let wanted = self.control.memory.mesh_keys.as_ref().map(|keys| keys.ring.first());
        if cluster.first_key.is_some() && wanted.is_some() && wanted != cluster.first_key {
            let sentence = format!(
                "Secret weft-cluster-key has other keys than the mesh of sites, so a new node of this cluster is not understood: replace its text by that of {}",
                config.cluster.key_file.display()
            );
            remarks.push(Remark { reason: Reason::ClusterKey, sentence });
        }
        remarks
    }

    /// Everything that becomes an Event. What changes its words all the time is left to `weft status`.
    fn remarks(&self, now: Instant) -> Vec<Remark> {
        let mut remarks = self.cluster_remarks();
        let problems = &self.control.problems;
        let mut add = |reason, sentence: &String| remarks.push(Remark { reason, sentence: sentence.clone() });
        self.control.store_error.iter().for_each(|sentence| add(Reason::Store, sentence));
        for sentence in problems.lease.keys() {
            let twin = sentence.starts_with("another node named ");
            add(if twin { Reason::DuplicateNode } else { Reason::PodSubnet }, sentence);
        }
        problems.chosen.iter().for_each(|sentence| add(Reason::PodCidr, sentence));
        self.asked_name(now).iter().for_each(|sentence| add(Reason::DuplicateNode, sentence));
        problems.ring.iter().for_each(|sentence| add(Reason::ClusterKey, sentence));
        problems.underlay.iter().for_each(|sentence| add(Reason::Machine, sentence));
        self.preflight.iter().for_each(|sentence| add(Reason::Machine, sentence));
        self.namesake(now).iter().for_each(|sentence| add(Reason::DuplicateNode, sentence));
        self.foreign_gossip(now).iter().for_each(|sentence| add(Reason::ClusterKey, sentence));
        remarks
    }
}
