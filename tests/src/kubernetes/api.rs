//! The API of a cluster and nothing else of it: etcd and kube-apiserver on one machine of a lab, no kubelet, no controller.
//!
//! For what weft does with the API alone: Nodes are made by hand, as a kubelet would. Each node of the lab has a kubeconfig
//! with what a pod of the DaemonSet has: a token of the ServiceAccount `weft`, bound to a pod of that node, so that the
//! permissions and policies of `deploy/` hold for it.

use std::fs;
use std::time::Duration;

use serde_json::{Value, json};

use super::authority::Authority;
use super::cluster::until;
use super::objects::{self, MANIFESTS};
use super::plane;
use super::programs::Programs;
use super::server::Server;
use crate::lab::{Lab, LabOptions};

/// Bounds what takes a moment.
const PATIENCE: Duration = Duration::from_secs(60);

/// Who may do anything.
const ADMIN: &str = "admin";

/// The API server of a lab.
#[derive(Debug)]
pub struct Api {
    programs: Programs,
    authority: Authority,
    place: String,
    servers: Vec<Server>,
}

/// Why there can be none on this machine, and what to do.
pub fn no_api() -> Option<String> {
    let programs = Programs::of_this_user();
    let absent = ["kube-apiserver", "kubectl"]
        .into_iter()
        .map(|name| programs.path(name))
        .find(|path| !path.is_file());
    if let Some(path) = absent {
        return Some(format!("{} is not built (make kubernetes)", path.display()));
    }
    let etcd = std::process::Command::new("etcd").arg("--version").output();
    etcd.is_err().then(|| "etcd is not installed: run `make deps`".to_owned())
}

/// A lab for it: nodes whose leases are in the API, without seeds and without cluster keys; the last machine is the API's.
/// No daemon runs yet.
pub fn lab_options(name: &str, nodes: usize, mode: &str) -> LabOptions {
    let config = format!(
        "[gossip]\nseeds = []\n[store]\ntype = \"kubernetes\"\nmode = \"{mode}\"\n[cluster]\nkey_file = \"/var/lib/weft/cluster.key\"\n",
    );
    let mut options = LabOptions::new(name).nodes(nodes + 1).started(0).config(&config);
    for number in 1..=nodes {
        let own = format!("[store]\nkubeconfig = \"/run/weft-lab/shared/pki/weft-n{number}.kubeconfig\"\n");
        options = options.node_config(&format!("n{number}"), &own);
    }
    options
}

impl Api {
    /// Starts it on a machine of the lab, with what `deploy/` has for weft, and with a Node for each of these.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn start(lab: &Lab, place: &str, nodes: &[&str]) -> Self {
        let programs = Programs::of_this_user();
        let authority = Authority::new(lab.handle().shared().as_path()).expect("certificates are made");
        let address = lab.state().node(place).expect("the machine is there").underlay[0];
        plane::certify(&authority, address, &[]).expect("certificates are written");
        let mut servers = vec![
            plane::etcd(lab, &programs, place).expect("etcd starts"),
            plane::apiserver(lab, &programs, &authority, place).expect("kube-apiserver starts"),
        ];
        plane::await_api(lab, &programs, &authority, place, &mut servers);
        let api = Self { programs, authority, place: place.to_owned(), servers };
        objects::account().iter().for_each(|object| api.apply(lab, object));
        for file in MANIFESTS {
            let text = fs::read_to_string(objects::manifest(file)).expect("deploy/ has it");
            let output = api.feed(lab, &["apply", "-f", "-"], &text);
            assert!(output.status.success(), "{file}: {}", String::from_utf8_lossy(&output.stderr));
        }
        api.kubectl(
            lab,
            &["wait", "--for=condition=Established", "--timeout=60s", "crd/podsubnets.weft.dev"],
        );
        for node in nodes {
            api.make_node(lab, node, &json!({}));
            api.let_in(lab, node);
        }
        api
    }

    /// Makes a Node as a kubelet would.
    pub fn make_node(&self, lab: &Lab, name: &str, spec: &Value) {
        self.apply(lab, &objects::node(name, spec));
        let addresses: Vec<_> = lab
            .state()
            .node(name)
            .expect("the machine is there")
            .underlay
            .iter()
            .map(|address| json!({ "type": "InternalIP", "address": address.to_string() }))
            .collect();
        let status = json!({ "status": { "addresses": addresses, "conditions": [
            { "type": "Ready", "status": "False", "reason": "KubeletNotReady", "message": "cni plugin not initialized" },
        ] } });
        self.patch_status(lab, name, &status);
    }

    /// Changes the status of a Node.
    pub fn patch_status(&self, lab: &Lab, name: &str, status: &Value) {
        self.kubectl(lab, &["patch", "node", name, "--subresource=status", "-p", &status.to_string()]);
    }

    /// Gives the daemon of a node a kubeconfig with a token that is bound to a pod there.
    pub fn let_in(&self, lab: &Lab, node: &str) {
        let pod = format!("weft-{node}");
        // The token stays good as long as the pod is there, whatever becomes of the Node: nobody removes pods here.
        self.apply(lab, &objects::pod(node));
        let words = objects::token(node);
        let words: Vec<&str> = words.iter().map(String::as_str).chain(["--duration=10h"]).collect();
        let mut token = String::new();
        until("there is a token", PATIENCE, || {
            let output = self.run(lab, &words);
            token = String::from_utf8_lossy(&output.stdout).trim().to_owned();
            output.status.success()
        });
        let address = lab.state().node(&self.place).expect("the machine is there").underlay[0];
        self.authority.bearer(&pod, &token, &plane::api(address)).expect("a kubeconfig is written");
    }

    /// Ends kube-apiserver; etcd goes on.
    pub fn stop(&mut self, lab: &Lab) {
        let place =
            self.servers.iter().position(|server| server.name() == "kube-apiserver").expect("it runs");
        self.servers.remove(place).end(lab).expect("it ends");
    }

    /// Starts kube-apiserver again and waits until it serves.
    pub fn start_again(&mut self, lab: &Lab) {
        let server = plane::apiserver(lab, &self.programs, &self.authority, &self.place);
        self.servers.push(server.expect("kube-apiserver starts"));
        plane::await_api(lab, &self.programs, &self.authority, &self.place, &mut self.servers);
    }

    /// Runs kubectl as who may do anything, and returns how it ended.
    pub fn run(&self, lab: &Lab, words: &[&str]) -> std::process::Output {
        let all = self.words(words);
        lab.exec(self.place.as_str(), &all.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Runs kubectl, which must succeed.
    pub fn kubectl(&self, lab: &Lab, words: &[&str]) -> String {
        let output = self.run(lab, words);
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// What kubectl gets, as JSON; null where there is none.
    pub fn get(&self, lab: &Lab, words: &[&str]) -> Value {
        let all = [&["get", "-o", "json", "--ignore-not-found"], words].concat();
        serde_json::from_str(&self.kubectl(lab, &all)).unwrap_or(Value::Null)
    }

    /// Applies an object.
    pub fn apply(&self, lab: &Lab, object: &Value) {
        let output = self.feed(lab, &["apply", "-f", "-"], &object.to_string());
        assert!(output.status.success(), "{object}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Runs kubectl with this on its standard input.
    pub fn feed(&self, lab: &Lab, words: &[&str], input: &str) -> std::process::Output {
        let all = self.words(words);
        lab.feed(self.place.as_str(), &all.iter().map(String::as_str).collect::<Vec<_>>(), input)
    }

    fn words(&self, words: &[&str]) -> Vec<String> {
        let config = format!("--kubeconfig={}", self.authority.file(&format!("{ADMIN}.kubeconfig")));
        let program = self.programs.path("kubectl").display().to_string();
        [program, config].into_iter().chain(words.iter().map(|word| (*word).to_owned())).collect()
    }
}
