//! What `tests/fuzz` needs of words about paths and no daemon does: the reader and the writer by themselves.
//!
//! Built with `--cfg fuzzing` alone.

use prost::Message;

use super::paths::{PathWord, from_body, to_body};
use super::proto;

/// Reads the word that the content of a datagram says: `None` for content of another kind, and within it `None` for a word out of
/// range.
pub fn word(content: &[u8]) -> Option<Option<PathWord>> {
    from_body(&proto::Datagram::decode(content).ok()?.body?)
}

/// Returns the content of a datagram that says a word, and nothing else.
pub fn said(word: &PathWord) -> Vec<u8> {
    proto::Datagram { body: Some(to_body(word)), ..Default::default() }.encode_to_vec()
}
