//! Runs that failed once, cut down to the steps that it took.

use std::time::Duration;

use super::step::Step;
use super::world::Secrecy;

/// A run that failed once.
pub struct Regression {
    /// What went wrong.
    pub what: &'static str,
    pub seed: u64,
    pub machines: usize,
    pub secrecy: Secrecy,
    /// Milliseconds since the step before, and the step.
    pub steps: &'static [(u64, Step)],
}

impl Regression {
    /// Returns the steps as a run.
    pub fn run(&self) -> Vec<(Duration, Step)> {
        self.steps.iter().map(|(pause, step)| (Duration::from_millis(*pause), step.clone())).collect()
    }
}

/// All of them.
pub const ALL: &[Regression] = &[
    Regression {
        what: "a node that left spun, for a pass that was due and never began",
        seed: 1,
        machines: 4,
        secrecy: Secrecy::Clear,
        steps: &[(29_842, Step::Leave(1))],
    },
    Regression {
        what: "a node that returned without its memory took its own old records for a twin's",
        seed: 307,
        machines: 4,
        secrecy: Secrecy::Clear,
        steps: &[(898, Step::Leave(2)), (1852, Step::AddPod(1))],
    },
    Regression {
        what: "a node that lost its memory after its key was rotated did not know its own lease",
        seed: 112,
        machines: 5,
        secrecy: Secrecy::Clear,
        steps: &[
            (0, Step::LoseStoreEverywhere),
            (7252, Step::RotateNodeKey(1)),
            (1809, Step::Leave(1)),
            (1124, Step::Kill(1)),
        ],
    },
    Regression {
        what: "a store that was behind for long, and so taken for a backup, showed an earlier run of the node as a twin",
        seed: 20_381,
        machines: 7,
        secrecy: Secrecy::Clear,
        steps: &[
            (4323, Step::Kill(1)),
            (8142, Step::Start(1)),
            (2864, Step::FallBehind(1, 4)),
            (2566, Step::FallBehind(1, 4)),
            (17_969, Step::AdvanceClock(2, Duration::from_millis(182_604))),
        ],
    },
];
