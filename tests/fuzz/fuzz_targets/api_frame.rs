//! What comes over the local socket: a length and a message, or nonsense.
#![no_main]

use libfuzzer_sys::fuzz_target;
use prost::Message;
use weft_wire::api::{Reply, Request};
use weft_wire::frame;

const LIMIT: usize = 1 << 16;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(Some((header, length))) = frame::length(bytes, LIMIT) {
        assert!(length <= LIMIT && header <= bytes.len());
        let body = &bytes[header..bytes.len().min(header + length)];
        if let Ok(request) = Request::decode(body) {
            let again = frame::encode(&request);
            let (header, length) =
                frame::length(&again, usize::MAX).expect("a frame of ours").expect("it is whole");
            assert_eq!(Request::decode(&again[header..header + length]), Ok(request));
        }
    }
    if let Ok(reply) = Reply::decode(bytes) {
        // As bytes: a round trip of NaN is not equal to itself.
        let once = reply.encode_to_vec();
        let again = Reply::decode(&once[..]).expect("what is encoded decodes");
        assert_eq!(again.encode_to_vec(), once);
    }
});
