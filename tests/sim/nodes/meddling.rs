//! Others at work in a machine's kernel, between a pass's look at it and its changes.

use std::collections::BTreeSet;

use ipnet::IpNet;
use weft_daemon::kernel::memory::MemoryKernel;
use weft_daemon::kernel::{Kernel, KernelError, UnderlayError, UnderlaySpec};
use weft_daemon::plan::model::{Actual, Op, Sessions, Underlay};

/// Something that another program does to an object of weft's; `choice` picks which.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Meddling {
    DeleteLink(usize),
    DeleteAddress(usize),
    DeleteNeighbour(usize),
    DeleteFdb(usize),
    DeleteRoute(usize),
    ChangeRoute(usize),
    FlushNft,
    Unbridge(usize),
}

impl Meddling {
    /// Does it; nothing where there is no such object.
    pub fn apply(&self, kernel: &mut MemoryKernel) {
        let state = &mut kernel.actual.state;
        match *self {
            Self::DeleteLink(choice) => {
                if let Some(name) = pick(state.links.keys(), choice) {
                    kernel.remove_link(&name);
                }
            }
            Self::DeleteAddress(choice) => {
                if let Some((dev, net)) = pick(state.addresses.iter(), choice) {
                    kernel.apply(&[Op::DelAddress(dev, net)]);
                }
            }
            Self::DeleteNeighbour(choice) => {
                pick(state.neighbours.keys(), choice).and_then(|key| state.neighbours.remove(&key));
            }
            Self::DeleteFdb(choice) => {
                pick(state.fdb.keys(), choice).and_then(|key| state.fdb.remove(&key));
            }
            Self::DeleteRoute(choice) => {
                pick(state.routes.keys(), choice).and_then(|key| state.routes.remove(&key));
            }
            Self::ChangeRoute(choice) => {
                let key = pick(state.routes.keys(), choice);
                if let Some(route) = key.and_then(|key| state.routes.get_mut(&key)) {
                    route.via = Some("192.0.2.254".parse().expect("an address"));
                    route.mtu = Some(1280);
                }
            }
            Self::FlushNft => state.nft = None,
            Self::Unbridge(choice) => {
                let name = pick(kernel.actual.veths.keys(), choice);
                if let Some(veth) = name.and_then(|name| kernel.actual.veths.get_mut(&name)) {
                    veth.bridged = false;
                }
            }
        }
    }
}

fn pick<'a, T: Clone + 'a>(mut all: impl ExactSizeIterator<Item = &'a T>, choice: usize) -> Option<T> {
    let count = all.len().max(1);
    all.nth(choice % count).cloned()
}

/// A kernel in which others are at work.
#[derive(Debug)]
pub struct Meddled<'a> {
    kernel: &'a mut MemoryKernel,
    after_dump: Vec<Meddling>,
    most: usize,
}

impl<'a> Meddled<'a> {
    /// The others act once, after the next dump.
    pub fn new(kernel: &'a mut MemoryKernel, after_dump: Vec<Meddling>) -> Self {
        Self { kernel, after_dump, most: usize::MAX }
    }

    /// Only so many changes are made: whoever asks for them is killed then.
    pub fn that_stops_after(self, most: usize) -> Self {
        Self { most, ..self }
    }
}

impl Kernel for Meddled<'_> {
    fn dump(&mut self, settings: &BTreeSet<String>) -> Result<Actual, KernelError> {
        let dump = self.kernel.dump(settings);
        self.after_dump.drain(..).for_each(|meddling| meddling.apply(self.kernel));
        dump
    }

    fn apply(&mut self, ops: &[Op]) -> Vec<Result<(), KernelError>> {
        self.kernel.apply(&ops[..ops.len().min(self.most)])
    }

    fn sessions(&mut self) -> Sessions {
        self.kernel.sessions()
    }

    fn underlay(&mut self, spec: &UnderlaySpec) -> Result<Underlay, UnderlayError> {
        self.kernel.underlay(spec)
    }

    fn obstacles(&mut self, cluster: &[IpNet]) -> Vec<String> {
        self.kernel.obstacles(cluster)
    }
}
