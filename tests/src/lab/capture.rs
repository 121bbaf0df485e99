//! What really crosses a device, as tcpdump sees it.

use std::time::Duration;

use super::harness::{Background, Lab, wait_until};

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
    lab: &'a Lab,
    place: &'a str,
    path: String,
    tcpdump: Background,
}

impl<'a> Capture<'a> {
    /// Captures from now on what crosses a device of a node.
    pub fn start(lab: &'a Lab, place: &'a str, device: &str) -> Self {
        let path = format!("/tmp/{}-{}-{device}.pcap", lab.handle().name(), place.replace('/', "-"));
        // Written as they come, or the last second of packets would be lost with the interrupt.
        let words = ["tcpdump", "-Z", "root", "-i", device, "-U", "--immediate-mode", "-s", "0", "-w", &path];
        let tcpdump = lab.background(place, &words);
        wait_until("tcpdump captures", PATIENCE, || lab.exec(place, &["test", "-s", &path]).status.success());
        Self { lab, place, path, tcpdump }
    }

    /// Ends it once it has so many packets, and looks for what a filter finds and for these bytes.
    pub fn finish(self, at_least: usize, filter: &str, secret: &str) -> Found {
        let Self { lab, place, path, tcpdump } = self;
        let count = |filter: &str| -> usize {
            let script = format!("tcpdump -nn -r {path} '{filter}' 2>/dev/null | wc -l");
            lab.sh(place, &script).trim().parse().expect("wc counts")
        };
        wait_until("the capture has its packets", PATIENCE, || count("") >= at_least);
        tcpdump.interrupt();
        let matching = count(filter);
        let secret = lab.exec(place, &["grep", "-a", "-q", secret, &path]).status.success();
        lab.sh(place, &format!("rm {path}"));
        Found { matching, secret }
    }
}
