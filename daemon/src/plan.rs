//! What the kernel should hold, and what must change for it to hold that. Pure: values in, values out.
//!
//! Invariants: [`desired::desired`] is total and does not depend on the order of its inputs; the diff of a
//! desired state against itself is empty; no operation names an object without weft's mark.

pub mod desired;
pub mod diff;
pub mod model;
pub mod table;
