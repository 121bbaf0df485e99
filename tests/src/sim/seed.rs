//! Where the randomness of a test comes from, always printed: `WEFT_SEED`; else the name of the test, so that the same code gives
//! the same runs; with `WEFT_RANDOM` the time, to go where no run has been.

/// Returns the seed of a run and prints it.
pub fn of(test: &str) -> u64 {
    // Fowler-Noll-Vo 1a: the same with every compiler.
    let named = test.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    choose(test, if std::env::var_os("WEFT_RANDOM").is_some() { time() } else { named % 1_000_000_000 })
}

/// Returns a seed that is another one each time, but for `WEFT_SEED`, and prints it.
pub fn anew(test: &str) -> u64 {
    choose(test, time())
}

fn choose(test: &str, otherwise: u64) -> u64 {
    let given = std::env::var("WEFT_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = given.unwrap_or(otherwise);
    println!("{test}: WEFT_SEED={seed}");
    seed
}

fn time() -> u64 {
    std::time::UNIX_EPOCH.elapsed().map_or(1, |age| age.as_nanos() as u64 % 1_000_000_000)
}
