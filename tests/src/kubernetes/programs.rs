//! Where the programs and images of a cluster are, and whether they can run here.

use std::path::{Path, PathBuf};
use std::process::Command;

use nix::unistd::geteuid;

use super::objects;

/// What `make kubernetes` built.
#[derive(Debug, Clone)]
pub struct Programs(PathBuf);

/// What must be there.
const PROGRAMS: [&str; 9] = [
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
    "kubectl",
    "containerd",
    "containerd-shim-runc-v2",
    "ctr",
];
/// The images of every node.
pub(crate) const IMAGES: [&str; 3] = ["pause.tar", "agnhost.tar", "coredns.tar"];

impl Programs {
    /// Names the directory that the Makefile uses.
    pub fn of_this_user() -> Self {
        Self(objects::built())
    }

    /// The directory of the executables.
    pub fn bin(&self) -> PathBuf {
        self.0.join("bin")
    }

    /// One executable.
    pub fn path(&self, program: &str) -> PathBuf {
        self.bin().join(program)
    }

    /// One image.
    pub fn image(&self, file: &str) -> PathBuf {
        self.0.join("images").join(file)
    }
}

/// Why no cluster can be made on this machine, and what to do; none if it can.
pub fn missing() -> Option<String> {
    if !geteuid().is_root() {
        return Some("containerd and kubelet need root".into());
    }
    let programs = Programs::of_this_user();
    let mut wanted =
        PROGRAMS.iter().map(|name| programs.path(name)).chain(IMAGES.iter().map(|file| programs.image(file)));
    if let Some(path) = wanted.find(|path| !path.is_file()) {
        return Some(format!("{} is not built (make kubernetes)", path.display()));
    }
    let found = |tool: &&&str| {
        let search = format!("PATH=$PATH:/usr/sbin:/sbin command -v {tool}");
        Command::new("sh").args(["-c", &search]).output().is_ok_and(|output| output.status.success())
    };
    if let Some(tool) = ["etcd", "runc", "iptables", "nft", "conntrack"].iter().find(|tool| !found(tool)) {
        return Some(format!("{tool} is not installed (make deps)"));
    }
    if !Path::new("/sys/fs/cgroup/cpu/cgroup.procs").exists() {
        return Some(
            "the nodes are given their cgroups in the way of cgroup v1, which this machine has not mounted"
                .into(),
        );
    }
    None
}
