//! The pod journal: which pod holds which address, durable before the address is used.
//!
//! One SQLite file of one daemon. It outlives the daemon and is void after a reboot, so it is written
//! without waiting for the disk: what a crash of the *machine* loses is worth nothing afterwards, because
//! every entry carries the boot it was made in and the pods of an earlier boot do not exist.
//!
//! Not here: what the addresses mean (`weft_ipam::pods`) or whether the pod is still there
//! ([`attach::survey`](crate::attach::survey)).
//!
//! Invariant: an address in use by a pod is in the journal.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, params};
use weft_wire::cni::{CniError, Code};
use weft_wire::types::MacAddress;

use crate::attach::{Attachment, AttachmentId, NetnsId, PodAddress, PodName};

/// The open journal.
#[derive(Debug)]
pub struct Journal {
    db: Connection,
    path: PathBuf,
    boot: String,
    /// Entries whose removal the disk refused; tried again with the next write.
    unremoved: Vec<AttachmentId>,
}

/// What an earlier run left.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Recovered {
    /// The attachments of this boot.
    pub attachments: Vec<Attachment>,
    /// How many entries of earlier boots were dropped.
    pub stale: usize,
}

/// Why the journal could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The disk has no room. Nothing was written.
    #[error("the disk under the pod journal {} is full; free some space, then the pod can be attached", .path.display())]
    Full {
        /// The journal's file.
        path: PathBuf,
        /// What SQLite said.
        #[source]
        source: rusqlite::Error,
    },
    /// The file is no journal of weft. Nothing was written.
    #[error("{} is not a pod journal of weft ({why}); move it away and restart weftd, then pods that run keep their network and their addresses are found again when they are listed by GC", .path.display())]
    Broken {
        /// The journal's file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Another process has the journal open. Nothing was written.
    #[error("the pod journal {} is in use by another process; a second weftd needs a state_dir of its own", .path.display())]
    InUse {
        /// The journal's file.
        path: PathBuf,
    },
    /// The file cannot be read or written. Nothing was written.
    #[error("the pod journal {} cannot be used; check that its directory exists and belongs to the user of weftd", .path.display())]
    Io {
        /// The journal's file.
        path: PathBuf,
        /// What SQLite said.
        #[source]
        source: rusqlite::Error,
    },
}

impl From<JournalError> for CniError {
    fn from(error: JournalError) -> Self {
        let details = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        Self::new(Code::InputOutput, error.to_string()).with_details(details)
    }
}

const SCHEMA: &str = "
    CREATE TABLE IF NOT EXISTS attachment (
        container TEXT NOT NULL,
        ifname TEXT NOT NULL,
        boot TEXT NOT NULL,
        network TEXT NOT NULL,
        netns TEXT NOT NULL,
        netns_dev INTEGER NOT NULL,
        netns_ino INTEGER NOT NULL,
        pod_namespace TEXT NOT NULL,
        pod_name TEXT NOT NULL,
        pod_uid TEXT NOT NULL,
        addresses TEXT NOT NULL, -- 'address/length gateway', separated by commas
        mac TEXT NOT NULL,
        mtu INTEGER NOT NULL,
        since_unix_s INTEGER NOT NULL,
        PRIMARY KEY (container, ifname)
    ) WITHOUT ROWID";

/// `PRAGMA user_version` of the schema above.
const VERSION: i64 = 1;

/// Reads the identity of the running boot.
///
/// # Errors
/// Where `/proc` is not mounted.
pub fn boot_id() -> std::io::Result<String> {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|id| id.trim().to_owned())
}

impl Journal {
    /// Opens or creates the journal, drops entries of earlier boots, and returns those of this one.
    ///
    /// # Errors
    /// [`JournalError`]; an existing file is unchanged.
    pub fn open(path: &Path, boot: &str) -> Result<(Self, Recovered), JournalError> {
        let fail = |source| failure(path, source);
        let db = Connection::open(path).map_err(fail)?;
        // A daemon that was told to stop may still be about to.
        db.busy_timeout(Duration::from_secs(1)).map_err(fail)?;
        // One daemon, so the index of the log can be in memory: a restart needs no room on the disk. NORMAL
        // syncs at checkpoints only, which keeps the file sound and an ADD fast.
        db.execute_batch(
            "PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;",
        )
        .map_err(fail)?;
        let version: i64 = db.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(fail)?;
        if version > VERSION {
            return Err(JournalError::Broken {
                path: path.into(),
                why: format!("its format {version} is of a later release"),
            });
        }
        if version == 0 {
            db.execute_batch(&format!("BEGIN IMMEDIATE; {SCHEMA}; PRAGMA user_version = {VERSION}; COMMIT"))
                .map_err(fail)?;
        }
        let stale = db
            .query_row("SELECT count(*) FROM attachment WHERE boot <> ?1", [boot], |row| row.get::<_, i64>(0))
            .map_err(fail)?;
        let stale = usize::try_from(stale).unwrap_or_default();
        let journal = Self { db, path: path.into(), boot: boot.into(), unremoved: Vec::new() };
        let attachments = journal.load()?;
        // They are void whether the disk has room to remove them or not.
        let _ = journal.db.execute("DELETE FROM attachment WHERE boot <> ?1", [boot]);
        Ok((journal, Recovered { attachments, stale }))
    }

    /// Writes an attachment, in place of an earlier one of the same id. Must succeed before the address is used.
    ///
    /// # Errors
    /// [`JournalError`]; the journal is unchanged.
    pub fn insert(&mut self, attachment: &Attachment) -> Result<(), JournalError> {
        self.unremoved.retain(|id| *id != attachment.id);
        self.retry_removals();
        let addresses: Vec<String> =
            attachment.addresses.iter().map(|a| format!("{} {}", a.address, a.gateway)).collect();
        let mut statement = self
            .db
            .prepare_cached(
                "INSERT OR REPLACE INTO attachment VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14)",
            )
            .map_err(|source| failure(&self.path, source))?;
        statement
            .execute(params![
                attachment.id.container(),
                attachment.id.ifname(),
                self.boot,
                attachment.network,
                attachment.netns.to_string_lossy(),
                attachment.netns_id.dev.cast_signed(),
                attachment.netns_id.ino.cast_signed(),
                attachment.pod.namespace,
                attachment.pod.name,
                attachment.pod.uid,
                addresses.join(","),
                attachment.mac.to_string(),
                attachment.mtu,
                attachment.since_unix_s.cast_signed(),
            ])
            .map(drop)
            .map_err(|source| failure(&self.path, source))
    }

    /// Removes an attachment; one that is not there is no error.
    ///
    /// Where the disk refuses, the removal is kept in memory and tried again with every later write, so that
    /// a full disk never keeps a container from being deleted.
    ///
    /// # Errors
    /// [`JournalError`], for the log; a daemon that starts before the retry finds the entry again, and
    /// [`attach::survey`](crate::attach::survey) tells it that the pod is gone.
    pub fn remove(&mut self, id: &AttachmentId) -> Result<(), JournalError> {
        self.retry_removals();
        self.try_remove(id).inspect_err(|_| {
            if !self.unremoved.contains(id) {
                self.unremoved.push(id.clone());
            }
        })
    }

    /// Returns how many removals wait for the disk.
    pub fn removals_waiting(&self) -> usize {
        self.unremoved.len()
    }

    fn retry_removals(&mut self) {
        while let Some(id) = self.unremoved.last().cloned() {
            if self.try_remove(&id).is_err() {
                return;
            }
            self.unremoved.pop();
        }
    }

    fn try_remove(&self, id: &AttachmentId) -> Result<(), JournalError> {
        self.db
            .prepare_cached("DELETE FROM attachment WHERE container = ?1 AND ifname = ?2")
            .and_then(|mut statement| statement.execute([id.container(), id.ifname()]))
            .map(drop)
            .map_err(|source| failure(&self.path, source))
    }

    fn load(&self) -> Result<Vec<Attachment>, JournalError> {
        let fail = |source| failure(&self.path, source);
        let mut statement = self
            .db
            .prepare(
                "SELECT container, ifname, network, netns, netns_dev, netns_ino, pod_namespace, pod_name, pod_uid,
                        addresses, mac, mtu, since_unix_s FROM attachment WHERE boot = ?1 ORDER BY container, ifname",
            )
            .map_err(fail)?;
        let mut rows = statement.query([&self.boot]).map_err(fail)?;
        let mut attachments = Vec::new();
        while let Some(row) = rows.next().map_err(fail)? {
            let attachment = read(row).ok_or_else(|| JournalError::Broken {
                path: self.path.clone(),
                why: format!("entry {} cannot be read", attachments.len() + 1),
            })?;
            attachments.push(attachment);
        }
        Ok(attachments)
    }
}

/// Reads an entry; nothing where a column holds what no attachment has, be it of another type.
fn read(row: &rusqlite::Row<'_>) -> Option<Attachment> {
    let text = |column: &str| row.get::<_, String>(column).ok();
    let number = |column: &str| row.get::<_, i64>(column).ok().map(i64::cast_unsigned);
    let addresses = text("addresses")?
        .split(',')
        .map(|pair| {
            let (address, gateway) = pair.split_once(' ')?;
            Some(PodAddress { address: address.parse().ok()?, gateway: gateway.parse().ok()? })
        })
        .collect::<Option<Vec<PodAddress>>>()?;
    Some(Attachment {
        id: AttachmentId::new(&text("container")?, &text("ifname")?).ok()?,
        network: text("network")?,
        netns: text("netns")?.into(),
        netns_id: NetnsId { dev: number("netns_dev")?, ino: number("netns_ino")? },
        pod: PodName { namespace: text("pod_namespace")?, name: text("pod_name")?, uid: text("pod_uid")? },
        addresses,
        mac: weft_wire::types::from_hex(&text("mac")?.replace(':', "")).map(MacAddress)?,
        mtu: row.get("mtu").ok()?,
        since_unix_s: number("since_unix_s")?,
    })
}

fn failure(path: &Path, source: rusqlite::Error) -> JournalError {
    let path = path.into();
    if let rusqlite::Error::SqlInputError { msg, .. } = source {
        // The statements are right: it is the tables that are not weft's.
        return JournalError::Broken { path, why: msg };
    }
    match source.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => JournalError::Full { path, source },
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => JournalError::InUse { path },
        Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => {
            JournalError::Broken { path, why: source.to_string() }
        }
        _ => JournalError::Io { path, source },
    }
}

#[cfg(test)]
mod tests;
