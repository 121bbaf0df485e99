//! A lab in which everything fails, from a seed; once it is quiet, all must be whole.
//!
//! `WEFT_SEED=n` repeats a run, `CHAOS_SEEDS` and `CHAOS_STEPS` make more and longer ones, and `CHAOS_REPLAY=file`
//! repeats the steps of a file. A run that fails is cut down to a short one, which is printed.

mod deeds;
mod step;
mod verdict;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use rand_chacha::ChaCha8Rng;
use rand_core::SeedableRng;
use step::Step;
use weft_tests::sim::seed;
use world::{BEFALLEN, World};

/// Between two looks whether the lab is whole.
const STRETCH: usize = 25;
/// How long a run may be cut down.
const SHORTEN: Duration = Duration::from_secs(600);

fn setting(name: &str, otherwise: usize) -> usize {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(otherwise)
}

/// Lets the steps befall a lab, with a look at it now and then.
fn go_through(run: &[Step]) -> Result<(), String> {
    let attempt = catch_unwind(AssertUnwindSafe(|| {
        let mut world = World::new();
        verdict::whole(&world)?;
        for stretch in run.chunks(STRETCH) {
            let pings = world.watch();
            for step in stretch {
                let began = Instant::now();
                world.apply(*step);
                if began.elapsed() > Duration::from_secs(5) {
                    println!("  {step}: {:.1} s", began.elapsed().as_secs_f32());
                }
            }
            for (sent, lost) in pings.into_iter().map(weft_tests::lab::Ping::stop) {
                if !lost.is_empty() {
                    return Err(format!("nodes that no step befell lost {lost:?} of {sent} pings"));
                }
            }
            world.become_quiet();
            let took = verdict::whole(&world).inspect_err(|_| verdict::print_last_words(&world))?;
            println!("  {} steps, whole after {:.1} s", stretch.len(), took.as_secs_f32());
        }
        verdict::nothing_leaks(&world)
    }));
    attempt.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        Err(text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default())
    })
}

/// Takes steps away as long as the run still fails and there is time.
fn shortest(mut run: Vec<Step>) -> Vec<Step> {
    let began = Instant::now();
    let mut chunk = run.len().div_ceil(2);
    while chunk > 0 && began.elapsed() < SHORTEN {
        let mut start = 0;
        while start < run.len() && began.elapsed() < SHORTEN {
            let mut shorter = run.clone();
            shorter.drain(start..(start + chunk).min(run.len()));
            if go_through(&shorter).is_err() {
                run = shorter;
            } else {
                start += chunk;
            }
        }
        chunk /= 2;
    }
    run
}

fn check(label: &str, run: Vec<Step>) {
    let Err(wrong) = go_through(&run) else { return };
    println!("{label}: {wrong}");
    let run = if std::env::var_os("CHAOS_KEEP").is_some() { run } else { shortest(run) };
    let steps: String = run.iter().map(|step| format!("{step}\n")).collect();
    panic!(
        "{label}: {wrong}\nThe shortest run found that fails (write it to a file for CHAOS_REPLAY):\n{steps}"
    );
}

fn read(text: &str) -> Vec<Step> {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.map(|line| line.parse().unwrap_or_else(|error| panic!("{error}"))).collect()
}

#[test]
fn a_lab_that_everything_befell_is_whole_once_it_is_quiet() {
    if let Ok(file) = std::env::var("CHAOS_REPLAY") {
        let text = std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{file}: {error}"));
        return check(&file, read(&text));
    }
    let first = seed::anew("chaos");
    for seed in first..first + setting("CHAOS_SEEDS", 1) as u64 {
        let steps = setting("CHAOS_STEPS", 50);
        println!("WEFT_SEED={seed}, {steps} steps");
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        check(&format!("WEFT_SEED={seed}"), Step::random_run(&mut rng, BEFALLEN, steps));
    }
}

#[test]
fn runs_that_failed_once_do_not_fail_again() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/chaos/regressions");
    let entries = std::fs::read_dir(directory).expect("the regressions are beside this file");
    let mut files: Vec<_> = entries.map(|entry| entry.expect("the directory can be read").path()).collect();
    files.sort();
    assert!(!files.is_empty(), "{directory} has no runs");
    for file in files {
        let text = std::fs::read_to_string(&file).expect("a run is text");
        check(&file.display().to_string(), read(&text));
    }
}

#[test]
fn steps_are_read_as_they_are_written() {
    let run = Step::random_run(&mut ChaCha8Rng::seed_from_u64(7), BEFALLEN, 300);
    let text: String = run.iter().map(|step| format!("{step}\n")).collect();
    assert_eq!(read(&text), run);
}
