//! Restores a node: what `weft install-cni` and a daemon left on it goes.
//!
//! It works with a daemon and without one, which is why it uses the kernel itself. Invariants: nothing is removed while
//! pods are attached, unless forced; only what carries weft's mark is removed from the kernel.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::install::{self, InstallError, Places};
use crate::kernel::linux::Linux;
use crate::kernel::{Kernel, preflight, purge};
use crate::state::{StateDir, StateError};

/// What is removed, and how.
#[derive(Debug, Clone)]
pub struct Uninstall {
    /// Where shim and network list are.
    pub places: Places,
    /// The daemon's state directory.
    pub state_dir: PathBuf,
    /// The daemon's socket, a file that it leaves.
    pub socket: PathBuf,
    /// Cut attached pods off.
    pub force: bool,
    /// Remove the state too, the node's keys included.
    pub purge: bool,
}

/// Why a node was not restored; each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum UninstallError {
    /// Pods would be cut off. Nothing was changed.
    #[error(
        "{0} pods are attached to this node's network; drain the node first, or cut them off with --force"
    )]
    Pods(usize),
    /// A daemon holds the state directory. Nothing was changed.
    #[error("a weftd runs on this node: {0}")]
    Runs(String),
    /// The kernel does not answer, or not to this user. Nothing was changed.
    #[error("{0}")]
    Kernel(String),
    /// Files; what was done before stays done.
    #[error(transparent)]
    Files(#[from] InstallError),
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// The kernel kept something.
    #[error("the kernel refused to remove {0}; run the command again")]
    Kept(String),
}

impl Uninstall {
    /// Looks whether the node can be restored: no daemon may run, and no pod be attached.
    ///
    /// # Errors
    /// [`UninstallError`]; nothing is changed.
    pub fn check(&self) -> Result<Ready<'_>, UninstallError> {
        if let Some(sentence) = preflight::missing_capability() {
            return Err(UninstallError::Kernel(sentence.replace("weftd", "weft uninstall")));
        }
        // Held to the end: a daemon that starts meanwhile would make anew what is removed.
        let state = match self.state_dir.is_dir() {
            false => None,
            true => match StateDir::open(&self.state_dir) {
                Ok(state) => Some(state),
                Err(StateError::Locked { .. }) => {
                    return Err(UninstallError::Runs(
                        "stop it first, with `systemctl stop weftd` or by deleting its DaemonSet".into(),
                    ));
                }
                Err(error) => return Err(error.into()),
            },
        };
        let mut kernel = Linux::open().map_err(|error| {
            UninstallError::Kernel(format!("the kernel gives no netlink socket: {error}"))
        })?;
        let found =
            kernel.dump(&BTreeSet::new()).map_err(|error| UninstallError::Kernel(error.to_string()))?;
        if !found.veths.is_empty() && !self.force {
            return Err(UninstallError::Pods(found.veths.len()));
        }
        Ok(Ready { what: self, kernel, state })
    }
}

/// A node that can be restored.
#[derive(Debug)]
pub struct Ready<'a> {
    what: &'a Uninstall,
    kernel: Linux,
    state: Option<StateDir>,
}

impl Ready<'_> {
    /// Removes everything; returns what was done, a sentence each. Can be repeated.
    ///
    /// # Errors
    /// [`UninstallError`]; what was done before stays done.
    pub fn remove(mut self) -> Result<Vec<String>, UninstallError> {
        // First of all no new pod may come.
        let mut done = install::remove_conflist(&self.what.places)?;
        let left = purge(&mut self.kernel);
        if !left.is_empty() {
            return Err(UninstallError::Kept(left.join(", ")));
        }
        done.push(
            "every kernel object of weft is removed; forwarding stays as it is (net.ipv4.ip_forward, net.ipv6.conf.all.forwarding), since others may rely on it"
                .into(),
        );
        done.extend(install::remove_shim(&self.what.places)?);
        if let Some(state) = self.state.take() {
            done.push(self.remove_state(state)?);
        }
        // A socket that nobody listens at.
        if std::fs::remove_file(&self.what.socket).is_ok() {
            done.push(format!("{} is removed", self.what.socket.display()));
        }
        Ok(done)
    }

    fn remove_state(&self, state: StateDir) -> Result<String, UninstallError> {
        let directory: &Path = &self.what.state_dir;
        let shown = directory.display();
        if !self.what.purge {
            return Ok(format!("{shown} stays, with the node's keys; --purge removes it"));
        }
        Ok(match state.purge()? {
            true => format!("{shown} is removed"),
            false => format!("the daemon's files in {shown} are removed, others are left alone"),
        })
    }
}
