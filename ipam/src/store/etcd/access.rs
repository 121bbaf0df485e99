//! How to reach and convince etcd: endpoints, certificates, user and password. It connects to nothing.
//!
//! Files are read again for every connection, so that certificates and passwords that are renewed on the disk
//! are used without a restart. Invariant: what cannot work is found by [`EtcdOptions::check`], in one sentence.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{ClientConfig, Error as TlsError, RootCertStore};
use tonic::transport::{Certificate, ClientTlsConfig, Identity, Uri};
use weft_wire::types::NodeName;

/// What an [`EtcdStore`](super::EtcdStore) needs to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdOptions {
    /// The members' client addresses: at least one, all with TLS or none.
    pub endpoints: Vec<Endpoint>,
    /// What the store's keys begin with, without a slash at its end.
    pub prefix: String,
    /// The CA of the members' certificates; needed with `https`.
    pub ca_file: Option<PathBuf>,
    /// This node's certificate and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// The user, and the file that holds the password.
    pub user: Option<(String, PathBuf)>,
    /// Whose store this is: the entries of a node share one lease of etcd.
    pub node: NodeName,
    /// How long entries outlive the last sign of their node; rounded up to seconds.
    pub abandon_after: Duration,
}

/// The address of a member: `https://HOST:PORT`, or `http://` without TLS.
#[derive(Clone, PartialEq, Eq)]
pub struct Endpoint(Uri);

/// Options that cannot work: one sentence that names the key of `[store]`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct EtcdOptionsError(String);

fn wrong<T>(sentence: impl Into<String>) -> Result<T, EtcdOptionsError> {
    Err(EtcdOptionsError(sentence.into()))
}

impl EtcdOptions {
    /// Checks the options against each other, without touching a file.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self) -> Result<(), EtcdOptionsError> {
        let Some(first) = self.endpoints.first() else {
            return wrong(
                "store.type = \"etcd\" needs store.endpoints, for example [\"https://192.0.2.1:2379\"]",
            );
        };
        if let Some(other) = self.endpoints.iter().find(|other| other.tls() != first.tls()) {
            return wrong(format!(
                "store.endpoints mixes https and http ({first}, {other}): write all of them with https://, or none"
            ));
        }
        match (first.tls(), &self.ca_file) {
            (true, None) => {
                return wrong(format!("{first} needs store.ca_file: the CA that signed etcd's certificate"));
            }
            (false, Some(_)) => {
                return wrong(format!("store.ca_file is of no use with {first}: write https://"));
            }
            (false, None) if self.identity.is_some() => {
                return wrong(format!("store.cert_file is of no use with {first}: write https://"));
            }
            _ => {}
        }
        let named = |text: &str| text.len() <= 256 && text.bytes().all(|byte| byte.is_ascii_graphic());
        if !self.prefix.starts_with('/') || self.prefix.ends_with('/') || !named(&self.prefix) {
            return wrong(format!(
                "store.prefix {:?} cannot be used: write one like \"/weft\", without a slash at its end",
                self.prefix
            ));
        }
        Ok(())
    }

    /// Reads the files and checks what they hold.
    ///
    /// # Errors
    /// The first file that is missing or is not what it should be.
    pub fn check_files(&self) -> Result<(), EtcdOptionsError> {
        self.credentials().map(drop)
    }

    pub(super) fn credentials(&self) -> Result<Credentials, EtcdOptionsError> {
        let login = match &self.user {
            None => None,
            Some((user, file)) => Some(Login { user: user.clone(), password: password(file)? }),
        };
        let tls = match &self.ca_file {
            None => None,
            Some(ca_file) => Some(self.tls(ca_file)?),
        };
        Ok(Credentials { tls, login })
    }

    fn tls(&self, ca_file: &Path) -> Result<Tls, EtcdOptionsError> {
        let ca = read("store.ca_file", ca_file)?;
        let mut roots = RootCertStore::empty();
        for certificate in certificates("store.ca_file", ca_file, &ca)? {
            if let Err(error) = roots.add(certificate) {
                return wrong(format!(
                    "store.ca_file {} holds a certificate that cannot be used ({error}): name the CA that signed etcd's",
                    ca_file.display()
                ));
            }
        }
        let builder = ClientConfig::builder_with_provider(ring::default_provider().into())
            .with_safe_default_protocol_versions()
            .or_else(|error| wrong(format!("TLS cannot be used: {error}")))?
            .with_root_certificates(roots);
        let tonic = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&ca));
        let Some((cert_file, key_file)) = &self.identity else {
            return Ok(Tls { tonic, bare: builder.with_no_client_auth().into() });
        };
        let (cert, key) = (read("store.cert_file", cert_file)?, read("store.key_file", key_file)?);
        let chain = certificates("store.cert_file", cert_file, &cert)?;
        let Ok(secret) = PrivateKeyDer::from_pem_slice(&key) else {
            return wrong(format!(
                "store.key_file {} holds no private key in PEM: name the key of store.cert_file",
                key_file.display()
            ));
        };
        match builder.with_client_auth_cert(chain, secret) {
            Ok(bare) => Ok(Tls { tonic: tonic.identity(Identity::from_pem(cert, key)), bare: bare.into() }),
            Err(TlsError::InconsistentKeys(_)) => wrong(format!(
                "store.key_file {} is not the key of store.cert_file {}: name the two that belong together",
                key_file.display(),
                cert_file.display()
            )),
            Err(error) => wrong(format!(
                "store.cert_file {} with store.key_file {} cannot be used: {error}",
                cert_file.display(),
                key_file.display()
            )),
        }
    }

    /// Names the lease of etcd that this node's entries share: the same at every start.
    ///
    /// Other options make another name, because the time to live of a lease of etcd never changes.
    pub(super) fn lease_id(&self) -> i64 {
        let name = format!("{}\n{}\n{}", self.prefix, self.node, self.abandon_seconds());
        // FNV-1a; a collision makes two nodes share a lease of etcd, which keeps entries longer and no more.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        i64::try_from(hash >> 1).expect("63 bits").max(1)
    }

    pub(super) fn abandon_seconds(&self) -> i64 {
        // etcd takes at most 9,000,000,000 s.
        let seconds = self.abandon_after.as_secs() + u64::from(self.abandon_after.subsec_nanos() > 0);
        i64::try_from(seconds.clamp(1, 9_000_000_000)).expect("in range")
    }
}

/// What is shown to etcd, as read from the files.
pub(super) struct Credentials {
    pub(super) tls: Option<Tls>,
    pub(super) login: Option<Login>,
}

/// How TLS is spoken: for gRPC, and the same for a handshake alone.
pub(super) struct Tls {
    pub(super) tonic: ClientTlsConfig,
    pub(super) bare: Arc<ClientConfig>,
}

/// A user and a password.
pub(super) struct Login {
    pub(super) user: String,
    pub(super) password: String,
}

fn read(key: &str, file: &Path) -> Result<Vec<u8>, EtcdOptionsError> {
    std::fs::read(file).or_else(|error| {
        wrong(format!(
            "{key} {} cannot be read ({error}): put it there, or name another file",
            file.display()
        ))
    })
}

fn certificates(
    key: &str,
    file: &Path,
    pem: &[u8],
) -> Result<Vec<CertificateDer<'static>>, EtcdOptionsError> {
    match CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>() {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        _ => wrong(format!(
            "{key} {} holds no certificate in PEM: name a file with BEGIN CERTIFICATE",
            file.display()
        )),
    }
}

/// Reads a password: the file's text without the end of its line.
fn password(file: &Path) -> Result<String, EtcdOptionsError> {
    let text = String::from_utf8(read("store.password_file", file)?).unwrap_or_default();
    match text.trim_end_matches(['\r', '\n']) {
        "" => wrong(format!("store.password_file {} holds no password: write it there", file.display())),
        password => Ok(password.to_owned()),
    }
}

impl Endpoint {
    /// Returns whether the member is spoken to through TLS.
    pub fn tls(&self) -> bool {
        self.0.scheme_str() == Some("https")
    }

    pub(super) fn uri(&self) -> Uri {
        self.0.clone()
    }

    /// Returns the name or address that the member's certificate must be for.
    pub(super) fn host(&self) -> &str {
        self.0.host().unwrap_or_default().trim_matches(['[', ']'])
    }

    pub(super) fn port(&self) -> u16 {
        self.0.port_u16().unwrap_or_default()
    }
}

impl FromStr for Endpoint {
    type Err = EtcdOptionsError;

    fn from_str(text: &str) -> Result<Self, EtcdOptionsError> {
        let uri = text.parse::<Uri>().ok();
        if !text.contains("://") {
            return wrong(format!(
                "store.endpoints: {text:?} has no scheme: write \"https://HOST:2379\", or \"http://HOST:2379\" without TLS"
            ));
        }
        let usable = uri.filter(|uri| {
            matches!(uri.scheme_str(), Some("http" | "https"))
                && uri.host().is_some_and(|host| !host.is_empty())
                && uri.port_u16().is_some_and(|port| port > 0)
                && uri.authority().is_some_and(|authority| !authority.as_str().contains('@'))
                && matches!(uri.path(), "" | "/")
                && uri.query().is_none()
        });
        usable.map(Self).ok_or_else(|| {
            EtcdOptionsError(format!(
                "store.endpoints: {text:?} is no address of an etcd member: write \"https://HOST:2379\""
            ))
        })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.to_string().trim_end_matches('/'))
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
