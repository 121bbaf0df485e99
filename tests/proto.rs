//! The documented messages are the messages: every `.proto` of wire/ is held against the structs that prost encodes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

fn wire() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../wire")
}

/// The tags of each message, with the name of each field; a oneof's members count as fields of their message.
type Messages = BTreeMap<String, BTreeSet<(u32, String)>>;

fn documented(file: &str) -> Messages {
    let directory = wire().join("proto");
    let set = protox::compile([directory.join(file)], [directory]).expect("the .proto compiles");
    let messages = set.file.into_iter().flat_map(|file| file.message_type);
    messages
        .map(|message| {
            let fields = message.field.iter();
            let fields = fields
                .map(|field| (field.number().unsigned_abs(), field.name().replace('_', "").to_lowercase()));
            (message.name().to_owned(), fields.collect())
        })
        .collect()
}

/// The name that a `pub struct` or `pub enum` line declares.
fn declared(line: &str) -> Option<&str> {
    let rest = line.strip_prefix("pub struct ").or(line.strip_prefix("pub enum "))?;
    // An empty message is one line.
    Some(&rest[..rest.find([' ', '{', ';', '(']).unwrap_or(rest.len())])
}

/// Reads the structs and oneofs of source files by their prost attributes.
fn encoded(files: &[&str]) -> Messages {
    let mut messages = Messages::new();
    for file in files {
        let text = std::fs::read_to_string(wire().join("src").join(file)).expect("the source is there");
        let lines = || text.lines().map(str::trim);
        // A oneof is an enum of its own; its members count for the message that holds it.
        let mut owners = BTreeMap::new();
        let mut name = "";
        for line in lines() {
            name = declared(line).unwrap_or(name);
            if let Some((_, rest)) = line.split_once("oneof = \"") {
                owners.insert(rest.split('"').next().unwrap_or_default(), name);
            }
        }
        let (mut name, mut tag, mut is_message) = ("", None, false);
        for line in lines() {
            if line.starts_with("#[derive") {
                is_message = line.contains("Message") || line.contains("Oneof");
            } else if let Some(found) = declared(line) {
                name = owners.get(found).copied().unwrap_or(found);
                if is_message {
                    messages.entry(name.to_owned()).or_default();
                }
            } else if let Some(rest) = line.strip_prefix("#[prost(") {
                tag = rest
                    .split("tag = \"")
                    .nth(1)
                    .and_then(|rest| rest.split('"').next()?.parse::<u32>().ok());
            } else if let Some(tag) = tag.take() {
                let field = line.trim_start_matches("pub ").split([':', '(']).next().unwrap_or_default();
                let field = field.trim_start_matches("r#").replace('_', "").to_lowercase();
                messages.entry(name.to_owned()).or_default().insert((tag, field));
            }
        }
    }
    messages
}

fn assert_same(proto: &str, sources: &[&str]) {
    let (documented, mut encoded) = (documented(proto), encoded(sources));
    encoded.retain(|name, _| documented.contains_key(name));
    for (name, fields) in &documented {
        assert_eq!(encoded.get(name), Some(fields), "message {name} of {proto} and its struct differ");
    }
}

#[test]
fn the_local_sockets_messages_are_as_documented() {
    let sources = ["api.rs", "api/request.rs", "api/tables.rs", "api/checks.rs", "cni/call.rs"];
    assert_same("api.proto", &sources);
}

#[test]
fn the_meshs_messages_are_as_documented() {
    assert_same("mesh.proto", &["mesh/proto.rs"]);
}
