//! One node for one test: a network namespace with a bridge, and the daemon's pod side behind a socket.
//!
//! Everything that a CNI call meets is real (pool, journal, worker threads, kernel); leases, gossip and the overlay are
//! not there.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use prost::Message;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use weft_daemon::attach::Network;
use weft_daemon::journal::Journal;
use weft_daemon::node::pods::{Pods, Readiness};
use weft_ipam::pods::PodPool;
use weft_wire::{api, frame};

pub const BRIDGE: &str = "weft0";
pub const SUBNETS: [&str; 2] = ["10.32.4.0/24", "fd00:32:4::/64"];
const ON_THE_BRIDGE: [&str; 2] = ["10.32.4.1/24", "fd00:32:4::1/64"];

/// Returns whether this machine lets the test make namespaces; says why not.
pub fn possible() -> bool {
    let possible = nix::unistd::geteuid().is_root();
    if !possible {
        weft_tests::lab::skip("needs root to make network namespaces");
    }
    possible
}

/// Finds an executable of this repository.
pub fn executable(name: &str) -> PathBuf {
    let beside = std::env::current_exe().unwrap().ancestors().nth(2).unwrap().to_owned();
    let places = std::env::var_os("WEFT_BIN_DIR").map(PathBuf::from).into_iter().chain([beside]);
    let found = places.map(|place| place.join(name)).find(|path| path.exists());
    found.unwrap_or_else(|| {
        panic!("{name} is not built: run `make build` and set WEFT_BIN_DIR to its directory")
    })
}

/// A thread in namespaces of its own, which does nothing more and keeps them.
struct Holder {
    tid: i32,
    stop: mpsc::Sender<()>,
    thread: Option<JoinHandle<()>>,
}

impl Holder {
    fn new(flags: CloneFlags, inside: impl FnOnce() + Send + 'static) -> Self {
        let (stop, stopped) = mpsc::channel();
        let (tell, told) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            unshare(flags).expect("root may unshare");
            inside();
            tell.send(nix::unistd::gettid().as_raw()).expect("the test waits");
            let _ = stopped.recv();
        });
        let tid = told.recv().expect("the namespace is set up");
        Self { tid, stop, thread: Some(thread) }
    }

    fn namespace(&self, kind: &str) -> PathBuf {
        format!("/proc/{}/task/{}/ns/{kind}", std::process::id(), self.tid).into()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.stop.send(());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        // A joined thread may still be on its way out of the kernel, with its namespaces in its hands.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while self.namespace("net").exists() && std::time::Instant::now() < deadline {
            std::thread::yield_now();
        }
    }
}

/// A pod's network namespace.
pub struct Pod(Holder);

impl Pod {
    pub fn new() -> Self {
        Self(Holder::new(CloneFlags::CLONE_NEWNET, || {}))
    }

    pub fn netns(&self) -> String {
        self.0.namespace("net").to_string_lossy().into_owned()
    }

    pub fn try_run(&self, words: &str) -> Output {
        let netns = format!("--net={}", self.netns());
        Command::new("nsenter").arg(netns).args(words.split(' ')).output().unwrap()
    }

    pub fn run(&self, words: &str) -> String {
        succeeded(words, self.try_run(words))
    }

    pub fn json(&self, words: &str) -> Value {
        json_of(&self.run(words))
    }
}

/// A call of a CNI plugin that has begun.
pub struct Calling(Child);

impl Calling {
    /// The plugin's answer, or its error as the specification has it.
    pub fn answer(self) -> Result<Value, Value> {
        let output = self.0.wait_with_output().unwrap();
        let answer = if output.stdout.is_empty() {
            Value::Null
        } else {
            serde_json::from_slice(&output.stdout)
                .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stdout)))
        };
        if output.status.success() { Ok(answer) } else { Err(answer) }
    }

    /// Waits until the plugin sleeps, as one does that tried and will try again.
    pub fn await_sleep(&self) {
        let file = format!("/proc/{}/syscall", self.0.id());
        let asleep = nix::libc::SYS_clock_nanosleep.to_string();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        loop {
            let said = std::fs::read_to_string(&file).unwrap();
            if said.split(' ').next() == Some(&asleep) {
                return;
            }
            assert!(std::time::Instant::now() < deadline, "it does not wait: {said}");
            std::thread::yield_now();
        }
    }

    pub fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// A node.
pub struct Node {
    holder: Holder,
    pub dir: PathBuf,
    /// What stands in the way of attaching pods; empty for nothing.
    pub blocked: Arc<Mutex<String>>,
    daemon: Option<(tokio::sync::oneshot::Sender<()>, JoinHandle<()>)>,
}

impl Node {
    /// A node with a bridge and a daemon.
    pub fn new() -> Self {
        let mut node = Self::without_bridge();
        for line in ["link add weft0 type bridge", "link set weft0 address 02:00:00:00:00:fe mtu 1450"] {
            node.run(&format!("ip {line}"));
        }
        for address in ON_THE_BRIDGE {
            node.run(&format!("ip addr add {address} dev weft0 nodad"));
        }
        node.run("ip link set weft0 up");
        node.start();
        node
    }

    /// A node on which nothing is set up.
    pub fn without_bridge() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("weft-cni-{}-{number}", std::process::id()));
        std::fs::create_dir(&dir).expect("a new directory");
        let holder = Holder::new(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS, || {
            let none = None::<&str>;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
            // Where plugins and their callers keep state.
            for place in ["/run", "/var/lib"] {
                mount(Some("tmpfs"), place, Some("tmpfs"), MsFlags::empty(), none).unwrap();
            }
        });
        let node = Self { holder, dir, blocked: Arc::default(), daemon: None };
        node.run("ip link set lo up");
        node.run("sysctl -q -w net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv6.conf.default.accept_dad=0");
        node
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.join("weft.sock")
    }

    /// Runs the pod side of the daemon in this node.
    pub fn start(&mut self) {
        let (socket, journal) = (self.socket(), self.dir.join("pods.db"));
        let (net, blocked) = (self.holder.namespace("net"), self.blocked.clone());
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let (tell, told) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            nix::sched::setns(std::fs::File::open(net).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(serve(&socket, &journal, blocked, stopped, tell));
        });
        told.recv().expect("the daemon listens");
        self.daemon = Some((stop, thread));
    }

    pub fn stop(&mut self) {
        if let Some((stop, thread)) = self.daemon.take() {
            let _ = stop.send(());
            thread.join().unwrap();
            let _ = std::fs::remove_file(self.socket());
        }
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={}", self.holder.namespace("net").display()))
            .arg(format!("--mount={}", self.holder.namespace("mnt").display()))
            .arg(program);
        command
    }

    pub fn run(&self, words: &str) -> String {
        let (program, arguments) = words.split_once(' ').unwrap();
        succeeded(words, self.command(program).args(arguments.split(' ')).output().unwrap())
    }

    pub fn json(&self, words: &str) -> Value {
        json_of(&self.run(words))
    }

    /// Runs a program with these variables and this input, as a container runtime does.
    pub fn exec(
        &self,
        program: &Path,
        arguments: &[&str],
        environment: &[(&str, &str)],
        input: &[u8],
    ) -> Output {
        self.spawn(program, arguments, environment, input).wait_with_output().unwrap()
    }

    fn spawn(&self, program: &Path, arguments: &[&str], environment: &[(&str, &str)], input: &[u8]) -> Child {
        let mut child = self
            .command(&program.to_string_lossy())
            .args(arguments)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .envs(environment.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let _ = child.stdin.take().unwrap().write_all(input);
        child
    }

    /// Calls a CNI plugin; its answer, or its error as the specification has it.
    pub fn cni(
        &self,
        plugin: &Path,
        verb: &str,
        container: &str,
        ifname: &str,
        netns: &str,
        config: &Value,
    ) -> Result<Value, Value> {
        self.begin(plugin, verb, container, ifname, netns, config).answer()
    }

    /// Begins a call of a CNI plugin.
    pub fn begin(
        &self,
        plugin: &Path,
        verb: &str,
        container: &str,
        ifname: &str,
        netns: &str,
        config: &Value,
    ) -> Calling {
        let environment = [
            ("CNI_COMMAND", verb),
            ("CNI_CONTAINERID", container),
            ("CNI_NETNS", netns),
            ("CNI_IFNAME", ifname),
            ("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web"),
            ("CNI_PATH", "/usr/lib/cni"),
        ];
        Calling(self.spawn(plugin, &[], &environment, config.to_string().as_bytes()))
    }

    /// Calls weft-cni.
    pub fn weft(
        &self,
        verb: &str,
        container: &str,
        ifname: &str,
        netns: &str,
        config: &Value,
    ) -> Result<Value, Value> {
        self.cni(&executable("weft-cni"), verb, container, ifname, netns, config)
    }

    /// The network configuration of this node's daemon.
    pub fn config(&self, version: &str) -> Value {
        json!({"cniVersion": version, "name": "podnet", "type": "weft-cni", "socket": self.socket()})
    }

    /// The names of the node's interfaces.
    pub fn links(&self) -> Vec<String> {
        let links = self.json("ip -j link");
        links.as_array().unwrap().iter().map(|link| link["ifname"].as_str().unwrap().to_owned()).collect()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.stop();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

async fn serve(
    socket: &Path,
    journal: &Path,
    blocked: Arc<Mutex<String>>,
    mut stopped: tokio::sync::oneshot::Receiver<()>,
    ready: mpsc::Sender<()>,
) {
    let subnets = SUBNETS.map(|subnet| subnet.parse().unwrap());
    let (journal, recovered) = Journal::open(journal, "boot").unwrap();
    let (done, mut finished) = tokio::sync::mpsc::channel(16);
    let mut pods = Pods::new(PodPool::new(&subnets, &[], 0), journal, recovered.attachments, done);
    let listener = tokio::net::UnixListener::bind(socket).unwrap();
    let (call, mut calls) = tokio::sync::mpsc::channel(16);
    ready.send(()).unwrap();
    loop {
        tokio::select! {
            _ = &mut stopped => return,
            connection = listener.accept() => drop(tokio::spawn(converse(connection.unwrap().0, call.clone()))),
            work = finished.recv() => drop(pods.handle_done(work.unwrap())),
            request = calls.recv() => {
                let (request, answer) = request.unwrap();
                let readiness: Readiness = match blocked.lock().unwrap().as_str() {
                    "" => Ok(Network { bridge: BRIDGE.into(), mtu: 1450, hairpin: true }),
                    step => Err(step.into()),
                };
                pods.handle_call(request, answer, readiness);
            }
        }
    }
}

type Call = (api::CniRequest, tokio::sync::oneshot::Sender<api::Reply>);

async fn converse(mut connection: tokio::net::UnixStream, calls: tokio::sync::mpsc::Sender<Call>) {
    let mut received = Vec::new();
    let request = loop {
        if let Ok(Some((skip, length))) = frame::length(&received, frame::MAX_REQUEST_BYTES)
            && let Some(message) = received.get(skip..skip + length)
        {
            break api::Request::decode(message).unwrap();
        }
        if connection.read_buf(&mut received).await.unwrap_or(0) == 0 {
            return;
        }
    };
    let Some(api::RequestBody::Cni(request)) = request.body else { panic!("the shim makes CNI calls only") };
    let (answer, answered) = tokio::sync::oneshot::channel();
    if calls.send((request, answer)).await.is_ok()
        && let Ok(reply) = answered.await
    {
        let _ = connection.write_all(&frame::encode(&reply)).await;
    }
}

fn succeeded(words: &str, output: Output) -> String {
    assert!(output.status.success(), "{words}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn json_of(text: &str) -> Value {
    if text.trim().is_empty() { json!([]) } else { serde_json::from_str(text).unwrap() }
}
