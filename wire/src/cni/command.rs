//! From the environment and the standard input of a plugin call to a checked command.

use std::net::IpAddr;
use std::path::PathBuf;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{
    AttachmentId, CniError, CniRequest, CniResult, Code, Dns, MAX_INPUT_BYTES, SpecVersion, Verb, clip,
    is_spec_name, missing,
};
use crate::types::MacAddress;

/// A checked plugin call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Attach a container.
    Add(PodRequest),
    /// Remove an attachment.
    Del(DelRequest),
    /// Verify an attachment.
    Check(CheckRequest),
    /// Remove what the runtime no longer lists.
    Gc(GcRequest),
    /// Tell whether ADD would work.
    Status(StatusRequest),
    /// Tell the supported versions; needs no daemon.
    Version(SpecVersion),
}

/// What ADD asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodRequest {
    /// The spec version of the reply.
    pub version: SpecVersion,
    /// The name of the network configuration.
    pub network: String,
    /// Which attachment.
    pub id: AttachmentId,
    /// The path of the container's network namespace.
    pub netns: PathBuf,
    /// Whose pod it is, as far as the runtime says.
    pub pod: PodName,
    /// What the call asks for beyond the defaults.
    pub wishes: Wishes,
    /// Name resolution that the result hands through.
    pub dns: Dns,
}

/// What Kubernetes calls the container's pod; from `CNI_ARGS`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodName {
    /// `K8S_POD_NAMESPACE`; empty where it is not given.
    pub namespace: String,
    /// `K8S_POD_NAME`; empty where it is not given.
    pub name: String,
    /// `K8S_POD_UID`; empty where it is not given.
    pub uid: String,
}

/// What a caller may choose instead of weft.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wishes {
    /// Addresses, at most one a family (`IP=` in `CNI_ARGS`, `runtimeConfig.ips`, `args.cni.ips`).
    pub ips: Vec<IpAddr>,
    /// The Ethernet address of the pod's end (`MAC=` in `CNI_ARGS`, `runtimeConfig.mac`).
    pub mac: Option<MacAddress>,
    /// The MTU of the pod's end in bytes (`mtu` in the configuration).
    pub mtu: Option<u32>,
}

/// What DEL asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DelRequest {
    /// The spec version of the reply.
    pub version: SpecVersion,
    /// The name of the network configuration.
    pub network: String,
    /// Which attachment.
    pub id: AttachmentId,
    /// The path of the container's network namespace, where the runtime still knows one.
    pub netns: Option<PathBuf>,
}

/// What CHECK asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckRequest {
    /// The attachment as ADD would see it.
    pub pod: PodRequest,
    /// The result of the ADD, after later plugins of the chain.
    pub previous: CniResult,
}

/// What GC asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GcRequest {
    /// The spec version of the reply.
    pub version: SpecVersion,
    /// The name of the network configuration: attachments of other networks stay.
    pub network: String,
    /// The attachments that stay.
    pub valid: Vec<AttachmentId>,
}

/// What STATUS asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatusRequest {
    /// The spec version of the reply.
    pub version: SpecVersion,
    /// The name of the network configuration.
    pub network: String,
}

impl Command {
    /// Checks a plugin call.
    ///
    /// # Errors
    /// The spec's code: 1 for a version, 4 for the environment, 6 for input that is no JSON object, 7 for
    /// a configuration that is wrong.
    pub fn parse(request: &CniRequest) -> Result<Self, CniError> {
        let verb: Verb = request.verb.parse()?;
        if request.stdin.len() + request.args.len() > MAX_INPUT_BYTES {
            return Err(CniError::new(
                Code::DecodeFailure,
                format!("the network configuration and CNI_ARGS together exceed {MAX_INPUT_BYTES} bytes"),
            ));
        }
        if verb == Verb::Version {
            return Ok(Self::Version(SpecVersion::of_input(&request.stdin)));
        }
        // The environment first: a caller that set none is not a runtime, and hears that.
        let id = match verb {
            Verb::Add | Verb::Del | Verb::Check => {
                Some(AttachmentId::new(&request.container_id, &request.ifname)?)
            }
            _ => None,
        };
        let config = Config::parse(&request.stdin)?;
        let (version, network) = (config.version()?, config.network()?);
        match (verb, id) {
            (Verb::Add, Some(id)) => Ok(Self::Add(pod(request, &config, version, network, id)?)),
            (Verb::Check, Some(id)) => {
                let pod = pod(request, &config, version, network, id)?;
                let previous = config.field::<CniResult>("prevResult")?.ok_or_else(|| {
                    config_error(
                        "CHECK needs prevResult, the result of the ADD; the container runtime must pass it",
                    )
                })?;
                Ok(Self::Check(CheckRequest { pod, previous }))
            }
            (Verb::Del, Some(id)) => {
                let netns = (!request.netns.is_empty()).then(|| request.netns.clone().into());
                Ok(Self::Del(DelRequest { version, network, id, netns }))
            }
            _ if version < SpecVersion::V1_1_0 => Err(CniError::new(
                Code::IncompatibleVersion,
                format!(
                    "{} exists from CNI version 1.1.0 on, and the network configuration says {version}",
                    verb.as_str()
                ),
            )),
            (Verb::Gc, _) => Ok(Self::Gc(GcRequest { version, network, valid: config.valid_attachments()? })),
            _ => Ok(Self::Status(StatusRequest { version, network })),
        }
    }
}

/// Returns the daemon's socket that a network configuration names, where it names one.
pub fn socket_of_input(stdin: &[u8]) -> Option<PathBuf> {
    let config = serde_json::from_slice::<Value>(stdin).ok()?;
    Some(config.get("socket")?.as_str()?.into())
}

fn pod(
    request: &CniRequest,
    config: &Config,
    version: SpecVersion,
    network: String,
    id: AttachmentId,
) -> Result<PodRequest, CniError> {
    if request.netns.is_empty() {
        return Err(missing("CNI_NETNS"));
    }
    if !request.netns.starts_with('/') || request.netns.contains('\0') {
        return Err(CniError::new(
            Code::InvalidEnvironment,
            format!("CNI_NETNS {:?} is not an absolute path", clip(&request.netns)),
        ));
    }
    let args = parse_args(&request.args)?;
    Ok(PodRequest {
        version,
        network,
        id,
        netns: request.netns.clone().into(),
        wishes: config.wishes(&args)?,
        pod: args.pod,
        dns: config.field("dns")?.unwrap_or_default(),
    })
}

#[derive(Debug, Default)]
struct Args {
    pod: PodName,
    ips: Vec<IpAddr>,
    mac: Option<MacAddress>,
}

/// `K=V;K=V`; keys that weft does not know are for other plugins of the chain.
fn parse_args(text: &str) -> Result<Args, CniError> {
    let mut args = Args::default();
    for pair in text.split(';').filter(|pair| !pair.is_empty()) {
        let Some((key, value)) = pair.split_once('=') else {
            return Err(CniError::new(
                Code::InvalidEnvironment,
                format!("CNI_ARGS has {:?} where KEY=VALUE belongs", clip(pair)),
            ));
        };
        match key {
            "K8S_POD_NAMESPACE" => args.pod.namespace = value.into(),
            "K8S_POD_NAME" => args.pod.name = value.into(),
            "K8S_POD_UID" => args.pod.uid = value.into(),
            "IP" => {
                for ip in value.split(',').filter(|ip| !ip.is_empty()) {
                    let ip = parse_ip(ip).ok_or_else(|| {
                        CniError::new(
                            Code::InvalidEnvironment,
                            format!("CNI_ARGS asks for IP={:?}, which is not an address", clip(ip)),
                        )
                    })?;
                    args.ips.push(ip);
                }
            }
            "MAC" => {
                let mac = parse_mac(value).map_err(|why| {
                    CniError::new(
                        Code::InvalidEnvironment,
                        format!("CNI_ARGS asks for MAC={:?}, {why}", clip(value)),
                    )
                })?;
                args.mac = Some(mac);
            }
            _ => {}
        }
    }
    Ok(args)
}

/// An address, with or without a prefix length (which the lease decides).
fn parse_ip(text: &str) -> Option<IpAddr> {
    let text = text.trim();
    text.parse().ok().or_else(|| text.parse::<ipnet::IpNet>().ok().map(|net| net.addr()))
}

fn parse_mac(text: &str) -> Result<MacAddress, &'static str> {
    let digits: String = text.chars().filter(|c| *c != ':').collect();
    let shape = text.len() == 17 && text.bytes().skip(2).step_by(3).all(|c| c == b':');
    let bytes = crate::types::from_hex::<6>(&digits).filter(|_| shape);
    match bytes {
        None => Err("which is not an Ethernet address such as 02:00:00:00:00:01"),
        Some(bytes) if bytes[0] & 1 == 1 => Err("which is a multicast address; a pod needs a unicast one"),
        Some([0, 0, 0, 0, 0, 0]) => Err("which is the zero address"),
        Some(bytes) => Ok(MacAddress(bytes)),
    }
}

/// The network configuration: a JSON object whose fields are looked at when a verb needs them.
struct Config(Map<String, Value>);

impl Config {
    fn parse(stdin: &[u8]) -> Result<Self, CniError> {
        if stdin.iter().all(u8::is_ascii_whitespace) {
            return Err(decode_error(
                "standard input is empty; the network configuration belongs there".into(),
                None,
            ));
        }
        match serde_json::from_slice(stdin) {
            Ok(Value::Object(fields)) => Ok(Self(fields)),
            Ok(_) => Err(decode_error(
                "standard input holds JSON, but not an object with a network configuration".into(),
                None,
            )),
            Err(error) => Err(decode_error(
                format!("standard input is not JSON (line {}, column {})", error.line(), error.column()),
                Some(&error),
            )),
        }
    }

    /// A field of a known type; JSON's null counts as absent.
    fn field<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, CniError> {
        match self.0.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => T::deserialize(value).map(Some).map_err(|error| {
                config_error(format!(
                    "{name} in the network configuration is not what the CNI specification says"
                ))
                .with_details(error)
            }),
        }
    }

    fn version(&self) -> Result<SpecVersion, CniError> {
        match self.field::<String>("cniVersion")? {
            Some(version) => version.parse(),
            None => Err(CniError::new(
                Code::IncompatibleVersion,
                "the network configuration has no cniVersion, which means 0.1.0; set it to 0.4.0, 1.0.0 or 1.1.0",
            )),
        }
    }

    fn network(&self) -> Result<String, CniError> {
        let name = self.field::<String>("name")?.unwrap_or_default();
        if name.is_empty() {
            return Err(config_error("the network configuration has no name"));
        }
        if name.len() > 256 || !is_spec_name(&name) {
            return Err(config_error(format!(
                "the network's name {:?} is not valid: it starts with a letter or digit and goes on with letters, digits, '_', '.' and '-'",
                clip(&name)
            )));
        }
        Ok(name)
    }

    fn wishes(&self, args: &Args) -> Result<Wishes, CniError> {
        let mut ips = args.ips.clone();
        let runtime = self.field::<Map<String, Value>>("runtimeConfig")?.unwrap_or_default();
        let conventions = self.field::<Map<String, Value>>("args")?.unwrap_or_default();
        for (place, list) in [
            ("runtimeConfig.ips", runtime.get("ips")),
            ("args.cni.ips", conventions.get("cni").and_then(|cni| cni.get("ips"))),
        ] {
            let list = match list {
                None | Some(Value::Null) => continue,
                Some(list) => Vec::<String>::deserialize(list).map_err(|error| {
                    config_error(format!("{place} is not a list of addresses")).with_details(error)
                })?,
            };
            for text in list {
                let ip = parse_ip(&text).ok_or_else(|| {
                    config_error(format!("{place} has {:?}, which is not an address", clip(&text)))
                })?;
                ips.push(ip);
            }
        }
        ips.sort_unstable();
        ips.dedup();
        if ips.iter().filter(|ip| ip.is_ipv4()).count() > 1
            || ips.iter().filter(|ip| ip.is_ipv6()).count() > 1
        {
            return Err(config_error(
                "the call asks for more than one address of a family; weft gives one of each",
            ));
        }
        let mac =
            match runtime.get("mac") {
                None | Some(Value::Null) => args.mac,
                Some(value) => {
                    let text = value.as_str().unwrap_or_default();
                    Some(parse_mac(text).map_err(|why| {
                        config_error(format!("runtimeConfig.mac is {:?}, {why}", clip(text)))
                    })?)
                }
            };
        let mtu = match self.0.get("mtu") {
            None | Some(Value::Null) => None,
            // 0 is how the bridge plugin spells "the default".
            Some(value) if value.as_u64() == Some(0) => None,
            Some(value) => Some(
                value
                    .as_u64()
                    .and_then(|mtu| u32::try_from(mtu).ok())
                    .filter(|mtu| (68..=65_535).contains(mtu))
                    .ok_or_else(|| {
                        config_error("mtu in the network configuration is not a number from 68 to 65535")
                    })?,
            ),
        };
        Ok(Wishes { ips, mac, mtu })
    }

    /// libcni leaves the list out when nothing is valid (`cnitool gc`); an early draft named it `cni.dev/attachments`.
    fn valid_attachments(&self) -> Result<Vec<AttachmentId>, CniError> {
        #[derive(Deserialize)]
        struct Entry {
            #[serde(rename = "containerID")]
            container: String,
            ifname: String,
        }
        let entries = match self.field::<Vec<Entry>>("cni.dev/valid-attachments")? {
            Some(entries) => entries,
            None => self.field::<Vec<Entry>>("cni.dev/attachments")?.unwrap_or_default(),
        };
        // An entry that weft would never have attached protects nothing, but it is not an error either:
        // the list covers what other plugins of the chain attached too.
        Ok(entries
            .iter()
            .filter_map(|entry| AttachmentId::new(&entry.container, &entry.ifname).ok())
            .collect())
    }
}

fn config_error(message: impl Into<String>) -> CniError {
    CniError::new(Code::InvalidConfiguration, message)
}

fn decode_error(message: String, cause: Option<&serde_json::Error>) -> CniError {
    let error = CniError::new(Code::DecodeFailure, message);
    match cause {
        Some(cause) => error.with_details(cause),
        None => error,
    }
}
