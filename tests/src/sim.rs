//! What simulations stand on: a network in virtual time. It knows neither meshes nor daemons.

pub mod net;
pub mod seed;
