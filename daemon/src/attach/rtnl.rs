//! To be filled.
use weft_wire::cni::CniError;

pub(super) struct Conn;

impl Conn {
    pub(super) fn open() -> Result<Self, CniError> {
        Ok(Self)
    }
}
