//! A lab that a test owns: it comes up with the test's options and is gone when the value is dropped.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::fcntl::Flock;
use nix::unistd::geteuid;
use serde_json::Value;

use super::enter::{self, Place};
use super::home::{Handle, KeeperId, Presence};
use super::keeper::{LET_GO, Word};
use super::matrix::Matrix;
use super::model::{Backend, Families, Options, Request, State, Store};
use super::nat::Nat;
use super::tools::{self, said};

/// What a test wants of its lab. Starts as three nodes with two dual-stack pods each.
#[derive(Debug, Clone)]
pub struct LabOptions(pub Options);

impl LabOptions {
    /// A lab for one test; the name only helps people and need not be unique between runs.
    pub fn new(name: &str) -> Self {
        LabOptions(Options {
            name: format!("{}-{}", name.chars().take(20).collect::<String>(), std::process::id()),
            nodes: 3,
            started: 3,
            pods: 2,
            sites: 1,
            apart: false,
            nat: Vec::new(),
            backend: Backend::Vxlan,
            store: Store::Sqlite,
            underlay: Families::V4,
            overlay: Families::Dual,
            config: toml::Table::new(),
            node_config: Default::default(),
            bin_dir: PathBuf::new(),
        })
    }

    /// Sets how many nodes there are, all started.
    pub fn nodes(mut self, nodes: usize) -> Self {
        self.0.nodes = nodes;
        self.0.started = nodes;
        self
    }

    /// Sets how many of the nodes run their daemon from the start.
    pub fn started(mut self, started: usize) -> Self {
        self.0.started = started;
        self
    }

    /// Sets how many pods each node gets.
    pub fn pods(mut self, pods: usize) -> Self {
        self.0.pods = pods;
        self
    }

    /// Sets where leases are kept.
    pub fn backend(mut self, backend: Backend) -> Self {
        self.0.backend = backend;
        self
    }

    /// Where leases are kept.
    pub fn store(mut self, store: Store) -> Self {
        self.0.store = store;
        self
    }

    /// Sets how many sites the nodes are spread over.
    pub fn sites(mut self, sites: usize) -> Self {
        self.0.sites = sites;
        self
    }

    /// Has the sites begin as meshes of their own, which know nothing of each other.
    pub fn apart(mut self) -> Self {
        self.0.apart = true;
        self
    }

    /// Puts routers before the sites, the first one first.
    pub fn nat(mut self, nat: &[Nat]) -> Self {
        self.0.nat = nat.to_vec();
        self
    }

    /// Sets the families of the network between the nodes.
    pub fn underlay(mut self, families: Families) -> Self {
        self.0.underlay = families;
        self
    }

    /// Sets the families of the pods.
    pub fn overlay(mut self, families: Families) -> Self {
        self.0.overlay = families;
        self
    }

    /// Merges TOML into the configuration of every node.
    pub fn config(mut self, text: &str) -> Self {
        self.0.config = text.parse().expect("the test's configuration is TOML");
        self
    }

    /// Merges TOML into the configuration of one node.
    pub fn node_config(mut self, node: &str, text: &str) -> Self {
        self.0.node_config.insert(node.to_owned(), text.parse().expect("the test's configuration is TOML"));
        self
    }
}

/// Says why a test does not run here. Under CI that is a failure.
///
/// # Panics
/// When the environment has `CI`.
pub fn skip(reason: &str) {
    println!("SKIP: {reason}");
    assert!(std::env::var_os("CI").is_none(), "SKIP is a failure under CI: {reason}");
}

/// Waits until the check is true, and says how long that took.
///
/// # Panics
/// When the bound passes first.
pub fn wait_until(what: &str, bound: Duration, mut check: impl FnMut() -> bool) -> Duration {
    let began = Instant::now();
    while !check() {
        assert!(began.elapsed() < bound, "waited {bound:?} in vain until {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
    began.elapsed()
}

/// Finds the directory that holds all of these executables.
fn directory_with(names: &[&str]) -> anyhow::Result<PathBuf> {
    let mut places: Vec<PathBuf> = std::env::var_os("WEFT_BIN_DIR").map(PathBuf::from).into_iter().collect();
    let own = std::env::current_exe()?;
    places.extend(own.ancestors().skip(1).take(2).map(Path::to_owned));
    let whole = |place: &&PathBuf| names.iter().all(|name| place.join(name).is_file());
    places.iter().find(whole).cloned().with_context(|| {
        format!("{names:?} are not all in one of {places:?}: run `make build` and set WEFT_BIN_DIR to its directory")
    })
}

/// Where one of weft's executables is.
///
/// # Panics
/// When it was not built.
pub fn executable(name: &str) -> PathBuf {
    match directory_with(&[name]) {
        Ok(directory) => directory.join(name),
        Err(error) => panic!("{error:#}"),
    }
}

/// A running lab. Dropping it takes the lab down, and so does the end of the process that holds it.
#[derive(Debug)]
pub struct Lab {
    handle: Handle,
    /// None once the lab was let go.
    keeper: Option<(Child, ChildStdin)>,
    /// Held by a test's lab until it is down.
    slot: Option<Slot>,
}

/// Leave to have a lab. Tests measure times, so only a few labs of a process run at once, whatever the number of cores.
#[derive(Debug)]
struct Slot;

static TAKEN: (Mutex<usize>, Condvar) = (Mutex::new(0), Condvar::new());

impl Slot {
    const ALL: usize = 2;

    fn wait() -> Self {
        let taken = TAKEN.0.lock().expect("no thread panics with the lock");
        let full = |taken: &mut usize| *taken >= Slot::ALL;
        *TAKEN.1.wait_while(taken, full).expect("no thread panics with the lock") += 1;
        Slot
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        *TAKEN.0.lock().expect("no thread panics with the lock") -= 1;
        TAKEN.1.notify_one();
    }
}

impl Lab {
    /// Brings a lab up.
    ///
    /// # Panics
    /// When it does not come up; the message says why.
    pub fn up(options: LabOptions) -> Lab {
        let slot = Slot::wait();
        let name = options.0.name.clone();
        match Lab::try_up(options.0, &mut |line| eprintln!("{name}: {line}")) {
            Ok(mut lab) => {
                lab.slot = Some(slot);
                lab
            }
            Err(error) => panic!("the lab did not come up: {error:#}"),
        }
    }

    /// Brings a lab up and hands every line of progress on.
    ///
    /// # Errors
    /// A sentence: what failed, and what to do where that is known. Nothing is left running.
    pub fn try_up(mut options: Options, progress: &mut dyn FnMut(&str)) -> anyhow::Result<Lab> {
        options.check()?;
        if options.bin_dir.as_os_str().is_empty() {
            options.bin_dir = directory_with(&["weftd", "weft", "weft-cni"])?;
        }
        options.bin_dir = options.bin_dir.canonicalize().context("--bin-dir")?;
        let lab_program = directory_with(&["weft-lab"])?.join("weft-lab");
        let handle = Handle::new(&options.name);
        let lock = handle.lock()?;
        if handle.presence() == Presence::Alive {
            bail!("lab {0} is up already: take it down with `weft-lab --name {0} down`", options.name);
        }
        for stale in Handle::all().into_iter().filter(|lab| lab.presence() == Presence::Stale) {
            progress(&format!("removing what an interrupted run of lab {} left", stale.name()));
            stale.remove_locked()?;
        }
        handle.create()?;
        handle.write("options.json", &options)?;
        let result = Lab::spawn(&handle, &lab_program, lock, progress);
        if result.is_err() {
            handle.down().ok();
        }
        result
    }

    fn spawn(
        handle: &Handle,
        lab_program: &Path,
        lock: Flock<File>,
        progress: &mut dyn FnMut(&str),
    ) -> anyhow::Result<Lab> {
        let user_namespace = !geteuid().is_root();
        let mut command = Command::new("setsid");
        command.arg("unshare");
        if user_namespace {
            may_make_user_namespaces()?;
            command.args(["--user", "--map-root-user"]);
        }
        let log = File::create(handle.dir().join("keeper.log"))?;
        // The first process of the namespace is a shell, because a shell reaps every process that was left to it.
        let first = r#"exec 3<&0; "$@" <&3 3<&- & exec 3<&-; wait $!"#;
        command
            .args([
                "--mount",
                "--propagation",
                "private",
                "--net",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
            ])
            .args(["--", "sh", "-c", first, "sh"])
            .arg(lab_program)
            .args(["--name", handle.name(), "keeper"])
            .arg(handle.dir())
            // An ordinary user's path lacks the directories of ip, bridge and nft.
            .env("PATH", enter::path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log);
        let mut child = command.spawn().context("cannot run setsid and unshare: is util-linux installed?")?;
        let keeper = KeeperId::of(child.id(), user_namespace)?;
        handle.write("keeper.json", &keeper)?;
        // Now everybody can see that the lab lives.
        drop(lock);
        let stdin = child.stdin.take().expect("standard input was asked to be a pipe");
        let stdout = child.stdout.take().expect("standard output was asked to be a pipe");
        // From here on a failure drops the lab, which ends the keeper.
        let lab = Lab { handle: handle.clone(), keeper: Some((child, stdin)), slot: None };
        for line in BufReader::new(stdout).lines() {
            match serde_json::from_str(&line?)? {
                Word::Progress(what) => progress(&what),
                Word::Ready => return Ok(lab),
                Word::Failed(why) => {
                    keep_log_of_failure(handle);
                    bail!(why)
                }
            }
        }
        let log = std::fs::read_to_string(handle.dir().join("keeper.log")).unwrap_or_default();
        bail!("the lab's keeper ended at once: {}", log.trim())
    }

    /// Lets the lab go on without this process.
    ///
    /// # Errors
    /// When the keeper is already gone.
    pub fn let_go(mut self) -> anyhow::Result<Handle> {
        let (_, mut stdin) = self.keeper.take().expect("a lab is let go at most once");
        writeln!(stdin, "{LET_GO}").context("the keeper is gone")?;
        Ok(self.handle.clone())
    }

    /// Names the lab.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// What the lab is now.
    pub fn state(&self) -> State {
        self.handle.state().expect("the lab is up")
    }

    /// Tells the lab to do something.
    ///
    /// # Panics
    /// When it cannot.
    pub fn tell(&self, request: Request) -> State {
        self.handle.request(&request).unwrap_or_else(|error| panic!("{request:?}: {error:#}"))
    }

    /// Ends a daemon with SIGKILL.
    pub fn kill(&self, node: &str) {
        self.tell(Request::Kill { node: node.into() });
    }

    /// Ends a daemon with SIGTERM.
    pub fn stop(&self, node: &str) {
        self.tell(Request::Stop { node: node.into() });
    }

    /// Starts a daemon and waits until it answers.
    pub fn start(&self, node: &str) {
        self.tell(Request::Start { node: node.into(), ahead_s: 0 });
    }

    /// Has the sites let each other in.
    pub fn befriend_sites(&self) {
        self.tell(Request::Befriend);
    }

    /// Lets two nodes no longer hear each other.
    pub fn cut(&self, a: &str, b: &str) {
        self.tell(Request::Cut { a: a.into(), b: b.into() });
    }

    /// Undoes a cut.
    pub fn heal(&self, a: &str, b: &str) {
        self.tell(Request::Heal { a: a.into(), b: b.into() });
    }

    /// Lets no longer packet pass between two nodes, and tells nobody; 0 lets all pass.
    pub fn floor(&self, a: &str, b: &str, bytes: u32) {
        self.tell(Request::Floor { a: a.into(), b: b.into(), bytes });
    }

    /// Runs a command in a place and returns how it ended.
    pub fn exec(&self, place: impl Into<Place>, words: &[&str]) -> Output {
        let mut command = self.handle.command(place, words).expect("the place exists");
        tools::output(&mut command).expect("the command runs")
    }

    /// Runs a command in a place with this on its standard input.
    pub fn feed(&self, place: impl Into<Place>, words: &[&str], input: &str) -> Output {
        let mut command = self.handle.command(place, words).expect("the place exists");
        tools::feed(&mut command, input).expect("the command runs")
    }

    /// Runs a command that must succeed and returns what it wrote.
    pub fn run(&self, place: impl Into<Place>, words: &[&str]) -> String {
        let place = place.into();
        let output = self.exec(&place, words);
        assert!(output.status.success(), "{place}: {words:?} failed ({}): {}", output.status, said(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs a shell script that must succeed.
    pub fn sh(&self, place: impl Into<Place>, script: &str) -> String {
        self.run(place, &["sh", "-c", script])
    }

    /// Runs a command that must succeed and write JSON, such as `ip -j`.
    pub fn json(&self, place: impl Into<Place>, words: &[&str]) -> Value {
        let text = self.run(place, words);
        let text = if text.trim().is_empty() { "[]" } else { &text };
        serde_json::from_str(text).unwrap_or_else(|error| panic!("{words:?} wrote no JSON ({error}): {text}"))
    }

    /// Asks the daemon of a node. A failed check (exit 1) is an answer too.
    pub fn weft(&self, node: &str, words: &[&str]) -> Value {
        let mut all = vec!["weft", "-o", "json"];
        all.extend(words);
        let output = self.exec(node, &all);
        assert!(
            matches!(output.status.code(), Some(0 | 1)),
            "{node}: {all:?} failed ({}): {}",
            output.status,
            said(&output)
        );
        serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{node}: {all:?} wrote no JSON: {error}"))
    }

    /// The leases that a node knows: subnet, node and epoch of each, sorted.
    pub fn leases(&self, node: &str) -> Vec<Value> {
        let list = self.weft(node, &["leases"])["leases"].as_array().cloned().unwrap_or_default();
        let mut known: Vec<Value> = list
            .iter()
            .map(|lease| serde_json::json!([lease["subnet"], lease["node"], lease["epoch"]]))
            .collect();
        known.sort_by_key(Value::to_string);
        known
    }

    /// The address of a pod, IPv4 first.
    pub fn ip(&self, node: &str, pod: &str) -> IpAddr {
        let state = self.state();
        let pod = state.node(node).and_then(|node| node.pod(pod)).expect("the pod exists").clone();
        pod.v4().or(pod.v6()).expect("a pod has an address")
    }

    /// The addresses of a pod.
    pub fn ips(&self, node: &str, pod: &str) -> Vec<IpAddr> {
        let state = self.state();
        state.node(node).and_then(|node| node.pod(pod)).expect("the pod exists").ips.clone()
    }

    /// Pings once and waits a second for the answer.
    pub fn ping(&self, from: impl Into<Place>, to: IpAddr) -> bool {
        self.exec(from, &["ping", "-n", "-q", "-c", "1", "-W", "1", &to.to_string()]).status.success()
    }

    /// Waits until every pod has reached every other, and then pings them all again. Two nodes that ask each other for a first
    /// session at the same moment may both have to ask again, which WireGuard does after five seconds (whitepaper s6.4).
    ///
    /// # Panics
    /// When one does not answer.
    pub fn meet(&self) -> Matrix {
        let all = || Matrix::measure(&self.handle).expect("the lab is up").losses().is_empty();
        wait_until("every pod has reached every other", Duration::from_secs(180), all);
        self.ping_all()
    }

    /// Pings from every pod to every other pod.
    ///
    /// # Panics
    /// When one does not answer.
    pub fn ping_all(&self) -> Matrix {
        let matrix = Matrix::measure(&self.handle).expect("the lab is up");
        assert!(matrix.losses().is_empty(), "no answer: {:#?}", matrix.losses());
        matrix
    }
}

impl Lab {
    /// Prints what the daemons say of their peers and of themselves, of a test that failed.
    fn tell_what_nodes_say(&self) {
        let Ok(state) = self.handle.state() else { return };
        for (node, words) in state.nodes.iter().flat_map(|node| [(node, "peers"), (node, "status")]) {
            let asked = self.handle.command(node.name.as_str(), &["timeout", "5", "weft", words]);
            if let Some(Ok(output)) = asked.ok().map(|mut command| tools::output(&mut command)) {
                eprintln!(
                    "--- {} says: weft {words}\n{}",
                    node.name,
                    String::from_utf8_lossy(&output.stdout)
                );
            }
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Some((mut child, stdin)) = self.keeper.take() {
            if std::thread::panicking() {
                self.tell_what_nodes_say();
                keep_log_of_failure(&self.handle);
            }
            self.handle.request(&Request::Down).ok();
            drop(stdin);
            child.wait().ok();
            self.handle.remove().ok();
        }
    }
}

/// Prints the end of every log of a lab that is about to vanish.
pub(crate) fn keep_log_of_failure(handle: &Handle) {
    let Ok(entries) = std::fs::read_dir(handle.dir().join("log")) else { return };
    let mut logs: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    logs.push(handle.dir().join("keeper.log"));
    logs.sort();
    for log in logs {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        if !lines.is_empty() {
            let end = lines[lines.len().saturating_sub(30)..].join("\n");
            eprintln!("--- the end of {}\n{end}", log.file_name().unwrap_or_default().to_string_lossy());
        }
    }
}

fn may_make_user_namespaces() -> anyhow::Result<()> {
    let read = |path: &str| std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned());
    let switches = [
        ("/proc/sys/user/max_user_namespaces", "0", "user.max_user_namespaces=10000"),
        ("/proc/sys/kernel/unprivileged_userns_clone", "0", "kernel.unprivileged_userns_clone=1"),
        (
            "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
            "1",
            "kernel.apparmor_restrict_unprivileged_userns=0",
        ),
    ];
    for (path, closed, open) in switches {
        if read(path).as_deref() == Some(closed) {
            bail!(
                "this machine does not let ordinary users make user namespaces: run the lab as root, or `sysctl -w {open}`"
            );
        }
    }
    Ok(())
}
