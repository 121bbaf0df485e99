//! What really crosses a device, as tcpdump sees it.

use std::time::Duration;

use super::harness::{Lab, wait_until};
use super::traffic::Background;

const PATIENCE: Duration = Duration::from_secs(30);

/// A capture filter (pcap-filter(7)): whatever has a pod's address outside a tunnel, and VXLAN.
pub const CLEAR: &str = "net 10.32.0.0/12 or net fd00:32::/48 or udp port 8472";

/// What a capture has.
#[derive(Debug)]
pub struct Found {
    /// So many packets match the filter.
    pub matching: usize,
    /// The secret is in it.
    pub secret: bool,
}

/// tcpdump, writing to a file of the lab.
#[derive(Debug)]
pub struct Capture<'a> {
    written: Written<'a>,
    tcpdump: Background,
}

/// The file that it writes.
#[derive(Debug)]
struct Written<'a> {
    lab: &'a Lab,
    place: &'a str,
    path: String,
}

impl Written<'_> {
    fn count(&self, filter: &str) -> usize {
        let script = format!("tcpdump -nn -r {} '{filter}' 2>/dev/null | wc -l", self.path);
        self.lab.sh(self.place, &script).trim().parse().expect("wc counts")
    }
}

impl Drop for Written<'_> {
    fn drop(&mut self) {
        self.lab.exec(self.place, &["rm", "-f", &self.path]);
    }
}

impl<'a> Capture<'a> {
    /// Captures from now on what crosses a device of a node.
    pub fn start(lab: &'a Lab, place: &'a str, device: &str) -> Self {
        let path = format!("/tmp/{}-{}-{device}.pcap", lab.handle().name(), place.replace('/', "-"));
        // Written as they come, or the last second of packets would be lost with the interrupt.
        let words = ["tcpdump", "-Z", "root", "-i", device, "-U", "--immediate-mode", "-s", "0", "-w", &path];
        let tcpdump = lab.background(place, &words);
        wait_until("tcpdump captures", PATIENCE, || lab.exec(place, &["test", "-s", &path]).status.success());
        Self { written: Written { lab, place, path }, tcpdump }
    }

    /// Ends it once it has so many packets, and looks for what a filter finds and for these bytes.
    pub fn finish(self, at_least: usize, filter: &str, secret: &str) -> Found {
        let Self { written, tcpdump } = self;
        wait_until("the capture has its packets", PATIENCE, || written.count("") >= at_least);
        tcpdump.interrupt();
        let matching = written.count(filter);
        let found = written.lab.exec(written.place, &["grep", "-a", "-q", secret, &written.path]);
        Found { matching, secret: found.status.success() }
    }

    /// Ends it once it has a packet that the first filter finds, and counts what each of the others does.
    pub fn finish_with(self, last: &str, filters: &[&str]) -> Vec<usize> {
        let Self { written, tcpdump } = self;
        wait_until("the capture has its last packet", PATIENCE, || written.count(last) > 0);
        tcpdump.interrupt();
        filters.iter().map(|filter| written.count(filter)).collect()
    }
}
