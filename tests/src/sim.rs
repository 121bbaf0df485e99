//! What simulations stand on: a network in virtual time, and meshes in it.

pub mod meshes;
pub mod nat;
pub mod net;
pub mod records;
pub mod seed;
pub mod size;
