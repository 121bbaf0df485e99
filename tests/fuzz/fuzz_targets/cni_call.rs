//! What a container runtime hands the shim: every verb, its environment and its JSON.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weft_daemon::attach;
use weft_wire::cni::{CniError, CniRequest, Code};

fuzz_target!(|bytes: &[u8]| {
    let mut parts = bytes.splitn(6, |byte| *byte == 0);
    let mut text = || String::from_utf8_lossy(parts.next().unwrap_or_default()).into_owned();
    let request = CniRequest {
        verb: text(),
        container_id: text(),
        netns: text(),
        ifname: text(),
        args: text(),
        stdin: parts.next().unwrap_or_default().to_vec(),
        ..CniRequest::default()
    };
    let outcome = match attach::parse(&request) {
        Ok(_) => Err(CniError::new(Code::TryAgainLater, "later")),
        Err(error) => Err(error),
    };
    if let Err(error) = &outcome {
        assert!(!error.message.is_empty() && !error.message.contains('\n'), "{:?}", error.message);
    }
    let reply = attach::reply(&request, outcome);
    assert!(
        serde_json::from_slice::<serde_json::Value>(&reply.stdout).is_ok(),
        "a runtime can read every answer"
    );
});
