//! A real etcd: started on loopback with its own directory and free ports, ended with its value.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use weft_ipam::store::etcd::EtcdOptions;

use super::support::Directory;

/// What etcd writes to its log last, and what tests wait with.
const PATIENCE: Duration = Duration::from_secs(60);

/// One member, which may be stopped and started again.
pub struct Etcd {
    directory: Directory,
    arguments: Vec<String>,
    /// The port of the clients, without TLS: the tests' own way to etcd.
    pub port: u16,
    child: Option<Child>,
}

/// Says that etcd is missing; the caller goes on without it, and fails under CI.
pub fn missing() -> bool {
    let missing = Command::new("etcd").arg("--version").stdout(Stdio::null()).status().is_err();
    if missing {
        println!("SKIP: etcd is not installed: run `make deps`");
        assert!(std::env::var_os("CI").is_none(), "SKIP is a failure under CI: etcd");
    }
    missing
}

/// Returns ports that nobody has at the moment, each once, and below those that the kernel gives to connections
/// (`net.ipv4.ip_local_port_range`): a server is about to take them, and takes them again after a restart.
pub fn free_ports<const N: usize>() -> [u16; N] {
    static TAKEN: AtomicU16 = AtomicU16::new(0);
    // Another run of these tests begins elsewhere.
    let first = 20_000 + u16::try_from(std::process::id() % 10_000).expect("it is below 10,000");
    let next = || first + TAKEN.fetch_add(1, Ordering::Relaxed);
    // Not by a listener: a program that starts meanwhile would hold a copy of it for a while.
    let free = |port: &u16| TcpStream::connect(("127.0.0.1", *port)).is_err();
    [(); N].map(|()| std::iter::repeat_with(next).find(free).expect("it ends with a port"))
}

pub fn url(port: u16) -> String {
    format!("http://127.0.0.1:{port}")
}

/// Returns what a node needs for these members.
pub fn options(endpoints: &[String]) -> EtcdOptions {
    EtcdOptions {
        endpoints: endpoints.iter().map(|url| url.parse().expect("an endpoint")).collect(),
        prefix: "/weft".into(),
        ca_file: None,
        identity: None,
        user: None,
        node: "n1".parse().expect("a name"),
        abandon_after: Duration::from_secs(7 * 24 * 3600),
    }
}

impl Etcd {
    /// Starts a cluster of one.
    pub fn start() -> Self {
        Self::with(|_| Vec::new())
    }

    /// Starts a cluster of one with more arguments.
    pub fn with(more: impl FnOnce(&Directory) -> Vec<String>) -> Self {
        let [port, peer] = free_ports();
        let more = |directory: &Directory| {
            let mut arguments = more(directory);
            arguments.push(format!("--initial-cluster=m1={}", url(peer)));
            arguments
        };
        let mut etcd = Self::member("m1", port, peer, more);
        etcd.launch();
        etcd.await_healthy();
        etcd
    }

    /// Starts a cluster of three; each is up once two are.
    pub fn three() -> [Self; 3] {
        let ports: [u16; 3] = free_ports();
        let peers: [u16; 3] = free_ports();
        let all = (1..).zip(peers).map(|(number, peer)| format!("m{number}={}", url(peer)));
        let all = all.collect::<Vec<_>>().join(",");
        let mut members = [0, 1, 2].map(|at| {
            let cluster = vec![format!("--initial-cluster={all}")];
            Self::member(&format!("m{}", at + 1), ports[at], peers[at], |_| cluster)
        });
        members.iter_mut().for_each(Self::launch);
        members.iter_mut().for_each(Self::await_healthy);
        members
    }

    fn member(name: &str, port: u16, peer: u16, more: impl FnOnce(&Directory) -> Vec<String>) -> Self {
        let directory = Directory::new();
        let mut arguments = vec![
            format!("--name={name}"),
            format!("--data-dir={}", directory.join("data").display()),
            format!("--listen-peer-urls={}", url(peer)),
            format!("--initial-advertise-peer-urls={}", url(peer)),
            format!("--advertise-client-urls={}", url(port)),
            "--logger=zap".into(),
            "--log-level=warn".into(),
        ];
        let more = more(&directory);
        if !more.iter().any(|argument| argument.starts_with("--listen-client-urls")) {
            arguments.push(format!("--listen-client-urls={}", url(port)));
        }
        arguments.extend(more.into_iter().map(|argument| argument.replace("HTTP", &url(port))));
        Self { directory, arguments, port, child: None }
    }

    pub fn launch(&mut self) {
        let log = std::fs::File::options().create(true).append(true).open(self.directory.join("log"));
        // It must not outlive a test that is killed.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "etcd"])
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log.expect("a log file"))
            .spawn();
        self.child = Some(child.expect("setpriv runs"));
    }

    pub fn await_healthy(&mut self) {
        let bound = Instant::now() + PATIENCE;
        // With users it refuses, and so it is up.
        let serves =
            |answer: Value| !answer["header"].is_null() || answer["error"].to_string().contains("user name");
        while !self.try_post("kv/range", &json!({"key": "AA=="})).is_some_and(serves) {
            let ended = self.child.as_mut().and_then(|child| child.try_wait().expect("our own child"));
            assert!(ended.is_none() && Instant::now() < bound, "etcd is not up: {}", self.log());
            std::thread::yield_now();
        }
    }

    pub fn url(&self) -> String {
        url(self.port)
    }

    pub fn options(&self) -> EtcdOptions {
        options(&[self.url()])
    }

    pub fn directory(&self) -> &Directory {
        &self.directory
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.join("log")).unwrap_or_default()
    }

    /// Ends it as a power cut would.
    pub fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("our own child");
            child.wait().expect("our own child");
        }
    }

    pub fn restart(&mut self) {
        self.stop();
        self.launch();
        self.await_healthy();
    }

    /// Makes it deaf, or hear again.
    pub fn pause(&self, pause: bool) {
        let child = self.child.as_ref().expect("it runs");
        let pid = Pid::from_raw(i32::try_from(child.id()).expect("a process id"));
        kill(pid, if pause { Signal::SIGSTOP } else { Signal::SIGCONT }).expect("our own child");
    }

    /// Asks through etcd's JSON gateway, which has nothing of weft in it; an error of etcd is an answer.
    pub fn post(&self, path: &str, body: &Value) -> Value {
        self.try_post(path, body).unwrap_or_else(|| panic!("no answer to {path}: {}", self.log()))
    }

    /// Is [`Etcd::post`] for a member that may be down.
    pub fn try_post(&self, path: &str, body: &Value) -> Option<Value> {
        self.post_as(None, path, body)
    }

    /// Is [`Etcd::try_post`] with a token.
    pub fn post_as(&self, token: Option<&str>, path: &str, body: &Value) -> Option<Value> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(10))).ok()?;
        let body = body.to_string();
        let token = token.map(|token| format!("Authorization: {token}\r\n")).unwrap_or_default();
        let head = format!("POST /v3/{path} HTTP/1.0\r\nContent-Length: {}\r\n{token}\r\n", body.len());
        stream.write_all((head + &body).as_bytes()).ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        serde_json::from_str(text.split_once("\r\n\r\n")?.1).ok()
    }

    /// Returns the revision as etcd tells it.
    pub fn revision(&self) -> u64 {
        let answer = self.post("kv/range", &json!({"key": "AA=="}));
        answer["header"]["revision"].as_str().expect("a revision").parse().expect("a number")
    }

    /// Returns whether this member leads.
    pub fn leads(&self) -> bool {
        let status = self.post("maintenance/status", &json!({}));
        !status["leader"].is_null() && status["leader"] == status["header"]["member_id"]
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.stop();
    }
}
