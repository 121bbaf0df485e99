//! The node daemon as a library: the loop, what the kernel should hold, and how it gets there.
#![forbid(unsafe_code)]

pub mod attach;
pub mod cli;
pub mod config;
pub mod control;
pub mod gossip;
pub mod handover;
pub mod install;
pub mod journal;
pub mod kernel;
pub mod kubernetes;
pub mod leases;
pub mod metrics;
pub mod node;
pub mod plan;
pub mod reconcile;
pub mod relay;
mod ring_file;
pub mod server;
pub mod state;
pub mod tunnel;
pub mod uninstall;
