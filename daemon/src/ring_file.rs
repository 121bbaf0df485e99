//! The file of the cluster keys: one of 64 hexadecimal digits a line, `#` starts a comment, the first one seals.
//!
//! The text of a Secret is the same.

use std::path::Path;

use weft_wire::seal::{ClusterKey, KeyRing};

use crate::state::{self, StateError};

/// Reads the file.
pub(crate) fn read_ring(path: &Path) -> Result<KeyRing, String> {
    let text = state::read_secret(path).map_err(|error| error.to_string())?.ok_or_else(|| {
        format!(
            "{} does not exist: make one with `weft cluster-key generate` and copy it to every node of the cluster",
            path.display()
        )
    })?;
    parse_ring(&text, &path.display().to_string())
}

/// Reads the text of cluster keys; `place` is where it is from.
pub(crate) fn parse_ring(text: &str, place: &str) -> Result<KeyRing, String> {
    let keys = text
        .lines()
        .enumerate()
        .map(|(line, key)| (line + 1, key.split('#').next().unwrap_or_default().trim()))
        .filter(|(_, key)| !key.is_empty())
        .map(|(line, key)| key.parse::<ClusterKey>().map_err(|error| format!("{place}:{line}: {error}")))
        .collect::<Result<Vec<_>, _>>()?;
    KeyRing::new(keys).map_err(|error| format!("{place}: {error}"))
}

/// Replaces the file of cluster keys.
pub(crate) fn write_ring(path: &Path, ring: &KeyRing) -> Result<(), StateError> {
    let text: String = ring.keys().map(|key| key.to_secret_text() + "\n").collect();
    state::replace(path, text.as_bytes())
}
