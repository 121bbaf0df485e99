//! The CNI plugin: hands a runtime's call to the daemon of the node and prints what it answers.
//!
//! It holds no state and decides nothing but what needs no daemon: VERSION, and refusing a call that is
//! broken. It uses the standard library and `weft-wire` only, so that it starts fast and links statically.
#![forbid(unsafe_code)]

use std::io::{IsTerminal, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use weft_wire::cni::{
    CniError, CniReply, CniRequest, Code, Command, MAX_INPUT_BYTES, Reply, Request, RequestBody, SpecVersion,
    Success, socket_of_input,
};
use weft_wire::frame;

const SOCKET: &str = "/run/weft/weft.sock";

/// Longer than any attachment takes, shorter than the patience of kubelet (two minutes).
const REPLY_WITHIN: Duration = Duration::from_secs(60);
const SEND_WITHIN: Duration = Duration::from_secs(5);

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
    if let Command::Version(version) = Command::parse(request)? {
        return Ok(CniReply::new(version, Ok(Success::Versions)));
    }
    let socket = socket_of_input(&request.stdin).unwrap_or_else(|| PathBuf::from(SOCKET));
    let connection = UnixStream::connect(&socket).map_err(|error| unreachable(request, &socket, &error))?;
    let lost = |error: std::io::Error| {
        let what = match error.kind() {
            std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => {
                "weftd did not answer in time; `weft status` and the log of weftd name what it waits for"
            }
            _ => "weftd ended the connection before it answered; see its log, the runtime tries again",
        };
        CniError::new(Code::TryAgainLater, what).with_details(error)
    };
    exchange(connection, request).map_err(lost)?.into_cni()
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
        std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused => format!(
            "weftd does not run on this node (nothing listens at {shown}); look at its log, and start it: its pod of the DaemonSet weft, or `systemctl start weftd`"
        ),
        std::io::ErrorKind::PermissionDenied => {
            format!("weft-cni may not talk to weftd at {shown}; the container runtime must run as root")
        }
        _ => format!("weft-cni cannot reach weftd at {shown}"),
    };
    CniError::new(code, message).with_details(error)
}
