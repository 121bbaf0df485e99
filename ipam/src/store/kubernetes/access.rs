//! How to reach and convince the API server: the pod's service account, or a kubeconfig. It asks for nothing yet.
//!
//! Programs that a kubeconfig names to get a token (`exec`, `auth-provider`) are not run: a daemon cannot bound how
//! long they take. Files are read again for every new client, a token's file at least once a minute, and in a pod so is
//! the CA. Invariant: what cannot work is one sentence that names the key of `[store]`, or the file.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::Client;
use kube::client::{Body, ClientBuilder, ConfigExt};
use kube::config::{Config, InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError, LoadDataError};
use tower::{BoxError, ServiceBuilder};
use weft_wire::types::NodeName;

use crate::store::cause::deepest;

/// How long a connection may take. The API server is a few milliseconds away, or gone.
const CONNECT: Duration = Duration::from_secs(4);
/// A connection on which nothing comes is asked so often whether it lives, and dead after so long without an answer.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(15));

/// What a [`KubernetesStore`](super::KubernetesStore) needs to know, and whoever else talks to the API server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KubernetesOptions {
    /// The kubeconfig; `None` for the service account of the pod that the daemon runs in.
    pub kubeconfig: Option<PathBuf>,
    /// The namespace of weft's own objects.
    pub namespace: String,
    /// The Node object whose daemon this is.
    pub node: NodeName,
    /// Who chooses the node's subnets.
    pub mode: Mode,
}

/// Who chooses a node's pod subnets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// weft does, from the cluster's ranges.
    WeftIpam,
    /// The cluster's controller does: they stand in `spec.podCIDRs` of the Node.
    NodePodCidr,
}

/// Options that cannot work: one sentence that says what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct KubernetesOptionsError(String);

fn wrong<T>(sentence: impl Into<String>) -> Result<T, KubernetesOptionsError> {
    Err(KubernetesOptionsError(sentence.into()))
}

impl KubernetesOptions {
    /// Checks the options without touching a file.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self) -> Result<(), KubernetesOptionsError> {
        let label = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        let name = self.namespace.as_str();
        let edges = name.starts_with('-') || name.ends_with('-');
        if name.is_empty() || name.len() > 63 || edges || !name.bytes().all(label) {
            return wrong(format!(
                "store.namespace {name:?} is no name of a namespace: write the one that weft runs in, for example \"weft-system\""
            ));
        }
        Ok(())
    }

    /// Reads the files and checks what they hold; blocks for as long as that takes.
    ///
    /// # Errors
    /// The first file that is missing or is not what it should be.
    pub fn check_files(&self) -> Result<(), KubernetesOptionsError> {
        let check = || {
            let runtime = tokio::runtime::Builder::new_current_thread().build();
            let runtime = runtime.or_else(|error| wrong(format!("cannot read files: {error}")))?;
            runtime.block_on(self.client()).map(drop)
        };
        // On a thread of its own: the caller may be inside a runtime, which cannot hold another.
        std::thread::scope(|scope| {
            scope.spawn(check).join().unwrap_or_else(|_| wrong("the check of the files of [store] failed"))
        })
    }

    /// Returns a new client for the API server; its connections belong to the runtime that this runs in.
    ///
    /// It sends each request once, whatever becomes of it, and each needs a deadline of the caller's.
    ///
    /// # Errors
    /// What is wrong with the pod's service account or the kubeconfig.
    pub async fn client(&self) -> Result<Client, KubernetesOptionsError> {
        Ok(self.connect().await?.0)
    }

    /// Returns a new client and the API server's address.
    pub(super) async fn connect(&self) -> Result<(Client, String), KubernetesOptionsError> {
        let config = match &self.kubeconfig {
            Some(path) => from_file(path).await?,
            None => Config::incluster().or_else(|error| wrong(in_cluster(&error)))?,
        };
        if config.cluster_url.scheme_str() != Some("https") {
            return wrong(format!(
                "the API server's address {} is not safe for credentials: write https:// in {}",
                config.cluster_url,
                self.source()
            ));
        }
        let refused = |error: kube::Error| {
            let why = deepest(&error);
            KubernetesOptionsError(format!(
                "the credentials in {} cannot be used ({why}): correct them",
                self.source()
            ))
        };
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(CONNECT));
        tcp.set_keepalive(Some(KEEP_ALIVE.0));
        tcp.set_keepalive_interval(Some(KEEP_ALIVE.1 / 3));
        tcp.set_keepalive_retries(Some(1));
        tcp.set_tcp_user_timeout(Some(KEEP_ALIVE.1));
        let tls = config.rustls_https_connector_with_connector(tcp).map_err(refused)?;
        let http: HttpClient<_, Body> = HttpClient::builder(TokioExecutor::new()).build(tls);
        // Without kube's own retries: a write that is made twice may find itself in its way.
        let service = ServiceBuilder::new()
            .layer(config.base_uri_layer())
            .option_layer(config.auth_layer().map_err(refused)?)
            .layer(config.extra_headers_layer().map_err(refused)?)
            .map_err(BoxError::from)
            .service(http);
        let server = config.cluster_url.to_string().trim_end_matches('/').to_owned();
        Ok((ClientBuilder::new(service, config.default_namespace).build(), server))
    }

    /// Names where the credentials come from.
    pub(super) fn source(&self) -> String {
        match &self.kubeconfig {
            Some(path) => format!("store.kubeconfig {}", path.display()),
            None => "the pod's service account".to_owned(),
        }
    }
}

async fn from_file(path: &Path) -> Result<Config, KubernetesOptionsError> {
    let shown = path.display();
    let kubeconfig = Kubeconfig::read_from(path).or_else(|error| match error {
        KubeconfigError::ReadConfig(error, _) => wrong(format!(
            "store.kubeconfig {shown} cannot be read ({error}): put it there, or leave the key out to use the pod's service account"
        )),
        error => wrong(format!("store.kubeconfig {shown} is no kubeconfig ({})", one_line(&error.to_string()))),
    })?;
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await;
    let config = config.or_else(|error| {
        let file = match &error {
            KubeconfigError::LoadCertificateAuthority(LoadDataError::ReadFile(why, file)) => {
                Some(("the CA", why, file))
            }
            KubeconfigError::LoadClientCertificate(LoadDataError::ReadFile(why, file)) => {
                Some(("the client certificate", why, file))
            }
            KubeconfigError::LoadClientKey(LoadDataError::ReadFile(why, file)) => {
                Some(("the client key", why, file))
            }
            _ => None,
        };
        wrong(match (file, &error) {
            (Some((what, why, file)), _) => format!(
                "{what} {} of store.kubeconfig {shown} cannot be read ({why}): put it there, or name another file",
                file.display()
            ),
            (None, KubeconfigError::CurrentContextNotSet) => format!(
                "store.kubeconfig {shown} has no current-context: run `kubectl config use-context` on it"
            ),
            (None, error) => format!("store.kubeconfig {shown} cannot be used: {error}"),
        })
    })?;
    if config.auth_info.exec.is_some() || config.auth_info.auth_provider.is_some() {
        return wrong(format!(
            "store.kubeconfig {shown} gets its token from a program, which weftd does not run: use a tokenFile, or a client certificate"
        ));
    }
    if config.proxy_url.is_some() {
        return wrong(format!(
            "store.kubeconfig {shown} has a proxy-url, which weftd does not use: name an address that the node reaches"
        ));
    }
    if let Some(file) = &config.auth_info.token_file
        && let Err(error) = std::fs::read(file)
    {
        return wrong(format!(
            "the token file {file} of store.kubeconfig {shown} cannot be read ({error}): put it there, or name another file"
        ));
    }
    Ok(config)
}

/// Says why the pod's service account cannot be used.
fn in_cluster(error: &InClusterError) -> String {
    const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
    match error {
        InClusterError::ReadEnvironmentVariable(_) => "store.type = \"kubernetes\" without store.kubeconfig needs a pod with a service account, and KUBERNETES_SERVICE_HOST and _PORT are not set: run weftd in the cluster, or set store.kubeconfig".to_owned(),
        InClusterError::ReadCertificateBundle(error) => format!(
            "the CA of the pod's service account, {ACCOUNT}/ca.crt, cannot be read ({error}): give the pod automountServiceAccountToken: true"
        ),
        InClusterError::ReadDefaultNamespace(error) => format!(
            "the pod's service account in {ACCOUNT} cannot be read ({error}): give the pod automountServiceAccountToken: true"
        ),
        InClusterError::ParseCertificates(error) => format!(
            "{ACCOUNT}/ca.crt holds no certificate in PEM ({error}): look at the ConfigMap kube-root-ca.crt of weft's namespace"
        ),
        InClusterError::ParseClusterPort(_) | InClusterError::ParseClusterUrl(_) => format!(
            "KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are no address of an API server ({error}): correct them in the pod, or leave them to Kubernetes"
        ),
    }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
