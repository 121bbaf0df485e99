//! Puts the CNI shim and the network list where a container runtime looks for them, and takes them away again.
//!
//! It starts nothing and asks no daemon. Invariants: a file is there whole or not at all; the network list, which makes the
//! runtime call the shim, comes last and goes first; another program's configuration is renamed only when that is asked for,
//! and what was renamed is put back.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::state::{self, StateError};

/// The name of weft's network list: a runtime takes the first of its directory.
pub const CONFLIST: &str = "10-weft.conflist";
/// The name of the shim: the `type` in the network list.
pub const SHIM: &str = "weft-cni";
/// The network list where no other is named.
const DEFAULT: &str = include_str!("../../deploy/cni/10-weft.conflist");
/// What a configuration that was set aside ends in: none of the endings that runtimes read.
const DISABLED: &str = "weft-disabled";
/// What runtimes read (libcni, `ConfFiles`).
const ENDINGS: [&str; 3] = ["conf", "conflist", "json"];

/// Where a container runtime looks.
#[derive(Debug, Clone)]
pub struct Places {
    /// The plugins, `/opt/cni/bin` as a rule.
    pub bin_dir: PathBuf,
    /// The network configurations, `/etc/cni/net.d` as a rule.
    pub conf_dir: PathBuf,
}

/// What to install.
#[derive(Debug, Clone, Default)]
pub struct Source {
    /// The shim.
    pub shim: PathBuf,
    /// The network list; weft's own by default.
    pub conflist: Option<PathBuf>,
    /// Whether other network configurations are set aside.
    pub exclusive: bool,
}

/// Why something was not installed or removed; each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// A file cannot be written, moved or removed. What came before it stays done.
    #[error(transparent)]
    File(#[from] StateError),
    /// What to install cannot be read. Nothing was changed.
    #[error("cannot read {}: {source}; name what to install with --{option}", path.display())]
    Source {
        /// The file.
        path: PathBuf,
        /// The option that names another.
        option: &'static str,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The network list is none. Nothing was changed.
    #[error("{what} is no network list of weft: {why}; see deploy/cni/{CONFLIST}")]
    Conflist {
        /// Which one.
        what: String,
        /// What it lacks.
        why: String,
    },
    /// The network list calls plugins that the machine does not have, so no pod would start. Nothing was changed.
    #[error(
        "{} has no {missing}, which the network list calls; install the CNI plugins there (Debian: containernetworking-plugins, in /usr/lib/cni), or name a list without them with --conflist",
        directory.display()
    )]
    Plugins {
        /// Where they were looked for.
        directory: PathBuf,
        /// Which ones.
        missing: String,
    },
    /// The place is there and no directory. Nothing was changed.
    #[error("{} is not a directory; name the right one with --{option}", path.display())]
    NotADirectory {
        /// The place.
        path: PathBuf,
        /// The option that names another.
        option: &'static str,
    },
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> InstallError {
    let path = path.to_owned();
    move |source| StateError::Io { action, path, source }.into()
}

/// Installs; returns what was done and what a person should hear of, a sentence each.
///
/// Can be repeated: what is right is not written again. Two at a time wait for each other.
///
/// # Errors
/// [`InstallError`].
pub fn install(source: &Source, places: &Places) -> Result<(Vec<String>, Vec<String>), InstallError> {
    let shim = fs::read(&source.shim).map_err(|error| InstallError::Source {
        path: source.shim.clone(),
        option: "shim",
        source: error,
    })?;
    let list = match &source.conflist {
        None => DEFAULT.as_bytes().to_vec(),
        Some(path) => fs::read(path).map_err(|error| InstallError::Source {
            path: path.clone(),
            option: "conflist",
            source: error,
        })?,
    };
    let what = source.conflist.as_ref().map_or("the default".into(), |path| path.display().to_string());
    let plugins = plugins(&list).map_err(|why| InstallError::Conflist { what, why })?;
    ensure_directory(&places.bin_dir, "bin-dir")?;
    ensure_directory(&places.conf_dir, "conf-dir")?;
    let lock = |path: &Path| {
        let directory = File::open(path).map_err(failed("open", path))?;
        directory.lock().map_err(failed("lock", path))?;
        Ok::<File, InstallError>(directory)
    };
    let _locks = (lock(&places.bin_dir)?, lock(&places.conf_dir)?);
    let missing: Vec<_> =
        plugins.into_iter().filter(|name| name != SHIM && !places.bin_dir.join(name).is_file()).collect();
    if !missing.is_empty() {
        return Err(InstallError::Plugins {
            directory: places.bin_dir.clone(),
            missing: missing.join(" and no "),
        });
    }
    let mut done = Vec::new();
    done.extend(ensure_file(&places.bin_dir.join(SHIM), &shim, 0o755)?);
    done.extend(ensure_file(&places.conf_dir.join(CONFLIST), &list, 0o644)?);
    let mut warnings = Vec::new();
    for other in others(&places.conf_dir)? {
        let path = places.conf_dir.join(&other);
        if source.exclusive {
            let aside = places.conf_dir.join(format!("{other}.{DISABLED}"));
            fs::rename(&path, &aside).map_err(failed("rename", &path))?;
            done.push(format!("{} is set aside as {}", path.display(), aside.display()));
        } else if other.as_str() < CONFLIST {
            warnings.push(format!(
                "{} sorts before {CONFLIST}, so the container runtime takes that network and not weft; remove it, or install with --exclusive, which sets it aside",
                path.display()
            ));
        }
    }
    Ok((done, warnings))
}

/// Takes the network list away and puts back what was set aside; returns what was done, a sentence each.
///
/// # Errors
/// [`InstallError`].
pub fn remove_conflist(places: &Places) -> Result<Vec<String>, InstallError> {
    let path = places.conf_dir.join(CONFLIST);
    let mut done = Vec::new();
    match fs::read(&path) {
        Ok(text) if plugins(&text).is_ok() => {
            fs::remove_file(&path).map_err(failed("remove", &path))?;
            done.push(format!("{} is removed", path.display()));
        }
        Ok(_) => done.push(format!("{} does not call {SHIM} and is left alone", path.display())),
        Err(error) if is_absent(&error) => {}
        Err(error) => return Err(failed("read", &path)(error)),
    }
    for name in names(&places.conf_dir)? {
        let Some(original) = name.strip_suffix(&format!(".{DISABLED}")) else { continue };
        let (aside, original) = (places.conf_dir.join(&name), places.conf_dir.join(original));
        if original.exists() {
            done.push(format!("{} stays aside, as {} is there", aside.display(), original.display()));
        } else {
            fs::rename(&aside, &original).map_err(failed("rename", &aside))?;
            done.push(format!("{} is put back", original.display()));
        }
    }
    sync(&places.conf_dir)?;
    Ok(done)
}

/// Takes the shim away; returns what was done.
///
/// # Errors
/// [`InstallError`].
pub fn remove_shim(places: &Places) -> Result<Option<String>, InstallError> {
    let path = places.bin_dir.join(SHIM);
    match fs::remove_file(&path) {
        Ok(()) => sync(&places.bin_dir).map(|()| Some(format!("{} is removed", path.display()))),
        Err(error) if is_absent(&error) => Ok(None),
        Err(error) => Err(failed("remove", &path)(error)),
    }
}

/// The plugins that a network list calls, weft's first; otherwise what it lacks.
fn plugins(text: &[u8]) -> Result<Vec<String>, String> {
    let list: Value = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    let plugins = list["plugins"].as_array().ok_or("it has no \"plugins\"")?;
    let types: Option<Vec<String>> =
        plugins.iter().map(|plugin| plugin["type"].as_str().map(str::to_owned)).collect();
    let types = types.ok_or("a plugin has no \"type\"")?;
    if types.iter().any(|name| name.contains('/')) {
        return Err("a plugin's \"type\" is a path".into());
    }
    if types.first().is_none_or(|first| first != SHIM) {
        return Err(format!("its first plugin is not {SHIM}"));
    }
    Ok(types)
}

fn ensure_directory(path: &Path, option: &'static str) -> Result<(), InstallError> {
    match fs::create_dir_all(path) {
        Ok(()) => Ok(()),
        Err(error) if matches!(error.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory) => {
            Err(InstallError::NotADirectory { path: path.to_owned(), option })
        }
        Err(error) => Err(failed("create", path)(error)),
    }
}

fn ensure_file(path: &Path, bytes: &[u8], mode: u32) -> Result<Option<String>, InstallError> {
    let same = fs::symlink_metadata(path)
        .is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o7777 == mode)
        && fs::read(path).is_ok_and(|found| found == bytes);
    if same {
        return Ok(None);
    }
    state::replace_with_mode(path, bytes, mode)?;
    Ok(Some(format!("{} is written", path.display())))
}

/// The network configurations of others, by name.
fn others(conf_dir: &Path) -> Result<Vec<String>, InstallError> {
    let mut names = names(conf_dir)?;
    names.retain(|name| {
        let ending = Path::new(name).extension().and_then(|ending| ending.to_str());
        name != CONFLIST && ending.is_some_and(|ending| ENDINGS.contains(&ending))
    });
    Ok(names)
}

/// What is in a directory, sorted; nothing where it is not there. Names that are no text are nobody's configuration.
fn names(directory: &Path) -> Result<Vec<String>, InstallError> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if is_absent(&error) => return Ok(Vec::new()),
        Err(error) => return Err(failed("read", directory)(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        names.extend(entry.map_err(failed("read", directory))?.file_name().into_string());
    }
    names.sort();
    Ok(names)
}

fn sync(directory: &Path) -> Result<(), InstallError> {
    match File::open(directory).and_then(|directory| directory.sync_all()) {
        Err(error) if !is_absent(&error) => Err(failed("sync", directory)(error)),
        _ => Ok(()),
    }
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}
