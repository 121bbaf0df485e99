//! What only a file that several processes share can suffer.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rusqlite::Connection;
use weft_ipam::store::sqlite::SqliteOptions;

use super::*;

/// Tells a test that it is the second process, and where the file is.
const CHILD: &str = "WEFT_TEST_STORE";

fn child_file() -> Option<PathBuf> {
    std::env::var_os(CHILD).map(PathBuf::from)
}

fn child(program: &Path, test: &str, file: &Path) -> Command {
    let mut command = Command::new(program);
    command.args(["--exact", test, "--nocapture"]).env(CHILD, file).stdout(Stdio::null());
    command
}

fn this_program() -> PathBuf {
    std::env::current_exe().expect("the test's own file")
}

#[test]
fn a_reopened_file_has_everything() {
    let directory = Directory::new();
    let file = directory.join("deep/below/store.db");
    let before = runtime().block_on(async {
        let store = SqliteStore::open(&file);
        store.put_if(key(1), Expect::Absent, b"a".to_vec()).await.expect("absent");
        store.list().await.expect("up")
    });
    let after = runtime().block_on(SqliteStore::open(&file).list()).expect("up");
    assert_eq!(before, after);
}

/// Both processes count one entry up; every count must survive.
#[test]
fn two_processes_racing_lose_no_write() {
    const ROUNDS: u32 = 100;
    /// SQLite's waiters do not queue: on a busy machine one of them may wait in vain, and asks again, as weftd does.
    const REFUSALS: u32 = 10;
    async fn count(store: &SqliteStore) {
        let mut refusals = 0;
        let mut refuse = |error| {
            refusals += 1;
            assert!(refusals <= REFUSALS, "{error}");
        };
        for _ in 0..ROUNDS {
            loop {
                let snapshot = match store.list().await {
                    Ok(snapshot) => snapshot,
                    Err(error) => {
                        refuse(error);
                        continue;
                    }
                };
                let entry = snapshot.entries.get(&key(1));
                let number: u32 = entry.map_or(0, |entry| {
                    std::str::from_utf8(&entry.value).expect("text").parse().expect("a number")
                });
                let expect = entry.map_or(Expect::Absent, |entry| Expect::Revision(entry.revision));
                match store.put_if(key(1), expect, (number + 1).to_string().into_bytes()).await {
                    Ok(_) => break,
                    Err(PutError::Conflict(_)) => {}
                    Err(PutError::Store(error)) => refuse(error),
                }
            }
        }
    }
    if let Some(file) = child_file() {
        return runtime().block_on(count(&SqliteStore::open(file)));
    }
    let directory = Directory::new();
    let file = directory.join("store.db");
    let mut other = child(&this_program(), "sqlite::two_processes_racing_lose_no_write", &file)
        .spawn()
        .expect("a second process");
    let store = SqliteStore::open(&file);
    runtime().block_on(count(&store));
    assert!(other.wait().expect("the second process").success());
    let snapshot = runtime().block_on(store.list()).expect("up");
    assert_eq!(snapshot.entries[&key(1)].value, (2 * ROUNDS).to_string().into_bytes());
    assert_eq!(snapshot.revision, u64::from(2 * ROUNDS));
}

#[test]
fn threads_with_their_own_connections_win_each_key_once() {
    let directory = Directory::new();
    let file = directory.join("store.db");
    let won: usize = std::thread::scope(|scope| {
        let racers: Vec<_> = (0..4_u8)
            .map(|racer| {
                let file = file.clone();
                scope.spawn(move || {
                    runtime().block_on(async {
                        // Each of a hundred writes waits for the disk, and a disk that others fill stands still for a minute.
                        let patient = SqliteOptions {
                            busy_timeout: Duration::from_secs(600),
                            ..SqliteOptions::default()
                        };
                        let store = SqliteStore::with_options(file, patient);
                        let mut won = 0;
                        for number in 0..25 {
                            let put = store.put_if(key(number), Expect::Absent, vec![racer]).await;
                            assert!(!matches!(put, Err(PutError::Store(_))), "{put:?}");
                            won += usize::from(put.is_ok());
                        }
                        won
                    })
                })
            })
            .collect();
        racers.into_iter().map(|racer| racer.join().expect("a racer")).sum()
    });
    assert_eq!(won, 25);
}

#[test]
fn a_write_of_another_process_wakes_the_watch() {
    let directory = Directory::new();
    let (one, two) = (SqliteStore::open(directory.join("s")), SqliteStore::open(directory.join("s")));
    runtime().block_on(async {
        one.list().await.expect("up");
        let mut watch = one.watch();
        // A new watcher is told once at the start; drain what the watch had to say before the write.
        while tokio::time::timeout(Duration::from_secs(1), watch.changed()).await.is_ok() {}
        two.put_if(key(1), Expect::Absent, vec![]).await.expect("absent");
        assert_eq!(changed(&mut watch).await, Some(Change::Relist));
    });
}

#[test]
fn a_file_that_goes_and_comes_back_is_the_same_store() {
    let directory = Directory::new();
    let (file, away) = (directory.join("store.db"), directory.join("away.db"));
    let store = SqliteStore::open(&file);
    runtime().block_on(async {
        let revision = store.put_if(key(1), Expect::Absent, b"a".to_vec()).await.expect("absent");
        let before = store.list().await.expect("up");
        std::fs::rename(&file, &away).expect("moved");
        let gone = format!(
            "the store {} is gone: put it back, or restart weftd to begin an empty one",
            file.display()
        );
        assert_eq!(sentence(store.list().await), gone);
        assert!(!file.exists(), "an empty store would give the subnets away");
        std::fs::rename(&away, &file).expect("moved");
        assert_eq!(store.list().await.expect("back"), before);
        store.put_if(key(1), Expect::Revision(revision), b"b".to_vec()).await.expect("current");
    });
}

#[test]
fn a_write_meant_for_a_replaced_file_fails_until_the_new_one_is_listed() {
    let directory = Directory::new();
    let file = directory.join("store.db");
    let store = SqliteStore::open(&file);
    runtime().block_on(async {
        let revision = store.put_if(key(1), Expect::Absent, b"a".to_vec()).await.expect("absent");
        let before = store.list().await.expect("up");
        std::fs::remove_file(&file).expect("removed");
        // Another daemon starts, and its first write gets the same revision under the same key.
        let other = SqliteStore::open(&file);
        assert_eq!(other.put_if(key(1), Expect::Absent, b"other".to_vec()).await, Ok(revision));
        let error = store.put_if(key(1), Expect::Revision(revision), b"b".to_vec()).await;
        let replaced = format!("the store {} was replaced: its leases are read again", file.display());
        assert_eq!(error, Err(PutError::Store(StoreError(replaced))));
        let after = store.list().await.expect("up");
        assert_ne!(before.store_id, after.store_id);
        assert_eq!(after.entries[&key(1)].value, b"other");
        store.put_if(key(1), Expect::Revision(revision), b"b".to_vec()).await.expect("listed since");
    });
}

#[test]
fn a_read_only_file_is_named_and_works_again_once_writable() {
    async fn read_only(file: &Path) {
        let directory = file.parent().expect("a directory");
        let mode = |path: &Path, mode| {
            let permissions = std::fs::Permissions::from_mode(mode);
            std::fs::set_permissions(path, permissions).expect("our own file");
        };
        SqliteStore::open(file).put_if(key(1), Expect::Absent, vec![]).await.expect("absent");
        mode(file, 0o444);
        let store = SqliteStore::open(file);
        let expected = format!(
            "the store {} is read-only: make the file and its directory writable for weftd",
            file.display()
        );
        assert_eq!(
            store.put_if(key(2), Expect::Absent, vec![]).await.expect_err("denied").to_string(),
            expected
        );
        mode(file, 0o644);
        store.put_if(key(2), Expect::Absent, vec![]).await.expect("absent");
        assert_eq!(store.list().await.expect("up").entries.len(), 2);
        mode(directory, 0o755);
    }
    if let Some(file) = child_file() {
        return runtime().block_on(read_only(&file));
    }
    let directory = Directory::new();
    let file = directory.join("store.db");
    let probe = directory.join("probe");
    std::fs::write(&probe, "").expect("a file");
    std::fs::set_permissions(&probe, std::fs::Permissions::from_mode(0o444)).expect("our own file");
    if std::fs::OpenOptions::new().append(true).open(&probe).is_err() {
        return runtime().block_on(read_only(&file));
    }
    // Modes do not bind root: be somebody else, with a copy of this program that anybody may run.
    let program = directory.join("program");
    std::fs::copy(this_program(), &program).expect("a copy");
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).expect("our own file");
    let nobody = 65_534;
    let own = directory.join("own");
    std::fs::create_dir(&own).expect("a directory");
    std::os::unix::fs::chown(&own, Some(nobody), Some(nobody)).expect("root may");
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).expect("our own");
    let test = "sqlite::a_read_only_file_is_named_and_works_again_once_writable";
    let status = child(&program, test, &own.join("store.db")).uid(nobody).gid(nobody).status();
    assert!(status.expect("a second process").success());
}

#[test]
fn a_full_store_says_so_and_keeps_what_it_has() {
    let directory = Directory::new();
    let options = SqliteOptions { max_pages: 16, ..SqliteOptions::default() };
    let file = directory.join("store.db");
    let store = SqliteStore::with_options(&file, options);
    runtime().block_on(async {
        let mut last = 0;
        let error = loop {
            match store.put_if(key(last), Expect::Absent, vec![b'x'; 2000]).await {
                Ok(_) => last += 1,
                Err(error) => break error,
            }
        };
        let expected = format!(
            "no room to write the store {}: free space on its disk (its limit is 16 pages)",
            file.display()
        );
        assert_eq!(error.to_string(), expected);
        let snapshot = store.list().await.expect("up");
        assert_eq!(snapshot.entries.len(), usize::from(last));
        // Room again: what is written over or deleted frees pages.
        for number in 0..4 {
            store.delete_if(key(number), snapshot.entries[&key(number)].revision).await.expect("current");
        }
        store.put_if(key(200), Expect::Absent, vec![b'x'; 1000]).await.expect("absent");
    });
}

#[test]
fn a_locked_file_is_named_within_the_busy_timeout() {
    let directory = Directory::new();
    let file = directory.join("store.db");
    let options = SqliteOptions { busy_timeout: Duration::from_millis(50), ..SqliteOptions::default() };
    let store = SqliteStore::with_options(&file, options);
    runtime().block_on(async {
        store.list().await.expect("up");
        let other = Connection::open(&file).expect("a second connection");
        other.execute_batch("BEGIN IMMEDIATE").expect("the write lock");
        let error = store.put_if(key(1), Expect::Absent, vec![]).await.expect_err("locked");
        assert!(error.to_string().contains("was locked for 50ms by another process"), "{error}");
        store.list().await.expect("reading goes on");
        other.execute_batch("ROLLBACK").expect("the lock given back");
        store.put_if(key(1), Expect::Absent, vec![]).await.expect("absent");
    });
}

#[test]
fn a_file_that_is_no_store_is_refused_and_left_alone() {
    let directory = Directory::new();
    let text = directory.join("text");
    std::fs::write(&text, "not a database, but long enough to be read as a header of one".repeat(20))
        .expect("a file");
    let before = std::fs::read(&text).expect("a file");
    let expected = format!(
        "{} is not a store of weft: name another file in [store] path, or move this one away",
        text.display()
    );
    assert_eq!(sentence(runtime().block_on(SqliteStore::open(&text).list())), expected);
    assert_eq!(std::fs::read(&text).expect("a file"), before);

    let foreign = directory.join("foreign.db");
    let connection = Connection::open(&foreign).expect("a database");
    connection.execute_batch("CREATE TABLE theirs (a)").expect("a table");
    let expected = format!(
        "{} is not a store of weft: name another file in [store] path, or move this one away",
        foreign.display()
    );
    assert_eq!(sentence(runtime().block_on(SqliteStore::open(&foreign).list())), expected);

    let newer = directory.join("newer.db");
    runtime().block_on(SqliteStore::open(&newer).list()).expect("up");
    Connection::open(&newer).expect("a database").execute_batch("PRAGMA user_version = 2").expect("written");
    let error = sentence(runtime().block_on(SqliteStore::open(&newer).list()));
    assert!(error.contains("layout 2"), "{error}");
}

#[test]
fn a_directory_that_cannot_be_made_is_named() {
    let directory = Directory::new();
    let file = directory.join("file");
    std::fs::write(&file, "").expect("a file");
    let error = sentence(runtime().block_on(SqliteStore::open(file.join("store.db")).list()));
    assert!(
        error.starts_with(&format!("the store {}/store.db cannot be reached", file.display())),
        "{error}"
    );
}
