//! The pod journal, whatever is in its columns or has become of its file: every entry is recovered, dropped with its
//! boot, or named as unreadable, and then the file stays as it is.
#![no_main]

use std::fs;
use std::path::PathBuf;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use rusqlite::types::Value;
use rusqlite::{Connection, params_from_iter};
use weft_daemon::attach::{Attachment, AttachmentId, NetnsId, PodAddress, PodName};
use weft_daemon::journal::{Journal, JournalError, Recovered};
use weft_wire::types::MacAddress;

const BOOT: &str = "boot-1";
/// A good value for each column, in the order of the table.
const GOOD: [&str; 14] = [
    "c1",
    "eth0",
    BOOT,
    "podnet",
    "/run/netns/blue",
    "4",
    "4026532000",
    "shop",
    "web-0",
    "u1",
    "10.32.4.7/24 10.32.4.1,fd00:32::7/64 fd00:32::1",
    "02:00:00:00:00:07",
    "1450",
    "1700000000",
];

/// A directory in memory, where there is one, that goes with this value.
struct Dir(PathBuf);

impl Dir {
    fn new() -> Self {
        let memory = PathBuf::from("/dev/shm");
        let parent = if memory.is_dir() { memory } else { std::env::temp_dir() };
        let path = parent.join(format!("weft-fuzz-journal-{}", std::process::id()));
        fs::create_dir_all(&path).expect("a directory");
        Self(path)
    }

    fn file(&self) -> PathBuf {
        self.0.join("pods.db")
    }

    fn open(&self) -> Connection {
        let db = Connection::open(self.file()).expect("the file is a database");
        db.execute_batch("PRAGMA locking_mode = EXCLUSIVE; PRAGMA synchronous = OFF")
            .expect("the file is a database");
        db
    }

    fn count(&self, which: &str) -> usize {
        let query = format!("SELECT count(*) FROM attachment WHERE {which}");
        self.open().query_row(&query, [], |row| row.get(0)).expect("the table is there")
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn attachment(container: &str) -> Attachment {
    Attachment {
        id: AttachmentId::new(container, "eth0").expect("an id"),
        network: "podnet".into(),
        netns: "/run/netns/blue".into(),
        netns_id: NetnsId { dev: 4, ino: 9 },
        pod: PodName { namespace: "shop".into(), name: "web-0".into(), uid: "u1".into() },
        addresses: vec![PodAddress {
            address: "10.32.4.7/24".parse().expect("an address"),
            gateway: "10.32.4.1".parse().expect("an address"),
        }],
        mac: MacAddress([2, 0, 0, 0, 0, 7]),
        mtu: 1450,
        since_unix_s: 1_700_000_000,
    }
}

/// The file of a journal with so many entries.
fn fresh(dir: &Dir, entries: usize) -> Vec<u8> {
    let (mut journal, _) = Journal::open(&dir.file(), BOOT).expect("a new journal");
    for number in 0..entries {
        journal.insert(&attachment(&format!("c{number}"))).expect("there is room");
    }
    drop(journal);
    fs::read(dir.file()).expect("the journal is there")
}

/// One entry: columns split by the byte 0xff, each begun by its type; good values in place of what is missing.
fn insert(db: &Connection, number: usize, bytes: &[u8]) {
    let mut columns = bytes.split(|byte| *byte == 0xff);
    let mut values = Vec::new();
    let mut places = Vec::new();
    for (at, good) in GOOD.iter().enumerate() {
        let place = at + 1;
        places.push(format!("?{place}"));
        values.push(match columns.next().and_then(<[u8]>::split_first) {
            Some((b't', text)) => {
                // The type of SQLite, with bytes that may be no UTF-8.
                places[at] = format!("CAST(?{place} AS TEXT)");
                Value::Blob(text.to_vec())
            }
            Some((b'b', blob)) => Value::Blob(blob.to_vec()),
            Some((b'i', number)) => {
                Value::Integer(number.iter().fold(0i64, |sum, byte| sum << 8 | i64::from(*byte)))
            }
            Some((b'r', number)) => Value::Real(number.iter().map(|byte| f64::from(*byte)).sum()),
            _ if at == 0 => Value::Text(format!("c{number}")),
            _ => Value::Text((*good).to_owned()),
        });
    }
    let statement = format!("INSERT OR IGNORE INTO attachment VALUES ({})", places.join(", "));
    db.execute(&statement, params_from_iter(values)).expect("SQLite takes any type");
}

fn rows(dir: &Dir, bytes: &[u8]) {
    static FRESH: OnceLock<Vec<u8>> = OnceLock::new();
    fs::write(dir.file(), FRESH.get_or_init(|| fresh(dir, 0))).expect("there is room");
    let db = dir.open();
    db.execute_batch("BEGIN").expect("nobody else is there");
    for (number, row) in bytes.split(|byte| *byte == 0xfe).take(8).enumerate() {
        insert(&db, number, row);
    }
    db.execute_batch("COMMIT").expect("there is room");
    drop(db);
    let all = dir.count("true");
    let current = dir.count(&format!("boot = '{BOOT}'"));
    match Journal::open(&dir.file(), BOOT) {
        Ok((mut journal, recovered)) => {
            assert_eq!((recovered.attachments.len(), recovered.stale), (current, all - current));
            for attachment in &recovered.attachments {
                journal.insert(attachment).expect("there is room");
            }
            drop(journal);
            let (_journal, again) = Journal::open(&dir.file(), BOOT).expect("it was opened before");
            assert_eq!(again, Recovered { stale: 0, ..recovered });
        }
        Err(JournalError::Broken { .. }) => assert_eq!(dir.count("true"), all),
        Err(other) => panic!("{other}: {:?}", std::error::Error::source(&other)),
    }
}

/// Bytes of the file changed: two for the place, one for what is changed there.
fn damage(dir: &Dir, bytes: &[u8]) {
    static FULL: OnceLock<Vec<u8>> = OnceLock::new();
    let mut file = FULL.get_or_init(|| fresh(dir, 3)).clone();
    for change in bytes.chunks_exact(3) {
        let place = usize::from(u16::from_be_bytes([change[0], change[1]])) % file.len();
        file[place] ^= change[2];
    }
    fs::write(dir.file(), file).expect("there is room");
    if let Ok((mut journal, recovered)) = Journal::open(&dir.file(), BOOT) {
        for attachment in &recovered.attachments {
            let _ = journal.remove(&attachment.id);
        }
        let _ = journal.insert(&attachment("c9"));
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((how, rest)) = bytes.split_first() else { return };
    let dir = Dir::new();
    if how % 4 == 0 { damage(&dir, rest) } else { rows(&dir, rest) }
});
