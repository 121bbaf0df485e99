//! What befalls the machines: made from a seed alone, so that a run can be repeated and cut down.

use std::time::Duration;

use rand_core::RngCore;

use weft_daemon::plan::model::Encryption;

use super::meddling::Meddling;

/// One mishap or deed. Machines are named by number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    Start(usize),
    Kill(usize),
    CutPower(usize),
    Leave(usize),
    /// Machines whose bit is set do not hear the others.
    Part(u64),
    /// The second does not hear the first.
    Deafen(usize, usize),
    Heal,
    Weather {
        loss_percent: u64,
        duplicate_percent: u64,
        jitter: Duration,
    },
    /// Datagrams are taken in so much later.
    Slow(usize, Duration),
    AdvanceClock(usize, Duration),
    LoseStore(usize),
    LoseStoreEverywhere,
    FindStore(usize),
    LoseAnswers(usize, u32),
    /// Lists come from a replica so many writes behind.
    FallBehind(usize, usize),
    FillDisk(usize),
    FreeDisk(usize),
    RefuseChanges(usize, usize),
    FailDumps(usize, usize),
    Meddle(usize, Meddling),
    MeddleWithinPass(usize, Meddling),
    /// The underlay gets another address.
    Move(usize),
    LoseUnderlay(usize),
    FindUnderlay(usize),
    AddPod(usize),
    DeletePod(usize, usize),
    VanishPod(usize, usize),
    RotateNodeKey(usize),
    RotateTunnelKey(usize),
    /// A daemon that is started again has another policy.
    Demand(usize, Encryption),
    /// The next phase of: add a key everywhere, use it everywhere, remove the old one everywhere.
    RotateClusterKey,
    /// Delivered datagrams are delivered again.
    Replay(usize),
    /// Delivered datagrams are delivered changed.
    Forge(usize),
    /// The first is told to forget the second.
    Forget(usize, usize),
}

fn below(rng: &mut dyn RngCore, bound: usize) -> usize {
    rng.next_u64() as usize % bound
}

fn meddling(rng: &mut dyn RngCore) -> Meddling {
    let choice = below(rng, 1000);
    match below(rng, 8) {
        0 => Meddling::DeleteLink(choice),
        1 => Meddling::DeleteAddress(choice),
        2 => Meddling::DeleteNeighbour(choice),
        3 => Meddling::DeleteFdb(choice),
        4 => Meddling::DeleteRoute(choice),
        5 => Meddling::ChangeRoute(choice),
        6 => Meddling::FlushNft,
        _ => Meddling::Unbridge(choice),
    }
}

/// Makes a random run: what happens, and how long after what happened before.
pub fn random_run(rng: &mut dyn RngCore, machines: usize, steps: usize) -> Vec<(Duration, Step)> {
    let step = |rng: &mut dyn RngCore| {
        let (a, b) = (below(rng, machines), below(rng, machines));
        let ms = |rng: &mut dyn RngCore, most| Duration::from_millis(below(rng, most) as u64);
        match below(rng, 67) {
            0..=5 => Step::Kill(a),
            6..=15 => Step::Start(a),
            16 | 17 => Step::CutPower(a),
            18 | 19 => Step::Leave(a),
            20 | 21 => Step::Part(rng.next_u64()),
            22 | 23 => Step::Deafen(a, b),
            24..=26 => Step::Heal,
            27 => Step::Weather {
                loss_percent: below(rng, 30) as u64,
                duplicate_percent: below(rng, 20) as u64,
                jitter: ms(rng, 200),
            },
            28 => Step::Slow(a, ms(rng, 6000)),
            29 | 30 => Step::AdvanceClock(a, ms(rng, 200_000)),
            31 | 32 => Step::LoseStore(a),
            33 => Step::LoseStoreEverywhere,
            34..=36 => Step::FindStore(a),
            37 => Step::LoseAnswers(a, 1 + below(rng, 3) as u32),
            38 => Step::FallBehind(a, below(rng, 6)),
            39 => Step::FillDisk(a),
            40 | 41 => Step::FreeDisk(a),
            42 => Step::RefuseChanges(a, 1 + below(rng, 5)),
            43 => Step::FailDumps(a, 1 + below(rng, 2)),
            44 | 45 => Step::Meddle(a, meddling(rng)),
            46 | 47 => Step::MeddleWithinPass(a, meddling(rng)),
            48 => Step::Move(a),
            49 => Step::LoseUnderlay(a),
            50 => Step::FindUnderlay(a),
            51..=55 => Step::AddPod(a),
            56 | 57 => Step::DeletePod(a, b),
            58 => Step::VanishPod(a, b),
            59 => Step::RotateNodeKey(a),
            60 => Step::RotateClusterKey,
            61 => Step::Replay(1 + below(rng, 30)),
            62 => Step::Forge(1 + below(rng, 30)),
            63 | 64 => Step::RotateTunnelKey(a),
            65 => Step::Demand(a, [Encryption::Never, Encryption::Always][b % 2]),
            _ => Step::Forget(a, b),
        }
    };
    let pause = |rng: &mut dyn RngCore| match below(rng, 8) {
        0 => Duration::ZERO,
        1 => Duration::from_millis(below(rng, 30_000) as u64),
        _ => Duration::from_millis(below(rng, 3000) as u64),
    };
    (0..steps).map(|_| (pause(rng), step(rng))).collect()
}
