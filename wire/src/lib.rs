//! What crosses a process or network boundary, and the mesh protocol.
//!
//! Everything here is pure: values and `now` in, values out. No clock, socket, file, thread or global
//! random number generator; `forbid(unsafe_code)`.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod api;
pub mod cni;
pub mod frame;
pub mod gateway;
pub mod handshake;
pub mod invite;
mod kem_box;
pub mod mesh;
pub mod packet;
pub mod pair;
pub mod preshared;
pub mod record;
pub mod seal;
pub mod sealed_box;
pub mod site;
pub mod types;
