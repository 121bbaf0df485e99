//! The file behind the embedded store: blocking calls, reopened when the file was replaced.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use rusqlite::{
    Connection, ErrorCode, OpenFlags, OptionalExtension, Transaction, TransactionBehavior, params,
};

use super::SqliteOptions;
use crate::store::{Entry, Expect, Key, PutError, Snapshot, StoreError};

/// Marks the file as a store of weft (`PRAGMA application_id`), and its layout (`PRAGMA user_version`).
const APPLICATION_ID: i32 = 0x7765_6674;
const LAYOUT: i32 = 1;

/// A random name is made by SQLite so that no other source of randomness is needed.
const SCHEMA: &str = "
    CREATE TABLE store (one INTEGER PRIMARY KEY CHECK (one = 1), id TEXT NOT NULL, revision INTEGER NOT NULL) STRICT;
    INSERT INTO store VALUES (1, lower(hex(randomblob(16))), 0);
    CREATE TABLE lease (subnet TEXT PRIMARY KEY, value BLOB NOT NULL, revision INTEGER NOT NULL) STRICT;
";

pub(super) struct File {
    path: PathBuf,
    options: SqliteOptions,
    open: Option<Open>,
    /// The file has been open in this run: if it is missing now, somebody removed it.
    known: bool,
    /// The store that the asker's expectations are about.
    listed: Option<String>,
}

struct Open {
    connection: Connection,
    identity: (u64, u64),
    store_id: String,
}

#[derive(Debug, thiserror::Error)]
enum OpenError {
    #[error(transparent)]
    Sqlite(#[from] rusqlite::Error),
    #[error(transparent)]
    Path(std::io::Error),
    #[error("read-only")]
    ReadOnly,
    #[error("not a store of weft")]
    Foreign,
    #[error("layout {0}")]
    Layout(i32),
}

/// What the watch compares: which store, and SQLite's own counter of foreign changes.
type Version = Option<(String, i64)>;

impl File {
    pub(super) fn new(path: PathBuf, options: SqliteOptions) -> Self {
        Self { path, options, open: None, known: false, listed: None }
    }

    pub(super) fn list(&mut self) -> Result<Snapshot, StoreError> {
        let snapshot = self.with(|open| {
            let transaction = open.connection.transaction_with_behavior(TransactionBehavior::Deferred)?;
            let revision = revision(&transaction)?;
            let mut snapshot = Snapshot { store_id: open.store_id.clone(), revision, ..Snapshot::default() };
            let mut statement = transaction.prepare_cached("SELECT subnet, value, revision FROM lease")?;
            let mut rows = statement.query([])?;
            while let Some(row) = rows.next()? {
                let key: String = row.get(0)?;
                let entry = Entry { value: row.get(1)?, revision: unsigned(row.get(2)?) };
                match key.parse() {
                    Ok(key) => drop(snapshot.entries.insert(key, entry)),
                    Err(error) => tracing::warn!(key, err = %error, "store entry is no subnet"),
                }
            }
            Ok(snapshot)
        })?;
        self.listed = Some(snapshot.store_id.clone());
        Ok(snapshot)
    }

    pub(super) fn put_if(&mut self, key: Key, expect: Expect, value: &[u8]) -> Result<u64, PutError> {
        self.write(key, expect, |transaction, revision| {
            let sql = "INSERT OR REPLACE INTO lease (subnet, value, revision) VALUES (?1, ?2, ?3)";
            transaction.execute(sql, params![key.to_string(), value, revision])
        })
    }

    pub(super) fn delete_if(&mut self, key: Key, revision: u64) -> Result<u64, PutError> {
        self.write(key, Expect::Revision(revision), |transaction, _| {
            transaction.execute("DELETE FROM lease WHERE subnet = ?1", [key.to_string()])
        })
    }

    /// Returns what changes with every write of another connection; `None` while the file cannot be read.
    pub(super) fn version(&mut self) -> Version {
        // The watch only looks: the serving thread creates the file.
        self.known = true;
        self.with(|open| {
            let version = open.connection.pragma_query_value(None, "data_version", |row| row.get(0))?;
            Ok((open.store_id.clone(), version))
        })
        .ok()
    }

    fn write(
        &mut self,
        key: Key,
        expect: Expect,
        work: impl FnOnce(&Transaction<'_>, i64) -> rusqlite::Result<usize>,
    ) -> Result<u64, PutError> {
        let listed = self.listed.clone();
        let replaced =
            StoreError(format!("the store {} was replaced: its leases are read again", self.path.display()));
        self.with(|open| {
            if listed.is_some_and(|listed| listed != open.store_id) {
                return Ok(Err(replaced.into()));
            }
            let transaction = open.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let current = entry(&transaction, key)?;
            let met = match expect {
                Expect::Absent => current.is_none(),
                Expect::Revision(expected) => {
                    current.as_ref().is_some_and(|entry| entry.revision == expected)
                }
            };
            if !met {
                return Ok(Err(PutError::Conflict(current)));
            }
            let next = revision(&transaction)? + 1;
            let signed = i64::try_from(next).expect("a counter of writes stays below 2^63");
            work(&transaction, signed)?;
            transaction.execute("UPDATE store SET revision = ?1", [signed])?;
            transaction.commit()?;
            Ok(Ok(next))
        })?
    }

    /// Runs work on the file at the path, which may be another than last time.
    fn with<T>(&mut self, work: impl FnOnce(&mut Open) -> rusqlite::Result<T>) -> Result<T, StoreError> {
        self.reopen()?;
        let open = self.open.as_mut().expect("reopen opened it");
        match work(open) {
            Ok(value) => Ok(value),
            Err(error) => {
                let sentence = self.sentence(&error);
                // A busy file is healthy; anything else is looked at afresh next time.
                if error.sqlite_error_code() != Some(ErrorCode::DatabaseBusy) {
                    self.open = None;
                }
                Err(sentence)
            }
        }
    }

    fn reopen(&mut self) -> Result<(), StoreError> {
        let identity = match std::fs::metadata(&self.path) {
            Ok(metadata) => Some(identity(&metadata)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => {
                return Err(StoreError(format!(
                    "the store {} cannot be reached: {error}",
                    self.path.display()
                )));
            }
        };
        if identity.is_some() && self.open.as_ref().map(|open| open.identity) == identity {
            return Ok(());
        }
        self.open = None;
        if identity.is_none() {
            if self.known {
                return Err(StoreError(format!(
                    "the store {} is gone: put it back, or restart weftd to begin an empty one",
                    self.path.display()
                )));
            }
            if let Some(directory) = self.path.parent().filter(|directory| !directory.as_os_str().is_empty())
            {
                std::fs::create_dir_all(directory).map_err(|error| {
                    StoreError(format!(
                        "the store's directory {} cannot be created: {error}",
                        directory.display()
                    ))
                })?;
            }
        }
        let open = self.connect(identity).map_err(|error| self.open_sentence(error))?;
        self.open = Some(open);
        self.known = true;
        Ok(())
    }

    fn connect(&self, before: Option<(u64, u64)>) -> Result<Open, OpenError> {
        let mut flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        if !self.known {
            flags |= OpenFlags::SQLITE_OPEN_CREATE;
        }
        let mut connection = Connection::open_with_flags(&self.path, flags)?;
        // SQLite falls back to read-only. Go no further then: it would give its side files the mode of the
        // database, and they would stay read-only when the database no longer is.
        if connection.is_readonly("main")? {
            return Err(OpenError::ReadOnly);
        }
        connection.busy_timeout(self.options.busy_timeout)?;
        // WAL: readers do not wait for writers. FULL: an answered write survives a power cut.
        connection.pragma_update(None, "journal_mode", "wal")?;
        connection.pragma_update(None, "synchronous", "full")?;
        connection.pragma_update(None, "max_page_count", self.options.max_pages)?;
        let store_id = initialise(&mut connection)?;
        let metadata = std::fs::metadata(&self.path).map_err(OpenError::Path)?;
        let identity = identity(&metadata);
        if before.is_some_and(|before| before != identity) {
            return Err(OpenError::Path(std::io::Error::other("it was replaced while it was opened")));
        }
        Ok(Open { connection, identity, store_id })
    }

    fn open_sentence(&self, error: OpenError) -> StoreError {
        let path = self.path.display();
        StoreError(match error {
            OpenError::Sqlite(error) => return self.sentence(&error),
            OpenError::Path(error) => format!("the store {path} cannot be reached: {error}"),
            OpenError::ReadOnly => return self.read_only(),
            OpenError::Foreign => format!(
                "{path} is not a store of weft: name another file in [store] path, or move this one away"
            ),
            OpenError::Layout(layout) => format!(
                "the store {path} has layout {layout}, and this weftd knows only {LAYOUT}: upgrade weftd"
            ),
        })
    }

    fn read_only(&self) -> StoreError {
        let path = self.path.display();
        StoreError(format!(
            "the store {path} is read-only: make the file and its directory writable for weftd"
        ))
    }

    /// Says what happened, where, and what to do.
    fn sentence(&self, error: &rusqlite::Error) -> StoreError {
        let path = self.path.display();
        StoreError(match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => format!(
                "the store {path} was locked for {:?} by another process: find it with `fuser {path}`",
                self.options.busy_timeout
            ),
            Some(ErrorCode::ReadOnly) => return self.read_only(),
            Some(ErrorCode::DiskFull) => {
                format!(
                    "no room to write the store {path}: free space on its disk (its limit is {} pages)",
                    self.options.max_pages
                )
            }
            Some(ErrorCode::CannotOpen) => {
                format!(
                    "the store {path} cannot be opened: check that its directory exists and weftd may write there"
                )
            }
            Some(ErrorCode::PermissionDenied) => {
                format!("the store {path} may not be read: give weftd access to it")
            }
            Some(ErrorCode::NotADatabase) => {
                format!(
                    "{path} is not a store of weft: name another file in [store] path, or move this one away"
                )
            }
            Some(ErrorCode::DatabaseCorrupt) => format!(
                "the store {path} is damaged: move it away and restart every weftd on it; the nodes claim their subnets again"
            ),
            _ => format!("the store {path} failed: {error}"),
        })
    }
}

/// Returns the store's name, after making the tables if the file is new.
fn initialise(connection: &mut Connection) -> Result<String, OpenError> {
    let number = |connection: &Connection, name: &str| -> rusqlite::Result<i32> {
        connection.pragma_query_value(None, name, |row| row.get(0))
    };
    if number(connection, "application_id")? == 0 {
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        // Another daemon may have made the tables since; a file with other tables is somebody else's.
        if number(&transaction, "application_id")? == 0 {
            let tables: i64 =
                transaction.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
            if tables > 0 {
                return Err(OpenError::Foreign);
            }
            transaction.execute_batch(SCHEMA)?;
            transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
            transaction.pragma_update(None, "user_version", LAYOUT)?;
            transaction.commit()?;
        }
    }
    if number(connection, "application_id")? != APPLICATION_ID {
        return Err(OpenError::Foreign);
    }
    match number(connection, "user_version")? {
        LAYOUT => Ok(connection.query_row("SELECT id FROM store", [], |row| row.get(0))?),
        layout => Err(OpenError::Layout(layout)),
    }
}

fn revision(transaction: &Transaction<'_>) -> rusqlite::Result<u64> {
    transaction.query_row("SELECT revision FROM store", [], |row| row.get(0)).map(unsigned)
}

fn entry(transaction: &Transaction<'_>, key: Key) -> rusqlite::Result<Option<Entry>> {
    let sql = "SELECT value, revision FROM lease WHERE subnet = ?1";
    let entry = |row: &rusqlite::Row<'_>| Ok(Entry { value: row.get(0)?, revision: unsigned(row.get(1)?) });
    transaction.query_row(sql, [key.to_string()], entry).optional()
}

fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}
