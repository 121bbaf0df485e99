//! A configuration file: it resolves, or one line says what is wrong.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use weft_daemon::config::Config;

fuzz_target!(|text: &str| {
    if let Err(error) = Config::parse(text, Path::new("weft.toml"), "host") {
        let sentence = error.to_string();
        assert!(sentence.starts_with("weft.toml") && !error.message.is_empty());
        assert!(!sentence.contains('\n'), "{sentence:?}");
    }
});
