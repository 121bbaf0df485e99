//! What sites say outside of any datagram: a statement, a box that one key opens, the token that a person carries. What parses is in
//! range and has one meaning, what was signed or sealed here holds, and no bit of it can change.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weft_wire::invite::{self, MAX_ADDRESSES, Token};
use weft_wire::sealed_box;
use weft_wire::site::{
    MAX_PREFIXES, MAX_STATEMENT, MAX_VOID, SignedStatement, SiteKey, Statement, StatementError, fuzz,
};

const CLUSTER: &str = "fuzz";

fn key(secret: u8) -> SiteKey {
    SiteKey::from_secret([secret; 32])
}

fn flipped(bytes: &[u8], bit: [u8; 2]) -> Vec<u8> {
    let mut changed = bytes.to_vec();
    let bit = usize::from(u16::from_be_bytes(bit)) % (bytes.len() * 8);
    changed[bit / 8] ^= 1 << (bit % 8);
    changed
}

fn token(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    for text in [text.into_owned(), invite::text_of(bytes)] {
        let Ok(token) = text.parse::<Token>() else { continue };
        assert!(token.addresses.len() <= MAX_ADDRESSES);
        assert_eq!(token.to_secret_text().parse::<Token>().as_ref(), Ok(&token));
        assert_eq!(token.ring().ids().count(), 1);
    }
}

fn is_in_range(statement: &Statement) {
    let prefixes = match statement {
        Statement::Site(record) => {
            assert!(record.void.len() <= MAX_VOID);
            &record.prefixes
        }
        Statement::Admission(admission) => {
            assert_ne!(admission.by, admission.key);
            &admission.prefixes
        }
        Statement::Keys(grant) => return assert!(!grant.sealed.is_empty() && grant.version < 1 << 63),
    };
    assert!(prefixes.len() <= MAX_PREFIXES && statement.version() < 1 << 63);
    for (place, one) in prefixes.iter().enumerate() {
        assert!(prefixes[..place].iter().all(|other| !other.overlaps(*one)));
    }
}

/// The same statement by a key of this test.
fn said_by(key: &SiteKey, statement: Statement) -> Statement {
    match statement {
        Statement::Site(mut record) => {
            record.key = key.public();
            Statement::Site(record)
        }
        Statement::Admission(mut admission) => {
            admission.by = key.public();
            Statement::Admission(admission)
        }
        Statement::Keys(mut grant) => {
            grant.by = key.public();
            Statement::Keys(grant)
        }
    }
}

fn statement(bit: [u8; 2], bytes: &[u8]) {
    if let Ok(signed) = SignedStatement::from_bytes(bytes, CLUSTER) {
        assert_eq!(SignedStatement::from_bytes(&signed.to_bytes(), CLUSTER), Ok(signed));
    }
    let Ok(statement) = fuzz::parse(bytes) else { return };
    is_in_range(&statement);
    // Fields that this version does not know are lost here: a statement is passed on as it came.
    assert_eq!(fuzz::parse(&fuzz::encode(&statement)).as_ref(), Ok(&statement));
    let statement = said_by(&key(1), statement);
    let signed = match key(1).sign(CLUSTER, statement.clone()) {
        Ok(signed) => signed,
        Err(error) => {
            return assert!(matches!(error, StatementError::TooLong | StatementError::Field("key")));
        }
    };
    assert_eq!((signed.statement(), signed.statement().signer()), (&statement, key(1).public()));
    let bytes = signed.to_bytes();
    assert!(bytes.len() <= MAX_STATEMENT + 8);
    assert_eq!(SignedStatement::from_bytes(&bytes, CLUSTER), Ok(signed.clone()));
    assert!(SignedStatement::from_bytes(&bytes, "other").is_err());
    assert!(key(2).sign(CLUSTER, statement).is_err(), "it names another key");
    // A tag may change to one that nobody knows: then it is not the statement.
    let changed = SignedStatement::from_bytes(&flipped(&bytes, bit), CLUSTER);
    assert!(changed.is_err() || changed == Ok(signed));
}

fn sealed(bit: [u8; 2], bytes: &[u8]) {
    assert_eq!(fuzz::open(&key(1), bytes), None, "nobody sealed this");
    let Some((fresh, content)) = bytes.split_first_chunk::<32>() else { return };
    let content = &content[..content.len().min(600)];
    let sealed = sealed_box::seal(&key(1).public(), *fresh, content).expect("it is a key");
    assert_eq!(fuzz::open(&key(1), &sealed).as_deref(), Some(content));
    assert_eq!(fuzz::open(&key(2), &sealed), None);
    assert_eq!(fuzz::open(&key(1), &flipped(&sealed, bit)), None);
    let cut = usize::from(bit[0]) % sealed.len();
    assert_eq!(fuzz::open(&key(1), &sealed[..cut]), None);
    // Whatever is taken for a key: a box for it, or none.
    drop(sealed_box::seal(&weft_wire::types::PublicKey(*fresh), *fresh, content));
}

// The input: what it is, a bit to flip, the bytes.
fuzz_target!(|bytes: &[u8]| {
    let Some(([kind, bit @ ..], bytes)) = bytes.split_first_chunk::<3>() else { return };
    match kind % 3 {
        0 => token(bytes),
        1 => statement(*bit, bytes),
        _ => sealed(*bit, bytes),
    }
});
