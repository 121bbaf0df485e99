//! `[store]`: where leases are kept, and which keys belong to which kind of store.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use weft_ipam::carve::Carver;
use weft_ipam::store::etcd::EtcdOptionsError;
use weft_ipam::store::kubernetes::Mode;
use weft_ipam::store::{EtcdOptions, KubernetesOptions};
use weft_wire::types::{NodeName, Subnet};

use super::Span;
use crate::config::{StoreConfig, StoreKind};

/// Entries in etcd outlive the last sign of their node by this at least (docs/decisions/0010-etcd-store.md).
const ABANDON_LEAST: Duration = Duration::from_secs(7 * 24 * 3600);

#[derive(Debug, Default, Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Kind {
    #[default]
    Sqlite,
    Etcd,
    Kubernetes,
    Static,
}

impl Kind {
    fn name(&self) -> &'static str {
        match self {
            Self::Sqlite => "sqlite",
            Self::Etcd => "etcd",
            Self::Kubernetes => "kubernetes",
            Self::Static => "static",
        }
    }
}

/// `store.mode`.
#[derive(Debug, Clone, Copy, Deserialize)]
enum Chooser {
    #[serde(rename = "weft-ipam")]
    WeftIpam,
    #[serde(rename = "node-podcidr")]
    NodePodCidr,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Store {
    r#type: Kind,
    path: PathBuf,
    endpoints: Vec<String>,
    prefix: Option<String>,
    ca_file: Option<PathBuf>,
    cert_file: Option<PathBuf>,
    key_file: Option<PathBuf>,
    user: Option<String>,
    password_file: Option<PathBuf>,
    mode: Option<Chooser>,
    kubeconfig: Option<PathBuf>,
    namespace: Option<String>,
    subnets: Vec<Subnet>,
    lease_ttl: Span,
}

impl Default for Store {
    fn default() -> Self {
        Self {
            r#type: Kind::Sqlite,
            path: "/var/lib/weft/store.db".into(),
            endpoints: Vec::new(),
            prefix: None,
            ca_file: None,
            cert_file: None,
            key_file: None,
            user: None,
            password_file: None,
            mode: None,
            kubeconfig: None,
            namespace: None,
            subnets: Vec::new(),
            lease_ttl: Span(Duration::from_secs(3600)),
        }
    }
}

impl Store {
    /// Whether the blocks of the nodes are cut elsewhere, so that their size is not said here.
    pub(super) fn is_cut_elsewhere(&self) -> bool {
        matches!(self.mode, Some(Chooser::NodePodCidr))
    }

    /// Where the cluster keys are if nobody says. Where a Secret names the keys the daemon writes the file, beside what else it
    /// remembers.
    pub(super) fn usual_key_file(&self, state_dir: &Path) -> PathBuf {
        match self.r#type {
            Kind::Kubernetes => state_dir.join("cluster.key"),
            Kind::Sqlite | Kind::Etcd | Kind::Static => "/etc/weft/cluster.key".into(),
        }
    }

    pub(super) fn resolve(self, node: &NodeName, carver: &Carver) -> Result<StoreConfig, String> {
        let lease_ttl = self.lease_ttl.0;
        let kind = self.kind(node)?;
        if let StoreKind::Static(subnets) = &kind
            && let Some(outside) = subnets.iter().find(|subnet| !carver.allows(**subnet))
        {
            return Err(format!(
                "store.subnets: {outside} is not inside cluster.cidrs, or is reserved there; choose a subnet of the cluster"
            ));
        }
        Ok(StoreConfig { kind, lease_ttl })
    }

    fn kind(self, node: &NodeName) -> Result<StoreKind, String> {
        let only = [
            ("endpoints", !self.endpoints.is_empty(), Kind::Etcd),
            ("prefix", self.prefix.is_some(), Kind::Etcd),
            ("ca_file", self.ca_file.is_some(), Kind::Etcd),
            ("cert_file", self.cert_file.is_some(), Kind::Etcd),
            ("key_file", self.key_file.is_some(), Kind::Etcd),
            ("user", self.user.is_some(), Kind::Etcd),
            ("password_file", self.password_file.is_some(), Kind::Etcd),
            ("mode", self.mode.is_some(), Kind::Kubernetes),
            ("kubeconfig", self.kubeconfig.is_some(), Kind::Kubernetes),
            ("namespace", self.namespace.is_some(), Kind::Kubernetes),
            ("subnets", !self.subnets.is_empty(), Kind::Static),
        ];
        if let Some((key, _, kind)) = only.iter().find(|(_, given, kind)| *given && self.r#type != *kind) {
            return Err(format!(
                "store.{key} belongs to store.type = {:?}; remove it, or change the type",
                kind.name()
            ));
        }
        match self.r#type {
            Kind::Sqlite => Ok(StoreKind::Sqlite(self.path)),
            Kind::Etcd => self.etcd(node).map(StoreKind::Etcd),
            Kind::Kubernetes => self.kubernetes(node).map(StoreKind::Kubernetes),
            Kind::Static if self.subnets.is_empty() => Err(
                "store.type = \"static\" needs the node's subnets: set store.subnets, for example [\"10.32.4.0/24\"]".into(),
            ),
            Kind::Static => Ok(StoreKind::Static(self.subnets)),
        }
    }

    fn kubernetes(self, node: &NodeName) -> Result<KubernetesOptions, String> {
        let options = KubernetesOptions {
            kubeconfig: self.kubeconfig,
            namespace: self.namespace.unwrap_or_else(|| "weft-system".into()),
            node: node.clone(),
            mode: match self.mode {
                None | Some(Chooser::WeftIpam) => Mode::WeftIpam,
                Some(Chooser::NodePodCidr) => Mode::NodePodCidr,
            },
        };
        options.check().map_err(|error| error.to_string())?;
        Ok(options)
    }

    fn etcd(self, node: &NodeName) -> Result<EtcdOptions, String> {
        let both = |first: &str, second: &str| {
            format!("store.{first} needs store.{second} too: set both, or neither")
        };
        let identity = match (self.cert_file, self.key_file) {
            (Some(cert), Some(key)) => Some((cert, key)),
            (None, None) => None,
            (Some(_), None) => return Err(both("cert_file", "key_file")),
            (None, Some(_)) => return Err(both("key_file", "cert_file")),
        };
        let user = match (self.user, self.password_file) {
            (Some(user), Some(file)) => Some((user, file)),
            (None, None) => None,
            (Some(_), None) => return Err(both("user", "password_file")),
            (None, Some(_)) => return Err(both("password_file", "user")),
        };
        let endpoints =
            self.endpoints.iter().map(|text| text.parse()).collect::<Result<_, EtcdOptionsError>>();
        let options = EtcdOptions {
            endpoints: endpoints.map_err(|error| error.to_string())?,
            prefix: self.prefix.unwrap_or_else(|| "/weft".into()),
            ca_file: self.ca_file,
            identity,
            user,
            node: node.clone(),
            abandon_after: ABANDON_LEAST.max(self.lease_ttl.0 * 24),
        };
        options.check().map_err(|error| error.to_string())?;
        Ok(options)
    }
}
