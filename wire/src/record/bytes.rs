//! Addresses and subnets as the bytes of a message. IPv4 and IPv6 are told apart by their length.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use crate::types::{MacAddress, Subnet};

pub(crate) fn parse_all<T>(list: &[Vec<u8>], parse: fn(&[u8]) -> Option<T>) -> Option<Vec<T>> {
    list.iter().map(|bytes| parse(bytes)).collect()
}

pub(super) fn ip_to_bytes(ip: &IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

pub(super) fn ip_from_bytes(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}

pub(crate) fn socket_to_bytes(socket: &SocketAddr) -> Vec<u8> {
    let mut bytes = ip_to_bytes(&socket.ip());
    bytes.extend_from_slice(&socket.port().to_be_bytes());
    bytes
}

pub(crate) fn socket_from_bytes(bytes: &[u8]) -> Option<SocketAddr> {
    let (ip, port) = bytes.split_last_chunk::<2>()?;
    Some(SocketAddr::new(ip_from_bytes(ip)?, u16::from_be_bytes(*port)))
}

pub(crate) fn subnet_to_bytes(subnet: Subnet) -> Vec<u8> {
    let mut bytes = ip_to_bytes(&subnet.network());
    bytes.push(subnet.net().prefix_len());
    bytes
}

pub(crate) fn subnet_from_bytes(bytes: &[u8]) -> Option<Subnet> {
    let (prefix, ip) = bytes.split_last()?;
    IpNet::new(ip_from_bytes(ip)?, *prefix).ok()?.try_into().ok()
}

pub(super) fn mac_from_bytes(bytes: Vec<u8>) -> Option<Option<MacAddress>> {
    if bytes.is_empty() { Some(None) } else { Some(Some(MacAddress(bytes.try_into().ok()?))) }
}
