//! Network namespaces for tests, each with a thread of its own.

use std::fmt::Debug;
use std::process::Command;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace with one thread in it; it is gone with this value.
pub struct Netns {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<thread::JoinHandle<()>>,
    #[allow(dead_code, reason = "not every test names it to a tool outside")]
    pub tid: i32,
}

impl Netns {
    /// Makes one, or says why not.
    pub fn new() -> Option<Self> {
        let (jobs, todo) = mpsc::channel::<Job>();
        let (told, tell) = mpsc::channel();
        let thread = thread::spawn(move || {
            let done = unshare(CloneFlags::CLONE_NEWNET);
            told.send(done.map(|()| nix::unistd::gettid().as_raw())).unwrap();
            for job in todo {
                job();
            }
        });
        match tell.recv().unwrap() {
            Ok(tid) => {
                let netns = Self { jobs: Some(jobs), thread: Some(thread), tid };
                netns.sh("ip link set lo up");
                Some(netns)
            }
            Err(error) => {
                let reason = format!("a network namespace cannot be made here: {error}");
                assert!(std::env::var_os("CI").is_none(), "{reason}");
                println!("SKIP: {reason}");
                None
            }
        }
    }

    /// Runs something in it.
    pub fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, wait) = mpsc::channel();
        self.jobs.as_ref().unwrap().send(Box::new(move || drop(done.send(job())))).unwrap();
        wait.recv().expect("the job did not panic")
    }

    /// Runs a script in the namespace and gives back what it prints.
    pub fn sh(&self, script: &str) -> String {
        let script = script.to_owned();
        let output = self.run({
            let script = script.clone();
            move || Command::new("sh").args(["-ec", &script]).output().unwrap()
        });
        assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Opens what this process had open until a moment ago. A program that another test starts meanwhile holds a copy of every
/// socket and device of this process from its fork to its execution, and so the port is taken for as long.
#[allow(dead_code, reason = "not every test opens something a second time")]
pub fn opened_again<T, E: Debug>(open: impl Fn() -> Result<T, E>) -> T {
    let bound = Instant::now() + Duration::from_secs(20);
    loop {
        match open() {
            Ok(opened) => return opened,
            Err(error) => assert!(Instant::now() < bound, "it is never free again: {error:?}"),
        }
        thread::sleep(Duration::from_millis(1));
    }
}
