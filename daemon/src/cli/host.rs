//! The commands that change this machine's files and kernel themselves, with or without a daemon.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::json;
use weft_wire::api::{Empty, ReplyBody, RequestBody, SCHEMA_VERSION};

use super::{Cli, Failure, UNHEALTHY, UNREACHABLE, failure};
use crate::install::{self, Places, SHIM, Source};
use crate::uninstall::{Uninstall, UninstallError};

/// How long a daemon that left may take to end.
const END: Duration = Duration::from_secs(10);
/// Between two looks whether it has.
const LOOK: Duration = Duration::from_millis(50);

#[derive(Debug, Args)]
pub(super) struct PlacesArgs {
    /// Where the container runtime looks for plugins.
    #[arg(long, default_value = "/opt/cni/bin")]
    bin_dir: PathBuf,
    /// Where the container runtime looks for network configurations.
    #[arg(long, default_value = "/etc/cni/net.d")]
    conf_dir: PathBuf,
}

impl PlacesArgs {
    fn places(&self) -> Places {
        Places { bin_dir: self.bin_dir.clone(), conf_dir: self.conf_dir.clone() }
    }
}

#[derive(Debug, Args)]
pub(super) struct InstallArgs {
    #[command(flatten)]
    places: PlacesArgs,
    /// The shim to install; by default the weft-cni beside this executable.
    #[arg(long)]
    shim: Option<PathBuf>,
    /// The network list to install; by default weft's own, with portmap and bandwidth.
    #[arg(long)]
    conflist: Option<PathBuf>,
    /// Set other network configurations aside, as *.weft-disabled; `weft uninstall` puts them back.
    #[arg(long)]
    exclusive: bool,
}

#[derive(Debug, Args)]
pub(super) struct UninstallArgs {
    #[command(flatten)]
    places: PlacesArgs,
    /// The daemon's state directory.
    #[arg(long, default_value = "/var/lib/weft")]
    state_dir: PathBuf,
    /// Cut pods off that are still attached.
    #[arg(long)]
    force: bool,
    /// Remove the daemon's state too, the node's keys included.
    #[arg(long)]
    purge: bool,
}

impl Cli {
    pub(super) fn install_cni(&self, arguments: &InstallArgs) -> Result<ExitCode, Failure> {
        let beside = || std::env::current_exe().ok().map(|own| own.with_file_name(SHIM));
        let shim = arguments.shim.clone().or_else(beside);
        let shim =
            shim.ok_or_else(|| failure(2, "this executable's place is unknown; name the shim with --shim"))?;
        let source = Source { shim, conflist: arguments.conflist.clone(), exclusive: arguments.exclusive };
        let (mut done, warnings) = install::install(&source, &arguments.places.places())
            .map_err(|error| failure(UNHEALTHY, error.to_string()))?;
        if done.is_empty() {
            done.push("everything is in its place".into());
        }
        self.tell(&done, &warnings)
    }

    pub(super) fn uninstall(&self, arguments: &UninstallArgs) -> Result<ExitCode, Failure> {
        let whole = Uninstall {
            places: arguments.places.places(),
            state_dir: arguments.state_dir.clone(),
            socket: self.socket.clone(),
            force: arguments.force,
            purge: arguments.purge,
        };
        let told = |error: UninstallError| failure(UNHEALTHY, error.to_string());
        let mut done = Vec::new();
        match self.ask(RequestBody::Pods(Empty {})) {
            Ok(ReplyBody::Pods(pods)) if pods.pods.is_empty() => {
                // No pod may come between.
                done = install::remove_conflist(&whole.places).map_err(|error| told(error.into()))?;
                if let ReplyBody::Done(left) = self.ask(RequestBody::Leave(Empty {}))? {
                    done.push(left.message);
                }
            }
            Ok(ReplyBody::Pods(_)) if arguments.force => {
                return Err(failure(
                    UNHEALTHY,
                    "a weftd runs on this node; stop it first, then pods can be cut off",
                ));
            }
            Ok(ReplyBody::Pods(pods)) => return Err(told(UninstallError::Pods(pods.pods.len()))),
            // Without a daemon its leases run out by themselves.
            Err(failure) if failure.code == UNREACHABLE => {}
            Ok(_) => {
                return Err(failure(
                    UNREACHABLE,
                    "the daemon answered something else; use a weft of the same release",
                ));
            }
            Err(failure) => return Err(failure),
        }
        let began = Instant::now();
        let ready = loop {
            match whole.check() {
                // It has left and is about to end.
                Err(UninstallError::Runs(_)) if !done.is_empty() && began.elapsed() < END => {
                    std::thread::sleep(LOOK)
                }
                outcome => break outcome.map_err(told)?,
            }
        };
        done.extend(ready.remove().map_err(told)?);
        self.tell(&done, &[])
    }

    /// Prints what was done, and warns on standard error.
    fn tell(&self, done: &[String], warnings: &[String]) -> Result<ExitCode, Failure> {
        for warning in warnings {
            eprintln!("weft: warning: {warning}");
        }
        let json = json!({ "schema_version": SCHEMA_VERSION, "done": done, "warnings": warnings });
        self.print(&json, || done.iter().map(|line| format!("{line}\n")).collect(), true)
    }
}
