//! What goes on while a test does other things: commands, pings and flows.

use std::collections::BTreeSet;
use std::io::Read;
use std::net::IpAddr;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::enter::Place;
use super::harness::{Lab, wait_until};

/// The port of [`Flow`].
const PORT: u16 = 9000;
/// Takes a line a time and writes when it came.
const STAMP: &str = "nc.openbsd -l PORT | perl -MTime::HiRes=time -ne '$|=1; print time, \"\\n\"'";
/// Sends a line every 20 ms.
const LINES: &str =
    "perl -e '$|=1; while (print \"x\\n\") { select(undef, undef, undef, 0.02) }' | nc.openbsd TO PORT";

impl Lab {
    /// Starts a command that goes on while the test does other things.
    pub fn background(&self, place: impl Into<Place>, words: &[&str]) -> Background {
        let mut command = self.handle().command(place, words).expect("the place exists");
        Background::start(&mut command)
    }

    /// Starts a ping every 10 ms.
    pub fn background_ping(&self, place: impl Into<Place>, to: IpAddr) -> Ping {
        self.background_ping_after(place, &[], to)
    }

    /// Starts a ping every 10 ms in a network namespace that a place knows by this path.
    pub fn background_ping_in(&self, place: impl Into<Place>, netns: &str, to: IpAddr) -> Ping {
        self.background_ping_after(place, &["nsenter", &format!("--net={netns}"), "--"], to)
    }

    fn background_ping_after(&self, place: impl Into<Place>, before: &[&str], to: IpAddr) -> Ping {
        let to = to.to_string();
        let ping = self.background(place, &[before, &["ping", "-n", "-O", "-i", "0.01", &to]].concat());
        // An interrupt before ping listens for one would end it without its summary.
        wait_until("ping says something", Duration::from_secs(10), || !ping.said().is_empty());
        Ping(ping)
    }

    /// Starts a TCP flow from one pod to another.
    pub fn background_flow(&self, from: impl Into<Place>, to: &str, address: IpAddr) -> Flow {
        let script = |text: &str| text.replace("TO", &address.to_string()).replace("PORT", &PORT.to_string());
        let came = self.background(to, &["sh", "-c", &script(STAMP)]);
        let listens = format!("ss -ltn | grep -q :{PORT}");
        wait_until("somebody listens", Duration::from_secs(10), || {
            self.exec(to, &["sh", "-c", &listens]).status.success()
        });
        Flow { came, _sends: self.background(from, &["sh", "-c", &script(LINES)]) }
    }
}

/// A command that runs beside the test.
#[derive(Debug)]
pub struct Background {
    child: Child,
    reader: Option<JoinHandle<()>>,
    output: Arc<Mutex<Vec<u8>>>,
}

impl Background {
    fn start(command: &mut Command) -> Self {
        use std::os::unix::process::CommandExt;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).process_group(0);
        let mut child = command.spawn().expect("the command starts");
        let mut stdout = child.stdout.take().expect("standard output was asked to be a pipe");
        let output = Arc::new(Mutex::new(Vec::new()));
        let written = Arc::clone(&output);
        let reader = std::thread::spawn(move || {
            let mut some = [0; 4096];
            while let Ok(length @ 1..) = stdout.read(&mut some) {
                written.lock().expect("no thread panics with the lock").extend_from_slice(&some[..length]);
            }
        });
        Background { child, reader: Some(reader), output }
    }

    /// What the command has written so far.
    fn said(&self) -> String {
        String::from_utf8_lossy(&self.output.lock().expect("no thread panics with the lock")).into_owned()
    }

    /// Waits for the command's own end and returns what it wrote.
    pub fn finish(mut self) -> String {
        self.wait();
        self.said()
    }

    /// Waits for the command's own end and returns whether it succeeded.
    pub fn succeeded(mut self) -> bool {
        self.wait()
    }

    /// Waits for the command's own end and returns whether it succeeded.
    fn wait(&mut self) -> bool {
        let reader = self.reader.take().expect("a background command is finished once");
        reader.join().expect("the reader does not panic");
        self.child.wait().is_ok_and(|status| status.success())
    }

    /// Interrupts the command, as Ctrl-C does, and returns what it wrote.
    pub fn interrupt(self) -> String {
        self.signal(nix::sys::signal::Signal::SIGINT);
        self.finish()
    }

    fn signal(&self, signal: nix::sys::signal::Signal) {
        let group = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).expect("a process id fits"));
        nix::sys::signal::killpg(group, signal).ok();
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if self.reader.is_some() {
            self.signal(nix::sys::signal::Signal::SIGKILL);
            self.child.wait().ok();
        }
    }
}

/// A ping that goes on while the test does other things.
#[derive(Debug)]
pub struct Ping(Background);

impl Ping {
    /// Ends it and returns how many were sent and which sequence numbers got no answer.
    ///
    /// It goes on until one that was sent after the call is answered. What was sent after the last answer is left out: it may be
    /// on its way. Where no answer comes for ten seconds everything counts.
    pub fn stop(self) -> (u64, Vec<u64>) {
        let (answered, missing) = sequences(&self.0.said());
        let sent_before = answered.union(&missing).max().copied().unwrap_or(0);
        let began = Instant::now();
        let last_answered = |text: &str| sequences(text).0.last().copied().unwrap_or(0);
        while last_answered(&self.0.said()) <= sent_before && began.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let text = self.0.interrupt();
        let (answered, _) = sequences(&text);
        let sent: u64 = text
            .lines()
            .find_map(|line| line.split_once(" packets transmitted")?.0.trim().parse().ok())
            .unwrap_or_else(|| panic!("ping wrote no summary: {text}"));
        let last = answered.last().copied().filter(|last| *last > sent_before).unwrap_or(sent);
        let lost = (1..=last).filter(|sequence| !answered.contains(sequence)).collect();
        (sent, lost)
    }
}

/// Returns which sequence numbers ping (`-O`) says were answered, and which it says are not yet.
fn sequences(text: &str) -> (BTreeSet<u64>, BTreeSet<u64>) {
    let number = |line: &str| -> Option<u64> {
        line.split_once("icmp_seq=")?.1.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    };
    let of = |words: &str| text.lines().filter(|line| line.contains(words)).filter_map(number).collect();
    (of("bytes from"), of("no answer yet"))
}

/// A TCP flow between two pods that tells when each of its lines came, one of which is sent every 20 ms.
#[derive(Debug)]
pub struct Flow {
    came: Background,
    _sends: Background,
}

impl Flow {
    fn count(&self) -> usize {
        self.came.said().lines().count()
    }

    /// Waits until it goes on.
    pub fn await_more(&self, what: &str, limit: Duration) {
        let before = self.count();
        wait_until(what, limit, || self.count() > before + 30);
    }

    /// Ends it and returns the longest time between two of its lines.
    pub fn longest_pause(self) -> Duration {
        let said = self.came.said();
        let times: Vec<f64> = said.lines().filter_map(|line| line.trim().parse().ok()).collect();
        assert!(times.len() > 50, "too little came: {said}");
        Duration::from_secs_f64(times.windows(2).map(|pair| pair[1] - pair[0]).fold(0.0, f64::max))
    }
}
