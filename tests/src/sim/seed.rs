//! Where the randomness of a test comes from: `WEFT_SEED`, or the time, and always printed.

/// Returns the seed of a run and prints it.
pub fn of(test: &str) -> u64 {
    let given = std::env::var("WEFT_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = given.unwrap_or_else(|| {
        std::time::UNIX_EPOCH.elapsed().map_or(1, |age| age.as_nanos() as u64 % 1_000_000_000)
    });
    println!("{test}: WEFT_SEED={seed}");
    seed
}
