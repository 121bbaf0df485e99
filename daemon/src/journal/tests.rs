use std::sync::atomic::{AtomicU32, Ordering};

use super::*;

/// A directory of the test's own that goes with it.
struct Dir(PathBuf);

impl Dir {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("weft-journal-{}-{number}", std::process::id()));
        std::fs::create_dir(&path).expect("a new directory");
        Self(path)
    }

    fn file(&self) -> PathBuf {
        self.0.join("pods.db")
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn attachment(container: &str) -> Attachment {
    Attachment {
        id: AttachmentId::new(container, "eth0").unwrap(),
        network: "podnet".into(),
        netns: "/run/netns/blue".into(),
        netns_id: NetnsId { dev: 4, ino: u64::MAX },
        pod: PodName { namespace: "shop".into(), name: "web-0".into(), uid: "u1".into() },
        addresses: vec![
            PodAddress { address: "10.32.4.7/24".parse().unwrap(), gateway: "10.32.4.1".parse().unwrap() },
            PodAddress { address: "fd00:32::7/64".parse().unwrap(), gateway: "fd00:32::1".parse().unwrap() },
        ],
        mac: MacAddress([2, 0, 0, 0, 0, 7]),
        mtu: 1450,
        since_unix_s: 1_700_000_000,
    }
}

#[test]
fn what_is_written_is_there_after_a_restart() {
    let dir = Dir::new();
    let (mut journal, recovered) = Journal::open(&dir.file(), "boot-1").unwrap();
    assert_eq!(recovered, Recovered::default());
    journal.insert(&attachment("c1")).unwrap();
    journal.insert(&attachment("c2")).unwrap();
    journal.remove(&attachment("c2").id).unwrap();
    journal.remove(&attachment("c3").id).unwrap();
    let mut changed = attachment("c1");
    changed.netns = "/run/netns/green".into();
    journal.insert(&changed).unwrap();
    // As after a kill: the files as they are while the journal is open.
    let copy = Dir::new();
    for file in std::fs::read_dir(&dir.0).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), copy.0.join(file.file_name())).unwrap();
    }
    let (_, recovered) = Journal::open(&copy.file(), "boot-1").unwrap();
    assert_eq!(recovered, Recovered { attachments: vec![changed], stale: 0 });
}

#[test]
fn a_second_daemon_is_refused() {
    let dir = Dir::new();
    let (_journal, _) = Journal::open(&dir.file(), "boot-1").unwrap();
    let error = Journal::open(&dir.file(), "boot-1").expect_err("in use");
    assert!(error.to_string().contains("in use by another process"), "{error}");
}

#[test]
fn a_reboot_frees_every_address() {
    let dir = Dir::new();
    let (mut journal, _) = Journal::open(&dir.file(), "boot-1").unwrap();
    journal.insert(&attachment("c1")).unwrap();
    journal.insert(&attachment("c2")).unwrap();
    drop(journal);
    let (_, recovered) = Journal::open(&dir.file(), "boot-2").unwrap();
    assert_eq!(recovered, Recovered { attachments: vec![], stale: 2 });
}

#[test]
fn a_file_that_is_no_journal_is_named_and_kept() {
    let dir = Dir::new();
    std::fs::write(dir.file(), "something else, longer than the header of a database would be: 0123456789")
        .unwrap();
    let error = Journal::open(&dir.file(), "boot-1").expect_err("no journal");
    assert!(matches!(error, JournalError::Broken { .. }), "{error}");
    assert!(error.to_string().contains("move it away"), "{error}");
    assert!(std::fs::read_to_string(dir.file()).unwrap().starts_with("something else"));
    let error = Journal::open(&dir.0.join("missing/pods.db"), "boot-1").expect_err("no directory");
    assert!(error.to_string().contains("check that its directory exists"), "{error}");
}

#[test]
fn a_journal_of_a_later_release_is_not_touched() {
    let dir = Dir::new();
    let db = Connection::open(dir.file()).unwrap();
    db.execute_batch("PRAGMA user_version = 99").unwrap();
    drop(db);
    let error = Journal::open(&dir.file(), "boot-1").expect_err("too new");
    assert!(error.to_string().contains("format 99 is of a later release"), "{error}");
}

#[test]
fn an_entry_that_cannot_be_read_is_told_as_such_and_the_file_stays_as_it_is() {
    for spoiled in
        ["addresses = 'nowhere'", "mac = x'020000000007'", "mtu = -1", "pod_uid = CAST(x'ff' AS TEXT)"]
    {
        let dir = Dir::new();
        let (mut journal, _) = Journal::open(&dir.file(), "boot-0").unwrap();
        journal.insert(&attachment("c1")).unwrap();
        drop(journal);
        let (mut journal, _) = Journal::open(&dir.file(), "boot-0").unwrap();
        journal.boot = "boot-1".into();
        journal.insert(&attachment("c2")).unwrap();
        journal.db.execute(&format!("UPDATE attachment SET {spoiled} WHERE container = 'c2'"), []).unwrap();
        drop(journal);
        let error = Journal::open(&dir.file(), "boot-1").expect_err(spoiled);
        assert!(error.to_string().contains("entry 1 cannot be read"), "{spoiled}: {error}");
        let db = Connection::open(dir.file()).unwrap();
        let left: i64 = db.query_row("SELECT count(*) FROM attachment", [], |row| row.get(0)).unwrap();
        assert_eq!(left, 2, "{spoiled}");
    }
}

#[test]
fn a_database_of_something_else_is_told_as_such() {
    let dir = Dir::new();
    Connection::open(dir.file()).unwrap().execute_batch("CREATE TABLE attachment (mail TEXT)").unwrap();
    let error = Journal::open(&dir.file(), "boot-1").expect_err("no journal");
    assert!(error.to_string().contains("no such column: boot"), "{error}");
}

/// Runs a test on a thread whose `/tmp/...` directory is a file system of 128 KiB.
fn on_a_small_disk(test: impl FnOnce(&Path) + Send + 'static) {
    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};
    if !nix::unistd::geteuid().is_root() {
        assert!(std::env::var_os("CI").is_none(), "this test needs root, and CI must not skip it");
        eprintln!("SKIP: needs root to mount a small file system");
        return;
    }
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNS).expect("root may unshare");
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("private mounts");
        let dir = Dir::new();
        mount(Some("tmpfs"), &dir.0, Some("tmpfs"), MsFlags::empty(), Some("size=128k")).expect("a tmpfs");
        test(&dir.0);
        nix::mount::umount2(&dir.0, nix::mount::MntFlags::MNT_DETACH).expect("unmounted");
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn a_full_disk_refuses_the_insert_with_a_sentence_and_holds_no_removal_back() {
    on_a_small_disk(|dir| {
        let path = dir.join("pods.db");
        let (mut journal, _) = Journal::open(&path, "boot-1").expect("room for an empty journal");
        journal.insert(&attachment("c1")).expect("room for one");
        let ballast = dir.join("ballast");
        let mut written = vec![];
        loop {
            written.extend_from_slice(&[0; 4096]);
            if std::fs::write(&ballast, &written).is_err() {
                break;
            }
        }
        let mut error = None;
        let mut held = vec![attachment("c1")];
        // The log in front of the database may have room left.
        for number in 0..100 {
            let attachment = attachment(&format!("full{number}"));
            match journal.insert(&attachment) {
                Ok(()) => held.push(attachment),
                Err(failed) => {
                    error = Some(failed);
                    break;
                }
            }
        }
        let error = error.expect("the disk is full");
        assert!(matches!(error, JournalError::Full { .. }), "{error:?}");
        let error = CniError::from(error);
        assert_eq!(error.code, Code::InputOutput);
        assert!(error.message.contains("is full; free some space"), "{error}");
        // A daemon that starts now finds what is there.
        drop(journal);
        let (mut journal, recovered) = Journal::open(&path, "boot-1").expect("a restart needs no room");
        assert_eq!(recovered.attachments, held);
        let removed = journal.remove(&held[0].id);
        assert_eq!(journal.removals_waiting(), usize::from(removed.is_err()));
        // Room again: what waited is done with the next write.
        std::fs::remove_file(&ballast).unwrap();
        journal.insert(&attachment("c9")).expect("room again");
        assert_eq!(journal.removals_waiting(), 0);
        held.remove(0);
        held.push(attachment("c9"));
        held.sort_by(|a, b| a.id.cmp(&b.id));
        drop(journal);
        let (_, recovered) = Journal::open(&path, "boot-1").unwrap();
        assert_eq!(recovered.attachments, held, "nothing is lost and nothing is half-written");
    });
}

#[test]
fn the_running_boot_has_an_identity() {
    assert_eq!(boot_id().unwrap().len(), 36);
}
