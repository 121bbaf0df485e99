//! What `tests/fuzz` needs of sites and no daemon does: a statement without its signature, and what opens a box.
//!
//! Built with `--cfg fuzzing` alone.

use prost::Message;

use super::{ClaimedStatement, SIGNATURE, SiteKey, Statement, StatementError, to_proto};
use crate::mesh::proto;

/// Parses what a signature would be over.
///
/// # Errors
/// Bytes that are no statement.
pub fn parse(statement: &[u8]) -> Result<Statement, StatementError> {
    let signed = proto::SignedStatement { statement: statement.to_vec(), signature: vec![0; SIGNATURE] };
    ClaimedStatement::parse(&signed).map(|claimed| claimed.claim().clone())
}

/// Returns the bytes that a signer would sign for this statement.
pub fn encode(statement: &Statement) -> Vec<u8> {
    to_proto(statement).encode_to_vec()
}

/// Opens a box with a site's key.
pub fn open(key: &SiteKey, sealed: &[u8]) -> Option<Vec<u8>> {
    key.open(sealed).map(|content| content.to_vec())
}
