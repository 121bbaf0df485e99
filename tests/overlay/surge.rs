//! Two daemons of a node in containers of two pods, as a DaemonSet with a surge has them: the earlier one rests, comes back by
//! itself never, and is not taken for the later one.

use super::*;

/// A daemon as a pod has it: process 1 of a namespace of its own, which restarts by a new process of the same instance.
struct Pod<'a> {
    lab: &'a Lab,
    instance: &'static str,
    pid: String,
    process: Option<Background>,
}

const NODE: &str = "n1";

impl<'a> Pod<'a> {
    fn start(lab: &'a Lab, instance: &'static str) -> Self {
        let mut pod = Self { lab, instance, pid: String::new(), process: None };
        pod.launch();
        wait_until("the daemon serves", PATIENCE, || pod.is_ready() && pod.said("weftd started"));
        pod
    }

    fn log(&self) -> String {
        format!("/run/weft/{}.log", self.instance)
    }

    /// What a kubelet does, again and again: the same container from the start.
    fn launch(&mut self) {
        let before = daemons(self.lab, NODE);
        self.lab.sh(NODE, &format!("rm -f {}", self.log()));
        // Mounts of pods' namespaces come in, as with HostToContainer.
        let script = format!(
            "exec unshare --pid --fork --kill-child --mount --propagation slave --mount-proc env WEFT_INSTANCE={} \
             weftd --config {CONFIG} --take-over --rest >{} 2>&1",
            self.instance,
            self.log()
        );
        self.process = Some(self.lab.background(NODE, &["sh", "-c", &script]));
        let new = || daemons(self.lab, NODE).into_iter().find(|pid| !before.contains(pid));
        wait_until("the process is there", PATIENCE, || new().is_some());
        self.pid = new().expect("it was there");
    }

    fn said(&self, what: &str) -> bool {
        self.lab.exec(NODE, &["grep", "-q", what, &self.log()]).status.success()
    }

    /// What an exec probe in the pod's container finds.
    fn is_ready(&self) -> bool {
        let own = format!("WEFT_INSTANCE={}", self.instance);
        self.lab.exec(NODE, &["env", &own, "weft", "ready"]).status.code() == Some(0)
    }

    fn rests(&self) {
        wait_until("it rests", PATIENCE, || self.said("rests until it is told to stop"));
        // Idle threads of the runtime end by themselves.
        let tasks = format!("ls /proc/{}/task | wc -l", self.pid);
        wait_until("one thread is left", PATIENCE, || self.lab.sh(NODE, &tasks).trim() == "1");
        let fds = self.lab.sh(NODE, &format!("ls -l /proc/{}/fd", self.pid));
        assert!(!fds.contains("/dev/net/tun") && !fds.contains("/var/lib/weft"), "{fds}");
        let sockets = self.lab.run(NODE, &["ss", "-Hantuxp"]);
        let own: Vec<_> =
            sockets.lines().filter(|line| line.contains(&format!("pid={},", self.pid))).collect();
        // The pair by which a signal wakes the runtime has no address.
        let named: Vec<_> =
            own.iter().filter(|line| !line.starts_with("u_str") || line.contains('/')).collect();
        assert!(named.is_empty(), "{named:#?}");
    }

    fn signal(&self, signal: &str) {
        self.lab.run(NODE, &["kill", signal, &self.pid]);
        wait_until("the process is gone", PATIENCE, || !daemons(self.lab, NODE).contains(&self.pid));
    }

    /// How the process ended, by its own word: the exit status of `unshare` is that of the daemon.
    fn terminate(mut self) {
        let background = self.process.take().expect("it was launched");
        self.signal("-TERM");
        assert!(background.succeeded(), "{} did not end with 0", self.instance);
    }
}

fn weft(lab: &Lab, words: &[&str]) -> Option<i32> {
    lab.exec(NODE, words).status.code()
}

fn surge(name: &str, backend: Backend) {
    let lab = Lab::up(LabOptions::new(name).nodes(2).pods(1).backend(backend));
    let traffic = pings(&lab);
    // From one without an instance, as from an earlier release.
    let mut one = Pod::start(&lab, "one");
    wait_until("the lab's own daemon is gone", PATIENCE, || daemons(&lab, NODE) == [one.pid.clone()]);
    let mut two = Pod::start(&lab, "two");
    one.rests();
    assert!(two.is_ready() && !one.is_ready(), "each probe is answered for its own pod");
    assert_eq!(weft(&lab, &["weft", "ready"]), Some(0));
    assert_eq!(daemons(&lab, NODE).len(), 2);
    // The earlier one is restarted while its successor runs: it does not take the node back.
    one.signal("-KILL");
    one.launch();
    one.rests();
    assert!(one.said("has handed over to one that runs") && two.is_ready() && !one.is_ready());
    lab.tell(Request::PodAdd { node: NODE.into(), pod: "x".into() });
    lab.tell(Request::PodRemove { node: NODE.into(), pod: "x".into() });
    nothing_lost(&lab, traffic);

    // The later one dies. The one that rests lets it be.
    two.signal("-KILL");
    assert_eq!(weft(&lab, &["weft", "alive"]), Some(3));
    assert_eq!(daemons(&lab, NODE), [one.pid.clone()]);
    two.launch();
    wait_until("the later one is back", PATIENCE, || two.is_ready());
    assert!(!one.is_ready());
    one.rests();
    // Nobody runs, and both are restarted, the wrong one first: it serves until the later one is there.
    one.signal("-KILL");
    two.signal("-KILL");
    one.launch();
    wait_until("somebody serves", PATIENCE, || one.is_ready());
    two.launch();
    wait_until("the later one serves", PATIENCE, || two.is_ready() && !one.is_ready());
    one.rests();
    one.terminate();
    assert!(two.is_ready());
    lab.meet();
    two.terminate();
    assert_eq!(daemons(&lab, NODE), [""; 0]);
}

#[test]
fn a_daemon_that_handed_over_rests_for_good() {
    surge("surgevx", Backend::Vxlan);
}

#[test]
fn a_daemon_that_handed_its_tunnels_over_rests_for_good() {
    surge("surgewg", Backend::Wireguard);
}

#[test]
fn a_daemon_that_rests_goes_on_if_its_successor_never_served() {
    let lab = Lab::up(LabOptions::new("surgeback").nodes(2).pods(1).backend(Backend::Wireguard));
    let one = Pod::start(&lab, "one");
    wait_until("the lab's own daemon is gone", PATIENCE, || daemons(&lab, NODE) == [one.pid.clone()]);
    let mut two = Pod { lab: &lab, instance: "two", pid: String::new(), process: None };
    two.launch();
    wait_until("it has begun", PATIENCE, || two.said("weftd started"));
    two.signal("-KILL");
    wait_until("the earlier daemon serves", PATIENCE, || one.is_ready());
    assert!(!one.said("rests until it is told to stop"));
    lab.meet();
    one.terminate();
}
