//! The store of a cluster that runs Kubernetes.

mod access;

pub use access::{KubernetesOptions, KubernetesOptionsError, Mode};
