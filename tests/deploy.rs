//! What deploy/ holds: one set of objects, whichever way it is installed, that a daemon of this release understands.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use serde_json::Value;
use weft_daemon::config::Config;
use weft_tests::lab::{Backend, Background, Lab, LabOptions, executable, wait_until};
use weft_tests::manifest::{self, objects};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ is below the root").to_owned()
}

fn read(path: &str) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn run(command: &mut Command) -> Output {
    command.current_dir(root()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

fn text_of(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn helm(helm: &Path, words: &[&str]) -> Output {
    run(Command::new(helm)
        .args(["template", "weft", "deploy/helm/weft", "--namespace", "weft-system"])
        .args(words))
}

/// Every object by kind and name, with the texts of configurations as what they say.
fn by_name(objects: Vec<Value>) -> BTreeMap<(String, String), Value> {
    let of = |object: &Value, key: &str| object[key].as_str().unwrap_or_default().to_owned();
    let mut all = BTreeMap::new();
    for mut object in objects {
        if let Some(text) = object["data"]["weft.toml"].as_str() {
            let table: toml::Table = text.parse().expect("weft.toml is TOML");
            object["data"]["weft.toml"] = serde_json::to_value(table).expect("TOML is data");
        }
        if let Some(text) = object["data"]["10-weft.conflist"].as_str() {
            object["data"]["10-weft.conflist"] = serde_json::from_str(text).expect("the list is JSON");
        }
        let name = (of(&object, "kind"), of(&object["metadata"], "name"));
        assert!(all.insert(name.clone(), object).is_none(), "{name:?} is there twice");
    }
    all
}

fn weft_toml(objects: &[Value]) -> String {
    let map =
        objects.iter().find(|object| object["kind"] == "ConfigMap" && object["metadata"]["name"] == "weft");
    map.expect("there is a ConfigMap")["data"]["weft.toml"].as_str().expect("it has weft.toml").to_owned()
}

#[test]
fn the_committed_manifest_is_what_the_base_renders_to() {
    let Some(kustomize) = manifest::tool("kustomize") else { return };
    let rendered = text_of(&run(Command::new(&kustomize).args(["build", "deploy/kubernetes/base"])));
    assert!(rendered == read("deploy/weft.yaml"), "deploy/weft.yaml is not of today: run make manifests");
    for overlay in fs::read_dir(root().join("deploy/kubernetes/overlays")).expect("there are overlays") {
        let path = overlay.expect("the directory can be read").path();
        let rendered = objects(&text_of(&run(Command::new(&kustomize).arg("build").arg(&path))));
        assert_eq!(by_name(rendered.clone()).len(), by_name(objects(&read("deploy/weft.yaml"))).len());
        let text = weft_toml(&rendered);
        assert_ne!(text, read("deploy/kubernetes/base/weft.toml"), "{}", path.display());
        Config::parse(&text, &path, "worker-1").expect("the overlay's configuration is valid");
    }
}

#[test]
fn the_configuration_of_the_manifest_is_valid_and_its_files_are_those_of_the_chart() {
    let text = weft_toml(&objects(&read("deploy/weft.yaml")));
    let config =
        Config::parse(&text, Path::new("weft.yaml"), "worker-1").expect("the configuration is valid");
    // The root file system is read-only.
    assert!(config.cluster.key_file.starts_with(&config.node.state_dir));
    let list = read("deploy/cni/10-weft.conflist");
    for copy in ["deploy/kubernetes/base/10-weft.conflist", "deploy/helm/weft/files/10-weft.conflist"] {
        assert_eq!(read(copy), list, "{copy}: run make manifests");
    }
    for name in ["crd.yaml", "rbac.yaml", "admission.yaml"] {
        let copy = read(&format!("deploy/helm/weft/files/{name}"));
        assert!(copy == read(&format!("deploy/kubernetes/base/{name}")), "{name}: run make manifests");
    }
    let version = env!("CARGO_PKG_VERSION");
    for (file, line) in [
        ("deploy/weft.yaml", format!("image: ghcr.io/weft-net/weft:{version}\n")),
        ("deploy/helm/weft/Chart.yaml", format!("appVersion: {version}\n")),
    ] {
        assert!(read(file).contains(&line), "{file} is not of release {version}");
    }
}

#[test]
fn the_chart_gives_the_same_objects_and_refuses_wrong_values() {
    let Some(tool) = manifest::tool("helm") else { return };
    let mut base = by_name(objects(&read("deploy/weft.yaml")));
    // The namespace is the release's, which Helm makes or finds.
    base.remove(&("Namespace".into(), "weft-system".into())).expect("the base has it");
    let mut chart = by_name(objects(&text_of(&helm(&tool, &[]))));
    for (name, object) in &mut base {
        let other = chart.remove(name).unwrap_or_else(|| panic!("the chart has no {name:?}"));
        if let Some(settings) = object.get_mut("data").and_then(Value::as_object_mut) {
            // The chart writes defaults out.
            for (texts, of) in [(&settings["weft.toml"], "base"), (&other["data"]["weft.toml"], "chart")] {
                let text = toml::to_string(texts).expect("it was TOML");
                Config::parse(&text, Path::new(of), "worker-1").expect("the configuration is valid");
            }
            let resolved = |value: &Value| {
                let text = toml::to_string(&value["weft.toml"]).expect("it was TOML");
                format!("{:?}", Config::parse(&text, Path::new(""), "worker-1").expect("valid"))
            };
            assert_eq!(resolved(&Value::Object(settings.clone())), resolved(&other["data"]));
            assert_eq!(settings["10-weft.conflist"], other["data"]["10-weft.conflist"]);
        } else {
            assert_eq!(*object, other, "{name:?}");
        }
    }
    assert!(chart.is_empty(), "only the chart has {:?}", chart.keys());

    let all = helm(
        &tool,
        &[
            "--set",
            "encryption.policy=always,monitoring.enabled=true,cni.exclusive=true,store.mode=node-podcidr",
            "--set-string",
            "extraConfig=[masquerade]\nenabled = false",
        ],
    );
    let changed = objects(&text_of(&all));
    let config = Config::parse(&weft_toml(&changed), Path::new("chart"), "worker-1").expect("valid");
    assert!(config.encryption.tunnels && !config.masquerade.enabled);
    assert!(changed.iter().any(|object| object["kind"] == "PodMonitor"));
    let shown =
        changed.iter().find(|object| object["kind"] == "DaemonSet").expect("there is one").to_string();
    for word in ["--exclusive", "/dev/net/tun", "WEFT_METRICS_LISTEN"] {
        assert!(shown.contains(word), "{word}");
    }
    for wrong in [
        "store.mode=typo",
        "cluster.cidrs=",
        "encryption.polcy=always",
        "image.tag=a b",
        "cni.binDir=opt",
        "cluster.cidrs[0].nodePrefix=0",
    ] {
        let output = helm(&tool, &["--set", wrong]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains("schema"), "{wrong}: {said}");
    }
}

/// The metrics that an expression names.
fn metrics(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    words.filter(|word| word.starts_with("weft_")).map(str::to_owned).collect()
}

#[test]
fn the_dashboard_shows_metrics_that_the_daemon_serves() {
    let dashboard: Value =
        serde_json::from_str(&read("deploy/kubernetes/components/monitoring/weft.json")).expect("it is JSON");
    let panels = dashboard["panels"].as_array().expect("it has panels");
    let named: BTreeSet<String> = panels
        .iter()
        .flat_map(|panel| panel["targets"].as_array().expect("a panel has targets"))
        .flat_map(|target| metrics(target["expr"].as_str().expect("a target has an expression")))
        .collect();
    assert!(named.len() >= 10, "{named:?}");
    let lab = Lab::up(LabOptions::new("metrics").nodes(2).pods(1).backend(Backend::Wireguard));
    let ask = "exec 3<>/dev/tcp/127.0.0.1/7118; printf 'GET /metrics HTTP/1.1\\r\\n\\r\\n' >&3; cat <&3";
    let served = lab.run("n1", &["bash", "-c", ask]);
    let types: BTreeMap<&str, &str> = served
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE "))
        .filter_map(|line| line.split_once(' '))
        .collect();
    for name in named {
        // OpenMetrics: a counter's samples end in _total, its family does not.
        let family = name.strip_suffix("_total").filter(|family| types.get(family) == Some(&"counter"));
        assert!(family.is_some() || types.get(name.as_str()) == Some(&"gauge"), "{name} is not in {served}");
    }
}

#[test]
fn the_image_is_the_same_each_time_and_says_what_it_is() {
    let bin = executable("weftd").parent().expect("it is in a directory").to_owned();
    let dir = std::env::temp_dir().join(format!("weft-image-{}", std::process::id()));
    fs::create_dir_all(&dir).expect("a directory for the test");
    let make = |name: &str| {
        text_of(&run(Command::new("deploy/image").arg(&bin).arg(dir.join(name))));
        fs::read(dir.join(name)).expect("the image is there")
    };
    assert!(make("one.tar") == make("two.tar"), "two images of the same executables differ");
    let inside =
        |words: &[&str]| text_of(&run(Command::new("tar").arg("-xOf").arg(dir.join("one.tar")).args(words)));
    let manifest: Value = serde_json::from_str(&inside(&["manifest.json"])).expect("JSON");
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(manifest[0]["RepoTags"][0], format!("ghcr.io/weft-net/weft:{version}"));
    let config: Value = serde_json::from_str(&inside(&["config.json"])).expect("JSON");
    let labels = &config["config"]["Labels"];
    assert_eq!(labels["org.opencontainers.image.version"], version);
    assert_eq!(labels["org.opencontainers.image.licenses"], "Apache-2.0");
    assert_eq!(config["config"]["Entrypoint"][0], "/usr/local/bin/weftd");
    let script =
        format!("tar -xOf {0}/one.tar layer.tar | tar -tvf - | awk '{{print $1, $2, $6}}'", dir.display());
    let listed = text_of(&run(Command::new("sh").args(["-c", &script])));
    for name in ["weftd", "weft", "weft-cni"] {
        assert!(listed.contains(&format!("-rwxr-xr-x 0/0 ./usr/local/bin/{name}\n")), "{listed}");
    }
    fs::remove_dir_all(&dir).expect("cleaned");
}

#[test]
fn make_install_puts_everything_in_its_place() {
    let bin = executable("weftd").parent().expect("it is in a directory").to_owned();
    let dir = std::env::temp_dir().join(format!("weft-install-{}", std::process::id()));
    let install = |prefix: &str| {
        let mut make = Command::new("make");
        make.arg("install").arg(format!("BIN={}", bin.display())).arg(format!("DESTDIR={}", dir.display()));
        text_of(&run(make.arg(format!("PREFIX={prefix}"))));
    };
    install("/usr");
    let script = "find . -type f -printf '%m %P\\n' | sort -k2";
    let listed = text_of(&run(Command::new("sh").args(["-c", &format!("cd {}; {script}", dir.display())])));
    let expected = [
        "755 opt/cni/bin/weft-cni",
        "755 usr/bin/weft",
        "755 usr/bin/weft-cni",
        "755 usr/bin/weftd",
        "644 usr/lib/systemd/system/weftd.service",
        "644 usr/share/weft/10-weft.conflist",
        "644 usr/share/weft/weft.toml",
    ];
    assert_eq!(listed.lines().collect::<Vec<_>>(), expected);
    let unit = fs::read_to_string(dir.join("usr/lib/systemd/system/weftd.service")).expect("it is there");
    assert!(unit.contains("ExecStart=/usr/bin/weftd ") && !unit.contains("/usr/local"), "{unit}");
    fs::remove_dir_all(&dir).expect("cleaned");
}

/// A Kubernetes API server in a lab's node, with an etcd of its own, and no one else.
struct Api<'a> {
    lab: &'a Lab,
    kubectl: String,
    _servers: [Background; 2],
}

impl<'a> Api<'a> {
    fn start(lab: &'a Lab, server: &Path, kubectl: &Path) -> Self {
        let key = rcgen::KeyPair::generate().expect("a key for service accounts");
        lab.feed("n1", &["sh", "-c", "mkdir /run/api; cat >/run/api/sa.key"], &key.serialize_pem());
        lab.feed("n1", &["sh", "-c", "cat >/run/api/sa.pub"], &key.public_key_pem());
        lab.sh("n1", "echo 'secret,admin,1,system:masters' >/run/api/tokens");
        let etcd = "etcd --data-dir /run/api/etcd --unsafe-no-fsync";
        let server = format!(
            "{} --etcd-servers=http://127.0.0.1:2379 --cert-dir=/run/api --secure-port=6443 --advertise-address=192.0.2.1 \
             --service-account-issuer=https://api --service-account-key-file=/run/api/sa.pub \
             --service-account-signing-key-file=/run/api/sa.key --authorization-mode=RBAC \
             --token-auth-file=/run/api/tokens --service-cluster-ip-range=198.51.100.0/24",
            server.display()
        );
        let background = |name: &str, command: &str| {
            lab.background("n1", &["sh", "-c", &format!("exec {command} >/run/api/{name}.log 2>&1")])
        };
        let servers = [background("etcd", etcd), background("server", &server)];
        let kubectl = format!(
            "{} --server=https://127.0.0.1:6443 --insecure-skip-tls-verify --token=secret",
            kubectl.display()
        );
        let api = Self { lab, kubectl, _servers: servers };
        let answers = || api.kubectl("get --raw /readyz", "").status.success();
        wait_until("the API server is ready", Duration::from_secs(120), answers);
        api
    }

    fn kubectl(&self, words: &str, input: &str) -> Output {
        // An empty HOME would be the machine's.
        let script = format!("HOME=/run/api {} {words}", self.kubectl);
        self.lab.feed("n1", &["sh", "-c", &script], input)
    }
}

#[test]
fn an_api_server_takes_every_object_and_knows_every_field() {
    let Some(server) = manifest::kubernetes("kube-apiserver") else { return };
    let Some(kubectl) = manifest::kubernetes("kubectl") else { return };
    let (Some(kustomize), Some(tool)) = (manifest::tool("kustomize"), manifest::tool("helm")) else { return };
    let lab = Lab::up(LabOptions::new("api").nodes(1).started(0).pods(0));
    let api = Api::start(&lab, &server, &kubectl);
    let apply = |text: &str| {
        let output = api.kubectl("apply --server-side --force-conflicts --validate=strict -f -", text);
        let said =
            format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success() && !said.contains("Warning"), "{said}");
    };
    apply(&read("deploy/weft.yaml"));
    for overlay in ["wireguard", "dual-stack", "node-podcidr"] {
        let path = format!("deploy/kubernetes/overlays/{overlay}");
        apply(&text_of(&run(Command::new(&kustomize).args(["build", &path]))));
    }
    apply(&text_of(&helm(&tool, &["--set", "encryption.policy=always,cni.exclusive=true"])));
    let shown = text_of(&api.kubectl("-n weft-system get daemonset weft -o json", ""));
    let shown: Value = serde_json::from_str(&shown).expect("kubectl writes JSON");
    assert_eq!(shown["spec"]["updateStrategy"]["rollingUpdate"]["maxSurge"], 1);
    // A field that it does not know would have been refused.
    let wrong = read("deploy/weft.yaml").replace("maxSurge", "maxSurges");
    let refused = api.kubectl("apply --server-side --force-conflicts --validate=strict -f -", &wrong);
    assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("maxSurges"));
}
