//! The local socket: frames in, calls to the loop, frames out.
//!
//! It answers nothing itself but what is no request. Invariants: one connection cannot hold up another;
//! sizes are checked before anything is allocated; a silent client is cut off.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::time::timeout;
use tracing::{debug, warn};
use weft_wire::api::{Reply, Request};
use weft_wire::frame::{self, MAX_REQUEST_BYTES};

/// More connections wait to be accepted.
const CONNECTIONS: usize = 128;
/// What both sockets of a daemon accept together is below this.
const ROOM: usize = 2 * CONNECTIONS;
/// A client that sends nothing for so long is cut off.
const IDLE: Duration = Duration::from_secs(60);

/// Who was let in before the door closed says what it wants within this time.
const LAST_CALL: Duration = Duration::from_secs(1);

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

/// Lets callers in, or lets them wait: the kernel queues who connects. Both sockets of a daemon share one.
#[derive(Debug, Clone)]
pub struct Door {
    open: Arc<watch::Sender<bool>>,
    slots: Arc<Semaphore>,
}

impl Door {
    /// Makes one.
    pub fn new(open: bool) -> Self {
        Self { open: Arc::new(watch::Sender::new(open)), slots: Arc::new(Semaphore::new(ROOM)) }
    }

    /// Opens or closes it; those who are in get their answers.
    pub fn set(&self, open: bool) {
        self.open.send_if_modified(|now| std::mem::replace(now, open) != open);
    }

    /// Waits until nobody is in. Cancelling it changes nothing.
    pub async fn quiet(&self) {
        let all = u32::try_from(ROOM).expect("there are few connections");
        // It is never closed.
        drop(self.slots.acquire_many(all).await);
    }

    async fn is(&self, open: bool) {
        // The sender lives as long as this value.
        drop(self.open.subscribe().wait_for(|now| *now == open).await);
    }

    /// Waits until one more may come in, and lets `accept` wait for it.
    pub(crate) async fn admit<T>(
        &self,
        accept: impl Future<Output = T>,
    ) -> Option<(T, OwnedSemaphorePermit)> {
        self.is(true).await;
        let slot = self.slots.clone().acquire_owned().await.expect("it is never closed");
        tokio::select! {
            accepted = accept => Some((accepted, slot)),
            () = self.is(false) => None,
        }
    }
}

/// Makes the socket, or takes the one that an earlier daemon handed over if it is at the same path.
///
/// A socket file that an earlier daemon left is replaced: the lock on the state directory has shown that
/// no other daemon of this node runs.
///
/// # Errors
/// [`ListenError`] where the path cannot be used.
pub fn listen(path: &Path, inherited: Option<StdListener>) -> Result<StdListener, ListenError> {
    let same = |listener: &StdListener| {
        let address = listener.local_addr();
        address.is_ok_and(|address| address.as_pathname() == Some(path)) && path.exists()
    };
    match inherited.filter(same) {
        Some(listener) => Ok(listener),
        None => bind(path).map_err(|source| ListenError { path: path.into(), source }),
    }
}

/// Serves a socket until the loop goes away; calls go to `calls`.
///
/// # Errors
/// Where the runtime does not take it.
pub fn serve(listener: StdListener, door: Door, calls: mpsc::Sender<Call>) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    tokio::spawn(accept(UnixListener::from_std(listener)?, door, calls));
    Ok(())
}

fn bind(path: &Path) -> io::Result<StdListener> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    if fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
        fs::remove_file(path)?;
    }
    let listener = StdListener::bind(path)?;
    // Anyone may look; who may change things is told by SO_PEERCRED.
    fs::set_permissions(path, fs::Permissions::from_mode(0o666))?;
    Ok(listener)
}

async fn accept(listener: UnixListener, door: Door, calls: mpsc::Sender<Call>) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        let Some((accepted, let_in)) = door.admit(listener.accept()).await else { continue };
        match accepted {
            Ok((stream, _)) => {
                let (calls, door) = (calls.clone(), door.clone());
                tokio::spawn(async move {
                    if let Err(error) = converse(stream, &door, calls).await {
                        debug!(err = %error, "connection on the local socket ended");
                    }
                    drop((slot, let_in));
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

async fn converse(mut stream: UnixStream, door: &Door, calls: mpsc::Sender<Call>) -> io::Result<()> {
    let uid = stream.peer_cred()?.uid();
    let privileged = uid == 0 || uid == nix::unistd::geteuid().as_raw();
    let mut buffer = Vec::new();
    let mut served = false;
    loop {
        let frame = tokio::select! {
            biased;
            frame = read_frame(&mut stream, &mut buffer) => frame?,
            () = door.is(false) => {
                // Another daemon answers what comes later.
                if served && buffer.is_empty() {
                    return Ok(());
                }
                let last = timeout(LAST_CALL, read_frame(&mut stream, &mut buffer)).await;
                last.map_err(|_| io::ErrorKind::TimedOut)??
            }
        };
        let Some(frame) = frame else { return Ok(()) };
        served = true;
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
        serve(listen(&path, None).expect("bound"), Door::new(true), calls).expect("served");
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

    #[tokio::test]
    async fn who_comes_while_the_door_is_closed_waits_and_who_is_in_is_answered() {
        let path = scratch("door");
        let (calls, mut inbox) = mpsc::channel(4);
        let (door, listener) = (Door::new(true), listen(&path, None).expect("bound"));
        serve(listener.try_clone().expect("a descriptor"), door.clone(), calls).expect("served");
        let ask = async |stream: &mut UnixStream| {
            let request = Request { body: Some(RequestBody::Status(Empty {})) };
            stream.write_all(&frame::encode(&request)).await.expect("sent");
        };
        let mut early = UnixStream::connect(&path).await.expect("connected");
        ask(&mut early).await;
        let call = inbox.recv().await.expect("a call");
        door.set(false);
        let mut late = UnixStream::connect(&path).await.expect("the kernel queues it");
        ask(&mut late).await;
        let quiet = timeout(Duration::from_millis(50), door.quiet()).await;
        assert!(quiet.is_err(), "somebody waits for an answer");
        call.reply.send(Reply::done("early")).expect("waited for");
        read_reply(&mut early).await;
        timeout(IDLE, door.quiet()).await.expect("nobody is in");
        assert!(inbox.try_recv().is_err(), "the late one was not let in");
        // What another daemon does with the same socket.
        let (calls, mut inbox) = mpsc::channel(4);
        let inherited = listen(&path, Some(listener)).expect("taken");
        serve(inherited, Door::new(true), calls).expect("served");
        let call = inbox.recv().await.expect("a call");
        call.reply.send(Reply::done("late")).expect("waited for");
        read_reply(&mut late).await;
        fs::remove_file(&path).expect("cleaned");
    }
}
