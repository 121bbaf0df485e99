//! The token by which one site brings in another: text that a person carries from one node to another.
//!
//! It is the inviting site's name and key, where to find the node that made it, and a secret that only the two of them have.
//! It grants nothing by itself: the node that made it remembers for how long and for whom it is good, and that it was used
//! (`mesh::join`). Invariant: what parses has the checksum that it was made with, so a token cut short or mistyped is named as such.
//!
//! Text: `weft1.` and base64url of: mesh id and site name, each after its length (1 byte) | the site's key (32) | secret (16) |
//! socket addresses, each after its length (1) | the first 4 bytes of BLAKE2s-256(`"weft token v1" 0` | what is before).

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD as BASE64;
use blake2::{Blake2s256, Digest};
use zeroize::Zeroizing;

use crate::record::{socket_from_bytes, socket_to_bytes};
use crate::seal::{ClusterKey, KeyRing};
use crate::types::{PublicKey, SiteName};

/// The most addresses in a token.
pub const MAX_ADDRESSES: usize = 4;

const PREFIX: &str = "weft1.";
const SECRET: usize = 16;
const CHECK: usize = 4;
const CHECK_DOMAIN: &[u8] = b"weft token v1\0";
const KEY_DOMAIN: &[u8] = b"weft invitation key v1\0";

/// An invitation, as it is carried.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// The id of the mesh, `cluster.id` of its nodes.
    pub mesh: String,
    /// The inviting site.
    pub site: SiteName,
    /// Its key.
    pub key: PublicKey,
    /// Where the node that made the token receives gossip, the preferred first; at most [`MAX_ADDRESSES`].
    pub addresses: Vec<SocketAddr>,
    /// Known to who has the token.
    pub secret: Zeroizing<[u8; SECRET]>,
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token(of site {} of mesh {}, at {:?})", self.site, self.mesh, self.addresses)
    }
}

/// Text that is no token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It does not begin as one.
    #[error(
        "a token begins with {PREFIX:?}; `weft site invite` prints one on a node that speaks for the other site"
    )]
    Other,
    /// It was cut short or changed.
    #[error("the token is damaged: copy all of it, without spaces or line breaks")]
    Damaged,
}

impl Token {
    /// Returns the ring that seals what the two sites say to each other before they share a cluster key.
    pub fn ring(&self) -> KeyRing {
        let hash = Blake2s256::new().chain_update(KEY_DOMAIN).chain_update(*self.secret).finalize();
        KeyRing::new(vec![ClusterKey::from_bytes(hash.into())]).expect("one key is a ring")
    }

    /// Writes the token as a person carries it. It is a secret until it is used or void.
    pub fn to_secret_text(&self) -> String {
        let sized = |bytes: &[u8]| [&[bytes.len() as u8][..], bytes].concat();
        let mut bytes = [
            &sized(self.mesh.as_bytes())[..],
            &sized(self.site.as_str().as_bytes()),
            &self.key.0,
            &*self.secret,
        ]
        .concat();
        for address in self.addresses.iter().take(MAX_ADDRESSES) {
            bytes.extend(sized(&socket_to_bytes(address)));
        }
        bytes.extend(check(&bytes));
        format!("{PREFIX}{}", BASE64.encode(bytes))
    }
}

fn check(bytes: &[u8]) -> [u8; CHECK] {
    let hash = Blake2s256::new().chain_update(CHECK_DOMAIN).chain_update(bytes).finalize();
    [hash[0], hash[1], hash[2], hash[3]]
}

impl FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let text = text.trim().strip_prefix(PREFIX).ok_or(TokenError::Other)?;
        let bytes = BASE64.decode(text).map_err(|_| TokenError::Damaged)?;
        let (content, sum) = bytes.split_last_chunk::<CHECK>().ok_or(TokenError::Damaged)?;
        let parsed = if check(content) == *sum { parse(content) } else { None };
        parsed.ok_or(TokenError::Damaged)
    }
}

fn parse(mut rest: &[u8]) -> Option<Token> {
    let mesh = std::str::from_utf8(sized(&mut rest)?).ok()?.to_owned();
    let site = std::str::from_utf8(sized(&mut rest)?).ok()?.parse().ok()?;
    let (key, after) = rest.split_first_chunk()?;
    let (secret, mut rest) = after.split_first_chunk()?;
    let mut addresses = Vec::new();
    while !rest.is_empty() {
        addresses.push(socket_from_bytes(sized(&mut rest)?)?);
    }
    let token = Token { mesh, site, key: PublicKey(*key), addresses, secret: Zeroizing::new(*secret) };
    (token.addresses.len() <= MAX_ADDRESSES).then_some(token)
}

fn sized<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (length, after) = rest.split_first()?;
    let (bytes, after) = after.split_at_checked(usize::from(*length))?;
    *rest = after;
    Some(bytes)
}

/// Returns the text of any content, with its checksum: what `tests/fuzz` needs and no daemon does.
#[cfg(fuzzing)]
pub fn text_of(content: &[u8]) -> String {
    format!("{PREFIX}{}", BASE64.encode([content, &check(content)].concat()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn token(addresses: Vec<SocketAddr>) -> Token {
        Token {
            mesh: "default".into(),
            site: "berlin".parse().expect("a name"),
            key: PublicKey([7; 32]),
            addresses,
            secret: Zeroizing::new([9; SECRET]),
        }
    }

    fn arb_token() -> impl Strategy<Value = Token> {
        let addresses = prop::collection::vec(any::<SocketAddr>(), 0..=MAX_ADDRESSES);
        addresses.prop_map(|addresses| {
            // What a text cannot say of an IPv6 socket address is no part of a token.
            token(addresses.into_iter().map(|at| SocketAddr::new(at.ip(), at.port())).collect())
        })
    }

    proptest! {
        #[test]
        fn a_token_reads_as_it_was_written_and_with_any_letter_changed_it_does_not(
            token in arb_token(),
            place in any::<prop::sample::Index>(),
            letter in "[A-Za-z0-9_-]",
        ) {
            let text = token.to_secret_text();
            prop_assert_eq!(text.parse::<Token>(), Ok(token));
            let place = PREFIX.len() + place.index(text.len() - PREFIX.len());
            let changed = format!("{}{letter}{}", &text[..place], &text[place + 1..]);
            prop_assert!(changed == text || changed.parse::<Token>() == Err(TokenError::Damaged));
            prop_assert!(text[..place].parse::<Token>() == Err(TokenError::Damaged));
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,80}", bytes in prop::collection::vec(any::<u8>(), 0..120)) {
            prop_assert!(text.parse::<Token>().is_err());
            let _ = parse(&bytes);
            let text = format!("{PREFIX}{}", BASE64.encode(bytes));
            prop_assert!(text.parse::<Token>().is_err());
        }
    }

    #[test]
    fn a_token_is_short_enough_to_paste_and_its_debug_text_has_no_secret() {
        let addresses =
            ["192.0.2.1:7117", "[2001:db8::1]:7117"].map(|text| text.parse().expect("an address"));
        let token = token(addresses.into());
        let text = token.to_secret_text();
        assert!(text.len() <= 150, "{}", text.len());
        assert!(!format!("{token:?}").contains("9, 9"));
        assert_eq!("nonsense".parse::<Token>(), Err(TokenError::Other));
    }
}
