//! A lab's directory of plain files: who keeps the lab, what it is, its logs, and what its nodes share.
//!
//! The directory outlives a lab that was interrupted. Whether its keeper still lives is judged by process id *and* start
//! time *and* boot id, so that a process id that was given out again is never taken for a keeper.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};

use super::enter::{self, Place};
use super::model::{Request, State};

/// Which process keeps a lab.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct KeeperId {
    pub pid: u32,
    pub start_ticks: u64,
    pub boot: String,
    pub user_namespace: bool,
}

impl KeeperId {
    pub(crate) fn of(pid: u32, user_namespace: bool) -> anyhow::Result<Self> {
        let start_ticks = start_ticks(pid).with_context(|| format!("process {pid} is already gone"))?;
        Ok(KeeperId { pid, start_ticks, boot: boot_id(), user_namespace })
    }

    pub(crate) fn is_alive(&self) -> bool {
        self.boot == boot_id() && start_ticks(self.pid) == Some(self.start_ticks)
    }
}

/// Field 22 of /proc/PID/stat; none for a process that is gone or waits to be reaped.
fn start_ticks(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the name in parentheses, which may itself hold blanks and parentheses.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    if fields.first().is_none_or(|state| matches!(*state, "Z" | "X")) {
        return None;
    }
    fields.get(19)?.parse().ok()
}

fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// What is found where a lab would be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// Nothing.
    Absent,
    /// What a lab left that was interrupted.
    Stale,
    /// A lab whose keeper lives.
    Alive,
}

/// Names a lab and reaches it from outside.
#[derive(Debug, Clone)]
pub struct Handle {
    name: String,
    dir: PathBuf,
}

impl Handle {
    /// Names a lab; it need not exist.
    pub fn new(name: &str) -> Self {
        let base = std::env::var_os("XDG_RUNTIME_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
        let dir = base.join(format!("weft-lab-{}", geteuid())).join(name);
        Handle { name: name.to_owned(), dir }
    }

    /// Names a lab by its directory: inside a user namespace the path cannot be found from the user.
    pub(crate) fn at(name: &str, dir: &Path) -> Self {
        Handle { name: name.to_owned(), dir: dir.to_owned() }
    }

    /// Lists the labs of this user, alive or stale.
    pub fn all() -> Vec<Handle> {
        let Ok(entries) = fs::read_dir(Handle::new("any").base()) else { return Vec::new() };
        let mut names: Vec<String> =
            entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names.iter().map(|name| Handle::new(name)).collect()
    }

    /// The lab's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The directory of plain files.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The directory that all nodes see as `/run/weft-lab/shared`.
    pub fn shared(&self) -> PathBuf {
        self.dir.join("shared")
    }

    /// What the daemon of a node wrote.
    pub fn log(&self, node: &str) -> PathBuf {
        self.dir.join("log").join(format!("{node}.log"))
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.join("keeper.sock")
    }

    /// Says what is there.
    pub fn presence(&self) -> Presence {
        match self.keeper() {
            Some(keeper) if keeper.is_alive() => Presence::Alive,
            _ if self.dir.exists() => Presence::Stale,
            _ => Presence::Absent,
        }
    }

    pub(crate) fn keeper(&self) -> Option<KeeperId> {
        serde_json::from_str(&fs::read_to_string(self.dir.join("keeper.json")).ok()?).ok()
    }

    fn living_keeper(&self) -> anyhow::Result<KeeperId> {
        match self.keeper() {
            Some(keeper) if keeper.is_alive() => Ok(keeper),
            _ => bail!("lab {} is not up: start it with `weft-lab --name {} up`", self.name, self.name),
        }
    }

    fn base(&self) -> &Path {
        self.dir.parent().expect("a lab's directory has a parent")
    }

    /// Keeps other processes from making labs and from taking stale ones away, until the lock is dropped.
    pub(crate) fn lock(&self) -> anyhow::Result<Flock<File>> {
        let base = self.base();
        loop {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(base)
                .with_context(|| format!("cannot make {}", base.display()))?;
            let lock = Flock::lock(File::open(base)?, FlockArg::LockExclusive).map_err(|(_, error)| error)?;
            // Another process may have removed the directory before it could be locked.
            let Ok(there) = fs::metadata(base) else { continue };
            if there.uid() != geteuid().as_raw() {
                bail!(
                    "{} belongs to user {}: remove it, or set XDG_RUNTIME_DIR",
                    base.display(),
                    there.uid()
                );
            }
            if there.ino() == lock.metadata()?.ino() {
                return Ok(lock);
            }
        }
    }

    /// Makes the directory, which only this user may enter.
    pub(crate) fn create(&self) -> anyhow::Result<()> {
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        for part in ["shared", "log", "node"] {
            builder
                .create(self.dir.join(part))
                .with_context(|| format!("cannot make {}", self.dir.display()))?;
        }
        Ok(())
    }

    /// Removes the directory of a lab that is not alive. Takes the lock: another process may be at it too, or be
    /// making a lab in the directory around it.
    pub(crate) fn remove(&self) -> anyhow::Result<()> {
        let _lock = self.lock()?;
        self.remove_locked()
    }

    /// Is [`Handle::remove`] for a caller that holds the lock.
    pub(crate) fn remove_locked(&self) -> anyhow::Result<()> {
        match fs::remove_dir_all(&self.dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot remove {}", self.dir.display()))
            }
            _ => {
                // Fails when another lab is there, which is right.
                fs::remove_dir(self.base()).ok();
                Ok(())
            }
        }
    }

    /// What the lab last was, by its own file.
    ///
    /// # Errors
    /// A sentence, when no lab of this name is up.
    pub fn state(&self) -> anyhow::Result<State> {
        self.living_keeper()?;
        self.read_state()
    }

    pub(crate) fn read_state(&self) -> anyhow::Result<State> {
        let text = fs::read_to_string(self.dir.join("lab.json"))
            .with_context(|| format!("lab {} is coming up", self.name))?;
        Ok(serde_json::from_str(&text)?)
    }

    pub(crate) fn write(&self, file: &str, value: &impl Serialize) -> anyhow::Result<()> {
        let next = self.dir.join(format!("{file}.next"));
        fs::write(&next, serde_json::to_vec_pretty(value)?)?;
        fs::rename(&next, self.dir.join(file)).with_context(|| format!("cannot write {file}"))
    }

    /// Tells the lab to do something, and waits until it is done.
    ///
    /// # Errors
    /// What the lab answered, or that it is not up.
    pub fn request(&self, request: &Request) -> anyhow::Result<State> {
        let gone = || {
            format!("the keeper of lab {} does not answer: see {}/keeper.log", self.name, self.dir.display())
        };
        // A keeper that was just started listens a moment later.
        let mut stream = loop {
            self.living_keeper()?;
            match UnixStream::connect(self.socket()) {
                Ok(stream) => break stream,
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        stream.write_all(&line).with_context(gone)?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).with_context(gone)?;
        let answer: Result<State, String> = serde_json::from_str(&answer).with_context(gone)?;
        answer.map_err(anyhow::Error::msg)
    }

    /// Makes a command that runs in a place of the lab.
    ///
    /// # Errors
    /// A sentence, when there is no such place or no such lab.
    pub fn command(&self, place: impl Into<Place>, command: &[&str]) -> anyhow::Result<Command> {
        let keeper = self.living_keeper()?;
        let mut words = enter::to_keeper(&keeper);
        words.extend(enter::from_keeper(&self.read_state()?, &place.into())?);
        words.extend(command.iter().map(|word| (*word).to_owned()));
        Ok(enter::command(&words))
    }

    /// Ends the lab, or what is left of one, and removes its files. True if there was anything.
    ///
    /// # Errors
    /// When the keeper cannot be ended or the files cannot be removed.
    pub fn down(&self) -> anyhow::Result<bool> {
        let was = self.presence();
        if was == Presence::Alive {
            let keeper = self.living_keeper()?;
            if self.request(&Request::Down).is_err() {
                end(&keeper)?;
            }
            let patience = Instant::now() + Duration::from_secs(10);
            while keeper.is_alive() {
                if Instant::now() > patience {
                    end(&keeper)?;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        if was != Presence::Absent {
            self.remove()?;
        }
        Ok(was != Presence::Absent)
    }
}

/// Ends a keeper that does not listen; the kernel ends everything below it.
fn end(keeper: &KeeperId) -> anyhow::Result<()> {
    use nix::sys::signal::{Signal, kill};
    if keeper.is_alive() {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(keeper.pid)?);
        kill(pid, Signal::SIGKILL).context("cannot end the keeper")?;
    }
    Ok(())
}
