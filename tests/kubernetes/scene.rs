//! What one case works with: a cluster, a Kubernetes namespace of its own, and the ways into pods.

use std::net::IpAddr;
use std::process::Output;
use std::time::Duration;

use serde_json::{Value, json};
use weft_tests::kubernetes::{Cluster, Network};
use weft_tests::lab::{Background, Ping};

/// The image of everything that answers.
pub const AGNHOST: &str = "registry.k8s.io/e2e-test-images/agnhost:2.63.0";
/// The image of what only has to be there.
pub const PAUSE: &str = "registry.k8s.io/pause:3.10.2";

/// How long Kubernetes may take for something that it does within seconds.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// One case's.
pub struct Scene<'a> {
    pub cluster: &'a Cluster,
    pub network: &'a dyn Network,
    pub namespace: String,
}

/// A pod that runs.
#[derive(Debug, Clone)]
pub struct Pod {
    pub name: String,
    pub node: String,
    /// IPv4 first.
    pub ips: Vec<IpAddr>,
}

/// Where a request comes from.
#[derive(Debug, Clone)]
pub enum Client {
    /// A machine of the lab: a node, or the one outside.
    Machine(String),
    /// A pod's network namespace on its node.
    Pod { node: String, netns: String },
}

impl Client {
    /// The machine of the lab where a program runs, and the words that lead further.
    fn way(&self, words: &[&str]) -> (&str, Vec<String>) {
        let words = words.iter().map(|word| (*word).to_owned());
        match self {
            Client::Machine(name) => (name, words.collect()),
            Client::Pod { node, netns } => {
                let enter = ["nsenter".to_owned(), format!("--net={netns}"), "--".to_owned()];
                (node, enter.into_iter().chain(words).collect())
            }
        }
    }
}

impl<'a> Scene<'a> {
    /// Makes the namespace.
    pub fn new(cluster: &'a Cluster, network: &'a dyn Network, case: &str) -> Self {
        let namespace = case.replace('_', "-");
        cluster.kubectl(&["create", "namespace", &namespace]);
        Self { cluster, network, namespace }
    }

    /// Applies objects to the namespace.
    pub fn apply(&self, objects: &[Value]) {
        let mut items = objects.to_vec();
        for item in &mut items {
            item["metadata"]["namespace"] = json!(self.namespace);
        }
        self.cluster.apply(&json!({ "apiVersion": "v1", "kind": "List", "items": items }).to_string());
    }

    /// Runs kubectl in the namespace.
    pub fn kubectl(&self, words: &[&str]) -> String {
        let mut all = vec!["-n", self.namespace.as_str()];
        all.extend(words);
        self.cluster.kubectl(&all)
    }

    /// Waits until a Deployment is as it should be.
    pub fn await_deployment(&self, name: &str) {
        let bound = format!("--timeout={}s", PATIENCE.as_secs());
        self.kubectl(&["rollout", "status", &format!("deployment/{name}"), &bound]);
    }

    /// The pods of an app that run, by name.
    pub fn pods(&self, app: &str) -> Vec<Pod> {
        let list = self.cluster.objects(&["pods", "-n", &self.namespace, "-l", &format!("app={app}")]);
        let running = |item: &&Value| {
            item["status"]["phase"] == "Running" && item["metadata"]["deletionTimestamp"].is_null()
        };
        let mut pods: Vec<Pod> =
            list["items"].as_array().expect("a list").iter().filter(running).map(pod).collect();
        pods.sort_by(|one, other| one.name.cmp(&other.name));
        pods
    }

    /// Starts a Deployment of servers spread over the nodes and waits for it.
    pub fn servers(&self, app: &str, replicas: usize) -> Vec<Pod> {
        self.apply(&[deployment(app, replicas)]);
        self.await_deployment(app);
        let pods = self.pods(app);
        assert_eq!(pods.len(), replicas, "{pods:?}");
        pods
    }

    /// A Service's cluster addresses, IPv4 first.
    pub fn cluster_ips(&self, service: &str) -> Vec<IpAddr> {
        let service = self.cluster.objects(&["service", service, "-n", &self.namespace]);
        let mut ips: Vec<IpAddr> = addresses(&service["spec"]["clusterIPs"]);
        ips.sort();
        ips
    }

    /// Finds a pod's network namespace on its node by its address.
    pub fn inside(&self, pod: &Pod) -> Client {
        let script = r#"for name in $(ls /run/netns); do
            ip -n "$name" -o address show | grep -qF " $0/" && echo "$name"; done; true"#;
        let found = self.cluster.lab().run(pod.node.as_str(), &["sh", "-c", script, &pod.ips[0].to_string()]);
        let names: Vec<&str> = found.split_whitespace().collect();
        assert_eq!(names.len(), 1, "{pod:?} is in {names:?}");
        Client::Pod { node: pod.node.clone(), netns: format!("/run/netns/{}", names[0]) }
    }

    /// Runs a program of the machine where a client is.
    pub fn exec(&self, client: &Client, words: &[&str]) -> Output {
        let (place, words) = client.way(words);
        self.cluster.lab().exec(place, &words.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Starts a program of the machine where a client is, which goes on while the case does other things.
    pub fn background(&self, client: &Client, words: &[&str]) -> Background {
        let (place, words) = client.way(words);
        self.cluster.lab().background(place, &words.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Asks a server of agnhost's, by its address; none when it does not answer within seconds.
    pub fn try_ask(&self, client: &Client, address: IpAddr, port: u16, path: &str) -> Option<String> {
        let url = format!("http://{}{path}", std::net::SocketAddr::new(address, port));
        let output = self.exec(client, &["curl", "-gsS", "--fail", "--noproxy", "*", "-m", "5", &url]);
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Asks a server of agnhost's, which must answer.
    pub fn ask(&self, client: &Client, address: IpAddr, port: u16, path: &str) -> String {
        self.try_ask(client, address, port, path)
            .unwrap_or_else(|| panic!("{client:?} got no answer from {address} port {port} {path}"))
    }

    /// The address that a server sees this client under.
    pub fn seen_as(&self, client: &Client, address: IpAddr, port: u16) -> IpAddr {
        let said = self.ask(client, address, port, "/clientip");
        let (host, _) = said.rsplit_once(':').unwrap_or_else(|| panic!("no address and port: {said}"));
        host.trim_matches(['[', ']']).parse().unwrap_or_else(|error| panic!("{said}: {error}"))
    }

    /// Pings every 10 ms from a pod.
    pub fn ping(&self, client: &Client, to: IpAddr) -> Ping {
        let Client::Pod { node, netns } = client else { panic!("{client:?} is no pod") };
        self.cluster.lab().background_ping_in(node.as_str(), netns, to)
    }

    /// Waits until the check is true; each look may take as long as kubectl does.
    pub fn until(&self, what: &str, check: impl FnMut() -> bool) -> Duration {
        weft_tests::kubernetes::until(what, PATIENCE, check)
    }
}

impl Drop for Scene<'_> {
    fn drop(&mut self) {
        // The next case does not wait for it.
        self.cluster.try_kubectl(&["delete", "namespace", &self.namespace, "--wait=false"]);
    }
}

fn addresses(list: &Value) -> Vec<IpAddr> {
    let list = list.as_array().cloned().unwrap_or_default();
    list.iter().filter_map(|ip| ip.as_str().or(ip["ip"].as_str())?.parse().ok()).collect()
}

fn pod(item: &Value) -> Pod {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut ips = addresses(&item["status"]["podIPs"]);
    ips.sort();
    Pod { name: text(&item["metadata"]["name"]), node: text(&item["spec"]["nodeName"]), ips }
}

/// A container that answers over HTTP on port 8080.
pub fn server() -> Value {
    json!({
        "name": "server",
        "image": AGNHOST,
        "args": ["netexec", "--http-port=8080", "--udp-port=8081"],
        "readinessProbe": { "httpGet": { "path": "/healthz", "port": 8080 }, "periodSeconds": 1 },
    })
}

/// A Deployment of servers, as many on each node.
pub fn deployment(app: &str, replicas: usize) -> Value {
    deployment_of(app, replicas, server())
}

/// A Deployment of any container, as many on each node.
pub fn deployment_of(app: &str, replicas: usize, container: Value) -> Value {
    let labels = json!({ "app": app });
    json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": { "name": app },
        "spec": {
            "replicas": replicas,
            "selector": { "matchLabels": labels },
            "template": {
                "metadata": { "labels": labels },
                "spec": {
                    "terminationGracePeriodSeconds": 1,
                    "topologySpreadConstraints": [{
                        "maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "DoNotSchedule",
                        "labelSelector": { "matchLabels": labels },
                    }],
                    "containers": [container],
                },
            },
        },
    })
}

/// A Service on port 80 to the servers of an app, with more in its specification.
pub fn service(name: &str, app: &str, more: Value) -> Value {
    let mut spec = json!({
        "selector": { "app": app }, "ports": [{ "port": 80, "targetPort": 8080 }], "ipFamilyPolicy": "RequireDualStack",
    });
    for (key, value) in more.as_object().cloned().unwrap_or_default() {
        spec[key] = value;
    }
    json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "name": name }, "spec": spec })
}

/// A single pod with this specification.
pub fn single(name: &str, spec: Value) -> Value {
    let mut spec = spec;
    spec["terminationGracePeriodSeconds"] = json!(1);
    json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name, "labels": { "app": name } }, "spec": spec })
}
