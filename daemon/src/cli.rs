//! The operator's commands: one request to the local socket, one answer as a table or as JSON.
//!
//! It decides nothing about the node and reads no kernel: what it shows is what the daemon knows. Only `host.rs` has commands
//! that work without one.

mod host;
mod render;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory, Parser, Subcommand, ValueEnum};
use prost::Message;
use serde::Serialize;
use serde_json::{Value, json};
use weft_wire::api::{
    ClusterKeyRequest, Empty, ForgetRequest, PingRequest, Reply, ReplyBody, Request, RequestBody,
    SCHEMA_VERSION, SiteRequest, TraceRequest,
};
use weft_wire::frame::{self, MAX_REPLY_BYTES};
use weft_wire::seal::ClusterKey;
use weft_wire::site::SiteKey;

use crate::config::INSTANCE;

/// The daemon answers everything within this, or something is wrong.
const PATIENCE: Duration = Duration::from_secs(15);

const UNHEALTHY: u8 = 1;
const UNREACHABLE: u8 = 3;

/// Asks this node's weftd.
#[derive(Debug, Parser)]
#[command(name = "weft", version)]
pub struct Cli {
    /// The daemon's socket.
    #[arg(long, global = true, default_value = "/run/weft/weft.sock")]
    socket: PathBuf,
    /// How to show the answer.
    #[arg(short, long, global = true, value_enum, default_value = "table")]
    output: Format,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// For people.
    Table,
    /// For people with wide terminals.
    Wide,
    /// For programs.
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The node at a glance; exits with 1 when pods cannot be attached or something needs a person.
    Status,
    /// Exits with 0 when pods can be attached, and the daemon that answers is of WEFT_INSTANCE, if that is set.
    Ready,
    /// Exits with 0 when a daemon answers.
    Alive,
    /// The other nodes, as this one sees them.
    Peers,
    /// The routes to the other nodes' pods.
    Routes,
    /// Every lease of the store.
    Leases,
    /// The pods of this node.
    Pods,
    /// Follow a packet between two pods; names the first hop that is broken.
    Trace {
        /// A pod of this node: its name, NAMESPACE/NAME, container id or address.
        source: String,
        /// The other pod: the same, or the address of a pod on another node.
        destination: String,
    },
    /// Measure the round trip of gossip to a node, or to all of them.
    Ping {
        /// The node; all alive ones by default.
        node: Option<String>,
    },
    /// Look for what is wrong, and say what to do.
    Doctor,
    /// Show the status again and again until interrupted.
    Watch {
        /// Seconds between two looks.
        #[arg(long, default_value_t = 2)]
        interval: u64,
    },
    /// Take the node out of the cluster: leases released, every kernel object of weft removed.
    Leave,
    /// Put the CNI plugin and the network list where the container runtime looks, the list last.
    InstallCni(host::InstallArgs),
    /// Restore this machine: network list, plugin, kernel objects; refused while pods are attached.
    Uninstall(host::UninstallArgs),
    /// Forget a dead node on all nodes at once, rather than in ten minutes.
    Forget {
        /// The node.
        node: String,
    },
    /// The keys that seal gossip.
    #[command(subcommand)]
    ClusterKey(KeyCommand),
    /// The sites of the mesh, as this node sees them.
    Sites,
    /// Bring this node's site into the mesh that a token is of; on a node with the site's key.
    Join {
        /// What `weft site invite` printed at the other site; `-` reads it from standard input.
        token: String,
    },
    /// What this node's site says of others, and of its own nodes; on a node with the site's key.
    #[command(subcommand)]
    Site(SiteCommand),
    /// Sign with a new node key from now on; the old one endorses it.
    RotateKey,
    /// Print a completion script.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Print the version.
    Version,
}

#[derive(Debug, Clone, Subcommand)]
enum SiteCommand {
    /// Let another site in: its nodes are believed for what lies in the prefixes.
    Admit {
        /// The other site's name.
        site: String,
        /// Its key, as `weft sites` shows it there.
        key: String,
        /// What it may announce.
        #[arg(required = true)]
        prefixes: Vec<String>,
    },
    /// Put a site out, and what came in through it.
    Expel {
        /// The site.
        site: String,
    },
    /// Declare a node's key void in all sites, because it was stolen.
    Void {
        /// The node; without it all certificates so far are void, and the nodes get others.
        node: Option<String>,
    },
    /// Print a token that brings one other site in, once: `weft join TOKEN` on a node that speaks for it.
    Invite {
        /// The only site that may use it; any without a name.
        site: Option<String>,
        /// What that site may announce at most; what it says itself without one. Can be repeated.
        #[arg(long = "cidr")]
        prefixes: Vec<String>,
        /// For how long the token is good: 30s, 10m, 1h. It is void when this daemon ends.
        #[arg(long, default_value = "1h", value_parser = seconds)]
        valid: u64,
        /// Where the other site finds this node, if not at the addresses that it announces. Can be repeated.
        #[arg(long = "address")]
        addresses: Vec<String>,
    },
    /// Take this site out: the others drop its routes, and it keeps its inside.
    Leave,
    /// Give all sites that are in a new cluster key.
    Rekey,
    /// Print a new secret key for a site; changes nothing.
    GenerateKey,
}

#[derive(Debug, Subcommand)]
enum KeyCommand {
    /// The ids of the keys in the ring; the first one seals.
    List,
    /// Add a key that opens; do this on every node first.
    Add {
        /// 64 hexadecimal digits; `-` reads them from standard input.
        key: String,
    },
    /// Seal with a key from now on; do this once every node has it.
    Use {
        /// The key's id.
        id: String,
    },
    /// Remove a key; do this once no node seals with it.
    Remove {
        /// The key's id.
        id: String,
    },
    /// Print a new key; changes nothing.
    Generate,
}

/// Runs one command.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match cli.run() {
        Ok(code) => code,
        Err(failure) => {
            // A reader that went away, as `weft peers | head` does, is no one to complain to.
            let _ = writeln!(io::stderr(), "weft: {}", failure.message);
            ExitCode::from(failure.code)
        }
    }
}

struct Failure {
    code: u8,
    message: String,
}

fn failure(code: u8, message: impl Into<String>) -> Failure {
    Failure { code, message: message.into() }
}

impl Cli {
    fn run(&self) -> Result<ExitCode, Failure> {
        let empty = Empty {};
        let body = match &self.command {
            Command::Status => RequestBody::Status(empty),
            Command::Ready => return self.ready(std::env::var(INSTANCE).ok().as_deref()),
            Command::Alive => return self.ask(RequestBody::Status(empty)).map(|_| ExitCode::SUCCESS),
            Command::Peers => RequestBody::Peers(empty),
            Command::Routes => RequestBody::Routes(empty),
            Command::Leases => RequestBody::Leases(empty),
            Command::Pods => RequestBody::Pods(empty),
            Command::Doctor => RequestBody::Doctor(empty),
            Command::Leave => RequestBody::Leave(empty),
            Command::RotateKey => RequestBody::RotateNodeKey(empty),
            Command::Forget { node } => RequestBody::Forget(ForgetRequest { node: node.clone() }),
            Command::Trace { source, destination } => {
                RequestBody::Trace(TraceRequest { source: source.clone(), destination: destination.clone() })
            }
            Command::ClusterKey(command) => match key_request(command)? {
                Some(request) => RequestBody::ClusterKey(request),
                None => return self.generate_key(),
            },
            Command::Sites => RequestBody::Sites(empty),
            Command::Join { token } => {
                let token = if token == "-" { read_line()? } else { token.clone() };
                RequestBody::Site(SiteRequest { action: "join".into(), token, ..SiteRequest::default() })
            }
            Command::Site(command) => match site_request(command) {
                Some(request) => RequestBody::Site(request),
                None => return self.generate_site_key(),
            },
            Command::InstallCni(arguments) => return self.install_cni(arguments),
            Command::Uninstall(arguments) => return self.uninstall(arguments),
            Command::Ping { node } => return self.ping(node.as_deref()),
            Command::Watch { interval } => return self.watch(*interval),
            Command::Completions { shell } => {
                clap_complete::generate(*shell, &mut Self::command(), "weft", &mut io::stdout());
                return Ok(ExitCode::SUCCESS);
            }
            Command::Version => {
                let version = env!("CARGO_PKG_VERSION");
                let json = json!({ "schema_version": SCHEMA_VERSION, "version": version });
                return self.print(&json, || format!("weft {version}\n"), true);
            }
        };
        let reply = self.ask(body)?;
        self.show(&reply)
    }

    fn show(&self, reply: &ReplyBody) -> Result<ExitCode, Failure> {
        let wide = self.output == Format::Wide;
        match reply {
            ReplyBody::Status(status) => {
                let fine = status.ready && status.warnings.is_empty();
                self.print(&with_schema(status), || render::status(status), fine)
            }
            ReplyBody::Peers(peers) => self.print(&with_schema(peers), || render::peers(peers, wide), true),
            ReplyBody::Routes(routes) => self.print(&with_schema(routes), || render::routes(routes), true),
            ReplyBody::Leases(leases) => self.print(&with_schema(leases), || render::leases(leases), true),
            ReplyBody::Pods(pods) => self.print(&with_schema(pods), || render::pods(pods), true),
            ReplyBody::Trace(trace) => self.print(&with_schema(trace), || render::trace(trace), trace.ok),
            ReplyBody::Doctor(doctor) => {
                self.print(&with_schema(doctor), || render::doctor(doctor), doctor.ok)
            }
            ReplyBody::Done(done) => self.print(&with_schema(done), || format!("{}\n", done.message), true),
            ReplyBody::ClusterKeys(keys) => self.print(&with_schema(keys), || render::keys(keys), true),
            ReplyBody::Sites(sites) => {
                let fine = sites.sites.iter().all(|site| site.problems.is_empty());
                self.print(&with_schema(sites), || render::sites(sites), fine)
            }
            ReplyBody::Ping(_) | ReplyBody::Cni(_) | ReplyBody::Error(_) => Err(failure(
                UNREACHABLE,
                "the daemon answered something else; use a weft of the same release",
            )),
        }
    }

    fn print(&self, json: &Value, text: impl FnOnce() -> String, fine: bool) -> Result<ExitCode, Failure> {
        let text = if self.output == Format::Json { format!("{json:#}\n") } else { text() };
        // As above: a reader that went away is no failure of the node.
        let _ = io::stdout().write_all(text.as_bytes());
        Ok(if fine { ExitCode::SUCCESS } else { ExitCode::from(UNHEALTHY) })
    }

    /// While a daemon takes over there are two, and one answers: an orchestrator that asks for each of them must not take the
    /// other's answer for its own.
    fn ready(&self, own: Option<&str>) -> Result<ExitCode, Failure> {
        let ReplyBody::Status(status) = self.ask(RequestBody::Status(Empty {}))? else {
            return Err(failure(
                UNREACHABLE,
                "the daemon answered something else; use a weft of the same release",
            ));
        };
        let other = own.is_some_and(|own| !own.is_empty() && own != status.instance);
        let (ready, reason) = match (other, status.ready) {
            (true, _) => (false, format!("another daemon serves this node: {:?}", status.instance)),
            (false, ready) => (ready, status.blocked),
        };
        let json = json!({ "schema_version": SCHEMA_VERSION, "ready": ready, "reason": reason });
        self.print(&json, || if ready { "ready\n".into() } else { format!("not ready: {reason}\n") }, ready)
    }

    fn ping(&self, node: Option<&str>) -> Result<ExitCode, Failure> {
        let nodes = match node {
            Some(node) => vec![node.to_owned()],
            None => match self.ask(RequestBody::Peers(Empty {}))? {
                ReplyBody::Peers(peers) => peers.peers.into_iter().map(|peer| peer.node).collect(),
                _ => Vec::new(),
            },
        };
        let mut pongs = Vec::new();
        for node in nodes {
            let outcome = self.ask(RequestBody::Ping(PingRequest { node: node.clone() }));
            let rtt_ms = match outcome {
                Ok(ReplyBody::Ping(pong)) => Ok(pong.rtt_ms),
                Ok(_) => Err("the daemon answered something else".to_owned()),
                Err(failure) if failure.code == UNREACHABLE => return Err(failure),
                Err(failure) => Err(failure.message),
            };
            pongs.push((node, rtt_ms));
        }
        let fine = pongs.iter().all(|(_, rtt)| rtt.is_ok());
        let json = json!({
            "schema_version": SCHEMA_VERSION,
            "pings": pongs.iter().map(|(node, rtt)| json!({
                "node": node, "ok": rtt.is_ok(), "rtt_ms": rtt.as_ref().ok(), "error": rtt.as_ref().err(),
            })).collect::<Vec<_>>(),
        });
        self.print(&json, || render::pings(&pongs), fine)
    }

    fn watch(&self, interval: u64) -> Result<ExitCode, Failure> {
        loop {
            if let ReplyBody::Status(status) = self.ask(RequestBody::Status(Empty {}))? {
                let line = if self.output == Format::Json {
                    format!("{}\n", with_schema(&status))
                } else {
                    render::status_line(&status)
                };
                if io::stdout().write_all(line.as_bytes()).is_err() {
                    return Ok(ExitCode::SUCCESS);
                }
            }
            std::thread::sleep(Duration::from_secs(interval.max(1)));
        }
    }

    fn generate_key(&self) -> Result<ExitCode, Failure> {
        let bytes = crate::state::random().map_err(|error| failure(UNHEALTHY, error.to_string()))?;
        let key = ClusterKey::from_bytes(bytes);
        let json = json!({ "schema_version": SCHEMA_VERSION, "id": key.id().to_string(), "key": key.to_secret_text() });
        self.print(&json, || format!("{}\n", key.to_secret_text()), true)
    }

    fn generate_site_key(&self) -> Result<ExitCode, Failure> {
        let bytes = crate::state::random().map_err(|error| failure(UNHEALTHY, error.to_string()))?;
        let key = SiteKey::from_secret(bytes);
        let text = key.to_secret_text();
        let json =
            json!({ "schema_version": SCHEMA_VERSION, "public": key.public().to_string(), "key": *text });
        self.print(&json, || format!("{}\n", *text), true)
    }

    fn ask(&self, body: RequestBody) -> Result<ReplyBody, Failure> {
        let reply = exchange(&self.socket, &Request { body: Some(body) }).map_err(|error| {
            let advice = match error.kind() {
                io::ErrorKind::NotFound => {
                    "weftd does not run, or listens on another socket: see `systemctl status weftd`"
                }
                io::ErrorKind::ConnectionRefused => "weftd has stopped: see its log",
                io::ErrorKind::PermissionDenied => "run the command with sudo",
                _ => "see the log of weftd",
            };
            failure(UNREACHABLE, format!("no answer on {}: {error}; {advice}", self.socket.display()))
        })?;
        match reply.body {
            Some(ReplyBody::Error(error)) => Err(failure(UNHEALTHY, error.message)),
            Some(body) => Ok(body),
            None => Err(failure(UNREACHABLE, "the daemon answered nothing; use a weft of the same release")),
        }
    }
}

fn site_request(command: &SiteCommand) -> Option<SiteRequest> {
    let request = SiteRequest::default();
    Some(match command.clone() {
        SiteCommand::Admit { site, key, prefixes } => {
            SiteRequest { action: "admit".into(), site, key, prefixes, ..request }
        }
        SiteCommand::Expel { site } => SiteRequest { action: "expel".into(), site, ..request },
        SiteCommand::Void { node } => {
            SiteRequest { action: "void".into(), node: node.unwrap_or_default(), ..request }
        }
        SiteCommand::Invite { site, prefixes, valid, addresses } => SiteRequest {
            action: "invite".into(),
            site: site.unwrap_or_default(),
            prefixes,
            valid_s: valid,
            addresses,
            ..request
        },
        SiteCommand::Leave => SiteRequest { action: "leave".into(), ..request },
        SiteCommand::Rekey => SiteRequest { action: "rekey".into(), ..request },
        SiteCommand::GenerateKey => return None,
    })
}

fn read_line() -> Result<String, Failure> {
    let mut text = String::new();
    io::stdin().read_to_string(&mut text).map_err(|error| failure(2, error.to_string()))?;
    Ok(text.trim().to_owned())
}

fn seconds(text: &str) -> Result<u64, String> {
    crate::config::parse_duration(text).map(|duration| duration.as_secs())
}

fn key_request(command: &KeyCommand) -> Result<Option<ClusterKeyRequest>, Failure> {
    let (action, key) = match command {
        KeyCommand::List => ("list", String::new()),
        KeyCommand::Add { key } if key == "-" => ("add", read_line()?),
        KeyCommand::Add { key } => ("add", key.clone()),
        KeyCommand::Use { id } => ("use", id.clone()),
        KeyCommand::Remove { id } => ("remove", id.clone()),
        KeyCommand::Generate => return Ok(None),
    };
    Ok(Some(ClusterKeyRequest { action: action.into(), key }))
}

fn with_schema(reply: &impl Serialize) -> Value {
    let mut value = serde_json::to_value(reply).expect("replies have only text keys and finite numbers");
    if let Value::Object(members) = &mut value {
        members.insert("schema_version".into(), SCHEMA_VERSION.into());
    }
    value
}

fn exchange(socket: &Path, request: &Request) -> io::Result<Reply> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(&frame::encode(request))?;
    let mut received = Vec::new();
    loop {
        let mut chunk = [0; 64 * 1024];
        let read = stream.read(&mut chunk)?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        received.extend_from_slice(&chunk[..read]);
        let header = frame::length(&received, MAX_REPLY_BYTES).map_err(io::Error::other)?;
        if let Some((start, length)) = header
            && let Some(frame) = received.get(start..start + length)
        {
            return Reply::decode(frame).map_err(io::Error::other);
        }
    }
}
