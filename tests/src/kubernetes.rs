//! A Kubernetes of the lab: a machine that runs its control plane, and nodes with containerd, kubelet and kube-proxy.
//!
//! The machines are nodes of a [`Lab`](crate::lab::Lab) that runs no daemon of weft: the pod network is the business of
//! whoever asks for the cluster. The programs are Kubernetes's own, built by `make kubernetes`; nothing stands in for any of
//! them. What is faked is below them: a node has a few files over /proc/sys, so that no kubelet changes the machine's settings.
//!
//! Invariant: what holds of a lab holds of a cluster. When its keeper ends the kernel takes every process, mount and interface
//! away with it. Cgroups are no process's: a dropped cluster removes its own, and the next one those of one that was interrupted.

mod api;
mod authority;
#[path = "../../ipam/tests/contract/certificates.rs"]
mod certificates;
mod cgroups;
mod cluster;
mod machine;
mod network;
#[path = "../../ipam/tests/contract/objects.rs"]
mod objects;
mod plane;
mod programs;
mod server;
mod weft;

pub use api::{Api, lab_options, no_api};
pub use cluster::{Cluster, ClusterOptions, Proxy, until};
pub use network::{Network, Reference};
pub use programs::{Programs, missing};
pub use weft::{WEFT_IMAGE, Weft};
