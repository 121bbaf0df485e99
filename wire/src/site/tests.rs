use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::types::Epoch;

const CLUSTER: &str = "test";

fn key(byte: u8) -> SiteKey {
    SiteKey::from_secret([byte; 32])
}

fn arb_statement() -> impl Strategy<Value = Statement> {
    let name = "[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?";
    // Blocks of one size at different places do not overlap.
    let prefixes = proptest::collection::btree_set((any::<bool>(), 0..200u8), 0..=MAX_PREFIXES);
    (
        name,
        prefixes,
        0..1u64 << 63,
        any::<u64>(),
        vec(any::<[u8; 32]>(), 0..=MAX_VOID),
        any::<bool>(),
        any::<bool>(),
    )
        .prop_map(|(site, prefixes, version, least_serial, void, of_other, expelled)| {
            let site: SiteName = site.parse().expect("a name");
            let net = |(v4, place): (bool, u8)| match v4 {
                true => format!("10.{place}.0.0/16"),
                false => format!("fd00:{place:x}::/32"),
            };
            let prefixes = prefixes.into_iter().map(|which| net(which).parse().expect("a prefix")).collect();
            let own = key(1).public();
            if of_other {
                let of = key(2).public();
                return Statement::Admission(Admission {
                    by: own,
                    site,
                    key: of,
                    version,
                    prefixes,
                    expelled,
                });
            }
            let void = void.into_iter().map(PublicKey).collect();
            Statement::Site(SiteRecord {
                site,
                key: own,
                version,
                prefixes,
                least_serial,
                void,
                left: version % 2 == 1,
            })
        })
}

proptest! {
    #[test]
    fn a_signed_statement_survives_the_network_and_no_bit_of_it_can_change(
        statement in arb_statement(),
        bit in any::<prop::sample::Index>(),
    ) {
        let signed = match key(1).sign(CLUSTER, statement.clone()) {
            Ok(signed) => signed,
            // Long names, many prefixes and many void keys together.
            Err(error) => {
                prop_assert_eq!(error, StatementError::TooLong);
                return Ok(());
            }
        };
        let bytes = signed.to_bytes();
        prop_assert!(bytes.len() <= MAX_STATEMENT + 8);
        prop_assert_eq!(SignedStatement::from_bytes(&bytes, CLUSTER), Ok(signed.clone()));
        prop_assert_eq!(signed.statement(), &statement);
        prop_assert_eq!(SignedStatement::from_bytes(&bytes, "other"), Err(StatementError::Signature));
        let mut changed = bytes.clone();
        let bit = bit.index(bytes.len() * 8);
        changed[bit / 8] ^= 1 << (bit % 8);
        prop_assert_ne!(SignedStatement::from_bytes(&changed, CLUSTER), Ok(signed));
    }

    #[test]
    fn any_bytes_are_a_statement_or_an_error(bytes in vec(any::<u8>(), 0..1000)) {
        prop_assert!(SignedStatement::from_bytes(&bytes, CLUSTER).is_err());
    }
}

#[test]
fn a_site_signs_only_its_own_word_within_the_limits() {
    let record = |prefixes: &[&str]| SiteRecord {
        site: "a".parse().expect("a name"),
        key: key(1).public(),
        version: 1,
        prefixes: prefixes.iter().map(|prefix| prefix.parse().expect("a prefix")).collect(),
        least_serial: 0,
        void: Vec::new(),
        left: false,
    };
    let sign = |by: u8, statement| key(by).sign(CLUSTER, statement).map(|_| ());
    assert_eq!(sign(1, Statement::Site(record(&["10.0.0.0/8"]))), Ok(()));
    assert_eq!(sign(2, Statement::Site(record(&[]))), Err(StatementError::Field("key")));
    let overlapping = record(&["10.0.0.0/8", "10.3.0.0/16"]);
    assert_eq!(sign(1, Statement::Site(overlapping)), Err(StatementError::Field("prefixes")));
    let version = SiteRecord { version: 1 << 63, ..record(&[]) };
    assert_eq!(sign(1, Statement::Site(version)), Err(StatementError::Field("version")));
    let void = SiteRecord { void: vec![key(3).public(); MAX_VOID + 1], ..record(&[]) };
    assert_eq!(sign(1, Statement::Site(void)), Err(StatementError::Field("void")));
    let (by, site) = (key(1).public(), "a".parse().expect("a name"));
    let of_itself = Admission { by, site, key: by, version: 1, prefixes: Vec::new(), expelled: false };
    assert_eq!(sign(1, Statement::Admission(of_itself)), Err(StatementError::Field("key")));
}

#[test]
fn a_certificate_holds_for_what_it_was_made_for_and_for_nothing_else() {
    let leased =
        |subnet: &str, epoch| LeasedSubnet { subnet: subnet.parse().expect("a subnet"), epoch: Epoch(epoch) };
    let (site, node): (SiteName, NodeName) = ("a".parse().expect("a name"), "n1".parse().expect("a name"));
    let (other_site, other_node) = ("b".parse().expect("a name"), "n2".parse().expect("a name"));
    let (one, two) = (PublicKey([1; 32]), PublicKey([2; 32]));
    let subnets = [leased("10.1.0.0/24", 7), leased("fd00:1::/64", 7)];
    let good = Certified { site: &site, node: &node, key: &one, subnets: &subnets };
    let certificate = key(1).certify(CLUSTER, 3, good);
    let holds = |certified: Certified<'_>| certificate.verify(&key(1).public(), CLUSTER, certified).is_ok();
    assert!(holds(good));
    assert!(!holds(Certified { site: &other_site, ..good }));
    assert!(!holds(Certified { node: &other_node, ..good }));
    assert!(!holds(Certified { key: &two, ..good }));
    assert!(!holds(Certified { subnets: &subnets[..1], ..good }));
    assert!(!holds(Certified { subnets: &[leased("10.1.0.0/24", 8), subnets[1]], ..good }));
    assert!(!holds(Certified { subnets: &[leased("10.2.0.0/24", 7), subnets[1]], ..good }));
    assert!(certificate.verify(&key(2).public(), CLUSTER, good).is_err());
    assert!(certificate.verify(&key(1).public(), "other", good).is_err());
    let bytes = certificate.to_bytes();
    assert_eq!(Certificate::from_bytes(&bytes), Some(certificate));
    assert_eq!(Certificate::from_bytes(&bytes[1..]), None);
    let later = [&4u64.to_be_bytes()[..], &bytes[8..]].concat();
    let later = Certificate::from_bytes(&later).expect("of the right length");
    assert!(later.verify(&key(1).public(), CLUSTER, good).is_err(), "the serial number is signed too");
}

#[test]
fn a_site_key_survives_its_file() {
    let text = key(9).to_secret_text();
    assert_eq!(
        SiteKey::from_secret_text(&format!("{}\n", *text)).map(|key| key.public()),
        Ok(key(9).public())
    );
    assert_eq!(SiteKey::from_secret_text("no key").map(|_| ()), Err(SiteKeyError));
    assert!(!format!("{:?}", key(9)).contains(&text[..8]));
}
