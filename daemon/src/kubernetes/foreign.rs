//! Other network configurations in the directory that the container runtime reads: it takes the first by name.

use std::path::Path;
use std::time::Duration;

use super::events::{Reason, Remark};

/// Where runtimes look.
pub(super) const DIRECTORY: &str = "/etc/cni/net.d";
/// Between two looks.
pub(super) const LOOK: Duration = Duration::from_secs(30);

/// Returns what is wrong there: a configuration of another plugin comes before weft's.
pub(super) fn look(directory: impl AsRef<Path>) -> Option<Remark> {
    let directory = directory.as_ref();
    let entries = std::fs::read_dir(directory).ok()?;
    let mut files: Vec<String> =
        entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    // As containerd and CRI-O do (libcni's ConfFiles): by suffix, sorted.
    files.retain(|name| [".conf", ".conflist", ".json"].iter().any(|suffix| name.ends_with(suffix)));
    files.sort_unstable();
    let ours = files.iter().position(|name| {
        std::fs::read_to_string(directory.join(name)).is_ok_and(|text| text.contains("\"weft-cni\""))
    })?;
    let first = files.first().filter(|_| ours > 0)?;
    let directory = directory.display();
    Some(Remark {
        reason: Reason::OtherNetwork,
        sentence: format!(
            "{directory}/{first} comes before {directory}/{}, so pods get their network from it and not from weft: remove it, and make the pods of this node anew",
            files[ours]
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_configuration_before_wefts_is_told() {
        let directory = std::env::temp_dir().join(format!("weft-net.d-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&directory);
        assert_eq!(look(&directory), None, "there is no directory");
        std::fs::create_dir(&directory).expect("made");
        let write = |name: &str, text: &str| std::fs::write(directory.join(name), text).expect("written");
        write("05-other.conflist", r#"{"plugins":[{"type":"bridge"}]}"#);
        assert_eq!(look(&directory), None, "weft is not installed");
        write("10-weft.conflist", r#"{"plugins":[{"type":"weft-cni"}]}"#);
        let said = look(&directory).expect("told").sentence;
        assert!(
            said.contains("/05-other.conflist comes before ") && said.contains("/10-weft.conflist,"),
            "{said}"
        );
        std::fs::rename(directory.join("05-other.conflist"), directory.join("99-other.conflist"))
            .expect("moved");
        write("00-notes.txt", "not for the runtime");
        assert_eq!(look(&directory), None);
        std::fs::remove_dir_all(&directory).expect("our own");
    }
}
