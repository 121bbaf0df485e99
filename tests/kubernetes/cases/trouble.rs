//! What a person does wrong in a cluster: it is told where they look, and mended without more than the mistake undone.
//!
//! Events are those that `kubectl get events` shows. Every case ends with weft installed anew from deploy/ and pods that talk.

use serde_json::{Value, json};

use crate::scene::{PATIENCE, PAUSE, Scene, deployment, single};

/// The messages of an object's Events that have this reason.
fn told(scene: &Scene<'_>, kind: &str, name: &str, reason: &str) -> Vec<String> {
    let of =
        format!("--field-selector=involvedObject.kind={kind},involvedObject.name={name},reason={reason}");
    let events = scene.cluster.objects(&["events", "-A", &of]);
    let events = events["items"].as_array().cloned().unwrap_or_default();
    events.iter().filter_map(|event| event["message"].as_str().map(str::to_owned)).collect()
}

/// Waits until an Event of every node has all these words.
fn await_told(scene: &Scene<'_>, nodes: &[String], reason: &str, words: &[&str]) {
    for node in nodes {
        scene.until(&format!("{reason} of {node} says {words:?}"), || {
            told(scene, "Node", node, reason).iter().any(|said| words.iter().all(|word| said.contains(word)))
        });
    }
}

fn restart(scene: &Scene<'_>) {
    scene.cluster.kubectl(&["-n", "weft-system", "rollout", "restart", "daemonset/weft"]);
}

/// Installs weft again, and sees that its pods are Ready and that new pods talk.
fn mend(scene: &Scene<'_>) {
    scene.network.install(scene.cluster);
    let bound = format!("--timeout={}s", 2 * PATIENCE.as_secs());
    scene.cluster.kubectl(&["-n", "weft-system", "rollout", "status", "daemonset/weft", &bound]);
    let pods = scene.servers("after", 2);
    for (from, to) in [(&pods[0], &pods[1]), (&pods[1], &pods[0])] {
        for ip in &to.ips {
            scene.ask(&scene.inside(from), *ip, 8080, "/hostname");
        }
    }
}

pub fn missing_verbs_are_named(scene: &Scene<'_>) {
    let mut rules = scene.cluster.objects(&["clusterrole", "weft"])["rules"].clone();
    for rule in rules.as_array_mut().expect("a list") {
        match rule["resources"][0].as_str() {
            Some("podsubnets") => {
                rule["verbs"].as_array_mut().expect("a list").retain(|verb| verb != "watch");
            }
            Some("nodes/status") => rule["verbs"] = json!(["get"]),
            _ => {}
        }
    }
    let patch = json!({ "rules": rules }).to_string();
    scene.cluster.kubectl(&["patch", "clusterrole", "weft", "--type=merge", "-p", &patch]);
    restart(scene);
    let words = ["may not watch podsubnets.weft.dev, patch nodes/status: apply weft's rbac.yaml"];
    await_told(scene, &scene.cluster.nodes(), "WeftMissingPermission", &words);
    mend(scene);
}

pub fn an_older_definition_is_named(scene: &Scene<'_>) {
    let field = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/asked";
    let patch = json!([{ "op": "remove", "path": field }]).to_string();
    scene.cluster.kubectl(&["patch", "crd", "podsubnets.weft.dev", "--type=json", "-p", &patch]);
    restart(scene);
    let words =
        ["podsubnets.weft.dev is of another version of weft", "spec.asked", "kubectl apply -f crd.yaml"];
    await_told(scene, &scene.cluster.nodes(), "WeftStore", &words);
    mend(scene);
}

pub fn a_network_before_wefts_is_named(scene: &Scene<'_>) {
    let node = scene.cluster.nodes().remove(0);
    let other: Value = json!({ "cniVersion": "1.0.0", "name": "other", "plugins": [{ "type": "loopback" }] });
    let file = "/etc/cni/net.d/05-other.conflist";
    let made =
        scene.cluster.lab().feed(node.as_str(), &["sh", "-c", "cat > \"$0\"", file], &other.to_string());
    assert!(made.status.success());
    let words =
        ["/etc/cni/net.d/05-other.conflist comes before /etc/cni/net.d/10-weft.conflist", "remove it"];
    await_told(scene, std::slice::from_ref(&node), "WeftOtherNetwork", &words);
    scene.cluster.lab().run(node.as_str(), &["rm", file]);
    // The runtime reads the directory when it changes.
    let mut turn = 0;
    scene.until("new pods get their network from weft", || {
        turn += 1;
        let name = format!("try-{turn}");
        let spec = json!({ "nodeName": node, "containers": [{ "name": "pause", "image": PAUSE }] });
        scene.apply(&[single(&name, spec)]);
        let bound = format!("--timeout={}s", PATIENCE.as_secs());
        scene.kubectl(&["wait", "--for=jsonpath={.status.podIP}", &format!("pod/{name}"), &bound]);
        scene.kubectl(&["get", "pod", &name, "-o", "jsonpath={.status.podIP}"]).starts_with("10.244.")
    });
    mend(scene);
}

pub fn pods_wait_for_a_daemon_that_is_late(scene: &Scene<'_>) {
    // As after a node started: the network list is there, and weftd is not.
    let words = ["-n", "weft-system", "delete", "daemonset/weft", "--cascade=foreground", "--wait"];
    scene.cluster.kubectl(&words);
    scene.apply(&[deployment("early", 2)]);
    let list = || scene.cluster.objects(&["pods", "-n", &scene.namespace, "-l", "app=early"]);
    let names = |list: &Value| -> Vec<String> {
        let items = list["items"].as_array().into_iter().flatten();
        items.filter_map(|pod| pod["metadata"]["name"].as_str().map(str::to_owned)).collect()
    };
    let mut early = Vec::new();
    scene.until("the pods are there", || {
        early = names(&list());
        early.len() == 2
    });
    for pod in &early {
        scene.until(&format!("an Event of {pod} says what is missing"), || {
            told(scene, "Pod", pod, "FailedCreatePodSandBox")
                .iter()
                .any(|said| said.contains("weftd does not run on this node") && said.contains("DaemonSet"))
        });
    }
    mend(scene);
    scene.await_deployment("early");
    assert_eq!(names(&list()), early, "they are the same pods");
}
