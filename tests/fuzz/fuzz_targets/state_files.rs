//! What a daemon finds in its directory: a key, endorsements, the memory of an earlier run.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weft_daemon::state::Memory;
use weft_wire::mesh::NodeKey;
use weft_wire::seal::ClusterKey;

fuzz_target!(|text: &str| {
    if let Ok(key) = NodeKey::from_secret_text(text) {
        let again = NodeKey::from_secret_text(&key.to_secret_text()).expect("what is written can be read");
        assert_eq!(again.public(), key.public());
    }
    if let Ok(key) = text.parse::<ClusterKey>() {
        assert_eq!(key.to_secret_text().parse::<ClusterKey>().as_ref(), Ok(&key));
    }
    if let Ok(memory) = serde_json::from_str::<Memory>(text) {
        let written = serde_json::to_string(&memory).expect("the memory can be written");
        assert_eq!(serde_json::from_str::<Memory>(&written).ok(), Some(memory));
    }
});
