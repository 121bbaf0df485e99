//! Kubernetes manifests as values, and what renders them.

use std::path::PathBuf;

use serde_json::Value;

use crate::lab::skip;

/// Reads the objects of a YAML text; documents with nothing in them count as none.
///
/// # Panics
/// Where it is not YAML.
pub fn objects(text: &str) -> Vec<Value> {
    let all: Vec<Value> = serde_saphyr::from_multiple(text).unwrap_or_else(|error| panic!("{error}"));
    all.into_iter().filter(|object| !object.is_null()).collect()
}

/// Finds a program that `make deploy-tools` builds into the user's cache; says why a test does not run where it is not there.
///
/// # Panics
/// As [`skip`].
pub fn tool(name: &str) -> Option<PathBuf> {
    cached(&format!("bin/{name}"), "make deploy-tools")
}

/// Finds a program of Kubernetes there, as [`tool`] does.
///
/// # Panics
/// As [`skip`].
pub fn kubernetes(name: &str) -> Option<PathBuf> {
    cached(&format!("kubernetes/bin/{name}"), "make kubernetes")
}

fn cached(name: &str, target: &str) -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")));
    let found = cache.map(|cache| cache.join("weft-tests").join(name)).filter(|path| path.is_file());
    if found.is_none() {
        skip(&format!("{name} is not built ({target}, which needs Go)"));
    }
    found
}
