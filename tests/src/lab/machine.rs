//! A machine of the lab that is no node: a network namespace below the keeper's.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, bail};

use super::enter;
use super::tools::run;

const SETUP: &str = "ip link set lo up && echo ready && exec sleep infinity >/dev/null";

/// A network namespace with a process that holds it; both end with the keeper.
#[derive(Debug)]
pub(crate) struct Machine {
    holder: Child,
}

impl Machine {
    /// Makes it, with nothing but a loopback device; `name` is for errors.
    pub(crate) fn start(name: &str) -> anyhow::Result<Self> {
        let mut holder = Command::new("unshare")
            .args(["--net", "--", "sh", "-c", SETUP])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot run unshare: is util-linux installed?")?;
        let mut ready = String::new();
        let stdout = holder.stdout.take().expect("standard output was asked to be a pipe");
        BufReader::new(stdout).read_line(&mut ready)?;
        if ready != "ready\n" {
            bail!("cannot set up the machine {name}: {ready:?}");
        }
        Ok(Self { holder })
    }

    /// The process that holds the namespace, as the keeper sees it.
    pub(crate) fn holder(&self) -> u32 {
        self.holder.id()
    }

    /// A command that will run there.
    pub(crate) fn within(&self) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--net", "--target", &self.holder().to_string(), "--"]).env("PATH", enter::path());
        command
    }

    /// Runs a tool there, with words that are separated by blanks.
    pub(crate) fn tool(&self, line: &str) -> anyhow::Result<String> {
        run(self.within().args(line.split_ascii_whitespace()))
    }
}
