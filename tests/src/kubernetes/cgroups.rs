//! The cgroups of a cluster: below `weft-lab/CLUSTER` in each hierarchy of the machine, one for each node.
//!
//! Version 1 only. A node sees its own as the root of every hierarchy (a cgroup namespace), so kubelet, containerd and cadvisor
//! know nothing of other nodes or of the machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::lab::{Handle, Presence};

const HIERARCHIES: &str = "/sys/fs/cgroup";
/// Below it are all clusters' cgroups.
pub(crate) const PARENT: &str = "weft-lab";

/// Removes the cgroups of a cluster that is down.
pub(crate) fn remove(cluster: &str) {
    let patience = Instant::now() + Duration::from_secs(10);
    for root in hierarchies() {
        let parent = root.join(PARENT);
        // The kernel lets go of a process's cgroup a moment after the process is gone.
        while let Err(error) = remove_tree(&parent.join(cluster)) {
            if Instant::now() > patience {
                eprintln!("cannot remove the cgroup {}: {error}", parent.join(cluster).display());
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        // Fails when another cluster is there, which is right.
        fs::remove_dir(&parent).ok();
    }
}

/// Removes what clusters left that were interrupted.
pub(crate) fn remove_stale() {
    let mut names: Vec<String> = hierarchies()
        .iter()
        .flat_map(|root| directories(&root.join(PARENT)))
        .filter(|path| is_empty(path))
        .filter_map(|path| Some(path.file_name()?.to_string_lossy().into_owned()))
        .filter(|name| Handle::new(name).presence() != Presence::Alive)
        .collect();
    names.sort();
    names.dedup();
    names.iter().for_each(|name| remove(name));
}

fn hierarchies() -> Vec<PathBuf> {
    directories(Path::new(HIERARCHIES))
        .into_iter()
        .filter(|path| path.join("cgroup.procs").exists())
        .collect()
}

fn directories(path: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(path) else { return Vec::new() };
    entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir() && !path.is_symlink()).collect()
}

/// Whether no process is in the tree.
fn is_empty(path: &Path) -> bool {
    fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default().is_empty()
        && directories(path).iter().all(|child| is_empty(child))
}

/// The files of a cgroup go with it.
fn remove_tree(path: &Path) -> std::io::Result<()> {
    for child in directories(path) {
        remove_tree(&child)?;
    }
    match fs::remove_dir(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
