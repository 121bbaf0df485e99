//! The CNI plugin: hands a runtime's call to the daemon of the node and prints what it answers.
//!
//! It holds no state and decides nothing but what needs no daemon: VERSION, refusing a call that is
//! broken, and how long an ADD waits for a daemon that is about to be ready. It uses the standard library and `weft-wire` only, so that it starts fast and links statically.
#![forbid(unsafe_code)]

use std::io::{IsTerminal, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use weft_wire::cni::{
    CniError, CniReply, CniRequest, Code, Command, MAX_INPUT_BYTES, Reply, Request, RequestBody, SpecVersion,
    Success, socket_of_input,
};
use weft_wire::frame;

const SOCKET: &str = "/run/weft/weft.sock";

/// Longer than any attachment takes, shorter than the patience of kubelet (two minutes).
const REPLY_WITHIN: Duration = Duration::from_secs(60);
const SEND_WITHIN: Duration = Duration::from_secs(5);

/// How long an ADD waits for the daemon to be there and ready. The network list is on a node a moment before
/// the daemon answers, and kubelet, once refused, waits for ten seconds and more.
const READY_WITHIN: Duration = Duration::from_secs(8);
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(250);

fn main() -> ExitCode {
    let variable = |name: &str| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
    if variable("CNI_COMMAND").is_none() {
        eprintln!(
            "weft-cni {}: the CNI plugin of weft, for CNI versions 0.4.0, 1.0.0 and 1.1.0.\nA container runtime calls it with CNI_COMMAND set and a network configuration on standard input.",
            env!("CARGO_PKG_VERSION")
        );
    }
    let mut request = CniRequest {
        verb: variable("CNI_COMMAND").unwrap_or_default(),
        container_id: variable("CNI_CONTAINERID").unwrap_or_default(),
        netns: variable("CNI_NETNS").unwrap_or_default(),
        ifname: variable("CNI_IFNAME").unwrap_or_default(),
        args: variable("CNI_ARGS").unwrap_or_default(),
        path: variable("CNI_PATH").unwrap_or_default(),
        stdin: Vec::new(),
    };
    let reply = read_input(&mut request)
        .and_then(|()| call(&request))
        .unwrap_or_else(|error| CniReply::new(SpecVersion::of_input(&request.stdin), Err(error)));
    let mut stdout = std::io::stdout().lock();
    if stdout.write_all(&reply.stdout).and_then(|()| stdout.flush()).is_err() {
        return ExitCode::FAILURE;
    }
    ExitCode::from(u8::try_from(reply.exit_code).unwrap_or(1))
}

fn read_input(request: &mut CniRequest) -> Result<(), CniError> {
    let stdin = std::io::stdin();
    // A person who tries VERSION by hand types no configuration.
    if stdin.is_terminal() {
        return Ok(());
    }
    stdin.lock().take(MAX_INPUT_BYTES as u64 + 1).read_to_end(&mut request.stdin).map(drop).map_err(|error| {
        CniError::new(Code::InputOutput, "standard input cannot be read").with_details(error)
    })
}

fn call(request: &CniRequest) -> Result<CniReply, CniError> {
    // The daemon checks the same again; here it spares a broken call the wait, and needs no daemon.
    let command = Command::parse(request)?;
    if let Command::Version(version) = command {
        return Ok(CniReply::new(version, Ok(Success::Versions)));
    }
    let socket = socket_of_input(&request.stdin).unwrap_or_else(|| PathBuf::from(SOCKET));
    let until = Instant::now() + READY_WITHIN;
    let caller = std::os::unix::process::parent_id();
    loop {
        let (outcome, passes) = ask(&socket, request);
        // The other verbs have callers that ask again at once, or that must not be held up.
        if !passes || !matches!(command, Command::Add(_)) || Instant::now() + LOOK_AGAIN_AFTER >= until {
            return outcome;
        }
        std::thread::sleep(LOOK_AGAIN_AFTER);
        // Nobody hears the answer of an orphan, and the DEL for what it attached may have come already.
        if std::os::unix::process::parent_id() != caller {
            return outcome;
        }
    }
}

/// Asks the daemon once; also tells whether what is in the way passes by itself, soon.
fn ask(socket: &Path, request: &CniRequest) -> (Result<CniReply, CniError>, bool) {
    let connection = match UnixStream::connect(socket) {
        Ok(connection) => connection,
        Err(error) => return (Err(unreachable(request, socket, &error)), is_absent(&error)),
    };
    let reply = match exchange(connection, request) {
        Ok(reply) => reply.into_cni(),
        Err(error) => return (Err(lost(&error)), !is_late(&error)),
    };
    let passes = reply.as_ref().is_ok_and(CniReply::asks_again);
    (reply, passes)
}

fn is_absent(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused)
}

fn is_late(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut)
}

fn lost(error: &std::io::Error) -> CniError {
    let what = if is_late(error) {
        "weftd did not answer in time; `weft status` and the log of weftd name what it waits for"
    } else {
        "weftd ended the connection before it answered; see its log, the runtime tries again"
    };
    CniError::new(Code::TryAgainLater, what).with_details(error)
}

fn exchange(mut connection: UnixStream, request: &CniRequest) -> std::io::Result<Reply> {
    connection.set_write_timeout(Some(SEND_WITHIN))?;
    connection.set_read_timeout(Some(REPLY_WITHIN))?;
    connection.write_all(&frame::encode(&Request { body: Some(RequestBody::Cni(request.clone())) }))?;
    let mut received = Vec::with_capacity(4096);
    let mut chunk = [0; 4096];
    loop {
        let found = frame::length(&received, frame::MAX_REPLY_BYTES).map_err(std::io::Error::other)?;
        if let Some((skip, length)) = found
            && let Some(message) = received.get(skip..skip + length)
        {
            return Reply::from_bytes(message).map_err(std::io::Error::other);
        }
        match connection.read(&mut chunk)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            count => received.extend_from_slice(&chunk[..count]),
        }
    }
}

fn unreachable(request: &CniRequest, socket: &Path, error: &std::io::Error) -> CniError {
    let shown = socket.display();
    let code = if request.verb == "STATUS" { Code::NotAvailable } else { Code::TryAgainLater };
    let message = match error.kind() {
        _ if is_absent(error) => format!(
            "weftd does not run on this node (nothing listens at {shown}); look at its log, and start it: its pod of the DaemonSet weft, or `systemctl start weftd`"
        ),
        std::io::ErrorKind::PermissionDenied => {
            format!("weft-cni may not talk to weftd at {shown}; the container runtime must run as root")
        }
        _ => format!("weft-cni cannot reach weftd at {shown}"),
    };
    CniError::new(code, message).with_details(error)
}
