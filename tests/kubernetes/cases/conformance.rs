//! Kubernetes's own tests of conformance for networks, run as they are.

use std::collections::BTreeMap;
use std::fs;

use serde_json::Value;

use super::names;
use crate::scene::Scene;

/// Which of Kubernetes's tests.
const FOCUS: &str = r"\[sig-network\].*\[Conformance\]";

pub fn of_networks(scene: &Scene<'_>) {
    let suite = scene.cluster.program("e2e.test");
    assert!(std::path::Path::new(&suite).exists(), "{suite} is not built: run `make kubernetes-e2e`");
    names::start_coredns(scene);
    // Some of them have the API server fetch from pods.
    scene.network.lead_the_plane(scene.cluster);
    let directory = scene.cluster.lab().handle().dir().join("conformance");
    fs::create_dir_all(&directory).expect("the lab's directory takes another");
    let (output, focus) = (format!("--output-dir={}", directory.display()), format!("--focus={FOCUS}"));
    let config = format!("--kubeconfig={}", scene.cluster.admin_config());
    let words = [
        &scene.cluster.program("ginkgo"),
        "--procs=2",
        "--no-color",
        "--timeout=2h",
        "--json-report=report.json",
        &output,
        &focus,
        &suite,
        "--",
        "--provider=skeleton",
        "--disable-log-dump",
        &config,
    ];
    let run = scene.cluster.lab().exec(scene.cluster.plane(), &words);
    let said = String::from_utf8_lossy(&run.stdout).into_owned();
    let report = fs::read_to_string(directory.join("report.json")).unwrap_or_else(|error| {
        panic!("no report ({error}): {said}{}", String::from_utf8_lossy(&run.stderr))
    });
    let report: Value = serde_json::from_str(&report).expect("the report is JSON");
    let results = results(&report);
    // As it stands in docs/conformance.md.
    println!("| test | result |\n|---|---|");
    results.iter().for_each(|(name, state)| println!("| {name} | {state} |"));
    let failed: Vec<&String> =
        results.iter().filter(|(_, state)| *state != "passed").map(|(name, _)| name).collect();
    assert!(!results.is_empty(), "no test ran: {said}");
    assert!(failed.is_empty(), "{failed:#?}\n{}", failures(&report));
}

fn specs(report: &Value) -> Vec<&Value> {
    let suites = report.as_array().into_iter().flatten();
    suites.flat_map(|suite| suite["SpecReports"].as_array().into_iter().flatten()).collect()
}

/// What ran, and how it ended.
fn results(report: &Value) -> BTreeMap<String, String> {
    let ran =
        specs(report).into_iter().filter(|spec| spec["LeafNodeType"] == "It" && spec["State"] != "skipped");
    ran.map(|spec| (full_name(spec), spec["State"].as_str().unwrap_or_default().to_owned())).collect()
}

fn full_name(spec: &Value) -> String {
    let outer = spec["ContainerHierarchyTexts"].as_array().into_iter().flatten();
    let words: Vec<&str> = outer.chain([&spec["LeafNodeText"]]).filter_map(Value::as_str).collect();
    words.join(" ")
}

/// What those that failed said.
fn failures(report: &Value) -> String {
    let said = |spec: &Value| {
        let message = spec["Failure"]["Message"].as_str()?;
        Some(format!("--- {}\n{message}\n", full_name(spec)))
    };
    specs(report).into_iter().filter_map(said).collect()
}
