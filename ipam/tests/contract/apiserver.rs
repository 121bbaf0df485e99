//! A real API server of Kubernetes over a real etcd, with weft's manifests applied: started on loopback with its own
//! directory and free ports, ended with its value. `kubectl` is the tests' own way in.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use weft_ipam::store::kubernetes::{KubernetesOptions, Mode};

use super::authority::{Authority, NOW, Validity};
use super::certificates::token_keys;
use super::objects::{self, MANIFESTS};
use super::server::{self, Etcd, free_ports};
use super::support::Directory;

const PATIENCE: Duration = Duration::from_secs(120);
/// The token of who may do everything.
const ADMIN: &str = "token-of-the-tests";

/// Finds a program of Kubernetes.
pub fn program(name: &str) -> Option<PathBuf> {
    let given = std::env::var_os("WEFT_KUBERNETES_BIN").map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = given.into_iter().chain([objects::built().join("bin")]).chain(std::env::split_paths(&path));
    places.map(|place| place.join(name)).find(|file| file.is_file())
}

/// Says that Kubernetes or its etcd is missing; the caller goes on without it, and fails under CI.
pub fn missing() -> bool {
    if server::missing() {
        return true;
    }
    let missing = ["kube-apiserver", "kubectl"].into_iter().find(|name| program(name).is_none());
    if let Some(name) = missing {
        println!(
            "SKIP: {name} is not there: build Kubernetes' programs with `make kubernetes`, or set WEFT_KUBERNETES_BIN"
        );
        assert!(std::env::var_os("CI").is_none(), "SKIP is a failure under CI: {name}");
    }
    missing.is_some()
}

/// Is [`missing`] for tests that need controllers as well.
pub fn without_controllers() -> bool {
    let missing = program("kube-controller-manager").is_none();
    if missing {
        println!(
            "SKIP: kube-controller-manager is not there: build Kubernetes' programs with `make kubernetes`, or set WEFT_KUBERNETES_BIN"
        );
        assert!(std::env::var_os("CI").is_none(), "SKIP is a failure under CI: kube-controller-manager");
    }
    missing || self::missing()
}

/// A cluster of an API server alone.
pub struct Cluster {
    pub etcd: Etcd,
    pub directory: Directory,
    ca: Authority,
    pub port: u16,
    apiserver: Option<Child>,
    controllers: Option<Child>,
}

impl Cluster {
    /// Starts one with weft's manifests, the Nodes n1 to n3, and on each a pod of weft.
    pub fn start() -> Self {
        let mut cluster = Self::bare(NOW);
        cluster.await_ready();
        objects::account().iter().for_each(|object| cluster.create(&object.to_string()));
        MANIFESTS.iter().for_each(|name| cluster.apply(name));
        for node in ["n1", "n2", "n3"] {
            cluster.add_node(node);
            cluster.add_pod(node);
            let token = cluster.token(node);
            std::fs::write(cluster.token_file(node), token).expect("a file");
        }
        cluster.kubectl(&["wait", "--for=condition=established", "crd/podsubnets.weft.dev", "--timeout=60s"]);
        cluster.await_policy();
        cluster
    }

    /// Starts an API server without anything in it, whose certificate is valid for so long; it may not be up yet.
    pub fn bare(validity: Validity) -> Self {
        let directory = Directory::new();
        let ca = Authority::new("the CA of Kubernetes");
        ca.write(&directory, "ca");
        ca.sign(&directory, "server", "127.0.0.1", validity);
        let keys = token_keys();
        std::fs::write(directory.join("accounts.key"), keys.secret).expect("a file");
        std::fs::write(directory.join("accounts.pub"), keys.public).expect("a file");
        std::fs::write(directory.join("tokens.csv"), format!("{ADMIN},admin,admin,system:masters\n"))
            .expect("a file");
        let [port] = free_ports();
        let mut cluster =
            Self { etcd: Etcd::start(), directory, ca, port, apiserver: None, controllers: None };
        cluster.write_kubeconfig("admin", &json!({"token": ADMIN}));
        cluster.launch();
        cluster
    }

    fn spawn(&self, name: &str, arguments: &[String]) -> Child {
        let log = std::fs::File::options().create(true).append(true).open(self.directory.join("log"));
        // It must not outlive a test that is killed.
        Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(program(name).expect("the program is there"))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log.expect("a log file"))
            .spawn()
            .expect("setpriv runs")
    }

    pub fn launch(&mut self) {
        let file = |name: &str| self.directory.join(name).display().to_string();
        let arguments = [
            format!("--etcd-servers={}", self.etcd.url()),
            format!("--secure-port={}", self.port),
            "--bind-address=127.0.0.1".into(),
            format!("--tls-cert-file={}", file("server.pem")),
            format!("--tls-private-key-file={}", file("server.key")),
            format!("--cert-dir={}", file("certs")),
            format!("--service-account-key-file={}", file("accounts.pub")),
            format!("--service-account-signing-key-file={}", file("accounts.key")),
            "--service-account-issuer=https://kubernetes.default.svc".into(),
            format!("--token-auth-file={}", file("tokens.csv")),
            "--authorization-mode=RBAC".into(),
            "--service-cluster-ip-range=198.51.100.0/24".into(),
        ];
        self.apiserver = Some(self.spawn("kube-apiserver", &arguments));
    }

    /// Starts one of the controllers.
    pub fn control(&mut self, controller: &str) {
        let file = |name: &str| self.directory.join(name).display().to_string();
        let arguments = [
            format!("--kubeconfig={}", file("admin.kubeconfig")),
            format!("--controllers={controller}"),
            "--leader-elect=false".into(),
            "--secure-port=0".into(),
        ];
        self.controllers = Some(self.spawn("kube-controller-manager", &arguments));
    }

    pub fn await_ready(&mut self) {
        let bound = Instant::now() + PATIENCE;
        while self.try_kubectl(&["get", "--raw", "/readyz"], None).is_err() {
            let ended = self.apiserver.as_mut().and_then(|child| child.try_wait().expect("our own child"));
            assert!(ended.is_none() && Instant::now() < bound, "the API server is not up: {}", self.log());
        }
    }

    /// Waits until the policy is in force: a new one is, a moment after it was made.
    fn await_policy(&self) {
        let bound = Instant::now() + PATIENCE;
        let foreign = self.object("10.99.0.0/24", "10.99.0.0-24", "n2", "n2", 1);
        while self.kubectl_as("n1", &["create", "-f", "-"], &foreign).is_ok() {
            self.kubectl(&["delete", "podsubnet", "10.99.0.0-24"]);
            assert!(Instant::now() < bound, "the policy of admission is not in force");
        }
    }

    pub fn log(&self) -> String {
        let log = std::fs::read_to_string(self.directory.join("log")).unwrap_or_default();
        log.lines().rev().take(20).collect::<Vec<_>>().join("\n")
    }

    pub fn stop(&mut self) {
        end(&mut self.apiserver);
    }

    pub fn restart(&mut self) {
        self.stop();
        self.launch();
        self.await_ready();
    }

    /// Makes it deaf, or hear again.
    pub fn pause(&self, pause: bool) {
        let child = self.apiserver.as_ref().expect("it runs");
        let pid = Pid::from_raw(i32::try_from(child.id()).expect("a process id"));
        kill(pid, if pause { Signal::SIGSTOP } else { Signal::SIGCONT }).expect("our own child");
    }

    /// Asks as who may do everything, and returns the answer.
    pub fn kubectl(&self, arguments: &[&str]) -> String {
        self.try_kubectl(arguments, None).unwrap_or_else(|error| panic!("kubectl {arguments:?}: {error}"))
    }

    pub fn try_kubectl(&self, arguments: &[&str], input: Option<&str>) -> Result<String, String> {
        self.kubectl_with("admin", arguments, input)
    }

    /// Asks with the credentials of weft on a node.
    pub fn kubectl_as(&self, node: &str, arguments: &[&str], input: &str) -> Result<String, String> {
        self.options(node);
        self.kubectl_with(node, arguments, Some(input))
    }

    pub fn kubectl_with(&self, who: &str, arguments: &[&str], input: Option<&str>) -> Result<String, String> {
        let mut child = Command::new(program("kubectl").expect("kubectl is there"))
            .arg(format!("--kubeconfig={}", self.kubeconfig(who).display()))
            .arg(format!("--cache-dir={}", self.directory.join("cache").display()))
            .arg("--request-timeout=20s")
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("kubectl runs");
        let mut stdin = child.stdin.take().expect("piped");
        // It may have ended without reading.
        let _ = stdin.write_all(input.unwrap_or_default().as_bytes());
        drop(stdin);
        let output = child.wait_with_output().expect("kubectl ends");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    /// Applies one of weft's manifests.
    pub fn apply(&self, name: &str) {
        self.kubectl(&["apply", "-f", &objects::manifest(name).display().to_string()]);
    }

    pub fn add_node(&self, node: &str) {
        self.create(&objects::node(node, &json!({})).to_string());
    }

    /// Adds a pod of weft on a node, as the DaemonSet would.
    pub fn add_pod(&self, node: &str) {
        self.create(&objects::pod(node).to_string());
    }

    pub fn create(&self, object: &str) {
        self.try_kubectl(&["create", "-f", "-"], Some(object)).expect("it is created");
    }

    /// Returns what the kubelet of a node would put into the pod of weft there.
    pub fn token(&self, node: &str) -> String {
        let words = objects::token(node);
        self.kubectl(&words.iter().map(String::as_str).collect::<Vec<_>>()).trim().to_owned()
    }

    pub fn token_file(&self, node: &str) -> PathBuf {
        self.directory.join(&format!("{node}.token"))
    }

    pub fn uid(&self, node: &str) -> String {
        self.kubectl(&["get", "node", node, "-o", "jsonpath={.metadata.uid}"])
    }

    /// Returns a PodSubnet of `node` whose owner is the Node `owner`.
    pub fn object(&self, subnet: &str, name: &str, node: &str, owner: &str, epoch: u64) -> String {
        let owner = json!([{"apiVersion": "v1", "kind": "Node", "name": owner, "uid": self.uid(owner)}]);
        json!({
            "apiVersion": "weft.dev/v1",
            "kind": "PodSubnet",
            "metadata": {"name": name, "ownerReferences": owner},
            "spec": {
                "subnet": subnet,
                "node": node,
                "site": "default",
                "key": "ab".repeat(32),
                "epoch": epoch,
                "renewals": 0,
                "boot": "b",
            },
        })
        .to_string()
    }

    pub fn url(&self) -> String {
        url(self.port)
    }

    pub fn kubeconfig(&self, who: &str) -> PathBuf {
        self.directory.join(&format!("{who}.kubeconfig"))
    }

    /// Writes a kubeconfig for the API server's own address.
    pub fn write_kubeconfig(&self, who: &str, user: &serde_json::Value) -> PathBuf {
        self.write_kubeconfig_to(who, &self.url(), user)
    }

    pub fn write_kubeconfig_to(&self, who: &str, server: &str, user: &serde_json::Value) -> PathBuf {
        let ca = self.directory.join("ca.pem");
        let file = self.kubeconfig(who);
        std::fs::write(&file, kubeconfig(server, &ca, user)).expect("a file");
        file
    }

    /// Returns the options of weft on a node.
    pub fn options(&self, node: &str) -> KubernetesOptions {
        let user = json!({"tokenFile": self.token_file(node)});
        options(node, self.write_kubeconfig(node, &user))
    }

    /// Returns the options of weft on a node whose way goes through a port of the test's.
    pub fn options_through(&self, node: &str, port: u16) -> KubernetesOptions {
        let user = json!({"tokenFile": self.token_file(node)});
        options(node, self.write_kubeconfig_to(&format!("{node}-{port}"), &url(port), &user))
    }

    /// Returns a client certificate that the API server does not know.
    pub fn sign(&self, name: &str) -> (PathBuf, PathBuf) {
        self.ca.sign(&self.directory, name, name, NOW)
    }
}

pub fn url(port: u16) -> String {
    format!("https://127.0.0.1:{port}")
}

pub fn options(node: &str, kubeconfig: PathBuf) -> KubernetesOptions {
    KubernetesOptions {
        kubeconfig: Some(kubeconfig),
        namespace: "weft-system".into(),
        node: node.parse().expect("a name"),
        mode: Mode::WeftIpam,
    }
}

pub fn kubeconfig(server: &str, ca: &Path, user: &serde_json::Value) -> String {
    objects::kubeconfig(server, &ca.display().to_string(), user)
}

fn end(child: &mut Option<Child>) {
    if let Some(mut child) = child.take() {
        child.kill().expect("our own child");
        child.wait().expect("our own child");
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        end(&mut self.controllers);
        end(&mut self.apiserver);
    }
}
