//! A CA of the tests, and the certificates that it signs.

use std::path::PathBuf;

use super::support::Directory;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    IsCa, KeyPair, KeyUsagePurpose, date_time_ymd,
};

/// Where a certificate and its key were written.
pub type Pair = (PathBuf, PathBuf);

pub struct Authority(CertifiedIssuer<'static, KeyPair>);

/// From when until when, in years.
pub type Validity = (i32, i32);

pub const NOW: Validity = (2020, 4000);
pub const PAST: Validity = (2020, 2021);
pub const FUTURE: Validity = (3999, 4000);

impl Authority {
    pub fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.distinguished_name = named(name);
        (params.not_before, params.not_after) = (date_time_ymd(NOW.0, 1, 1), date_time_ymd(NOW.1, 1, 1));
        let key = KeyPair::generate().expect("a key");
        Self(CertifiedIssuer::self_signed(params, key).expect("a certificate"))
    }

    pub fn write(&self, directory: &Directory, name: &str) -> PathBuf {
        let file = directory.join(&format!("{name}.pem"));
        std::fs::write(&file, self.0.pem()).expect("a file");
        file
    }

    /// Signs a certificate for a name, which may be an address.
    pub fn sign(&self, directory: &Directory, file: &str, name: &str, validity: Validity) -> Pair {
        let mut params = CertificateParams::new(vec![name.to_owned()]).expect("a name");
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.distinguished_name = named(name);
        (params.not_before, params.not_after) =
            (date_time_ymd(validity.0, 1, 1), date_time_ymd(validity.1, 1, 1));
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.0).expect("a certificate");
        let files = (directory.join(&format!("{file}.pem")), directory.join(&format!("{file}.key")));
        std::fs::write(&files.0, certificate.pem()).expect("a file");
        std::fs::write(&files.1, key.serialize_pem()).expect("a file");
        files
    }
}

fn named(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}
