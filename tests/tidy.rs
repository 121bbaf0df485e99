//! The structure of the repository, checked: what depends on what, what stays pure, and that the documents are true.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ is below the root").to_owned()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Every file below a path, or the file itself; nothing for a path that is not there.
fn files(path: &Path) -> Vec<PathBuf> {
    if path.is_file() {
        return vec![path.to_owned()];
    }
    let Ok(entries) = fs::read_dir(path) else { return Vec::new() };
    entries
        .map(|entry| entry.expect("the directory can be read").path())
        .filter(|path| path.file_name().is_none_or(|name| name != "target" && name != ".git"))
        .flat_map(|path| files(&path))
        .collect()
}

fn sources(paths: &[&str]) -> Vec<PathBuf> {
    let all = paths.iter().flat_map(|path| files(&root().join(path)));
    all.filter(|path| path.extension().is_some_and(|extension| extension == "rs")).collect()
}

/// The lines of a source file with their numbers, without comments and without its tests.
fn code(path: &Path) -> Vec<(usize, String)> {
    let in_tests = path.components().any(|part| part.as_os_str() == "tests");
    if path.file_name().is_some_and(|name| name == "tests.rs")
        || (in_tests && path.components().any(|part| part.as_os_str() == "src"))
    {
        return Vec::new();
    }
    let mut lines = Vec::new();
    let text = read(path);
    let mut numbered = text.lines().enumerate().peekable();
    while let Some((number, line)) = numbered.next() {
        // Tests come last in a file; a test module of its own file is one declaration.
        if line.trim() == "#[cfg(test)]" && numbered.peek().is_some_and(|(_, next)| next.ends_with('{')) {
            break;
        }
        let line = line.split("//").next().unwrap_or_default();
        lines.push((number + 1, line.to_owned()));
    }
    lines
}

fn assert_absent(paths: &[&str], words: &[&str], why: &str) {
    let mut found = Vec::new();
    for path in sources(paths) {
        for (number, line) in code(&path) {
            for word in words.iter().filter(|word| line.contains(**word)) {
                let place =
                    path.strip_prefix(root()).expect("the file is below the root").display().to_string();
                found.push(format!("{place}:{number}: {word}"));
            }
        }
    }
    assert!(found.is_empty(), "{why}:\n{}", found.join("\n"));
}

#[test]
fn crates_depend_in_one_line() {
    let order = ["wire", "ipam", "daemon", "tests"];
    for (rank, name) in order.iter().enumerate() {
        let manifest: toml::Table =
            read(&root().join(name).join("Cargo.toml")).parse().expect("a manifest is TOML");
        for section in ["dependencies", "dev-dependencies", "build-dependencies"] {
            let Some(dependencies) = manifest.get(section).and_then(toml::Value::as_table) else { continue };
            for dependency in dependencies.keys().filter_map(|key| key.strip_prefix("weft-")) {
                let below = order[..rank].contains(&dependency);
                assert!(
                    below,
                    "{name} depends on {dependency} in [{section}]: the order is {}",
                    order.join(" <- ")
                );
            }
        }
    }
}

#[test]
fn wire_has_no_runtime() {
    let manifest: toml::Table = read(&root().join("wire/Cargo.toml")).parse().expect("a manifest is TOML");
    let dependencies = manifest["dependencies"].as_table().expect("wire has dependencies");
    for runtime in ["tokio", "futures-util", "rusqlite", "nix", "rtnetlink", "netlink-sys"] {
        assert!(
            !dependencies.contains_key(runtime),
            "wire depends on {runtime}: what does I/O belongs to daemon"
        );
    }
}

#[test]
fn cores_have_no_clock_no_socket_and_no_randomness_of_their_own() {
    assert_absent(
        &[
            "wire/src",
            "ipam/src/carve.rs",
            "ipam/src/carve",
            "ipam/src/lease.rs",
            "ipam/src/lease",
            "ipam/src/pods.rs",
            "ipam/src/pods",
            "daemon/src/plan.rs",
            "daemon/src/plan",
            "daemon/src/control.rs",
            "daemon/src/control",
            "daemon/src/reconcile.rs",
        ],
        &[
            "Instant::now",
            "SystemTime",
            "tokio",
            "OsRng",
            "thread_rng",
            "from_entropy",
            "from_os_rng",
            "getrandom",
            "UdpSocket",
            "TcpStream",
            "UnixStream",
            "std::fs",
            "std::thread",
            "std::process",
            "netlink_sys",
            "rusqlite",
        ],
        "a core takes values and returns values",
    );
}

#[test]
fn the_cni_shim_is_wire_and_std_alone() {
    assert_absent(
        &["daemon/src/bin/weft-cni.rs"],
        &["tokio", "weft_daemon", "weft_ipam", "use nix", "clap", "anyhow"],
        "the shim is started for every pod: it uses weft-wire and std",
    );
}

#[test]
fn no_source_has_a_placeholder() {
    let words = [
        concat!("todo", "!("),
        concat!("unimplemented", "!("),
        concat!("#[ign", "ore"),
        concat!("FIX", "ME"),
        concat!("dbg", "!("),
    ];
    assert_absent(
        &["wire", "ipam", "daemon", "tests"],
        &words,
        "finish it, or write down why it is not done",
    );
    for name in ["wire", "ipam", "daemon", "tests"] {
        let lib = root().join(name).join("src/lib.rs");
        assert!(read(&lib).contains("#![forbid(unsafe_code)]"), "{} lets unsafe code in", lib.display());
    }
}

#[test]
fn the_top_level_holds_what_it_should() {
    let known = [
        "Cargo.toml",
        "Cargo.lock",
        "LICENSE",
        "Makefile",
        "README.md",
        "clippy.toml",
        "rustfmt.toml",
        "daemon",
        "wire",
        "ipam",
        "deploy",
        "docs",
        "tests",
        "target",
    ];
    for entry in fs::read_dir(root()).expect("the root can be read") {
        let name = entry.expect("the root can be read").file_name().to_string_lossy().into_owned();
        assert!(
            name.starts_with('.') || known.contains(&name.as_str()),
            "{name} does not belong at the top level"
        );
    }
}

#[test]
fn decisions_are_numbered_without_a_gap() {
    let mut names: Vec<String> = files(&root().join("docs/decisions"))
        .iter()
        .map(|path| path.file_name().expect("a file has a name").to_string_lossy().into_owned())
        .collect();
    names.sort();
    for (index, name) in names.iter().enumerate() {
        let number = format!("{:04}-", index + 1);
        assert!(
            name.starts_with(&number) && name.ends_with(".md"),
            "docs/decisions/{name} should be {number}<title>.md"
        );
        let text = read(&root().join("docs/decisions").join(name));
        assert!(text.starts_with("# "), "docs/decisions/{name} does not begin with its title");
    }
}

fn documents() -> Vec<PathBuf> {
    let mut all = vec![root().join("README.md")];
    all.extend(
        files(&root().join("docs"))
            .into_iter()
            .filter(|path| path.extension().is_some_and(|end| end == "md")),
    );
    all
}

#[test]
fn links_in_the_documents_lead_somewhere() {
    for document in documents() {
        for link in read(&document).split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let file = link.split('#').next().unwrap_or_default();
            if file.is_empty() || file.contains("://") {
                continue;
            }
            let target = document.parent().expect("a document is in a directory").join(file);
            assert!(target.exists(), "{} links to {link}, which is not there", document.display());
        }
    }
}

/// The word after each occurrence of `program` that begins a command in a document.
fn commands(text: &str, program: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for part in text.split('`').skip(1).step_by(2).chain(text.split("```").skip(1).step_by(2)) {
        for line in part.lines().flat_map(|line| line.split("; ")) {
            let Some(rest) = line.trim().strip_prefix(program).and_then(|rest| rest.strip_prefix(' ')) else {
                continue;
            };
            let word = rest.split_ascii_whitespace().next().unwrap_or_default();
            if !word.is_empty()
                && word.bytes().all(|b| b.is_ascii_lowercase() || b == b'-')
                && !word.starts_with('-')
            {
                found.insert(word.to_owned());
            }
        }
    }
    found
}

#[test]
fn make_targets_that_the_documents_name_exist() {
    let makefile = read(&root().join("Makefile"));
    let targets: BTreeSet<&str> = makefile
        .lines()
        .filter(|line| line.contains("## "))
        .filter_map(|line| line.split(':').next())
        .collect();
    for document in documents() {
        for target in commands(&read(&document), "make") {
            assert!(
                targets.contains(target.as_str()),
                "{}: make {target} is not a target",
                document.display()
            );
        }
    }
    let ci = read(&root().join(".ci/run"));
    for target in ci.lines().filter_map(|line| line.strip_prefix("make ")) {
        assert!(targets.contains(target), ".ci/run: make {target} is not a target");
    }
}

#[test]
fn lab_commands_that_the_documents_name_exist() {
    let help = Command::new(env!("CARGO_BIN_EXE_weft-lab")).arg("help").output().expect("weft-lab runs");
    let help = String::from_utf8_lossy(&help.stdout).into_owned();
    for document in documents() {
        for verb in commands(&read(&document), "weft-lab") {
            let known = help.lines().any(|line| line.split_ascii_whitespace().next() == Some(verb.as_str()));
            assert!(known, "{}: weft-lab {verb} is not a command", document.display());
        }
    }
}

#[test]
fn the_samples_in_deploy_are_valid() {
    let path = root().join("deploy/weft.toml");
    let config =
        weft_daemon::config::Config::parse(&read(&path), &path, "worker-1").expect("the sample is valid");
    assert_eq!(config.node.name.as_str(), "worker-1");
    let network: serde_json::Value =
        serde_json::from_str(&read(&root().join("deploy/cni/10-weft.conflist"))).expect("the sample is JSON");
    assert_eq!(network["plugins"][0]["type"], "weft-cni");
    let unit = read(&root().join("deploy/systemd/weftd.service"));
    assert!(unit.contains("Type=notify") && unit.contains("--config /etc/weft/weft.toml"));
}

#[test]
fn every_mutant_still_has_its_place_in_the_code() {
    let list: toml::Table =
        read(&root().join("tests/mutants/mutants.toml")).parse().expect("the list is TOML");
    let mutants = list["mutant"].as_array().expect("the list has mutants");
    assert!(mutants.len() >= 10);
    for mutant in mutants {
        let text = |key: &str| mutant[key].as_str().expect("a mutant's fields are text").to_owned();
        let code = read(&root().join(text("file")));
        assert_eq!(code.matches(&text("from")).count(), 1, "{}: the code has changed", text("what"));
    }
}
