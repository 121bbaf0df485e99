//! A CA of the tests that writes what it signs into a directory of theirs.

use std::path::PathBuf;

use super::certificates::Issuer;
pub use super::certificates::{NOW, Validity};
use super::support::Directory;

/// Where a certificate and its key were written.
pub type Pair = (PathBuf, PathBuf);

pub struct Authority(Issuer);

pub const PAST: Validity = (2020, 2021);
pub const FUTURE: Validity = (3999, 4000);

impl Authority {
    pub fn new(name: &str) -> Self {
        Self(Issuer::new(name))
    }

    pub fn write(&self, directory: &Directory, name: &str) -> PathBuf {
        let file = directory.join(&format!("{name}.pem"));
        std::fs::write(&file, self.0.certificate()).expect("a file");
        file
    }

    /// Signs a certificate for a name, which may be an address.
    pub fn sign(&self, directory: &Directory, file: &str, name: &str, validity: Validity) -> Pair {
        let signed = self.0.sign(name, &[], vec![name.to_owned()], validity);
        let files = (directory.join(&format!("{file}.pem")), directory.join(&format!("{file}.key")));
        std::fs::write(&files.0, signed.public).expect("a file");
        std::fs::write(&files.1, signed.secret).expect("a file");
        files
    }
}
