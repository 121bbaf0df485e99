//! One program that runs on a machine of the lab for as long as the cluster wants it to.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::programs::Programs;
use crate::lab::{Lab, Place};

/// Says its process id, puts what was built before what is installed, enters the node's cgroups if there are any, and becomes the program.
const START: &str = r#"
set -eu
echo $$ > "$1"; shift
export PATH="$1:$PATH"; shift
if [ -e /run/weft-lab/cgroups ]; then
    for hierarchy in /sys/fs/cgroup/*/; do echo $$ > "$hierarchy/cgroup.procs"; done
    exec unshare --cgroup -- "$@"
fi
exec "$@"
"#;

/// A program that was started.
#[derive(Debug)]
pub(crate) struct Server {
    name: String,
    place: String,
    /// The way into the lab, which ends as the program ends.
    child: Child,
}

impl Server {
    /// Starts a program of the cluster's on a machine; it writes to a log of the lab's.
    pub(crate) fn start(
        lab: &Lab,
        programs: &Programs,
        place: &str,
        name: &str,
        args: &[String],
    ) -> anyhow::Result<Self> {
        let handle = lab.handle();
        let log = File::options().create(true).append(true).open(handle.log(&format!("{place}-{name}")))?;
        fs::create_dir_all(handle.shared().join("pid"))?;
        let bin = programs.bin().display().to_string();
        let pid = pid_file(place, name);
        let mut words = vec!["sh", "-c", START, "sh", &pid, &bin, name];
        words.extend(args.iter().map(String::as_str));
        let child = handle
            .command(Place::Node(place.to_owned()), &words)?
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {name} on {place}"))?;
        Ok(Self { name: name.to_owned(), place: place.to_owned(), child })
    }

    /// The program.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Whether it still runs.
    pub(crate) fn runs(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Ends it: with a word, and if that does not help, by force.
    pub(crate) fn end(mut self, lab: &Lab) -> anyhow::Result<()> {
        let pid = pid_file(&self.place, &self.name);
        for (signal, bound) in [("TERM", Duration::from_secs(15)), ("KILL", Duration::from_secs(10))] {
            lab.exec(self.place.as_str(), &["sh", "-c", "kill -s \"$0\" \"$(cat \"$1\")\"", signal, &pid]);
            let patience = Instant::now() + bound;
            while self.runs() {
                if Instant::now() > patience {
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            if !self.runs() {
                return Ok(());
            }
        }
        bail!("{} on {} does not end", self.name, self.place)
    }
}

fn pid_file(place: &str, name: &str) -> String {
    format!("/run/weft-lab/shared/pid/{place}-{name}")
}
