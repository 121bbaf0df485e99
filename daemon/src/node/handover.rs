//! Coming to rest so that another daemon can take over, and starting after one that did.
//!
//! At rest means: no caller is in, no pod is worked on, no request to the store is under way, and the kernel's thread has
//! ended. Callers who come meanwhile wait in the queue of the socket, which goes along.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tracing::{info, warn};

use super::{Ended, Node, worker};
use crate::handover::{Heritage, Message, Relays, Talk, Tunnels};

/// A daemon that is not at rest by then goes on.
const REST: Duration = Duration::from_secs(15);
/// Between two looks whether it is.
const LOOK: Duration = Duration::from_millis(20);
/// A daemon that took over lets callers in after so long, ready or not.
pub(super) const OPEN_AFTER: Duration = Duration::from_secs(10);
/// How long a daemon that ends waits for its tunnels to.
const END: Duration = Duration::from_secs(2);

/// A daemon that wants to take over.
#[derive(Debug)]
pub(super) struct Handing {
    talk: Talk,
    until: Instant,
    /// Nobody is let in any more.
    pub(super) closed: bool,
    /// Nobody is in any more.
    pub(super) quiet: bool,
}

/// Listens for daemons that want to take over; without the socket there is none.
pub(super) fn listen(path: &Path, asked: mpsc::Sender<Talk>) {
    let bind = || -> io::Result<UnixListener> {
        // The lock on the directory has shown that no daemon listens there.
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        Ok(listener)
    };
    match bind() {
        Ok(listener) => drop(tokio::spawn(accept(listener, asked))),
        Err(error) => {
            warn!(path = %path.display(), err = %error, "no daemon can take over from this one");
        }
    }
}

async fn accept(listener: UnixListener, asked: mpsc::Sender<Talk>) {
    while !asked.is_closed() {
        let Ok((stream, _)) = listener.accept().await else {
            // Out of descriptors, as a rule: some come back.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let asker = stream.peer_cred().map(|peer| peer.uid());
        if !asker.is_ok_and(|uid| uid == 0 || uid == nix::unistd::geteuid().as_raw()) {
            continue;
        }
        // One at a time: who is silent holds up the next for seconds, not more.
        let greeted = tokio::task::spawn_blocking(move || -> io::Result<Talk> {
            let talk = Talk::new(stream.into_std()?)?;
            talk.greeted()?;
            Ok(talk)
        });
        if let Ok(Ok(talk)) = greeted.await {
            let _ = asked.send(talk).await;
        }
    }
}

impl Node {
    pub(super) fn handle_take_over(&mut self, talk: Talk, now: Instant) {
        let why = if self.leaving.is_some() {
            "it is leaving the cluster"
        } else if self.handing.is_some() {
            "a third daemon is taking over from it"
        } else {
            info!("another daemon takes over");
            self.handing = Some(Handing { talk, until: now + REST, closed: false, quiet: false });
            return;
        };
        // Who asked may be gone.
        let _ = talk.say(&Message::Refused(why.into()), &[]);
    }

    /// Comes closer to rest; returns whether it is reached.
    pub(super) fn rests(&mut self, now: Instant) -> bool {
        let Some(handing) = &mut self.handing else { return false };
        if now >= handing.until {
            warn!("not at rest in time, this daemon goes on");
            let why = "it did not come to rest in time; `weft status` and its log name what it waits for";
            let _ = handing.talk.say(&Message::Refused(why.into()), &[]);
            self.handing = None;
            self.door.set(true);
            return false;
        }
        let report = self.control.pass.report.as_ref();
        let in_transit = report.and_then(|report| report.tunnels.as_ref()).is_some_and(|t| t.has_elder());
        if !handing.closed && !in_transit && self.opening.is_none() {
            handing.closed = true;
            self.door.set(false);
        }
        handing.quiet && self.pods.is_idle() && self.leases.is_idle()
    }

    /// When to look again whether the node is at rest.
    pub(super) fn rest_wake(&self, now: Instant) -> Option<Instant> {
        self.handing.as_ref().map(|handing| handing.until.min(now + LOOK))
    }

    /// Ends the kernel's thread and leaves what another daemon takes.
    pub(super) async fn surrender(mut self) -> Ended {
        let tunnels = self.end_kernel().await;
        self.remember(true, Instant::now());
        info!("at rest, another daemon may begin");
        Ended::HandOver(Heritage {
            lock: Some(self.dir.into_lock()),
            local: Some(self.local),
            metrics: self.metrics,
            tunnels: tunnels.map_or(Tunnels::None, Tunnels::Running),
            relay: self.relay.map_or(Relays::None, Relays::Running),
            talk: self.handing.map(|handing| handing.talk),
        })
    }

    async fn end_kernel(&mut self) -> Option<Box<crate::tunnel::Tunnel>> {
        self.jobs.send(worker::Job::Surrender).ok()?;
        loop {
            match self.inbox.kernel.recv().await? {
                worker::Done::Surrendered(tunnels) => return tunnels,
                // The next daemon makes a pass of its own.
                worker::Done::Reconciled { .. }
                | worker::Done::Strayed
                | worker::Done::Traffic(_)
                | worker::Done::Purged(_) => {}
            }
        }
    }

    /// Ends the tunnels before the process does, so that the daemon before this one, if it still waits, does not go on.
    pub(super) async fn end_tunnels(&mut self) {
        drop(tokio::time::timeout(END, self.end_kernel()).await);
    }

    /// Lets callers in once pods can be attached, after a start that let them wait.
    pub(super) fn open_door(&mut self, now: Instant) {
        if self.opening.is_some_and(|until| now >= until || self.control.ready().is_ok()) {
            self.opening = None;
            self.door.set(true);
            if let Some(talk) = self.predecessor.take() {
                // It carries nothing. If it is gone it needs no word.
                let _ = talk.say(&Message::Done, &[]);
            }
        }
    }
}
