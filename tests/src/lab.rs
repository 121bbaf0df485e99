//! The lab: nodes as network namespaces, with the real executables inside.
//!
//! One *keeper* process owns everything. It lives in namespaces of its own (mount, network and process; a user namespace
//! too when it was not started by root), and nodes and pods are namespaces below it. Nothing is mounted, linked or
//! configured outside, so when the keeper ends, for whatever reason, the kernel takes all of the lab away with it. Only
//! the lab's directory of plain files stays, and the next run removes it.
//!
//! Invariant: no interface of the lab has a path to the machine's own network. The underlay is a bridge inside the
//! keeper's network namespace and has no uplink.

mod capture;
mod enter;
mod etcd;
mod harness;
mod home;
mod keeper;
mod machine;
mod matrix;
mod model;
mod nat;
mod node;
mod relay;
mod runtime;
pub mod sites;
mod tools;
mod traffic;
mod underlay;
mod witness;

pub use capture::{CLEAR, Capture, Found};
pub use enter::Place;
pub(crate) use harness::keep_log_of_failure as show_logs;
pub use harness::{Lab, LabOptions, executable, skip, wait_until};
pub use home::{Handle, Presence};
pub use keeper::keep;
pub use matrix::{Matrix, Pair};
pub use model::{
    Backend, Families, Impairment, NodeView, Options, PodView, Request, RouterView, State, Store,
};
pub use nat::Nat;
pub use traffic::{Background, Flow, Ping};
pub use witness::differences;
