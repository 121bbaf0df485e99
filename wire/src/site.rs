//! What sites say, signed: of themselves, of the sites that they let in or put out, and of their nodes.
//!
//! A site has an ed25519 key. With it the site states which prefixes its nodes announce ([`SiteRecord`]), admits and expels
//! other sites ([`Admission`]), and certifies which node holds which lease ([`Certificate`]). Whom a node believes is not
//! decided here (`mesh::sites`). Invariant: a [`SignedStatement`] has been verified, or was signed here.

#[cfg(fuzzing)]
pub mod fuzz;

use std::fmt;

use blake2::{Blake2s256, Digest};
use ed25519_dalek::{Signer, SigningKey};
use prost::Message;
use zeroize::Zeroizing;

use crate::mesh::proto;
use crate::record::{
    BadSignature, LeasedSubnet, NodeRecord, check, parse_all, subnet_from_bytes, subnet_to_bytes, tag,
};
use crate::sealed_box;
use crate::types::{NodeName, PublicKey, SiteName, Subnet, from_hex, to_hex};

/// The most bytes of a signed statement: one fits a datagram beside any other content.
pub const MAX_STATEMENT: usize = 880;
/// The most prefixes of a site.
pub const MAX_PREFIXES: usize = 8;
/// The most node keys that a site declares void one by one; beyond that it raises the least serial number.
pub const MAX_VOID: usize = 16;

pub(crate) const SIGNATURE: usize = 64;
const STATEMENT_DOMAIN: &[u8] = b"weft site statement v1\0";
const CERTIFICATE_DOMAIN: &[u8] = b"weft node certificate v1\0";

/// What a site says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SiteRecord {
    /// The site.
    pub site: SiteName,
    /// The key that signed.
    pub key: PublicKey,
    /// A higher version replaces a lower one of the same key. Below 2^63.
    pub version: u64,
    /// What its nodes announce subnets of; at most [`MAX_PREFIXES`], none of which overlaps another.
    pub prefixes: Vec<Subnet>,
    /// Certificates with a lower serial number are void.
    pub least_serial: u64,
    /// Certificates of these node keys are void; at most [`MAX_VOID`].
    pub void: Vec<PublicKey>,
    /// The site has left the mesh of sites.
    pub left: bool,
}

/// What one site says of another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admission {
    /// The key of the site that says so.
    pub by: PublicKey,
    /// The other site.
    pub site: SiteName,
    /// Its key.
    pub key: PublicKey,
    /// A higher version replaces a lower one about the same key. Below 2^63.
    pub version: u64,
    /// What the other site may announce, at most; at most [`MAX_PREFIXES`].
    pub prefixes: Vec<Subnet>,
    /// Whether the other site is put out.
    pub expelled: bool,
}

/// The cluster keys of the mesh, from a site for one site or for one of its own nodes; nobody else can read them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyGrant {
    /// The key of the site that says so.
    pub by: PublicKey,
    /// The key of the site or of the node that it is for.
    pub to: PublicKey,
    /// Of two the higher (version, ring) holds, for everyone. Below 2^63.
    pub version: u64,
    /// A hash of the keys, so that two sites that say the same are known to.
    pub ring: u64,
    /// The keys, sealed for `to` ([`crate::sealed_box`]).
    pub sealed: Vec<u8>,
}

/// What a site key signs for all to hear.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Statement {
    /// Of itself.
    Site(SiteRecord),
    /// Of another site.
    Admission(Admission),
    /// The mesh's cluster keys, for another site.
    Keys(KeyGrant),
}

impl Statement {
    /// Returns the key that signed.
    pub fn signer(&self) -> PublicKey {
        match self {
            Self::Site(record) => record.key,
            Self::Admission(admission) => admission.by,
            Self::Keys(grant) => grant.by,
        }
    }

    /// Returns the version.
    pub fn version(&self) -> u64 {
        match self {
            Self::Site(record) => record.version,
            Self::Admission(admission) => admission.version,
            Self::Keys(grant) => grant.version,
        }
    }

    /// Returns what the statement is about: of two with one subject the higher version holds.
    pub fn subject(&self) -> Subject {
        match self {
            Self::Site(record) => Subject(record.key, record.key, false),
            Self::Admission(admission) => Subject(admission.by, admission.key, false),
            Self::Keys(grant) => Subject(grant.by, grant.to, true),
        }
    }
}

/// Who speaks, of or to whom, and whether it is about cluster keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Subject(pub PublicKey, pub PublicKey, pub bool);

impl Subject {
    /// What tells a statement apart from all others in the sums of anti-entropy.
    pub(crate) fn digest(&self, version: u64, tag: u32) -> u64 {
        let hash = Blake2s256::new()
            .chain_update(b"weft statement v1\0")
            .chain_update(self.0.0)
            .chain_update(self.1.0)
            .chain_update(version.to_be_bytes())
            .chain_update(tag.to_be_bytes())
            .chain_update(if self.2 { &b"keys"[..] } else { b"" })
            .finalize();
        u64::from_be_bytes(hash[..8].try_into().expect("a hash has 32 bytes"))
    }
}

/// A site's word that a node key holds certain leases.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Certificate {
    /// Rises when a site declares all earlier certificates void.
    pub serial: u64,
    signature: [u8; SIGNATURE],
}

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Certificate(serial {})", self.serial)
    }
}

/// What a certificate vouches for.
#[derive(Debug, Clone, Copy)]
pub struct Certified<'a> {
    /// The site.
    pub site: &'a SiteName,
    /// The node.
    pub node: &'a NodeName,
    /// Its key.
    pub key: &'a PublicKey,
    /// Its leases.
    pub subnets: &'a [LeasedSubnet],
}

impl<'a> Certified<'a> {
    /// Returns what a record would have to be certified for.
    pub fn of(record: &'a NodeRecord) -> Self {
        Self { site: &record.site, node: &record.node, key: &record.key, subnets: &record.facts.subnets }
    }

    fn statement(&self, cluster: &str, serial: u64) -> Vec<u8> {
        let text = |text: &str| [&(text.len() as u64).to_be_bytes()[..], text.as_bytes()].concat();
        let subnets = self.subnets.iter().flat_map(|leased| {
            let subnet = subnet_to_bytes(leased.subnet);
            [&[subnet.len() as u8][..], &subnet, &leased.epoch.0.to_be_bytes()].concat()
        });
        let mut statement = [
            CERTIFICATE_DOMAIN,
            &text(cluster),
            &text(self.site.as_str()),
            &text(self.node.as_str()),
            &self.key.0,
            &serial.to_be_bytes(),
        ]
        .concat();
        statement.extend(subnets);
        statement
    }
}

impl Certificate {
    /// Verifies that `site` certified this. About 50 us.
    pub fn verify(
        &self,
        site: &PublicKey,
        cluster: &str,
        certified: Certified<'_>,
    ) -> Result<(), BadSignature> {
        check(site, &certified.statement(cluster, self.serial), &self.signature)
    }

    pub(crate) fn to_bytes(self) -> Vec<u8> {
        [&self.serial.to_be_bytes()[..], &self.signature].concat()
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (serial, signature) = bytes.split_first_chunk()?;
        Some(Self { serial: u64::from_be_bytes(*serial), signature: signature.try_into().ok()? })
    }
}

/// A site's secret key.
#[derive(Clone)]
pub struct SiteKey {
    secret: SigningKey,
}

impl fmt::Debug for SiteKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SiteKey({:?})", self.public())
    }
}

/// A text that is no site key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a site key file has 64 hexadecimal digits; `weft site key generate` prints one")]
pub struct SiteKeyError;

impl SiteKey {
    /// Takes 32 bytes from a cryptographic random number generator.
    pub fn from_secret(secret: [u8; 32]) -> Self {
        Self { secret: SigningKey::from_bytes(&Zeroizing::new(secret)) }
    }

    /// Returns the public half.
    pub fn public(&self) -> PublicKey {
        PublicKey(self.secret.verifying_key().to_bytes())
    }

    /// Writes the secret, for a file that only root reads.
    pub fn to_secret_text(&self) -> Zeroizing<String> {
        Zeroizing::new(to_hex(self.secret.as_bytes()))
    }

    /// Reads what [`SiteKey::to_secret_text`] wrote.
    ///
    /// # Errors
    /// Where the text is anything else.
    pub fn from_secret_text(text: &str) -> Result<Self, SiteKeyError> {
        from_hex(text.trim()).map(Self::from_secret).ok_or(SiteKeyError)
    }

    /// Opens what was sealed for this key.
    pub(crate) fn open(&self, sealed: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        sealed_box::open(&self.secret, sealed)
    }

    /// Signs `content` beside the domain.
    pub(crate) fn sign_bytes(&self, domain: &[u8], content: &[u8]) -> [u8; SIGNATURE] {
        self.secret.sign(&[domain, content].concat()).to_bytes()
    }

    /// Certifies a node for its leases.
    pub fn certify(&self, cluster: &str, serial: u64, certified: Certified<'_>) -> Certificate {
        let signature = self.secret.sign(&certified.statement(cluster, serial)).to_bytes();
        Certificate { serial, signature }
    }

    /// Signs a statement, which must name this key as the one that signs.
    ///
    /// # Errors
    /// Where it names another one, or goes beyond a limit. Nothing is signed.
    pub fn sign(&self, cluster: &str, statement: Statement) -> Result<SignedStatement, StatementError> {
        if statement.signer() != self.public() {
            return Err(StatementError::Field("key"));
        }
        limits(&statement)?;
        let bytes = to_proto(&statement).encode_to_vec();
        if bytes.len() + SIGNATURE > MAX_STATEMENT {
            return Err(StatementError::TooLong);
        }
        let signature = self.secret.sign(&signed_bytes(cluster, &bytes)).to_bytes();
        Ok(SignedStatement { statement, bytes: bytes.into(), signature })
    }
}

/// A statement and the bytes that its site signed.
#[derive(Clone, PartialEq, Eq)]
pub struct SignedStatement {
    statement: Statement,
    bytes: Box<[u8]>,
    signature: [u8; SIGNATURE],
}

impl fmt::Debug for SignedStatement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.statement, f)
    }
}

impl SignedStatement {
    /// Returns what is stated.
    pub fn statement(&self) -> &Statement {
        &self.statement
    }

    /// Orders two statements on one subject, the same for everyone.
    pub(crate) fn order(&self) -> (u64, u32) {
        (self.statement.version(), tag(&self.signature))
    }

    pub(crate) fn to_proto(&self) -> proto::SignedStatement {
        proto::SignedStatement { statement: self.bytes.to_vec(), signature: self.signature.to_vec() }
    }

    /// Writes the statement for a file or a token.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.to_proto().encode_to_vec()
    }

    /// Reads what [`SignedStatement::to_bytes`] wrote, and verifies it.
    ///
    /// # Errors
    /// Where the bytes are no statement, or not one that its site signed.
    pub fn from_bytes(bytes: &[u8], cluster: &str) -> Result<Self, StatementError> {
        let signed = proto::SignedStatement::decode(bytes).map_err(|_| StatementError::Encoding)?;
        ClaimedStatement::parse(&signed)?.verify(cluster).map_err(|_| StatementError::Signature)
    }
}

/// A statement that parses, whose signature has not been looked at.
#[derive(Debug, Clone)]
pub(crate) struct ClaimedStatement(SignedStatement);

impl ClaimedStatement {
    pub(crate) fn claim(&self) -> &Statement {
        &self.0.statement
    }

    pub(crate) fn order(&self) -> (u64, u32) {
        self.0.order()
    }

    pub(crate) fn parse(signed: &proto::SignedStatement) -> Result<Self, StatementError> {
        if signed.statement.len() + SIGNATURE > MAX_STATEMENT {
            return Err(StatementError::TooLong);
        }
        let signature = signed.signature[..].try_into().map_err(|_| StatementError::Field("signature"))?;
        let decoded =
            proto::Statement::decode(&signed.statement[..]).map_err(|_| StatementError::Encoding)?;
        let statement = from_proto(decoded)?;
        limits(&statement)?;
        Ok(Self(SignedStatement { statement, bytes: signed.statement.clone().into(), signature }))
    }

    pub(crate) fn verify(self, cluster: &str) -> Result<SignedStatement, BadSignature> {
        let Self(signed) = self;
        check(&signed.statement.signer(), &signed_bytes(cluster, &signed.bytes), &signed.signature)?;
        Ok(signed)
    }
}

/// What is no statement of a site.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StatementError {
    /// Longer than [`MAX_STATEMENT`].
    #[error("the statement is longer than {MAX_STATEMENT} bytes")]
    TooLong,
    /// Not a protobuf message of this shape.
    #[error("the statement does not decode")]
    Encoding,
    /// A field has a value that it cannot have.
    #[error("the statement's field {0} is out of range")]
    Field(&'static str),
    /// Its site did not sign it.
    #[error("the statement's signature does not hold")]
    Signature,
}

fn limits(statement: &Statement) -> Result<(), StatementError> {
    use StatementError::Field;
    let (prefixes, void) = match statement {
        Statement::Site(record) => (&record.prefixes, record.void.len()),
        Statement::Admission(admission) if admission.by == admission.key => return Err(Field("key")),
        Statement::Admission(admission) => (&admission.prefixes, 0),
        Statement::Keys(grant) if grant.sealed.is_empty() => return Err(Field("keys")),
        Statement::Keys(grant) if grant.version >= 1 << 63 => return Err(Field("version")),
        Statement::Keys(_) => return Ok(()),
    };
    let overlap = |(place, one): (usize, &Subnet)| prefixes[..place].iter().any(|other| other.overlaps(*one));
    if prefixes.len() > MAX_PREFIXES || prefixes.iter().enumerate().any(overlap) {
        return Err(Field("prefixes"));
    }
    if void > MAX_VOID {
        return Err(Field("void"));
    }
    if statement.version() >= 1 << 63 { Err(Field("version")) } else { Ok(()) }
}

fn signed_bytes(cluster: &str, statement: &[u8]) -> Vec<u8> {
    [STATEMENT_DOMAIN, &(cluster.len() as u64).to_be_bytes(), cluster.as_bytes(), statement].concat()
}

fn to_proto(statement: &Statement) -> proto::Statement {
    let prefixes = |prefixes: &[Subnet]| prefixes.iter().map(|prefix| subnet_to_bytes(*prefix)).collect();
    match statement {
        Statement::Site(record) => proto::Statement {
            by: record.key.0.to_vec(),
            site: record.site.to_string(),
            version: record.version,
            prefixes: prefixes(&record.prefixes),
            least_serial: record.least_serial,
            void: record.void.iter().map(|key| key.0.to_vec()).collect(),
            left: record.left,
            ..proto::Statement::default()
        },
        Statement::Admission(admission) => proto::Statement {
            by: admission.by.0.to_vec(),
            site: admission.site.to_string(),
            of: admission.key.0.to_vec(),
            version: admission.version,
            prefixes: prefixes(&admission.prefixes),
            expelled: admission.expelled,
            ..proto::Statement::default()
        },
        Statement::Keys(grant) => proto::Statement {
            by: grant.by.0.to_vec(),
            of: grant.to.0.to_vec(),
            version: grant.version,
            keys: grant.sealed.clone(),
            ring: grant.ring,
            ..proto::Statement::default()
        },
    }
}

fn from_proto(statement: proto::Statement) -> Result<Statement, StatementError> {
    use StatementError::Field;
    let key = |bytes: &[u8], field| bytes.try_into().map(PublicKey).map_err(|_| Field(field));
    let by = key(&statement.by, "by")?;
    if !statement.keys.is_empty() {
        let (to, version) = (key(&statement.of, "of")?, statement.version);
        return Ok(Statement::Keys(KeyGrant {
            by,
            to,
            version,
            ring: statement.ring,
            sealed: statement.keys,
        }));
    }
    let site = statement.site.try_into().map_err(|_| Field("site"))?;
    let prefixes = parse_all(&statement.prefixes, subnet_from_bytes).ok_or(Field("prefixes"))?;
    let version = statement.version;
    if statement.of.is_empty() {
        let void = statement.void.iter().map(|bytes| key(bytes, "void")).collect::<Result<_, _>>()?;
        let (least_serial, left) = (statement.least_serial, statement.left);
        return Ok(Statement::Site(SiteRecord {
            site,
            key: by,
            version,
            prefixes,
            least_serial,
            void,
            left,
        }));
    }
    let (of, expelled) = (key(&statement.of, "of")?, statement.expelled);
    Ok(Statement::Admission(Admission { by, site, key: of, version, prefixes, expelled }))
}

#[cfg(test)]
mod tests;
