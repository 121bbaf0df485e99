//! One node: its namespaces, its private directories, its configuration, and its daemon.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::net::IpAddr;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, bail};
use serde_json::Value;

use super::enter::{self, Place};
use super::etcd;
use super::home::Handle;
use super::model::{Backend, NodeView, Options, State, Store};
use super::nat::{self, Router};
use super::tools::{self, run};
use super::{sites, underlay};

/// Gives the node directories of its own where weft and container tools keep things, without touching the machine's.
///
/// A directory is shadowed by a small file system of links to what it held, so that a user without rights on it can add
/// to it. Arguments: node, scratch directory, directory of the executables, shared directory.
const SETUP: &str = r#"
set -eu
node=$1 root=$2 bin=$3 shared=$4
hostname "$node"
mount -t tmpfs -o mode=0755 weft-lab "$root"
mkdir -p "$root/run/netns" "$root/run/weft-lab/bin" "$root/run/weft-lab/shared" "$root/run/weft-lab/host" "$root/run/weft-lab/own"
mount --rbind "$bin" "$root/run/weft-lab/bin"
mount --rbind "$shared" "$root/run/weft-lab/shared"
mount --rbind "$root/run" /run
shadow() {
    dir=$1; shift
    old=/run/weft-lab/host$dir new=/run/weft-lab/own$dir
    mkdir -p "$old" "$new"
    mount --rbind "$dir" "$old"
    for entry in "$old"/* "$old"/.[!.]*; do [ -e "$entry" ] || [ -L "$entry" ] || continue; printf '%s\0' "$entry"; done \
        | xargs -0 -r ln -s -t "$new"
    for own; do rm -f "$new/$own"; mkdir -p "$new/$own"; done
    mount --rbind "$new" "$dir"
}
shadow /etc weft cni
shadow /var/lib weft cni containerd
shadow /opt cni
mkdir -p /etc/cni/net.d /opt/cni/bin
for plugin in /usr/lib/cni/* /run/weft-lab/bin/weft-cni; do if [ -e "$plugin" ]; then ln -sf "$plugin" /opt/cni/bin/; fi; done
# Some machines do not let a user mount these; only tools that read /sys/class/net miss them.
mkdir -p /run/weft-lab/cgroup
mount --rbind /sys/fs/cgroup /run/weft-lab/cgroup 2>/dev/null || true
mount -t sysfs sysfs /sys 2>/dev/null && mount --rbind /run/weft-lab/cgroup /sys/fs/cgroup 2>/dev/null || true
ip link set lo up
echo ready
exec sleep infinity >/dev/null
"#;

/// Where a node's own files are, inside the node.
const CONFIG: &str = "/etc/weft/weft.toml";
const KEY: &str = "/etc/weft/cluster.key";
const CONFLIST: &str = "/etc/cni/net.d/10-weft.conflist";

/// The CNI configuration of every node.
const NETWORK: &str = r#"{
  "cniVersion": "1.0.0",
  "name": "weft",
  "plugins": [{ "type": "weft-cni" }]
}
"#;

/// Writes what nodes share: the cluster key, and those of sites.
pub(crate) fn write_shared(handle: &Handle, options: &Options) -> anyhow::Result<()> {
    sites::write_keys(handle, options)?;
    for site in 1..=if options.apart { options.sites } else { 1 } {
        let mut key = [0u8; 32];
        std::io::Read::read_exact(&mut File::open("/dev/urandom")?, &mut key)?;
        let hex: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
        let path = handle.shared().join(sites::cluster_key(options, site));
        fs::write(&path, hex + "\n")?;
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    }
    Ok(())
}

/// Makes a node's namespaces, plugs it into the underlay, or into the network of the router that it is behind, and writes its
/// configuration.
pub(crate) fn make(
    handle: &Handle,
    options: &Options,
    index: usize,
    router: Option<&Router>,
) -> anyhow::Result<(NodeView, Child)> {
    let name = format!("n{index}");
    let root = handle.dir().join("node").join(&name);
    fs::create_dir_all(&root)?;
    let mut holder = Command::new("unshare")
        .args(["--mount", "--net", "--uts", "--", "sh", "-c", SETUP, "sh", &name])
        .args([&root, &options.bin_dir, &handle.shared()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .context("cannot run unshare: is util-linux installed?")?;
    let mut ready = String::new();
    BufReader::new(holder.stdout.take().expect("standard output was asked to be a pipe"))
        .read_line(&mut ready)?;
    if ready != "ready\n" {
        let status = holder.wait()?;
        bail!("cannot set up node {name} ({status})");
    }
    let view = NodeView {
        mac: format!("02:4c:42:00:00:{index:02x}"),
        holder: holder.id(),
        site: sites::site_of(options, index),
        underlay: nat::node_addresses(options, index),
        daemon: None,
        pods: Vec::new(),
        name,
    };
    link(options, index, &view, router)?;
    write_inside(&view, CONFIG, &config(handle, options, &view, index)?)?;
    let shared = sites::cluster_key(options, sites::site_of(options, index));
    // A copy for each node: a rotation rewrites it.
    write_inside(&view, KEY, &fs::read_to_string(handle.shared().join(shared))?)?;
    if sites::speaks(options, index) {
        let key = sites::key(handle, sites::site_of(options, index))?;
        write_inside(&view, sites::SITE_KEY, &key.to_secret_text())?;
    }
    write_inside(&view, CONFLIST, NETWORK)?;
    Ok((view, holder))
}

fn link(options: &Options, index: usize, view: &NodeView, router: Option<&Router>) -> anyhow::Result<()> {
    match router {
        Some(router) => router.plug(&view.name, view.holder, &view.mac)?,
        None => underlay::plug(&view.name, view.holder, &view.mac)?,
    }
    let tool = |line: &str| run_within(view, line);
    underlay::skip_dad(tool, "eth0")?;
    for address in &view.underlay {
        match address {
            IpAddr::V4(_) => tool(&format!("ip address add {address}/24 dev eth0"))?,
            IpAddr::V6(_) => tool(&format!("ip address add {address}/64 dev eth0 nodad"))?,
        };
    }
    tool("ip link set eth0 up")?;
    nat::routes(options, index).iter().try_for_each(|route| tool(&format!("ip route add {route}")).map(drop))
}

/// Runs a tool in a node, with words that are separated by blanks.
pub(crate) fn run_within(view: &NodeView, line: &str) -> anyhow::Result<String> {
    run(&mut within(view, &line.split(' ').collect::<Vec<_>>()))
}

fn within(view: &NodeView, words: &[&str]) -> Command {
    let holder = view.holder.to_string();
    let mut command = Command::new("nsenter");
    command
        .args(["--mount", "--net", "--uts", "--target", &holder, "--"])
        .args(words)
        .env("PATH", enter::path());
    command
}

fn write_inside(view: &NodeView, path: &str, text: &str) -> anyhow::Result<()> {
    let output = tools::feed(&mut within(view, &["sh", "-c", "umask 077; cat > \"$0\"", path]), text)?;
    anyhow::ensure!(
        output.status.success(),
        "cannot write {path} in {}: {}",
        view.name,
        tools::said(&output)
    );
    Ok(())
}

/// The node's configuration, with what the options add.
fn config(handle: &Handle, options: &Options, view: &NodeView, index: usize) -> anyhow::Result<String> {
    let (v4, v6) = (options.overlay.v4(), options.overlay.v6());
    let site = sites::site_of(options, index);
    let (range_v4, range_v6) = sites::ranges(site);
    let mut cidrs = Vec::new();
    let mut subnets = Vec::new();
    if v4 {
        cidrs.push(format!(r#"{{ cidr = "{range_v4}", node_prefix = 24 }}"#));
        subnets.push(format!(r#""10.32.{index}.0/24""#));
    }
    if v6 {
        cidrs.push(format!(r#"{{ cidr = "{range_v6}", node_prefix = 64 }}"#));
        subnets.push(format!(r#""fd00:32:0:{index:x}::/64""#));
    }
    // Each node knows a few others to begin with and hears of the rest from them.
    let seeds: Vec<String> = nat::seeds(options, index)
        .into_iter()
        .map(|address| format!("\"{}\"", std::net::SocketAddr::new(address, 7117)))
        .collect();
    let addresses: Vec<String> = view.underlay.iter().map(|address| format!("\"{address}\"")).collect();
    let store = match options.store {
        Store::Static => format!("type = \"static\"\nsubnets = [{}]", subnets.join(", ")),
        Store::Etcd => format!("type = \"etcd\"\nendpoints = [\"{}\"]", etcd::url(options)),
        // Also the first of several sites has it where a lab of one site does.
        Store::Sqlite if site == 1 => {
            "type = \"sqlite\"\npath = \"/run/weft-lab/shared/store.db\"".to_owned()
        }
        Store::Sqlite => format!("type = \"sqlite\"\npath = \"/run/weft-lab/shared/store-{site}.db\""),
    };
    let text = format!(
        "[node]\nname = \"{name}\"\n\
         [cluster]\nid = \"{lab}\"\nkey_file = \"{KEY}\"\ncidrs = [{cidrs}]\n\
         [store]\n{store}\n\
         [gossip]\nseeds = [{seeds}]\n\
         [underlay]\ndevice = \"eth0\"\naddress = [{addresses}]\n",
        name = view.name,
        lab = options.name,
        cidrs = cidrs.join(", "),
        seeds = seeds.join(", "),
        addresses = addresses.join(", "),
    );
    let encryption = match options.backend {
        Backend::Wireguard => "[encryption]\npolicy = \"always\"\n",
        Backend::Vxlan | Backend::Auto => "",
    };
    let own = "the lab's own configuration is not TOML";
    let mut table: toml::Table = text.parse().context(own)?;
    for more in [&sites::config(handle, options, index)?, encryption] {
        merge(&mut table, &more.parse().context(own)?);
    }
    merge(&mut table, &options.config);
    if let Some(own) = options.node_config.get(&view.name) {
        // Another kind of store has other settings.
        if own.get("store").is_some_and(|store| store.get("type").is_some()) {
            table.remove("store");
        }
        merge(&mut table, own);
    }
    Ok(table.to_string())
}

fn merge(into: &mut toml::Table, from: &toml::Table) {
    for (key, value) in from {
        match (into.get_mut(key), value) {
            (Some(toml::Value::Table(into)), toml::Value::Table(from)) => merge(into, from),
            _ => {
                into.insert(key.clone(), value.clone());
            }
        }
    }
}

/// Starts the node's daemon, with clocks so many seconds ahead; what it writes goes to its log.
pub(crate) fn launch(handle: &Handle, state: &State, name: &str, ahead_s: u64) -> anyhow::Result<Child> {
    let log = File::options().create(true).append(true).open(handle.log(name))?;
    let mut words = enter::from_keeper(state, &Place::Node(name.to_owned()))?;
    if ahead_s > 0 {
        // A time namespace (time_namespaces(7)); the program that is executed is the first one in it (Linux 6.3).
        words.extend(["unshare", "--time", "--monotonic", &ahead_s.to_string()].map(str::to_owned));
        words.extend(["--boottime", &ahead_s.to_string(), "--"].map(str::to_owned));
    }
    words.extend(["weftd", "--config", CONFIG].map(str::to_owned));
    enter::command(&words)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("cannot start the daemon")
}

/// What the node's daemon says of itself, or why it says nothing yet.
pub(crate) fn status(state: &State, name: &str) -> anyhow::Result<Result<Value, String>> {
    let mut words = enter::from_keeper(state, &Place::Node(name.to_owned()))?;
    words.extend(["weft", "-o", "json", "status"].map(str::to_owned));
    let output = tools::output(&mut enter::command(&words))?;
    // 0 is healthy and 1 a failed check: both are answers.
    if matches!(output.status.code(), Some(0 | 1)) {
        return Ok(serde_json::from_slice(&output.stdout).map_err(|error| format!("weft status: {error}")));
    }
    Ok(Err(tools::said(&output)))
}

/// Prints those of its arguments that the kernel has no route to.
const UNROUTED: &str = r#"for ip; do ip route get "$ip" >/dev/null 2>&1 || echo "$ip"; done"#;

/// The pods of other nodes to which this node's kernel has no route.
///
/// The underlay has no default route, so a route is one of weft's.
pub(crate) fn missing_routes(state: &State, name: &str) -> anyhow::Result<Vec<String>> {
    let mut words = enter::from_keeper(state, &Place::Node(name.to_owned()))?;
    words.extend(["sh", "-c", UNROUTED, "sh"].map(str::to_owned));
    let near = |other: &str| {
        !state.options.apart || sites::of(&state.options, other) == sites::of(&state.options, name)
    };
    let others = state.pods().filter(|(other, _)| other.name != name && near(&other.name));
    words.extend(others.flat_map(|(_, pod)| pod.ips.iter().map(IpAddr::to_string)));
    Ok(run(&mut enter::command(&words))?.lines().map(str::to_owned).collect())
}

/// The end of the daemon's log.
pub(crate) fn last_words(handle: &Handle, name: &str) -> String {
    let text = fs::read_to_string(handle.log(name)).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(12)..].join("\n")
}
