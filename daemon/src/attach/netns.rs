//! Network namespaces: telling them apart and doing something inside one.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::fstatfs;
use weft_wire::cni::{CniError, Code};

/// `include/uapi/linux/magic.h`: NSFS_MAGIC.
const NSFS_MAGIC: i64 = 0x6e73_6673;

/// Which network namespace: unique among those that exist, until a reboot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NetnsId {
    /// The device number of nsfs.
    pub dev: u64,
    /// The inode number.
    pub ino: u64,
}

impl NetnsId {
    fn of(file: &File) -> io::Result<Self> {
        let meta = file.metadata()?;
        Ok(Self { dev: meta.dev(), ino: meta.ino() })
    }
}

/// A network namespace that stays alive while this value exists.
#[derive(Debug)]
pub(super) struct Netns {
    pub(super) file: File,
    pub(super) id: NetnsId,
}

/// Opens the namespace behind `path`.
///
/// # Errors
/// A sentence for the caller of the plugin; [`Code::ContainerUnknown`] where there is none.
pub(super) fn open(path: &Path) -> Result<Netns, CniError> {
    let shown = path.display();
    let file = File::open(path).map_err(|error| {
        if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) {
            gone(path)
        } else {
            CniError::new(Code::InputOutput, format!("the network namespace {shown} cannot be opened"))
                .with_details(error)
        }
    })?;
    let kind = fstatfs(&file).map(|stat| stat.filesystem_type().0);
    // A bind mount that was removed leaves a plain file in its place: that namespace is gone too.
    if kind.is_ok_and(|kind| kind != NSFS_MAGIC) {
        return Err(CniError::new(
            Code::ContainerUnknown,
            format!("{shown} is a file, but no network namespace is mounted on it (any more)"),
        ));
    }
    let id = NetnsId::of(&file).map_err(|error| {
        CniError::new(Code::InputOutput, format!("{shown} cannot be read")).with_details(error)
    })?;
    Ok(Netns { file, id })
}

/// Identifies the namespace behind `path`, and refuses the daemon's own.
///
/// # Errors
/// As [`open`]; [`Code::InvalidEnvironment`] for the daemon's own.
pub(super) fn identify(path: &Path) -> Result<NetnsId, CniError> {
    let netns = open(path)?;
    let own = File::open("/proc/thread-self/ns/net").and_then(|file| NetnsId::of(&file));
    if own.is_ok_and(|own| own == netns.id) {
        return Err(CniError::new(
            Code::InvalidEnvironment,
            format!(
                "CNI_NETNS {} is the node's own network namespace; a pod with the host's network needs no CNI call",
                path.display()
            ),
        ));
    }
    Ok(netns.id)
}

/// The error for a namespace that is not there.
pub(super) fn gone(path: &Path) -> CniError {
    CniError::new(
        Code::ContainerUnknown,
        format!(
            "the network namespace {} does not exist (any more); the container seems to have ended",
            path.display()
        ),
    )
}

impl Netns {
    /// Runs `work` on a thread of its own inside the namespace; what it opens there stays there.
    ///
    /// The thread ends afterwards, so no other work can ever run in a wrong namespace.
    ///
    /// # Errors
    /// Where the namespace cannot be entered, or what `work` returns.
    pub(super) fn run<T: Send>(
        &self,
        work: impl FnOnce() -> Result<T, CniError> + Send,
    ) -> Result<T, CniError> {
        let enter = || {
            setns(&self.file, CloneFlags::CLONE_NEWNET).map_err(|errno| match errno {
                nix::Error::EPERM => CniError::new(
                    Code::Kernel,
                    "weftd may not enter the pod's network namespace; it needs the capabilities CAP_SYS_ADMIN and CAP_NET_ADMIN",
                ),
                nix::Error::EINVAL => CniError::new(
                    Code::InvalidEnvironment,
                    "CNI_NETNS names a namespace of another kind; it must be a network namespace",
                ),
                errno => CniError::new(Code::Kernel, "the pod's network namespace cannot be entered")
                    .with_details(errno),
            })?;
            work()
        };
        std::thread::scope(|scope| {
            std::thread::Builder::new()
                .name("pod-netns".into())
                .stack_size(256 * 1024)
                .spawn_scoped(scope, enter)
                .map_err(|error| {
                    CniError::new(Code::TryAgainLater, "the system has no thread left").with_details(error)
                })?
                .join()
                .map_err(|_| {
                    CniError::new(Code::Kernel, "attaching failed by a defect of weftd; see its log")
                })?
        })
    }
}
