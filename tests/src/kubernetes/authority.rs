//! The certificates of a cluster: one authority signs for servers, and for users, whose name and groups a certificate states.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::{Value, json};

use super::certificates::{Issuer, NOW, Pair, token_keys};
use super::objects;

/// Where all machines of the lab see what [`Authority`] writes.
const INSIDE: &str = "/run/weft-lab/shared/pki";

/// Signs, and writes what it signed into a directory that all machines of the lab share.
#[derive(Debug)]
pub(crate) struct Authority {
    issuer: Issuer,
    directory: PathBuf,
}

impl Authority {
    /// Makes an authority, and the key that service account tokens are signed with.
    pub(crate) fn new(shared: &Path) -> anyhow::Result<Self> {
        let directory = shared.join("pki");
        fs::create_dir_all(&directory)?;
        let authority = Self { issuer: Issuer::new("weft test cluster"), directory };
        authority.write("ca.pem", &authority.issuer.certificate())?;
        let tokens = token_keys();
        authority.write("tokens.key", &tokens.secret)?;
        authority.write("tokens.pub", &tokens.public)?;
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
        self.keep(name, &self.issuer.sign(name, &[], all, NOW))
    }

    /// Signs for a user of the API: `NAME.pem`, `NAME.key`, and `NAME.kubeconfig` that uses them.
    pub(crate) fn user(&self, name: &str, user: &str, groups: &[&str], server: &str) -> anyhow::Result<()> {
        self.keep(name, &self.issuer.sign(user, groups, Vec::new(), NOW))?;
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

    fn kubeconfig(&self, name: &str, user: &Value, server: &str) -> anyhow::Result<()> {
        let config = objects::kubeconfig(server, &self.file("ca.pem"), user);
        self.write(&format!("{name}.kubeconfig"), &config)
    }

    fn keep(&self, name: &str, signed: &Pair) -> anyhow::Result<()> {
        self.write(&format!("{name}.pem"), &signed.public)?;
        self.write(&format!("{name}.key"), &signed.secret)
    }

    fn write(&self, name: &str, text: &str) -> anyhow::Result<()> {
        let path = self.directory.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    }
}
