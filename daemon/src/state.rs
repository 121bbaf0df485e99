//! What a daemon remembers across its own restarts: its key, its boot counter, what it held and whom it knew.
//!
//! Not a source of truth: leases belong to the store and records to their signers. It lets a daemon that
//! starts without its store or its peers go on with what the kernel already carries. Files are replaced
//! whole (write, sync, rename), so a crash leaves the old one or the new one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use weft_ipam::lease::HeldLease;
use weft_wire::mesh::Owner;
use weft_wire::pair::PairSecret;
use weft_wire::record::NodeKey;
use weft_wire::seal::{ClusterKey, KeyRing};
use weft_wire::types::{Epoch, NodeName, PublicKey, Subnet, TunnelKey};
use zeroize::Zeroizing;

use crate::plan::model::Peer;
use crate::tunnel::TunnelSecret;

/// Whom the daemon has tunnels with, a name a line.
const ACTIVE: &str = "tunnels.active";
/// The instances that have handed over, one a line.
const SUPERSEDED: &str = "superseded";
/// So many of them are kept: more than a node ever has at a time.
const SUPERSEDED_MOST: usize = 32;
/// The mode of a file with secrets.
const PRIVATE: u32 = 0o600;

/// The directory of one daemon's state, locked for as long as this value lives.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    lock: File,
}

/// Why the state directory cannot be used; each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another process holds the lock.
    #[error("another weftd already runs on {}: stop it first, or give this one its own node.state_dir", path.display())]
    Locked {
        /// The directory.
        path: PathBuf,
    },
    /// A file cannot be read or written.
    #[error("cannot {action} {}: {source}; check that the directory exists, is writable and has space", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// A file holds something else than weft wrote.
    #[error("{} does not hold {what}; restore it from a backup, or remove it to start with a new one", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What belongs there.
        what: &'static str,
    },
    /// The key can be read by others.
    #[error("{} can be read by other users (mode {mode:o}); run: chmod 600 {}", path.display(), path.display())]
    Permissions {
        /// The file.
        path: PathBuf,
        /// Its mode bits.
        mode: u32,
    },
}

/// What a secret of the tunnels is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TunnelPlace {
    /// In force.
    Main,
    /// About to follow it.
    Next,
    /// For the detour.
    Detour,
}

impl TunnelPlace {
    fn file(self) -> &'static str {
        match self {
            Self::Main => "tunnel.key",
            Self::Next => "tunnel-next.key",
            Self::Detour => "tunnel-detour.key",
        }
    }
}

/// What the daemon remembers, as one JSON file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Memory {
    /// How often a daemon has started on this directory; orders the versions of its records.
    pub incarnation: u64,
    /// The leases that this node held.
    pub held: Vec<HeldLease>,
    /// Every lease of the store, as last seen.
    pub leases: BTreeMap<Subnet, RememberedLease>,
    /// The peers that the kernel was programmed for.
    pub peers: BTreeMap<NodeName, RememberedPeer>,
    /// What sites say, each statement in base64.
    pub statements: Vec<String>,
    /// The cluster keys that sites gave each other last.
    pub mesh_keys: Option<MeshKeys>,
    /// The secrets that the site shares with others, by the other site's key, each with the latest first.
    pub pair_secrets: BTreeMap<PublicKey, PairSecrets>,
    /// Where the site that let this one in gossips.
    pub site_seeds: Vec<SocketAddr>,
    /// The detour of the tunnels is open.
    pub detour: bool,
    /// The boot in which turning TX checksum offload off was found necessary: another kernel may do better.
    pub tx_checksum_off: Option<String>,
}

/// The cluster keys that a mesh of sites is to have.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "WrittenKeys", into = "WrittenKeys")]
pub struct MeshKeys {
    /// Later ones have a higher version.
    pub version: u64,
    /// The keys.
    pub ring: KeyRing,
}

impl std::fmt::Debug for MeshKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MeshKeys({} {:?})", self.version, self.ring.ids().collect::<Vec<_>>())
    }
}

#[derive(Serialize, Deserialize)]
struct WrittenKeys {
    version: u64,
    keys: Vec<String>,
}

impl TryFrom<WrittenKeys> for MeshKeys {
    type Error = String;

    fn try_from(written: WrittenKeys) -> Result<Self, String> {
        let parse = |text: &String| text.parse::<ClusterKey>().map_err(|error| error.to_string());
        let keys = written.keys.iter().map(parse).collect::<Result<Vec<_>, _>>()?;
        let ring = KeyRing::new(keys).map_err(|error| error.to_string())?;
        Ok(Self { version: written.version, ring })
    }
}

impl From<MeshKeys> for WrittenKeys {
    fn from(keys: MeshKeys) -> Self {
        Self { version: keys.version, keys: keys.ring.keys().map(ClusterKey::to_secret_text).collect() }
    }
}

/// The secrets of one pair of sites.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<String>", into = "Vec<String>")]
pub struct PairSecrets(pub Vec<PairSecret>);

impl TryFrom<Vec<String>> for PairSecrets {
    type Error = String;

    fn try_from(written: Vec<String>) -> Result<Self, String> {
        let secrets = written.iter().map(|text| text.parse().map_err(|error| format!("{error}")));
        secrets.collect::<Result<_, _>>().map(Self)
    }
}

impl From<PairSecrets> for Vec<String> {
    fn from(secrets: PairSecrets) -> Self {
        secrets.0.iter().map(|secret| secret.to_secret_text().to_string()).collect()
    }
}

/// A lease of the store as last seen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RememberedLease {
    /// The owner.
    pub node: NodeName,
    /// The owner's key.
    pub key: PublicKey,
    /// The fencing number.
    pub epoch: Epoch,
}

impl From<&RememberedLease> for Owner {
    fn from(lease: &RememberedLease) -> Self {
        Self { node: lease.node.clone(), key: lease.key, epoch: lease.epoch }
    }
}

/// A peer as the kernel was programmed for it, and where it gossips.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RememberedPeer {
    /// What the plan needs.
    pub peer: Peer,
    /// Where the peer receives gossip.
    pub gossip: Vec<std::net::SocketAddr>,
}

impl StateDir {
    /// Creates the directory if need be and takes its lock.
    ///
    /// # Errors
    /// `Locked` when another daemon runs on it.
    pub fn open(path: &Path) -> Result<Self, StateError> {
        let io = |action, path: &Path| {
            let path = path.to_owned();
            move |source| StateError::Io { action, path, source }
        };
        fs::create_dir_all(path).map_err(io("create", path))?;
        let lock_path = path.join("lock");
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&lock_path)
            .map_err(io("open", &lock_path))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { path: path.to_owned(), lock }),
            Err(TryLockError::WouldBlock) => Err(StateError::Locked { path: path.to_owned() }),
            Err(TryLockError::Error(source)) => {
                Err(StateError::Io { action: "lock", path: lock_path, source })
            }
        }
    }

    /// Goes on with a lock that another daemon took and gave away.
    pub fn adopt(path: &Path, lock: OwnedFd) -> Self {
        Self { path: path.to_owned(), lock: lock.into() }
    }

    /// Gives the lock away as it is: it belongs to the open file (flock(2)), not to the process, so nobody can take it on its way.
    pub fn into_lock(self) -> OwnedFd {
        self.lock.into()
    }

    /// Returns the path of a file in the directory.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Reads the node's signing key, or creates one with mode 0600.
    pub fn node_key(&self) -> Result<NodeKey, StateError> {
        let path = self.file("node.key");
        match read_secret(&path)? {
            Some(text) => NodeKey::from_secret_text(&text)
                .map_err(|_| StateError::Content { path, what: "a node key (64 hexadecimal digits)" }),
            None => {
                let key = NodeKey::from_secret(random()?);
                self.set_node_key(&key)?;
                Ok(key)
            }
        }
    }

    /// Replaces the node's signing key.
    pub fn set_node_key(&self, key: &NodeKey) -> Result<(), StateError> {
        replace(&self.file("node.key"), key.to_secret_text().as_bytes())
    }

    /// Reads a secret of the node's tunnels: 44 characters of base64, as `wg genkey` prints. There is always one in force and one
    /// for the detour, which are made where they are not there.
    pub fn tunnel_secret(&self, place: TunnelPlace) -> Result<Option<TunnelSecret>, StateError> {
        let path = self.file(place.file());
        match read_secret(&path)? {
            Some(text) => text
                .trim()
                .parse::<TunnelKey>()
                .map(|secret| Some(TunnelSecret::from_bytes(secret.0)))
                .map_err(|_| StateError::Content { path, what: "a tunnel key (44 characters of base64)" }),
            None if place == TunnelPlace::Next => Ok(None),
            None => self.new_tunnel_secret(place).map(Some),
        }
    }

    /// Makes another secret for the node's tunnels, on the disk before it is used.
    pub fn new_tunnel_secret(&self, place: TunnelPlace) -> Result<TunnelSecret, StateError> {
        let secret = TunnelSecret::from_bytes(random()?);
        // Public and secret keys have one form.
        let text = Zeroizing::new(format!("{}\n", TunnelKey(secret.to_bytes())));
        replace(&self.file(place.file()), text.as_bytes())?;
        Ok(secret)
    }

    /// Puts the next secret of the tunnels in the place of the one in force.
    pub fn turn_tunnel_secret(&self) -> Result<(), StateError> {
        let (next, path) = (self.file(TunnelPlace::Next.file()), self.file(TunnelPlace::Main.file()));
        let renamed = fs::rename(next, &path).and_then(|()| File::open(&self.path)?.sync_all());
        renamed.map_err(|source| StateError::Io { action: "replace", path, source })
    }

    /// Reads what an earlier daemon remembered; nothing on a first start.
    pub fn memory(&self) -> Result<Memory, StateError> {
        let path = self.file("memory.json");
        match fs::read(&path) {
            // A power cut can leave the file empty: what was in it is then of no use, for the kernel is empty too.
            Ok(bytes) if bytes.is_empty() => Ok(Memory::default()),
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|_| StateError::Content { path, what: "weftd's memory (JSON)" }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Memory::default()),
            Err(source) => Err(StateError::Io { action: "read", path, source }),
        }
    }

    /// Replaces what the daemon remembers; the old memory stays whole when this fails.
    pub fn set_memory(&self, memory: &Memory) -> Result<(), StateError> {
        let bytes = serde_json::to_vec(memory).expect("the memory has only text keys");
        replace(&self.file("memory.json"), &bytes)
    }

    /// Is [`StateDir::set_memory`] without waiting for the disk: for what only matters while this boot lasts.
    pub fn set_memory_of_boot(&self, memory: &Memory) -> Result<(), StateError> {
        let bytes = serde_json::to_vec(memory).expect("the memory has only text keys");
        write_and_rename(&self.file("memory.json"), &bytes, PRIVATE, false)
    }

    /// Reads whom the last daemon had tunnels with when it looked last; nobody where that cannot be read.
    pub fn active_peers(&self) -> BTreeSet<NodeName> {
        let text = fs::read_to_string(self.file(ACTIVE)).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    }

    /// Replaces that, without waiting for the disk: after a power cut no session is of use.
    pub fn set_active_peers(&self, peers: &BTreeSet<NodeName>) -> Result<(), StateError> {
        let text: String = peers.iter().map(|peer| format!("{peer}\n")).collect();
        write_and_rename(&self.file(ACTIVE), text.as_bytes(), PRIVATE, false)
    }

    /// Removes every file but the lock: what `weft leave` does last.
    pub fn forget(&self) -> Result<(), StateError> {
        for name in ["memory.json", ACTIVE, SUPERSEDED, "pods.db", "pods.db-wal", "pods.db-shm"] {
            remove(&self.file(name))?;
        }
        Ok(())
    }

    /// Removes every file of the daemon's, its keys and the lock too, and the directory if nothing else is in it; returns
    /// whether it is gone.
    pub fn purge(self) -> Result<bool, StateError> {
        self.forget()?;
        for name in ["node.key", "tunnel.key", crate::handover::SOCKET, "lock"] {
            remove(&self.file(name))?;
        }
        match fs::remove_dir(&self.path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(false),
            Err(source) => Err(StateError::Io { action: "remove", path: self.path.clone(), source }),
        }
    }
}

/// Removes a file, if it is there.
fn remove(path: &Path) -> Result<(), StateError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(StateError::Io { action: "remove", path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

/// Notes that an instance has handed over on a state directory, whose lock another one has by now.
pub fn note_superseded(path: &Path, instance: &str) -> Result<(), StateError> {
    let file = path.join(SUPERSEDED);
    let text = fs::read_to_string(&file).unwrap_or_default();
    let mut lines: Vec<&str> = text.lines().filter(|line| *line != instance).collect();
    lines.push(instance);
    let kept = lines.split_off(lines.len().saturating_sub(SUPERSEDED_MOST));
    replace(&file, format!("{}\n", kept.join("\n")).as_bytes())
}

/// Returns whether an instance has handed over on a state directory, as far as can be read.
pub fn is_superseded(path: &Path, instance: &str) -> bool {
    fs::read_to_string(path.join(SUPERSEDED)).unwrap_or_default().lines().any(|line| line == instance)
}

/// Reads a file of secrets, refusing one that others can read; `None` when there is none.
pub fn read_secret(path: &Path) -> Result<Option<String>, StateError> {
    let io = |action| {
        let path = path.to_owned();
        move |source| StateError::Io { action, path, source }
    };
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(io("read")(source)),
    };
    let mode = file.metadata().map_err(io("read"))?.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(StateError::Permissions { path: path.to_owned(), mode });
    }
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(io("read"))?;
    Ok(Some(text))
}

/// Replaces a file whole, with mode 0600: temporary file, sync, rename, sync of the directory.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<(), StateError> {
    write_and_rename(path, bytes, PRIVATE, true)
}

/// Is [`replace`] with another mode, which the umask does not change.
pub fn replace_with_mode(path: &Path, bytes: &[u8], mode: u32) -> Result<(), StateError> {
    write_and_rename(path, bytes, mode, true)
}

fn write_and_rename(path: &Path, bytes: &[u8], mode: u32, sync: bool) -> Result<(), StateError> {
    let temporary = path.with_extension("new");
    let write = || -> io::Result<()> {
        let mut file =
            OpenOptions::new().create(true).truncate(true).write(true).mode(PRIVATE).open(&temporary)?;
        file.write_all(bytes)?;
        if mode != PRIVATE {
            file.set_permissions(fs::Permissions::from_mode(mode))?;
        }
        if sync {
            file.sync_all()?;
        }
        fs::rename(&temporary, path)?;
        match path.parent() {
            Some(parent) if sync => File::open(parent)?.sync_all(),
            _ => Ok(()),
        }
    };
    write().map_err(|source| {
        // On a full disk its room is of more use than it is.
        drop(fs::remove_file(&temporary));
        StateError::Io { action: "write", path: path.to_owned(), source }
    })
}

/// Returns 32 bytes of the kernel's random number generator.
pub fn random() -> Result<[u8; 32], StateError> {
    let path = Path::new("/dev/urandom");
    let mut bytes = [0; 32];
    File::open(path).and_then(|mut file| file.read_exact(&mut bytes)).map_err(|source| StateError::Io {
        action: "read",
        path: path.to_owned(),
        source,
    })?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("weft-state-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        path
    }

    #[test]
    fn second_daemon_on_one_directory_is_refused() {
        let path = scratch("lock");
        let first = StateDir::open(&path).expect("the first daemon");
        let error = StateDir::open(&path).expect_err("the second daemon");
        assert!(error.to_string().contains("another weftd already runs"), "{error}");
        drop(first);
        StateDir::open(&path).expect("after the first ended");
        fs::remove_dir_all(&path).expect("cleaned");
    }

    #[test]
    fn instances_that_handed_over_are_known_and_few() {
        let path = scratch("superseded");
        drop(StateDir::open(&path).expect("opened"));
        assert!(!is_superseded(&path, "i0"));
        for index in 0..40 {
            note_superseded(&path, &format!("i{index}")).expect("written");
        }
        note_superseded(&path, "i20").expect("written");
        assert!(is_superseded(&path, "i39") && is_superseded(&path, "i20") && is_superseded(&path, "i8"));
        assert!(!is_superseded(&path, "i7") && !is_superseded(&path, "i"));
        assert_eq!(fs::read_to_string(path.join(SUPERSEDED)).expect("read").lines().count(), SUPERSEDED_MOST);
        assert!(StateDir::open(&path).expect("opened").purge().expect("purged"));
        assert!(!path.exists());
    }

    #[test]
    fn secrets_of_two_sites_survive_the_memory_which_only_its_owner_reads() {
        let path = scratch("pairs");
        let dir = StateDir::open(&path).expect("opened");
        let secrets = vec![PairSecret::new(2, [0xab; 32]), PairSecret::new(1, [0xcd; 32])];
        let pair_secrets = [(PublicKey([7; 32]), PairSecrets(secrets))].into();
        let memory = Memory { pair_secrets, ..Memory::default() };
        dir.set_memory(&memory).expect("written");
        assert_eq!(dir.memory().expect("read"), memory);
        let file = dir.file("memory.json");
        assert_eq!(fs::metadata(&file).expect("exists").permissions().mode() & 0o777, 0o600);
        let shown = format!("{memory:?}");
        assert!(!shown.contains("abab") && !shown.contains("171, 171"), "{shown}");
        fs::write(&file, r#"{ "pair_secrets": { "0707": ["1 ab"] } }"#).expect("written");
        assert!(matches!(dir.memory(), Err(StateError::Content { .. })));
        fs::remove_dir_all(&path).expect("cleaned");
    }

    #[test]
    fn node_key_is_private_and_stays() {
        let path = scratch("key");
        let dir = StateDir::open(&path).expect("opened");
        let key = dir.node_key().expect("created");
        assert_eq!(dir.node_key().expect("read").public(), key.public());
        let file = dir.file("node.key");
        assert_eq!(fs::metadata(&file).expect("exists").permissions().mode() & 0o777, 0o600);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).expect("chmod");
        assert!(matches!(dir.node_key(), Err(StateError::Permissions { .. })));
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).expect("chmod");
        fs::write(&file, "short").expect("written");
        assert!(matches!(dir.node_key(), Err(StateError::Content { .. })));
        fs::remove_dir_all(&path).expect("cleaned");
    }
}
