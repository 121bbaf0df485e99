//! Bytes from the network that nobody has looked at yet: they are refused, and what this ring sealed is not.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weft_wire::seal::{ClusterKey, KeyRing};

fuzz_target!(|bytes: &[u8]| {
    let ring = KeyRing::new(vec![ClusterKey::from_bytes([1; 32])]).expect("one key is a ring");
    // Nobody guesses a tag of 16 bytes.
    assert!(ring.open("fuzz", bytes).is_err());
    let content = &bytes[..bytes.len().min(1000)];
    let sealed = ring.seal("fuzz", [7; 24], content);
    assert_eq!(ring.open("fuzz", &sealed).as_deref(), Ok(content));
    assert!(ring.open("other", &sealed).is_err());
});
