//! What the tests and the quick start stand on: the lab, a cluster of network namespaces on one machine,
//! and the network of the simulations.
//!
//! Not part of what is shipped to a node. Nothing here may leave a trace on the machine once a lab is down.
#![forbid(unsafe_code)]

pub mod figures;
pub mod kubernetes;
pub mod lab;
pub mod manifest;
pub mod plot;
pub mod sim;
