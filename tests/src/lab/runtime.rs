//! The container runtime's part: makes a pod's network namespace and calls the CNI plugins as libcni does.
//!
//! Not a runtime: a pod here is a network namespace and a name.

use std::net::IpAddr;

use anyhow::{Context, bail};
use serde_json::{Value, json};

use super::enter::{self, Place};
use super::model::{PodView, State};
use super::tools::{self, run};

/// Makes a pod and attaches it.
pub(crate) fn add(state: &State, node: &str, pod: &str, container: &str) -> anyhow::Result<PodView> {
    let plain =
        !pod.is_empty() && pod.len() <= 32 && pod.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    anyhow::ensure!(plain, "pod name {pod:?}: use up to 32 letters, digits and dashes");
    if state.node(node)?.pod(pod).is_ok() {
        bail!("pod {pod} exists on {node} already");
    }
    let here = |words: &[&str]| -> anyhow::Result<std::process::Command> {
        let mut all = enter::from_keeper(state, &Place::Node(node.to_owned()))?;
        all.extend(words.iter().map(|word| (*word).to_owned()));
        Ok(enter::command(&all))
    };
    run(&mut here(&["ip", "netns", "add", pod])?)?;
    let attached = run(&mut here(&["ip", "-n", pod, "link", "set", "lo", "up"])?)
        .and_then(|_| call_all(state, node, "ADD", pod, container, None));
    match attached {
        Ok(result) => {
            let ips = addresses(&result);
            Ok(PodView { name: pod.to_owned(), container: container.to_owned(), result, ips })
        }
        Err(error) => {
            // A runtime calls DEL after an ADD that failed.
            call_all(state, node, "DEL", pod, container, None).ok();
            run(&mut here(&["ip", "netns", "delete", pod])?).ok();
            Err(error.context(format!("cannot attach {node}/{pod}")))
        }
    }
}

/// Detaches a pod and removes it.
pub(crate) fn remove(state: &State, node: &str, pod: &str) -> anyhow::Result<()> {
    let view = state.node(node)?.pod(pod)?;
    call_all(state, node, "DEL", pod, &view.container, Some(view.result.clone()))
        .with_context(|| format!("cannot detach {node}/{pod}"))?;
    let mut words = enter::from_keeper(state, &Place::Node(node.to_owned()))?;
    // A namespace may have vanished before its pod was removed.
    let script = "[ ! -e /run/netns/$0 ] || exec ip netns delete $0";
    words.extend(["sh", "-c", script, pod].map(str::to_owned));
    run(&mut enter::command(&words))?;
    Ok(())
}

fn addresses(result: &Value) -> Vec<IpAddr> {
    let ips = result["ips"].as_array().cloned().unwrap_or_default();
    ips.iter().filter_map(|ip| ip["address"].as_str()?.split('/').next()?.parse().ok()).collect()
}

/// Calls every plugin of the node's network: in order for ADD, in reverse for DEL.
fn call_all(
    state: &State,
    node: &str,
    verb: &str,
    pod: &str,
    container: &str,
    previous: Option<Value>,
) -> anyhow::Result<Value> {
    let mut words = enter::from_keeper(state, &Place::Node(node.to_owned()))?;
    words.extend(["cat", "/etc/cni/net.d/10-weft.conflist"].map(str::to_owned));
    let network: Value =
        serde_json::from_str(&run(&mut enter::command(&words))?).context("the conflist is not JSON")?;
    let mut plugins = network["plugins"].as_array().cloned().context("the conflist has no plugins")?;
    if verb == "DEL" {
        plugins.reverse();
    }
    let mut result = previous;
    for plugin in plugins {
        let mut config = plugin;
        config["cniVersion"] = network["cniVersion"].clone();
        config["name"] = network["name"].clone();
        if let Some(result) = &result {
            config["prevResult"] = result.clone();
        }
        let answer = call(state, node, verb, pod, container, &config)?;
        if verb == "ADD" {
            result =
                Some(serde_json::from_str(&answer).with_context(|| format!("{verb} answered {answer:?}"))?);
        }
    }
    Ok(result.unwrap_or_else(|| json!({})))
}

fn call(
    state: &State,
    node: &str,
    verb: &str,
    pod: &str,
    container: &str,
    config: &Value,
) -> anyhow::Result<String> {
    let plugin = config["type"].as_str().context("a plugin of the conflist has no type")?;
    let mut words = enter::from_keeper(state, &Place::Node(node.to_owned()))?;
    words.push(plugin.to_owned());
    let mut command = enter::command(&words);
    command
        .env("CNI_COMMAND", verb)
        .env("CNI_CONTAINERID", container)
        .env("CNI_NETNS", format!("/run/netns/{pod}"))
        .env("CNI_IFNAME", "eth0")
        .env("CNI_ARGS", format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=lab;K8S_POD_NAME={pod}"))
        .env("CNI_PATH", "/run/weft-lab/bin:/opt/cni/bin");
    let output = tools::feed(&mut command, &config.to_string())?;
    if !output.status.success() {
        // A plugin writes its error as JSON on standard output.
        let error: Value = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
        let said = error["msg"].as_str().map_or_else(
            || tools::said(&output),
            |msg| format!("{msg} {}", error["details"].as_str().unwrap_or_default()).trim().to_owned(),
        );
        bail!("{plugin} {verb} failed: {said}");
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
