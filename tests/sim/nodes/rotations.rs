//! Nodes of kernel and of user-space tunnels that change their keys, each when it likes, while packets go between all of them.

use std::collections::BTreeMap;
use std::time::Duration;

use rand_core::RngCore;
use weft_daemon::plan::model::metric;
use weft_wire::types::{NodeName, Subnet};

use super::wireguard::Wires;
use super::world::{Secrecy, World, tunnel_key};

/// Between two packets of a pair, and between two looks.
const BETWEEN: Duration = Duration::from_millis(2);
/// Between the first and the last node that begins to change its key.
const SPREAD_MS: [u64; 4] = [20, 400, 3_000, 25_000];
/// So long first sessions may take: kernels that ask each other at once ask again after five seconds, and now and then at once again.
const SETTLED: Duration = Duration::from_secs(40);
/// So long all of them may take.
const MOST: Duration = Duration::from_secs(400);

/// The machines with the tunnels between them.
struct Rotations {
    world: World,
    wires: Wires,
    names: Vec<NodeName>,
    subnets: Vec<Subnet>,
    packets: u64,
}

impl Rotations {
    fn new(seed: u64, machines: usize) -> Result<Self, String> {
        let mut world = World::new(seed, machines, Secrecy::Sealed);
        for number in 0..machines {
            world.machine(number).by_chance = false;
            world.with(number, super::machine::Machine::start);
        }
        world.pass_time(Duration::from_secs(20))?;
        let wires = Wires::new(seed, world.net.now);
        let names = world.machines().iter().map(|machine| machine.config.node.name.clone()).collect();
        let subnets = (0..machines).map(|number| {
            let daemon = world.machine(number).daemon.as_ref()?;
            daemon.control.subnets().first().copied()
        });
        let subnets = subnets.collect::<Option<Vec<_>>>().ok_or("a node has no subnet")?;
        Ok(Self { world, wires, names, subnets, packets: 0 })
    }

    /// Lets time pass; with packets between all pairs, if they are wanted.
    fn pass_time(&mut self, time: Duration, packets: bool) -> Result<(), String> {
        let end = self.world.net.now + time;
        while self.world.net.now < end {
            self.world.pass_time(BETWEEN)?;
            let now = self.world.net.now;
            self.wires.run_to(now);
            for number in 0..self.names.len() {
                let machine = self.world.machine(number);
                let carrier = machine.carrier();
                machine.kernel.sessions =
                    self.wires.follow(number, carrier, &machine.kernel.actual.state.tunnels);
                if packets {
                    self.send_from(number);
                }
            }
            if let Some(lost) = self.wires.lost.first() {
                let all = self.wires.lost.len();
                return Err(format!("{:?} on: {lost}, {all} lost in all", self.world.age()));
            }
        }
        Ok(())
    }

    fn send_from(&mut self, number: usize) {
        let routes = &self.world.machine(number).kernel.actual.state.routes;
        let by_prefix: BTreeMap<_, _> = self
            .subnets
            .iter()
            .map(|subnet| {
                let net = subnet.net();
                (net, routes.get(&(net, metric(net))).map(|route| route.dev.clone()))
            })
            .collect();
        for other in (0..self.names.len()).filter(|other| *other != number) {
            let dev = by_prefix[&self.subnets[other].net()].as_deref();
            self.packets += 1;
            self.wires.send((number, other, self.packets), dev, &self.names[other]);
        }
    }

    /// Waits for first sessions: what is lost before the network is whole is no matter.
    fn settle(&mut self) -> Result<(), String> {
        let end = self.world.net.now + SETTLED;
        // It ends with the first packet that is lost.
        while let Err(lost) = self.pass_time(Duration::from_secs(1), true) {
            if self.world.net.now > end {
                return Err(lost);
            }
            self.wires.lost.clear();
        }
        self.pass_time(Duration::from_secs(6), true)
    }

    fn is_over(&mut self) -> bool {
        let now = self.world.net.now;
        let machines = self.world.machines();
        machines.iter().all(|machine| machine.daemon.is_some() && !machine.changes_its_key(now))
    }
}

/// A machine whose daemon ends for good while its key changes keeps others from changing theirs for some minutes only.
///
/// # Errors
/// The change that did not come to its end.
pub fn beside_one_that_died(seed: u64) -> Result<(), String> {
    let mut run = Rotations::new(seed, 3)?;
    run.pass_time(Duration::from_secs(5), false)?;
    let keys = [0, 1].map(|_| tunnel_key(&mut run.world.net.rng));
    run.world.with(0, |machine, now| machine.rotate_tunnel_key(keys[0], now));
    run.pass_time(Duration::from_secs(2), false)?;
    run.world.machine(0).kill();
    run.world.with(1, |machine, now| machine.rotate_tunnel_key(keys[1], now));
    // Its lease is not over yet, and so it is a peer.
    run.pass_time(Duration::from_secs(30), false)?;
    if run.world.machine(1).disk.tunnel == keys[1] {
        return Err("it did not wait for the change that it knew of".into());
    }
    run.pass_time(Duration::from_secs(180), false)?;
    if run.world.machine(1).disk.tunnel == keys[1] { Ok(()) } else { Err("it waits for ever".into()) }
}

/// Each machine begins to change its key at some moment of a span.
///
/// # Errors
/// A packet that was lost, or a change that did not come to its end.
pub fn at_one_time(seed: u64) -> Result<(), String> {
    let machines = 2 + (seed % 4) as usize;
    let mut run = Rotations::new(seed, machines)?;
    run.settle()?;
    let mut before: Vec<_> = run.world.machines().iter().map(|machine| machine.disk.tunnel).collect();
    let mut draw = |most: u64| run.world.net.rng.next_u64() % most;
    let spread = SPREAD_MS[draw(4) as usize];
    let mut begins: Vec<_> = (0..machines).map(|number| (draw(spread), number)).collect();
    begins.sort_unstable();
    let mut passed = 0;
    for (at, number) in begins {
        run.pass_time(Duration::from_millis(at - passed), true)?;
        passed = at;
        let key = tunnel_key(&mut run.world.net.rng);
        run.world.with(number, |machine, now| machine.rotate_tunnel_key(key, now));
    }
    let end = run.world.net.now + MOST;
    while !run.is_over() {
        if run.world.net.now > end {
            return Err("the changes of keys do not come to an end".into());
        }
        run.pass_time(Duration::from_secs(1), true)?;
    }
    run.pass_time(Duration::from_secs(20), true)?;
    let machines = run.world.machines();
    before.retain(|key| machines.iter().any(|machine| machine.disk.tunnel == *key));
    if before.is_empty() { Ok(()) } else { Err("a key is as it was".into()) }
}
