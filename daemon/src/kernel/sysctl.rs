//! Kernel settings through `/proc/sys`. A setting that does not exist here reads as absent.

use std::fs;
use std::io;
use std::path::PathBuf;

fn path(name: &str) -> PathBuf {
    PathBuf::from("/proc/sys").join(name)
}

/// Reads a setting; `None` where there is no such setting, as for a device that is not there.
pub(super) fn read(name: &str) -> Option<String> {
    fs::read_to_string(path(name)).ok().map(|text| text.trim().to_owned())
}

/// Writes a setting.
pub(super) fn write(name: &str, value: &str) -> io::Result<()> {
    fs::write(path(name), value)
}
