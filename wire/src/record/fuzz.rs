//! What `tests/fuzz` needs of records and no daemon does: the parser and the encoder by themselves.
//!
//! Built with `--cfg fuzzing` alone.

use prost::Message;

use super::{ClaimedRecord, NodeRecord, RecordError, SignedRecord, proto, to_proto};

/// Parses a record as a message of the mesh carries it.
///
/// # Errors
/// Bytes that are no record.
pub fn parse(record: &[u8], signature: &[u8]) -> Result<ClaimedRecord, RecordError> {
    ClaimedRecord::parse(proto::SignedRecord { record: record.to_vec(), signature: signature.to_vec() })
}

/// Returns the bytes that a signer would sign for this content.
pub fn encode(record: &NodeRecord) -> Vec<u8> {
    to_proto(record).encode_to_vec()
}

/// Returns the record as it is sent and its signature.
pub fn sent(signed: &SignedRecord) -> (Vec<u8>, Vec<u8>) {
    let proto::SignedRecord { record, signature } = signed.to_proto();
    (record, signature)
}
