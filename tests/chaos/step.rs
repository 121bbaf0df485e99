//! What befalls a lab: plain values that are made from a seed, written as a line of text and read back.

use std::fmt;
use std::str::FromStr;

use rand_core::RngCore;

/// One mishap or deed; nodes are numbered from 1, `choice` picks among what there is at that moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// What happens.
    pub kind: Kind,
    /// To which node.
    pub node: usize,
    /// What else there is to choose.
    pub choice: u32,
}

macro_rules! kinds {
    ($($(#[doc = $doc:expr])* $name:ident = $word:literal x $weight:literal,)*) => {
        /// The kinds of step.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Kind { $($(#[doc = $doc])* $name,)* }

        impl Kind {
            /// Each kind with its word and how often it comes.
            const ALL: &[(Kind, &'static str, u32)] = &[$((Kind::$name, $word, $weight),)*];
        }
    };
}

kinds! {
    /// The daemon ends by SIGKILL.
    Kill = "kill" x 5,
    /// The daemon ends by SIGTERM.
    Stop = "stop" x 2,
    /// The daemon starts, if it does not run.
    Start = "start" x 9,
    /// The daemon starts with its clocks moved.
    StartAhead = "start-ahead" x 1,
    /// The daemon is stopped for some hundred milliseconds, to seconds.
    Pause = "pause" x 2,
    /// Two nodes no longer hear each other.
    Cut = "cut" x 3,
    /// All cuts and delays end.
    Heal = "heal" x 3,
    /// What two nodes send each other takes longer.
    Delay = "delay" x 1,
    /// A route of weft's is deleted.
    DeleteRoute = "delete-route" x 3,
    /// A neighbour of weft's is deleted.
    DeleteNeighbour = "delete-neighbour" x 3,
    /// A forwarding entry of weft's is deleted.
    DeleteFdb = "delete-fdb" x 3,
    /// An address of weft's is deleted.
    DeleteAddress = "delete-address" x 3,
    /// A device of weft's is deleted.
    DeleteLink = "delete-link" x 3,
    /// A device of weft's goes down.
    DownLink = "down-link" x 2,
    /// A pod's host end leaves the bridge.
    Unbridge = "unbridge" x 2,
    /// All of nftables is flushed, whoever made it.
    FlushRuleset = "flush-ruleset" x 2,
    /// Another program adds a route and a device of its own.
    AddForeign = "add-foreign" x 1,
    /// The underlay goes down and up.
    BounceUnderlay = "bounce-underlay" x 2,
    /// The underlay gets another address.
    MoveUnderlay = "move-underlay" x 2,
    /// The underlay gets another MTU.
    ResizeUnderlay = "resize-underlay" x 1,
    /// A pod comes.
    AddPod = "add-pod" x 7,
    /// A pod goes.
    RemovePod = "remove-pod" x 4,
    /// A pod's namespace goes before its DEL.
    VanishPod = "vanish-pod" x 2,
    /// The store goes away for all nodes.
    LoseStore = "lose-store" x 1,
    /// The store comes back.
    FindStore = "find-store" x 3,
    /// The store's file cannot be written.
    LockStore = "lock-store" x 1,
    /// The disk of the node's state is full.
    FillDisk = "fill-disk" x 1,
    /// The disk of the node's state has room.
    FreeDisk = "free-disk" x 3,
    /// The node's key is rotated.
    RotateKey = "rotate-key" x 1,
    /// A node no longer hears another one, which still hears it.
    CutOneWay = "cut-one-way" x 2,
    /// Something appears that has weft's mark and belongs nowhere.
    Plant = "plant" x 3,
    /// Something of weft's is changed to be wrong.
    Twist = "twist" x 3,
    /// Another program makes an nftables table of its own.
    AddForeignTable = "add-foreign-table" x 1,
    /// A runtime calls ADD and DEL several times at once, and again.
    Calls = "calls" x 2,
    /// A runtime calls DEL for a container that no one knows.
    UnknownDel = "unknown-del" x 1,
    /// The node loses power.
    Reboot = "reboot" x 1,
    /// The node leaves the cluster, to return.
    Return = "return" x 1,
    /// The key of the cluster is changed.
    RotateRing = "rotate-ring" x 1,
}

impl Step {
    /// Makes a run of steps for so many nodes.
    pub fn random_run(rng: &mut dyn RngCore, nodes: usize, steps: usize) -> Vec<Step> {
        let total: u32 = Kind::ALL.iter().map(|(.., weight)| weight).sum();
        let mut step = || {
            let mut place = rng.next_u32() % total;
            let found = Kind::ALL.iter().find(|(.., weight)| {
                let here = place < *weight;
                place = place.saturating_sub(*weight);
                here
            });
            let kind = found.map_or(Kind::Heal, |(kind, ..)| *kind);
            Step { kind, node: 1 + rng.next_u32() as usize % nodes, choice: rng.next_u32() % 1000 }
        };
        (0..steps).map(|_| step()).collect()
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = Kind::ALL.iter().find(|(kind, ..)| *kind == self.kind).map_or("", |(_, word, _)| word);
        write!(f, "{word} {} {}", self.node, self.choice)
    }
}

impl FromStr for Step {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let refusal = || format!("{line:?} is no step: write `WORD NODE CHOICE`, such as `kill 2 0`");
        let mut words = line.split_whitespace();
        let word = words.next().ok_or_else(refusal)?;
        let (kind, ..) = Kind::ALL.iter().find(|(_, known, _)| *known == word).ok_or_else(refusal)?;
        let mut number = || words.next().and_then(|word| word.parse::<u32>().ok()).ok_or_else(refusal);
        Ok(Step { kind: *kind, node: number()? as usize, choice: number()? })
    }
}
