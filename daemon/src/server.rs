//! The local socket: frames in, calls to the loop, frames out.
//!
//! It answers nothing itself but what is no request. Invariants: one connection cannot hold up another;
//! sizes are checked before anything is allocated; a silent client is cut off.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::timeout;
use tracing::{debug, warn};
use weft_wire::api::{Reply, Request};
use weft_wire::frame::{self, MAX_REQUEST_BYTES};

/// More connections wait to be accepted.
const CONNECTIONS: usize = 128;
/// A client that sends nothing for so long is cut off.
const IDLE: Duration = Duration::from_secs(60);

/// A request with the place for its answer.
#[derive(Debug)]
pub struct Call {
    /// What is asked.
    pub request: Request,
    /// Whether the caller may change things: root, or the daemon's own user.
    pub privileged: bool,
    /// Where the answer goes; dropping it closes the connection.
    pub reply: oneshot::Sender<Reply>,
}

/// A socket that cannot be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {}: {source}; create its directory, or set node.socket to another path", path.display())]
pub struct ListenError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Makes the socket and serves it until the loop goes away; calls go to `calls`.
///
/// A socket file that an earlier daemon left is replaced: the lock on the state directory has shown that
/// no other daemon of this node runs.
///
/// # Errors
/// [`ListenError`] where the path cannot be used.
pub fn serve(path: &Path, calls: mpsc::Sender<Call>) -> Result<(), ListenError> {
    let listener = listen(path).map_err(|source| ListenError { path: path.into(), source })?;
    tokio::spawn(accept(listener, calls));
    Ok(())
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    if fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
        fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    // Anyone may look; who may change things is told by SO_PEERCRED.
    fs::set_permissions(path, fs::Permissions::from_mode(0o666))?;
    Ok(listener)
}

async fn accept(listener: UnixListener, calls: mpsc::Sender<Call>) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let calls = calls.clone();
                tokio::spawn(async move {
                    if let Err(error) = converse(stream, calls).await {
                        debug!(err = %error, "connection on the local socket ended");
                    }
                    drop(slot);
                });
            }
            Err(error) => {
                warn!(err = %error, "local socket accepts no connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        if calls.is_closed() {
            return;
        }
    }
}

async fn converse(mut stream: UnixStream, calls: mpsc::Sender<Call>) -> io::Result<()> {
    let uid = stream.peer_cred()?.uid();
    let privileged = uid == 0 || uid == nix::unistd::geteuid().as_raw();
    let mut buffer = Vec::new();
    while let Some(frame) = read_frame(&mut stream, &mut buffer).await? {
        let reply = match Request::decode(&*frame) {
            Err(_) => Reply::refusal(
                1,
                "the request is no message of weft's socket; use a weft of the same release",
            ),
            Ok(request) => {
                let (reply, answer) = oneshot::channel();
                let gone = || io::Error::other("the daemon is stopping");
                calls.send(Call { request, privileged, reply }).await.map_err(|_| gone())?;
                answer.await.map_err(|_| gone())?
            }
        };
        stream.write_all(&frame::encode(&reply)).await?;
    }
    Ok(())
}

/// Reads one frame; `None` where the client has hung up between two.
async fn read_frame(stream: &mut UnixStream, buffer: &mut Vec<u8>) -> io::Result<Option<Vec<u8>>> {
    loop {
        let header = frame::length(buffer, MAX_REQUEST_BYTES)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        if let Some((start, length)) = header
            && buffer.len() >= start + length
        {
            let rest = buffer.split_off(start + length);
            let frame = std::mem::replace(buffer, rest).split_off(start);
            return Ok(Some(frame));
        }
        let mut chunk = [0; 4096];
        let read = timeout(IDLE, stream.read(&mut chunk)).await.map_err(|_| io::ErrorKind::TimedOut)??;
        if read == 0 {
            return Ok(None);
        }
        buffer.extend_from_slice(&chunk[..read]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use weft_wire::api::{Empty, ReplyBody, RequestBody};

    fn scratch(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("weft-server-{name}-{}.sock", std::process::id()))
    }

    async fn read_reply(stream: &mut UnixStream) -> Reply {
        let frame = read_frame(stream, &mut Vec::new()).await.expect("readable").expect("a frame");
        Reply::decode(&*frame).expect("a reply")
    }

    #[tokio::test]
    async fn a_call_is_answered_and_garbage_is_refused_on_the_same_socket() {
        let path = scratch("call");
        let (calls, mut inbox) = mpsc::channel(4);
        serve(&path, calls).expect("served");
        tokio::spawn(async move {
            while let Some(call) = inbox.recv().await {
                assert!(call.privileged);
                let _ = call.reply.send(Reply::done("seen"));
            }
        });
        let mut stream = UnixStream::connect(&path).await.expect("connected");
        let request = Request { body: Some(RequestBody::Status(Empty {})) };
        stream.write_all(&frame::encode(&request)).await.expect("sent");
        assert!(matches!(read_reply(&mut stream).await.body, Some(ReplyBody::Done(_))));
        stream.write_all(&[3, 0xff, 0xff, 0xff]).await.expect("sent");
        assert!(matches!(read_reply(&mut stream).await.body, Some(ReplyBody::Error(_))));
        // A frame of 256 MiB: the connection ends, and nothing was allocated for it.
        stream.write_all(&[0x80, 0x80, 0x80, 0x80, 0x01]).await.expect("sent");
        assert_eq!(stream.read(&mut [0; 8]).await.expect("closed"), 0);
        fs::remove_file(&path).expect("cleaned");
    }
}
