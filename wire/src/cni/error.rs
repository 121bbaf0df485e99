//! The errors of the CNI specification.

use std::fmt;

use serde::Serialize;

use super::SpecVersion;

/// An error code of the spec (section "Error"), or one of weft's own above 99.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Code {
    /// The configuration wants a spec version, or a verb of one, that does not fit.
    IncompatibleVersion = 1,
    /// A field of the configuration asks for something that weft does not do.
    UnsupportedField = 2,
    /// The container is unknown, or its namespace is gone; the runtime has nothing to clean up.
    ContainerUnknown = 3,
    /// An environment variable is missing or wrong.
    InvalidEnvironment = 4,
    /// A file or the journal could not be read or written.
    InputOutput = 5,
    /// Standard input is not what it should be.
    DecodeFailure = 6,
    /// The network configuration is not valid.
    InvalidConfiguration = 7,
    /// The daemon is not there, or not ready: the runtime should try again.
    TryAgainLater = 11,
    /// STATUS: ADD would fail.
    NotAvailable = 50,
    /// STATUS: ADD would fail, and existing containers may have limited connectivity.
    NotAvailableLimited = 51,
    /// CHECK: the attachment is not as it was made.
    CheckFailed = 100,
    /// No address is free.
    Exhausted = 101,
    /// The attachment, the address or the interface name is in use for something else.
    Conflict = 102,
    /// The kernel refused a change.
    Kernel = 103,
}

/// A failed CNI call: what the shim prints on standard output, with exit status 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CniError {
    /// What kind of error.
    pub code: Code,
    /// One sentence: what happened and what to do.
    pub message: String,
    /// What the kernel or a library said; empty where there is nothing more to say.
    pub details: String,
}

impl CniError {
    /// Makes an error without details.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), details: String::new() }
    }

    /// Adds what the kernel or a library said.
    #[must_use]
    pub fn with_details(mut self, details: impl fmt::Display) -> Self {
        self.details = details.to_string();
        self
    }

    /// Writes the error as the spec wants it on standard output.
    pub fn to_json(&self, version: SpecVersion) -> Vec<u8> {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Body<'a> {
            cni_version: &'a str,
            code: u32,
            msg: &'a str,
            #[serde(skip_serializing_if = "str::is_empty")]
            details: &'a str,
        }
        super::outcome::pretty(&Body {
            cni_version: version.as_str(),
            code: self.code as u32,
            msg: &self.message,
            details: &self.details,
        })
    }
}

impl fmt::Display for CniError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if self.details.is_empty() { Ok(()) } else { write!(f, " ({})", self.details) }
    }
}

impl std::error::Error for CniError {}
