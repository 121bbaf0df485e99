//! Certificates of the tests: a CA, and what it signs for servers and for users. The clusters of the lab have theirs from here too.

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    IsCa, KeyPair, KeyUsagePurpose, date_time_ymd,
};

/// From when until when, in years.
pub type Validity = (i32, i32);

pub const NOW: Validity = (2020, 4000);

#[derive(Debug)]
pub struct Issuer(CertifiedIssuer<'static, KeyPair>);

/// Something public and the secret that belongs to it, as PEM.
#[derive(Debug)]
pub struct Pair {
    pub public: String,
    pub secret: String,
}

impl Issuer {
    pub fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate().expect("a key");
        let certificate = CertifiedIssuer::self_signed(named(params, name, &[], NOW), key);
        Self(certificate.expect("a certificate"))
    }

    /// The CA's own certificate.
    pub fn certificate(&self) -> String {
        self.0.pem()
    }

    /// Signs a certificate for a server at these names and addresses, or for a user of these groups.
    pub fn sign(&self, subject: &str, groups: &[&str], names: Vec<String>, validity: Validity) -> Pair {
        let mut params = CertificateParams::new(names).expect("names");
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().expect("a key");
        let certificate = named(params, subject, groups, validity).signed_by(&key, &self.0);
        Pair { public: certificate.expect("a certificate").pem(), secret: key.serialize_pem() }
    }
}

/// Makes the keys that tokens of service accounts are signed with.
pub fn token_keys() -> Pair {
    let key = KeyPair::generate().expect("a key");
    Pair { public: key.public_key_pem(), secret: key.serialize_pem() }
}

fn named(
    mut params: CertificateParams,
    name: &str,
    groups: &[&str],
    (from, until): Validity,
) -> CertificateParams {
    let mut distinguished = DistinguishedName::new();
    for group in groups {
        distinguished.push(DnType::OrganizationName, *group);
    }
    distinguished.push(DnType::CommonName, name);
    params.distinguished_name = distinguished;
    (params.not_before, params.not_after) = (date_time_ymd(from, 1, 1), date_time_ymd(until, 1, 1));
    params
}
