//! To be filled.
use std::collections::BTreeSet;

use weft_wire::cni::{AttachmentId, CniError, CniResult, Code};

use super::{AddPlan, Attachment, Condition, rtnl::Conn};

fn not_yet() -> CniError {
    CniError::new(Code::UnsupportedField, "not built yet")
}

pub(super) fn add(_plan: &AddPlan) -> Result<CniResult, CniError> {
    Err(not_yet())
}

pub(super) fn del(_id: &AttachmentId) -> Result<(), CniError> {
    Err(not_yet())
}

pub(super) fn condition(_conn: &mut Conn, _attachment: &Attachment) -> Result<Condition, CniError> {
    Err(not_yet())
}

pub(super) fn sweep(_bridge: &str, _known: &BTreeSet<String>) -> Result<Vec<String>, CniError> {
    Err(not_yet())
}
