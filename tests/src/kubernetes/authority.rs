//! The certificates of a cluster: one authority signs for servers, and for users, whose name and groups a certificate states.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::Context;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    IsCa, KeyPair, KeyUsagePurpose, date_time_ymd,
};
use serde_json::json;

/// Where all machines of the lab see what [`Authority`] writes.
const INSIDE: &str = "/run/weft-lab/shared/pki";

/// Signs, and writes what it signed into a directory that all machines of the lab share.
#[derive(Debug)]
pub(crate) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    directory: PathBuf,
}

impl Authority {
    /// Makes an authority, and the key that service account tokens are signed with.
    pub(crate) fn new(shared: &Path) -> anyhow::Result<Self> {
        let directory = shared.join("pki");
        fs::create_dir_all(&directory)?;
        let mut params = named("weft test cluster", &[]);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let authority =
            Self { issuer: CertifiedIssuer::self_signed(params, KeyPair::generate()?)?, directory };
        authority.write("ca.pem", &authority.issuer.pem())?;
        let tokens = KeyPair::generate()?;
        authority.write("tokens.key", &tokens.serialize_pem())?;
        authority.write("tokens.pub", &tokens.public_key_pem())?;
        Ok(authority)
    }

    /// A file as the machines of the lab name it: `ca.pem`, `tokens.key`, or what was signed under this name.
    pub(crate) fn file(&self, name: &str) -> String {
        format!("{INSIDE}/{name}")
    }

    /// Signs for a server: `NAME.pem` and `NAME.key`.
    pub(crate) fn server(&self, name: &str, addresses: &[IpAddr], names: &[&str]) -> anyhow::Result<()> {
        let mut all: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        all.extend(addresses.iter().map(IpAddr::to_string));
        let mut params = CertificateParams::new(all)?;
        params.distinguished_name = named(name, &[]).distinguished_name;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.sign(name, params)
    }

    /// Signs for a user of the API: `NAME.pem`, `NAME.key`, and `NAME.kubeconfig` that uses them.
    pub(crate) fn user(&self, name: &str, user: &str, groups: &[&str], server: &str) -> anyhow::Result<()> {
        let mut params = named(user, groups);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(name, params)?;
        let user = json!({
            "client-certificate": self.file(&format!("{name}.pem")), "client-key": self.file(&format!("{name}.key")),
        });
        self.kubeconfig(name, &user, server)
    }

    /// Writes `NAME.kubeconfig` for who has a token.
    pub(crate) fn bearer(&self, name: &str, token: &str, server: &str) -> anyhow::Result<()> {
        self.write(&format!("{name}.token"), token)?;
        self.kubeconfig(name, &json!({ "tokenFile": self.file(&format!("{name}.token")) }), server)
    }

    fn kubeconfig(&self, name: &str, user: &serde_json::Value, server: &str) -> anyhow::Result<()> {
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{ "name": "lab", "cluster": { "server": server, "certificate-authority": self.file("ca.pem") } }],
            "users": [{ "name": name, "user": user }],
            "contexts": [{ "name": "lab", "context": { "cluster": "lab", "user": name } }],
            "current-context": "lab",
        });
        self.write(&format!("{name}.kubeconfig"), &config.to_string())
    }

    fn sign(&self, name: &str, mut params: CertificateParams) -> anyhow::Result<()> {
        let key = KeyPair::generate()?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let certificate = params.signed_by(&key, &self.issuer)?;
        self.write(&format!("{name}.pem"), &certificate.pem())?;
        self.write(&format!("{name}.key"), &key.serialize_pem())
    }

    fn write(&self, name: &str, text: &str) -> anyhow::Result<()> {
        let path = self.directory.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    }
}

fn named(name: &str, groups: &[&str]) -> CertificateParams {
    let mut params = CertificateParams::default();
    let mut distinguished = DistinguishedName::new();
    for group in groups {
        distinguished.push(DnType::OrganizationName, *group);
    }
    distinguished.push(DnType::CommonName, name);
    params.distinguished_name = distinguished;
    (params.not_before, params.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2100, 1, 1));
    params
}
