//! A node's record, whatever its bytes: what parses is in range and has one encoding, what is signed here holds, and no
//! bit of it can change.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weft_wire::record::{
    MAX_ENDORSEMENTS, MAX_GOSSIP, MAX_RECORD, MAX_SUBNETS, MAX_UNDERLAY, NodeKey, NodeRecord, SignedRecord,
    fuzz,
};
use weft_wire::types::{NodeName, SiteName};

const CLUSTER: &str = "fuzz";
const SIGNATURE: usize = 64;

fn is_in_range(claim: &NodeRecord) {
    assert!(
        claim.node.as_str().parse::<NodeName>().is_ok() && claim.site.as_str().parse::<SiteName>().is_ok()
    );
    let facts = &claim.facts;
    assert!(facts.subnets.len() <= MAX_SUBNETS && facts.gossip.len() <= MAX_GOSSIP);
    assert!(facts.underlay.len() <= MAX_UNDERLAY && claim.endorsements.len() <= MAX_ENDORSEMENTS);
    assert!(facts.vni < 1 << 24);
    for leased in &facts.subnets {
        assert_eq!(leased.subnet.net(), leased.subnet.net().trunc());
    }
}

/// Signs what the record says, by a key that followed `rotations` others, and looks at what a peer makes of it.
fn is_signed_soundly(claim: &NodeRecord, rotations: u8, bits: [u16; 4]) {
    let mut key = NodeKey::from_secret([1; 32]);
    for rotation in 0..rotations {
        key = NodeKey::from_secret([2 + rotation; 32]).endorsed_by(&key, CLUSTER, &claim.node);
    }
    let NodeRecord { node, site, version, facts, left, .. } = claim.clone();
    let signed = SignedRecord::sign(&key, CLUSTER, node, site, version, facts, left);
    let (record, signature) = fuzz::sent(&signed);
    assert!(record.len() + signature.len() <= MAX_RECORD);
    let claimed = fuzz::parse(&record, &signature).expect("it was signed here");
    assert!(claimed.clone().verify("other").is_err());
    assert_eq!(claimed.verify(CLUSTER).as_ref(), Ok(&signed));
    assert_eq!((&signed.record().facts, signed.record().version), (&claim.facts, claim.version));
    assert_eq!(signed.record().key, key.public());

    for bit in bits {
        let (mut record, mut signature) = (record.clone(), signature.clone());
        let bit = usize::from(bit) % ((record.len() + SIGNATURE) * 8);
        let length = record.len();
        *record.iter_mut().chain(&mut signature).nth(bit / 8).expect("inside") ^= 1 << (bit % 8);
        let changed = fuzz::parse(&record, &signature);
        assert!(
            changed.is_err() || changed.is_ok_and(|c| c.verify(CLUSTER).is_err()),
            "bit {bit} of {length}"
        );
    }
}

// The input: rotations and what else to do, four bits to flip, the signature, the record.
fuzz_target!(|bytes: &[u8]| {
    let Some(([how], bytes)) = bytes.split_first_chunk() else { return };
    let Some((bits, bytes)) = bytes.split_first_chunk::<8>() else { return };
    let Some((signature, record)) = bytes.split_first_chunk::<SIGNATURE>() else { return };
    let Ok(claimed) = fuzz::parse(record, signature) else { return };
    let claim = claimed.claim().clone();
    is_in_range(&claim);
    assert_eq!(claimed.encoded(), (record, signature));
    // Fields that this version does not know are lost here: a record is relayed as it came.
    let again = fuzz::parse(&fuzz::encode(&claim), signature).expect("what parses can be written and read");
    assert_eq!(again.claim(), &claim);
    if let Ok(signed) = claimed.clone().verify(CLUSTER) {
        assert_eq!(signed.record(), &claim);
        assert_eq!(fuzz::sent(&signed), (record.to_vec(), signature.to_vec()));
        assert!(claimed.verify("other").is_err());
    }
    let bits = std::array::from_fn(|at| u16::from_be_bytes([bits[2 * at], bits[2 * at + 1]]));
    is_signed_soundly(&claim, how % 6, bits);
});
