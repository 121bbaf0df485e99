//! The CNI plugin from the outside: the executable, a runtime's library, the reference plugins as an oracle, and real
//! containers.
#![allow(clippy::unwrap_used, reason = "a test that unwraps names its line")]

mod cnitool;
mod containers;
mod node;
mod oracle;
mod shim;
