//! An etcd on a machine of its own in the lab, plugged into the underlay like a node.
//!
//! Plain HTTP, one member: what certificates and members do is for the contract suite of the store.

use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::home::Handle;
use super::machine::Machine;
use super::model::{Options, underlay_addresses};
use super::underlay;

/// What it is called where nodes are named.
pub(crate) const NAME: &str = "etcd";
/// Its number among the underlay's addresses, above all nodes'.
const INDEX: usize = 254;

/// The machine and the server on it.
pub(crate) struct Etcd {
    handle: Handle,
    address: IpAddr,
    machine: Machine,
    server: Option<Child>,
}

/// Where the nodes reach it.
pub(crate) fn url(options: &Options) -> String {
    format!("http://{}", SocketAddr::new(underlay_addresses(options.underlay, INDEX)[0], 2379))
}

impl Etcd {
    /// Makes the machine and starts the server.
    pub(crate) fn start(handle: &Handle, options: &Options) -> anyhow::Result<Self> {
        let addresses = underlay_addresses(options.underlay, INDEX);
        let machine = Machine::start(NAME)?;
        let mut etcd = Self { handle: handle.clone(), address: addresses[0], machine, server: None };
        underlay::plug(NAME, etcd.machine.holder(), "02:4c:42:00:00:fe")?;
        for address in addresses {
            let (length, nodad) = if address.is_ipv4() { (24, "") } else { (64, "nodad") };
            let line = format!("ip address add {address}/{length} dev eth0 {nodad}");
            etcd.machine.tool(&line)?;
        }
        etcd.machine.tool("ip link set eth0 up")?;
        etcd.launch()?;
        Ok(etcd)
    }

    /// Starts the server, on the data that there is.
    pub(crate) fn launch(&mut self) -> anyhow::Result<()> {
        if self.runs() {
            bail!("{NAME} runs already");
        }
        let log = File::options().create(true).append(true).open(self.handle.log(NAME))?;
        let client = format!("http://{}", SocketAddr::new(self.address, 2379));
        let data = self.handle.dir().join("etcd");
        let mut command = self.machine.within();
        command
            .arg("etcd")
            .args([
                "--name=lab",
                "--logger=zap",
                "--log-level=warn",
                "--listen-peer-urls=http://127.0.0.1:2380",
            ])
            .args([
                "--initial-advertise-peer-urls=http://127.0.0.1:2380",
                "--initial-cluster=lab=http://127.0.0.1:2380",
            ])
            .arg(format!("--listen-client-urls={client}"))
            .arg(format!("--advertise-client-urls={client}"))
            .arg(format!("--data-dir={}", data.display()))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        self.server = Some(command.spawn().context("cannot run nsenter: is util-linux installed?")?);
        Ok(())
    }

    /// Ends the server with a signal, and waits until it is gone.
    pub(crate) fn end(&mut self, signal: Signal) -> anyhow::Result<()> {
        let Some(mut server) = self.server.take() else { bail!("{NAME} does not run") };
        if server.try_wait()?.is_some() {
            bail!("{NAME} does not run: it ended by itself");
        }
        kill(Pid::from_raw(i32::try_from(server.id())?), signal).context("cannot signal etcd")?;
        let patience = Instant::now() + Duration::from_secs(15);
        while server.try_wait()?.is_none() {
            if Instant::now() > patience {
                self.server = Some(server);
                bail!("{NAME} did not end within 15 s of {signal}: see weft-lab logs {NAME}");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    fn runs(&mut self) -> bool {
        self.server.as_mut().is_some_and(|server| matches!(server.try_wait(), Ok(None)))
    }
}
