//! The nouns that every part of weft shares.
//!
//! A value of one of these types is valid: parsing happens once, where the text or the bytes come in.
//! Nothing here performs I/O.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use base64::Engine;
use base64::prelude::BASE64_STANDARD as BASE64;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// Names a node or a site: an RFC 1123 label sequence of 1 to 63 bytes, lower case.
///
/// A node keeps its name across restarts and key rotations; two nodes of one mesh never share one.
macro_rules! name_type {
    ($name:ident, $what:literal) => {
        #[doc = concat!("Names a ", $what, ": 1 to 63 bytes of `a-z0-9.-`, with a letter or digit at both ends (RFC 1123).")]
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Box<str>);

        impl $name {
            /// Returns the name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                check_name($what, text).map(|()| Self(text.into()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;

            fn try_from(text: String) -> Result<Self, NameError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0.into()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }
    };
}

name_type!(NodeName, "node");
name_type!(SiteName, "site");

/// A node or site name that RFC 1123 does not allow.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{what} name {text:?} is not valid: use 1 to 63 of a-z, 0-9, '-' and '.', with a letter or digit at both ends"
)]
pub struct NameError {
    what: &'static str,
    text: String,
}

fn check_name(what: &'static str, text: &str) -> Result<(), NameError> {
    let inner = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-' || c == b'.';
    let edge = |c: Option<&u8>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    let bytes = text.as_bytes();
    if bytes.len() <= 63 && edge(bytes.first()) && edge(bytes.last()) && bytes.iter().all(|&c| inner(c)) {
        Ok(())
    } else {
        Err(NameError { what, text: text.chars().take(80).collect() })
    }
}

/// A block of pod addresses that one node leases; host bits are zero.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "IpNet", into = "IpNet")]
pub struct Subnet(IpNet);

/// A prefix with host bits set, where a subnet is expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubnetError {
    /// The text is no prefix at all.
    #[error("{0:?} is not a prefix such as 10.32.4.0/24 or fd00:32::/64")]
    Syntax(String),
    /// The address has bits below the prefix length.
    #[error("{given} has host bits set; the subnet is {subnet}")]
    HostBits {
        /// What was given.
        given: IpNet,
        /// The same prefix with its host bits cleared.
        subnet: IpNet,
    },
}

impl Subnet {
    /// Returns the subnet as a prefix.
    pub fn net(self) -> IpNet {
        self.0
    }

    /// Returns whether the two subnets share an address.
    pub fn overlaps(self, other: Self) -> bool {
        self.0.contains(&other.0.network()) || other.0.contains(&self.0.network())
    }

    /// Returns whether `other` lies wholly inside `self`.
    pub fn covers(self, other: Self) -> bool {
        self.0.contains(&other.0)
    }

    /// Returns whether `address` lies in the subnet.
    pub fn contains(self, address: IpAddr) -> bool {
        self.0.contains(&address)
    }

    /// Returns the first address, which stands for the node's end of the overlay (its VTEP).
    pub fn network(self) -> IpAddr {
        self.0.network()
    }

    /// Returns the second address, which the node's bridge holds as the pods' gateway.
    pub fn gateway(self) -> IpAddr {
        self.0.hosts().next().map_or(self.0.network(), |first| match (first, self.0) {
            // `hosts` starts at the subnet-router anycast address for IPv6 (RFC 4291 s2.6.1): skip it.
            (IpAddr::V6(first), IpNet::V6(net)) if first == net.network() => {
                IpAddr::V6((u128::from(first) + 1).into())
            }
            (first, _) => first,
        })
    }

    /// Returns whether the subnet is of IPv4.
    pub fn is_ipv4(self) -> bool {
        matches!(self.0, IpNet::V4(_))
    }
}

impl TryFrom<IpNet> for Subnet {
    type Error = SubnetError;

    fn try_from(given: IpNet) -> Result<Self, SubnetError> {
        if given.addr() == given.network() {
            Ok(Self(given))
        } else {
            Err(SubnetError::HostBits { given, subnet: given.trunc() })
        }
    }
}

impl From<Subnet> for IpNet {
    fn from(subnet: Subnet) -> Self {
        subnet.0
    }
}

impl FromStr for Subnet {
    type Err = SubnetError;

    fn from_str(text: &str) -> Result<Self, SubnetError> {
        let net: IpNet = text.parse().map_err(|_| SubnetError::Syntax(text.chars().take(80).collect()))?;
        net.try_into()
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0.to_string())
    }
}

impl fmt::Debug for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The fencing number of a lease: a later owner of a subnet always has a higher one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An ed25519 public key: who signs a node's records and owns its leases (RFC 8032).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PublicKey(pub [u8; 32]);

/// A text that is not 64 hexadecimal digits, where a key is expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a key is 64 hexadecimal digits (32 bytes)")]
pub struct KeyError;

impl PublicKey {
    /// Returns the first eight hexadecimal digits, for people.
    pub fn short(&self) -> String {
        to_hex(&self.0[..4])
    }
}

impl FromStr for PublicKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        from_hex(text).map(Self).ok_or(KeyError)
    }
}

impl TryFrom<String> for PublicKey {
    type Error = KeyError;

    fn try_from(text: String) -> Result<Self, KeyError> {
        text.parse()
    }
}

impl From<PublicKey> for String {
    fn from(key: PublicKey) -> Self {
        to_hex(&key.0)
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&to_hex(&self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.short())
    }
}

/// An X25519 public key: who is at the other end of a WireGuard tunnel (RFC 7748; the whitepaper, s5). As text it is
/// what `wg` shows: 44 characters of base64 (RFC 4648 s4).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TunnelKey(pub [u8; 32]);

/// A text that is no tunnel key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a tunnel key is 44 characters of base64 (32 bytes), as `wg pubkey` prints it")]
pub struct TunnelKeyError;

impl FromStr for TunnelKey {
    type Err = TunnelKeyError;

    fn from_str(text: &str) -> Result<Self, TunnelKeyError> {
        let bytes = BASE64.decode(text).map_err(|_| TunnelKeyError)?;
        bytes.try_into().map(Self).map_err(|_| TunnelKeyError)
    }
}

impl TryFrom<String> for TunnelKey {
    type Error = TunnelKeyError;

    fn try_from(text: String) -> Result<Self, TunnelKeyError> {
        text.parse()
    }
}

impl From<TunnelKey> for String {
    fn from(key: TunnelKey) -> Self {
        BASE64.encode(key.0)
    }
}

impl fmt::Display for TunnelKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&BASE64.encode(self.0))
    }
}

impl fmt::Debug for TunnelKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&BASE64.encode(&self.0[..6]))
    }
}

/// Writes bytes as lower-case hexadecimal digits.
pub fn to_hex(bytes: &[u8]) -> String {
    use fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Reads exactly `N` bytes of hexadecimal digits; `None` for any other text.
pub fn from_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != N * 2 {
        return None;
    }
    let nibble = |digit: u8| (digit as char).to_digit(16).map(|value| value as u8);
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
    }
    Some(bytes)
}

/// An Ethernet address (IEEE 802).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// Derives the locally administered unicast address of a node's VTEP: the same at every start.
    ///
    /// `scope` keeps the IPv4 and the IPv6 device of one node apart.
    pub fn derived(node: &NodeName, scope: &str) -> Self {
        use blake2::Digest;
        let hash = blake2::Blake2s256::new()
            .chain_update(b"weft mac v1\0")
            .chain_update(scope)
            .chain_update([0])
            .chain_update(node.as_str())
            .finalize();
        let mut mac = [0; 6];
        mac.copy_from_slice(&hash[..6]);
        mac[0] = mac[0] & 0xfe | 0x02;
        Self(mac)
    }
}

/// A text that is not six pairs of hexadecimal digits with colons, where an Ethernet address is expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("an Ethernet address is six pairs of hexadecimal digits with colons between them")]
pub struct MacError;

impl TryFrom<String> for MacAddress {
    type Error = MacError;

    fn try_from(text: String) -> Result<Self, MacError> {
        let well_placed = text.len() == 17 && text.bytes().skip(2).step_by(3).all(|byte| byte == b':');
        from_hex(&text.replace(':', "")).filter(|_| well_placed).map(Self).ok_or(MacError)
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> Self {
        mac.to_string()
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gateway_is_the_second_address_in_both_families() {
        let gateway = |text: &str| text.parse::<Subnet>().expect("a subnet").gateway().to_string();
        assert_eq!(gateway("10.32.4.0/24"), "10.32.4.1");
        assert_eq!(gateway("fd00:32::/64"), "fd00:32::1");
    }

    #[test]
    fn names_follow_rfc_1123() {
        for good in ["n1", "a", "ip-10-0-0-1.eu-west-1.compute.internal", &"x".repeat(63)] {
            assert!(good.parse::<NodeName>().is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a_b", "a/b", &"x".repeat(64)] {
            assert!(bad.parse::<NodeName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn host_bits_are_refused_with_the_subnet_meant() {
        let error = "10.32.4.7/24".parse::<Subnet>().expect_err("host bits");
        assert_eq!(error.to_string(), "10.32.4.7/24 has host bits set; the subnet is 10.32.4.0/24");
    }

    #[test]
    fn derived_mac_is_stable_local_and_unicast() {
        let node: NodeName = "n1".parse().expect("a name");
        let mac = MacAddress::derived(&node, "v4");
        assert_eq!(mac, MacAddress::derived(&node, "v4"));
        assert_ne!(mac, MacAddress::derived(&node, "v6"));
        assert_eq!(mac.0[0] & 0x03, 0x02);
    }
}
