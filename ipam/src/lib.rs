//! Who owns which address: node subnets leased from a shared store, and pod addresses inside them.
//!
//! The cores (`carve`, `lease`, `pods`) are pure; only `store` touches files.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod carve;
pub mod lease;
pub mod pods;
mod ranges;
pub mod store;
