//! To be filled.
use weft_wire::cni::{CniError, Code};

use super::CheckPlan;

pub(super) fn check(_plan: &CheckPlan) -> Result<(), CniError> {
    Err(CniError::new(Code::UnsupportedField, "not built yet"))
}
