//! Whole nodes in virtual time: the real control plane, leases, pod pool, plan and mesh over a kernel and a store in
//! memory, while everything around them fails. The laws are in `nodes/laws.rs`, the mishaps in `nodes/step.rs`.
//!
//! `WEFT_SEED=n` repeats one run; `SIM_SEEDS=n` runs so many from there on.

#[path = "nodes/disk.rs"]
mod disk;
#[path = "nodes/laws.rs"]
mod laws;
#[path = "nodes/machine.rs"]
mod machine;
#[path = "nodes/meddling.rs"]
mod meddling;
#[path = "nodes/regressions.rs"]
mod regressions;
#[path = "nodes/rotations.rs"]
mod rotations;
#[path = "nodes/sites.rs"]
mod sites;
#[path = "nodes/step.rs"]
mod step;
#[path = "nodes/store.rs"]
mod store;
#[path = "nodes/wireguard.rs"]
mod wireguard;
#[path = "nodes/world.rs"]
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use rand_chacha::ChaCha8Rng;
use rand_core::{RngCore, SeedableRng};
use step::{Step, random_run};
use world::{Secrecy, World};

/// How many random seeds `make test` runs.
const SEEDS: u64 = 30;
/// How many shorter runs are tried to find the shortest that fails.
const TRIALS: usize = 120;

type Run = Vec<(Duration, Step)>;

/// What a seed stands for: how many machines, which of them speak encrypted, and what befalls them.
fn plan(seed: u64) -> (usize, Secrecy, Run) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let machines = 3 + rng.next_u64() as usize % 5;
    let steps = 10 + rng.next_u64() as usize % 90;
    let secrecy = [Secrecy::Clear, Secrecy::Sealed, Secrecy::Mixed][(seed % 3) as usize];
    (machines, secrecy, random_run(&mut rng, machines, steps))
}

fn try_run(seed: u64, machines: usize, secrecy: Secrecy, run: &Run) -> Result<(Duration, u64), String> {
    let attempt = catch_unwind(AssertUnwindSafe(|| {
        let mut world = World::new(seed, machines, secrecy);
        world.go_through(run).map(|()| (world.age(), world.digest()))
    }));
    attempt.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        Err(text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default())
    })
}

/// Takes steps away as long as the run still fails.
fn shortest(seed: u64, machines: usize, secrecy: Secrecy, mut run: Run) -> Run {
    let mut trials = TRIALS;
    let mut chunk = run.len().div_ceil(2);
    while chunk > 0 && trials > 0 {
        let mut start = 0;
        while start < run.len() && trials > 0 {
            let mut shorter = run.clone();
            shorter.drain(start..(start + chunk).min(run.len()));
            trials -= 1;
            if try_run(seed, machines, secrecy, &shorter).is_err() {
                run = shorter;
            } else {
                start += chunk;
            }
        }
        chunk /= 2;
    }
    run
}

fn check(seed: u64) -> (Duration, u64) {
    let (machines, secrecy, run) = plan(seed);
    match try_run(seed, machines, secrecy, &run) {
        Ok(done) => done,
        Err(broken) => {
            println!("WEFT_SEED={seed}: {broken}");
            let run = shortest(seed, machines, secrecy, run);
            let still = try_run(seed, machines, secrecy, &run).err().unwrap_or_default();
            let steps: Vec<_> = run.iter().map(|(pause, step)| format!("  {pause:?} {step:?}\n")).collect();
            panic!(
                "WEFT_SEED={seed}, {machines} machines, {secrecy:?}, the shortest run that fails:\n{}{still}",
                steps.concat()
            );
        }
    }
}

#[test]
fn whatever_befalls_them_nodes_become_one_whole_network() {
    // `make test` must say the same of the same code every time; `make sim` goes where no run has been.
    let many = std::env::var("SIM_SEEDS").is_ok() || std::env::var_os("WEFT_SEED").is_some();
    let first = if many { weft_tests::sim::seed::of("whatever_befalls_them") } else { 1 };
    let seeds = std::env::var("SIM_SEEDS").ok().and_then(|seeds| seeds.parse().ok());
    let seeds = seeds.unwrap_or(if std::env::var_os("WEFT_SEED").is_some() { 1 } else { SEEDS });
    let mut total = Duration::ZERO;
    for seed in first..first + seeds {
        total += check(seed).0;
    }
    println!("{seeds} seeds from {first}: {} s of virtual time, no law broken", total.as_secs());
}

#[test]
fn what_once_failed_holds() {
    for regression in regressions::ALL {
        let outcome = try_run(regression.seed, regression.machines, regression.secrecy, &regression.run());
        assert!(outcome.is_ok(), "{}: {outcome:?}", regression.what);
    }
}

#[test]
fn cluster_keys_change_in_one_place_and_every_datagram_is_read() {
    let first = weft_tests::sim::seed::of("cluster_keys_change_in_one_place");
    for seed in first..first + 6 {
        let secrecy = [Secrecy::Clear, Secrecy::Sealed][(seed % 2) as usize];
        let outcome = World::new(seed, 3 + (seed % 4) as usize, secrecy).change_keys_in_one_place();
        assert!(outcome.is_ok(), "WEFT_SEED={seed}: {outcome:?}");
    }
}

#[test]
fn nodes_that_change_their_tunnel_keys_at_one_time_lose_no_packet() {
    let first = weft_tests::sim::seed::of("nodes_that_change_their_tunnel_keys");
    for seed in first..first + 6 {
        let outcome = rotations::at_one_time(seed);
        assert!(outcome.is_ok(), "WEFT_SEED={seed}: {outcome:?}");
    }
}

#[test]
fn a_node_that_dies_while_its_key_changes_does_not_hold_up_others_for_ever() {
    let seed = weft_tests::sim::seed::of("a_node_that_dies_while_its_key_changes");
    let outcome = rotations::beside_one_that_died(seed);
    assert!(outcome.is_ok(), "WEFT_SEED={seed}: {outcome:?}");
}

#[test]
fn a_site_that_was_cut_off_for_long_kept_its_routes_and_finds_the_others_again() {
    sites::cut_off_for_long(weft_tests::sim::seed::of("a_site_that_was_cut_off"));
}

#[test]
fn a_node_that_left_its_site_meanwhile_is_forgotten_once_the_site_is_heard() {
    sites::a_node_goes_while_its_site_is_cut_off(weft_tests::sim::seed::of("a_node_that_left_meanwhile"));
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let seed = weft_tests::sim::seed::of("the_same_seed_gives_the_same_run");
    assert_eq!(check(seed), check(seed));
}
