//! Any cluster CIDRs with any blocks taken: what is offered is whole, free and the operator's to give, each block comes
//! once, and where nothing is offered nothing is free.
#![no_main]

use std::net::IpAddr;

use ipnet::IpNet;
use libfuzzer_sys::fuzz_target;
use weft_ipam::carve::{Carver, ClusterCidr, Family};
use weft_wire::types::Subnet;

/// So many blocks of a CIDR are looked at one by one.
const FEW: usize = 64;

/// Takes parts off the input; zeros follow its end.
struct Parts<'a>(&'a [u8]);

impl Parts<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        std::array::from_fn(|_| self.byte())
    }

    /// A prefix of any length; its host bits are cleared but for one value of the first byte.
    fn net(&mut self) -> IpNet {
        let kind = self.byte();
        let address: IpAddr =
            if kind % 2 == 0 { self.bytes::<4>().into() } else { self.bytes::<16>().into() };
        let most = if address.is_ipv4() { 33 } else { 129 };
        let net = IpNet::new(address, self.byte() % most).expect("a length of the family");
        if kind == 0xff { net } else { net.trunc() }
    }

    /// A prefix in `around`, or around it.
    fn near(&mut self, around: IpNet) -> IpNet {
        let length = self.byte();
        let number = u128::from_be_bytes(self.bytes::<16>());
        let host = number.checked_shr(around.prefix_len().into()).unwrap_or_default();
        let address = match around.network() {
            IpAddr::V4(base) => {
                let host = (number as u32).checked_shr(around.prefix_len().into()).unwrap_or_default();
                IpAddr::V4((u32::from(base) | host).into())
            }
            IpAddr::V6(base) => IpAddr::V6((u128::from(base) | host).into()),
        };
        IpNet::new(address, length % (around.max_prefix_len() + 1)).expect("a length of the family").trunc()
    }
}

fn overlap(a: IpNet, b: IpNet) -> bool {
    a.contains(&b.network()) || b.contains(&a.network())
}

fn cidr(parts: &mut Parts<'_>) -> ClusterCidr {
    let cidr = parts.net();
    let node_prefix = cidr.prefix_len().saturating_add(parts.byte() % 32);
    let count = parts.byte() % 4;
    ClusterCidr { cidr, node_prefix, reserved: (0..count).map(|_| parts.near(cidr)).collect() }
}

fn is_offered_rightly(block: Subnet, cidrs: &[ClusterCidr], taken: &[Subnet]) {
    let home = cidrs.iter().find(|cidr| cidr.cidr.contains(&block.net())).expect("a block lies in a CIDR");
    assert_eq!(block.net().prefix_len(), home.node_prefix);
    let reserved = cidrs.iter().flat_map(|cidr| &cidr.reserved);
    assert!(reserved.into_iter().all(|reserved| !overlap(*reserved, block.net())), "{block} is reserved");
    assert!(taken.iter().all(|taken| !overlap(taken.net(), block.net())), "{block} is taken");
}

fn nothing_is_free(family: Family, cidrs: &[ClusterCidr], taken: &[Subnet]) {
    let reserved = || cidrs.iter().flat_map(|cidr| &cidr.reserved).copied();
    for cidr in cidrs.iter().filter(|cidr| cidr.cidr.addr().is_ipv4() == (family == Family::V4)) {
        for block in cidr.cidr.subnets(cidr.node_prefix).expect("the carver took it").take(FEW) {
            let used = reserved().chain(taken.iter().map(|taken| taken.net())).any(|net| overlap(net, block));
            assert!(used, "{block} of {cidr:?} is free");
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut parts = Parts(bytes);
    let (start, count) = (u64::from_be_bytes(parts.bytes()), parts.byte());
    let cidrs: Vec<ClusterCidr> = (0..count % 3 + 1).map(|_| cidr(&mut parts)).collect();
    let Ok(carver) = Carver::new(cidrs.clone()) else { return };
    let mut taken: Vec<Subnet> = Vec::new();
    while !parts.0.is_empty() && taken.len() < FEW {
        let around = cidrs[usize::from(parts.byte()) % cidrs.len()].cidr;
        taken.push(parts.near(around).try_into().expect("no host bits"));
    }
    for family in Family::ALL {
        let capacity = carver.capacity(family);
        for empty in [true, false] {
            let mut taken = if empty { Vec::new() } else { taken.clone() };
            let mut found = 0;
            while let Some(block) = carver.first_free(family, start, taken.iter().copied()) {
                assert_eq!(Family::of(block), family);
                is_offered_rightly(block, &cidrs, &taken);
                assert!(carver.allows(block));
                taken.push(block);
                found += 1;
                assert!(found <= capacity, "more blocks than there are");
                if found == FEW as u128 {
                    break;
                }
            }
            if found < FEW as u128 {
                nothing_is_free(family, &cidrs, &taken);
                assert!(!empty || found == capacity, "{found} blocks of {capacity}");
            }
        }
    }
});
