//! Kernel settings through `/proc/sys`. A setting that does not exist here reads as absent.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

/// `WEFT_PROC_SYS` names another place: a container runtime makes `/proc/sys` read-only (runtime-spec, `readonlyPaths`), but
/// lets a part of the host's be mounted elsewhere. Below `net` both show the network namespace of the thread that looks.
static ROOT: LazyLock<PathBuf> = LazyLock::new(|| {
    std::env::var_os("WEFT_PROC_SYS").filter(|path| !path.is_empty()).unwrap_or("/proc/sys".into()).into()
});

/// Returns where the settings below `net` of the calling thread's network namespace are.
pub(crate) fn net() -> PathBuf {
    path(Path::new("net"))
}

fn path(name: impl AsRef<Path>) -> PathBuf {
    ROOT.join(name)
}

/// Reads a setting; `None` where there is no such setting, as for a device that is not there.
pub(super) fn read(name: &str) -> Option<String> {
    fs::read_to_string(path(name)).ok().map(|text| text.trim().to_owned())
}

/// Writes a setting.
pub(super) fn write(name: &str, value: &str) -> io::Result<()> {
    fs::write(path(name), value)
}
