//! What the kernel of a node holds, as iproute2 and nft tell it: the judge that is not weft.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::harness::Lab;

impl Lab {
    /// All of weft's objects in the kernel of a node, without what changes by itself.
    pub fn picture(&self, node: &str) -> Value {
        let links = self.json(node, &["ip", "-j", "-d", "link", "show"]);
        let mut addresses = BTreeSet::new();
        for device in self.json(node, &["ip", "-j", "address", "show"]).as_array().into_iter().flatten() {
            if !is_weft(device) {
                continue;
            }
            for address in device["addr_info"].as_array().into_iter().flatten() {
                // A link-local address follows the hardware address, which the kernel chooses for a bridge.
                if address["scope"] != "link" || address["family"] == "inet" {
                    addresses.insert(format!(
                        "{} {}/{}",
                        device["ifname"], address["local"], address["prefixlen"]
                    ));
                }
            }
        }
        let mut neighbours = BTreeSet::new();
        for neighbour in self
            .json(node, &["ip", "-j", "neighbour", "show", "nud", "permanent"])
            .as_array()
            .into_iter()
            .flatten()
        {
            if neighbour["dev"].as_str().is_some_and(|dev| dev.starts_with("weft")) {
                neighbours
                    .insert(format!("{} {} {}", neighbour["dev"], neighbour["dst"], neighbour["lladdr"]));
            }
        }
        let mut fdb = BTreeSet::new();
        for entry in self.json(node, &["bridge", "-j", "fdb", "show"]).as_array().into_iter().flatten() {
            if entry["ifname"].as_str().is_some_and(|dev| dev.starts_with("weft-vx"))
                && entry["dst"].is_string()
            {
                fdb.insert(format!("{} {} {}", entry["ifname"], entry["mac"], entry["dst"]));
            }
        }
        json!({
            "links": links.as_array().into_iter().flatten().filter(|link| is_weft(link)).map(link).collect::<BTreeSet<_>>(),
            "addresses": addresses,
            "neighbours": neighbours,
            "fdb": fdb,
            "routes": self.weft_routes(node),
            "nft": self.nft_rules(node),
        })
    }

    /// The prefixes of weft's routes in the kernel of a node.
    pub fn weft_routes(&self, node: &str) -> BTreeSet<String> {
        let mut prefixes = BTreeSet::new();
        for family in ["-4", "-6"] {
            let routes =
                self.json(node, &["ip", "-j", family, "route", "show", "table", "all", "proto", "117"]);
            for route in routes.as_array().into_iter().flatten() {
                prefixes.insert(route["dst"].as_str().unwrap_or_default().to_owned());
            }
        }
        prefixes
    }

    /// The subnets of a node, from the addresses of its bridge.
    pub fn subnets(&self, node: &str) -> BTreeSet<String> {
        let mut subnets = BTreeSet::new();
        for family in ["-4", "-6"] {
            // The kernel derives a connected route from each address.
            let routes = self.json(node, &["ip", "-j", family, "route", "show", "proto", "kernel"]);
            for route in routes.as_array().into_iter().flatten().filter(|route| route["dev"] == "weft0") {
                let prefix = route["dst"].as_str().unwrap_or_default();
                if !prefix.starts_with("fe80") {
                    subnets.insert(prefix.to_owned());
                }
            }
        }
        subnets
    }

    /// True if each of these nodes has exactly the routes to the subnets of the others.
    pub fn routes_are_right(&self, nodes: &[&str]) -> bool {
        self.wrong_routes(nodes).is_empty()
    }

    /// For each of these nodes whose routes are not exactly those to the others' subnets: what is missing, what is extra.
    pub fn wrong_routes(&self, nodes: &[&str]) -> Vec<String> {
        let subnets: Vec<(&str, BTreeSet<String>)> =
            nodes.iter().map(|node| (*node, self.subnets(node))).collect();
        let mut wrong = Vec::new();
        for (node, own) in &subnets {
            let expected: BTreeSet<String> = subnets
                .iter()
                .filter(|(other, _)| other != node)
                .flat_map(|(_, subnets)| subnets.clone())
                .collect();
            let found = self.weft_routes(node);
            let missing: Vec<_> = expected.difference(&found).collect();
            let extra: Vec<_> = found.difference(&expected).collect();
            if own.is_empty() || !missing.is_empty() || !extra.is_empty() {
                wrong.push(format!("{node} (has {own:?}): missing {missing:?}, extra {extra:?}"));
            }
        }
        wrong
    }

    /// The rules of weft's nftables table, without handles and counts; empty without the table.
    pub fn nft_rules(&self, node: &str) -> Vec<Value> {
        let output = self.exec(node, &["nft", "-j", "list", "table", "inet", "weft"]);
        if !output.status.success() {
            return Vec::new();
        }
        let text: Value = serde_json::from_slice(&output.stdout).expect("nft writes JSON");
        let mut objects = text["nftables"].as_array().cloned().unwrap_or_default();
        objects.retain(|object| object.get("metainfo").is_none());
        objects.iter_mut().for_each(forget);
        objects
    }
}

/// What is in one picture and not in the other, one line each: `-` is missing from the second, `+` is new in it.
pub fn differences(one: &Value, other: &Value) -> Vec<String> {
    let mut lines = Vec::new();
    for (part, entries) in one.as_object().into_iter().flatten() {
        let (entries, others) = (entries.as_array(), other[part].as_array());
        let has = |list: Option<&Vec<Value>>, entry: &Value| list.is_some_and(|list| list.contains(entry));
        let missing = entries.into_iter().flatten().filter(|entry| !has(others, entry));
        lines.extend(missing.map(|entry| format!("- {part}: {entry}")));
        let extra = others.into_iter().flatten().filter(|entry| !has(entries, entry));
        lines.extend(extra.map(|entry| format!("+ {part}: {entry}")));
    }
    lines
}

fn is_weft(link: &Value) -> bool {
    link["ifname"].as_str().is_some_and(|name| name.starts_with("weft"))
}

fn link(link: &Value) -> String {
    let up = link["flags"].as_array().is_some_and(|flags| flags.iter().any(|flag| flag == "UP"));
    let kind = &link["linkinfo"]["info_kind"];
    let mut text = format!("{} {kind} mtu {} master {} up {up}", link["ifname"], link["mtu"], link["master"]);
    if kind == "vxlan" {
        let data = &link["linkinfo"]["info_data"];
        text += &format!(
            " {} id {} port {} local {}{}",
            link["address"], data["id"], data["port"], data["local"], data["local6"]
        );
    }
    text
}

/// Takes out of an object what differs between two tables with the same rules.
fn forget(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            for name in ["handle", "packets", "bytes", "comment"] {
                fields.remove(name);
            }
            fields.values_mut().for_each(forget);
        }
        Value::Array(items) => items.iter_mut().for_each(forget),
        _ => {}
    }
}
