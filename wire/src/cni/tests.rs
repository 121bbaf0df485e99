use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn call(verb: &str, stdin: &Value) -> CniRequest {
    CniRequest {
        verb: verb.into(),
        container_id: "3a5f".into(),
        netns: "/run/netns/blue".into(),
        ifname: "eth0".into(),
        args: String::new(),
        path: "/opt/cni/bin".into(),
        stdin: serde_json::to_vec(stdin).unwrap(),
    }
}

fn config(version: &str) -> Value {
    json!({"cniVersion": version, "name": "dbnet", "type": "weft-cni"})
}

fn with(key: &str, value: Value) -> Value {
    let mut config = config("1.1.0");
    config[key] = value;
    config
}

fn add(request: &CniRequest) -> PodRequest {
    match Command::parse(request) {
        Ok(Command::Add(request)) => request,
        other => panic!("{other:?}"),
    }
}

fn refusal(request: &CniRequest) -> CniError {
    Command::parse(request).expect_err("must be refused")
}

/// The result that the specification shows for its example (SPEC.md, "Appendix: Examples").
fn spec_result() -> Value {
    json!({
        "cniVersion": "1.1.0",
        "interfaces": [
            {"name": "cni0", "mac": "00:11:22:33:44:55"},
            {"name": "veth3243", "mac": "55:44:33:22:11:11"},
            {"name": "eth0", "mac": "99:88:77:66:55:44", "mtu": 1500, "sandbox": "/var/run/netns/blue"}
        ],
        "ips": [{"address": "10.1.0.5/16", "gateway": "10.1.0.1", "interface": 2}],
        "routes": [{"dst": "0.0.0.0/0"}],
        "dns": {"nameservers": ["10.1.0.1"]}
    })
}

#[test]
fn the_specs_example_configuration_is_an_add() {
    let request = call(
        "ADD",
        &json!({
            "cniVersion": "1.1.0", "name": "dbnet", "type": "weft-cni", "bridge": "cni0", "keyA": ["some more", "values"],
            "ipam": {"type": "host-local", "subnet": "10.1.0.0/16", "gateway": "10.1.0.1"},
            "dns": {"nameservers": ["10.1.0.1"]}
        }),
    );
    let request = add(&request);
    assert_eq!((request.network.as_str(), request.version), ("dbnet", SpecVersion::V1_1_0));
    assert_eq!(request.id, AttachmentId::new("3a5f", "eth0").unwrap());
    assert_eq!(request.netns.to_str(), Some("/run/netns/blue"));
    assert_eq!(request.dns.nameservers, ["10.1.0.1"]);
    assert_eq!(request.wishes, Wishes::default());
}

#[test]
fn the_specs_example_result_is_a_previous_result() {
    let mut request = call("CHECK", &with("prevResult", spec_result()));
    let Ok(Command::Check(check)) = Command::parse(&request) else { panic!("CHECK") };
    assert_eq!(check.previous.interfaces[2].mtu, Some(1500));
    assert_eq!(check.previous.ips[0].address.to_string(), "10.1.0.5/16");
    assert_eq!(check.previous.routes[0].gw, None);
    request.stdin = serde_json::to_vec(&config("1.1.0")).unwrap();
    let error = refusal(&request);
    assert_eq!(error.code, Code::InvalidConfiguration);
    assert!(error.message.contains("prevResult"));
}

#[test]
fn every_broken_call_gets_the_specs_code() {
    let set = |change: fn(&mut CniRequest)| {
        let mut request = call("ADD", &config("1.0.0"));
        change(&mut request);
        request
    };
    let cases: Vec<(CniRequest, Code, &str)> = vec![
        (set(|r| r.verb = String::new()), Code::InvalidEnvironment, "CNI_COMMAND is not set"),
        (set(|r| r.verb = "add".into()), Code::InvalidEnvironment, "CNI_COMMAND is \"add\""),
        (set(|r| r.container_id = String::new()), Code::InvalidEnvironment, "CNI_CONTAINERID is not set"),
        (set(|r| r.container_id = "../etc".into()), Code::InvalidEnvironment, "CNI_CONTAINERID \"../etc\""),
        (set(|r| r.container_id = "x".repeat(257)), Code::InvalidEnvironment, "at most 256"),
        (set(|r| r.netns = String::new()), Code::InvalidEnvironment, "CNI_NETNS is not set"),
        (set(|r| r.netns = "blue".into()), Code::InvalidEnvironment, "not an absolute path"),
        (set(|r| r.ifname = String::new()), Code::InvalidEnvironment, "CNI_IFNAME is not set"),
        (set(|r| r.ifname = "a-name-too-long1".into()), Code::InvalidEnvironment, "15 bytes"),
        (set(|r| r.ifname = "a/b".into()), Code::InvalidEnvironment, "not allowed"),
        (set(|r| r.ifname = "a b".into()), Code::InvalidEnvironment, "not allowed"),
        (set(|r| r.ifname = "..".into()), Code::InvalidEnvironment, "not interface names"),
        (set(|r| r.ifname = "lo".into()), Code::InvalidEnvironment, "loopback"),
        (set(|r| r.ifname = "all".into()), Code::InvalidEnvironment, "for settings"),
        (set(|r| r.args = "IgnoreUnknown".into()), Code::InvalidEnvironment, "KEY=VALUE"),
        (set(|r| r.args = "IP=10.0.0".into()), Code::InvalidEnvironment, "not an address"),
        (set(|r| r.args = "MAC=02:00".into()), Code::InvalidEnvironment, "not an Ethernet address"),
        (set(|r| r.args = "MAC=01:00:5e:00:00:01".into()), Code::InvalidEnvironment, "multicast"),
        (set(|r| r.stdin = Vec::new()), Code::DecodeFailure, "standard input is empty"),
        (set(|r| r.stdin = b"{\"name\":".to_vec()), Code::DecodeFailure, "line 1, column 8"),
        (set(|r| r.stdin = b"[]".to_vec()), Code::DecodeFailure, "not an object"),
        (set(|r| r.stdin = vec![0xff; 10]), Code::DecodeFailure, "not JSON"),
        (set(|r| r.stdin = vec![b' '; MAX_INPUT_BYTES + 1]), Code::DecodeFailure, "exceed"),
        (call("ADD", &config("0.3.1")), Code::IncompatibleVersion, "\"0.3.1\""),
        (call("ADD", &config("2.0.0")), Code::IncompatibleVersion, "1.1.0"),
        (call("ADD", &json!({"name": "n"})), Code::IncompatibleVersion, "no cniVersion"),
        (call("ADD", &json!({"cniVersion": 1, "name": "n"})), Code::InvalidConfiguration, "cniVersion"),
        (call("ADD", &json!({"cniVersion": "1.0.0"})), Code::InvalidConfiguration, "has no name"),
        (call("ADD", &json!({"cniVersion": "1.0.0", "name": "a/b"})), Code::InvalidConfiguration, "\"a/b\""),
        (call("ADD", &with("mtu", json!("big"))), Code::InvalidConfiguration, "mtu"),
        (call("ADD", &with("mtu", json!(67))), Code::InvalidConfiguration, "68"),
        (call("ADD", &with("dns", json!("10.1.0.1"))), Code::InvalidConfiguration, "dns"),
        (
            call("ADD", &with("runtimeConfig", json!({"ips": "x"}))),
            Code::InvalidConfiguration,
            "runtimeConfig.ips",
        ),
        (
            call("ADD", &with("runtimeConfig", json!({"mac": "x"}))),
            Code::InvalidConfiguration,
            "runtimeConfig.mac",
        ),
        (
            call("ADD", &with("runtimeConfig", json!({"ips": ["10.0.0.1", "10.0.0.2/24"]}))),
            Code::InvalidConfiguration,
            "more than one address",
        ),
        (call("STATUS", &config("1.0.0")), Code::IncompatibleVersion, "STATUS exists from CNI version 1.1.0"),
        (call("GC", &config("0.4.0")), Code::IncompatibleVersion, "GC exists from CNI version 1.1.0"),
        (
            call("GC", &with("cni.dev/valid-attachments", json!({}))),
            Code::InvalidConfiguration,
            "valid-attachments",
        ),
    ];
    for (request, code, words) in cases {
        let error = refusal(&request);
        assert_eq!(error.code, code, "{error} for {words}");
        assert!(error.to_string().contains(words), "{error:?} does not say {words:?}");
        let body: Value = serde_json::from_slice(&error.to_json(SpecVersion::V1_0_0)).unwrap();
        assert_eq!(body["code"], code as u32);
        assert_eq!(body["cniVersion"], "1.0.0");
        assert!(!body["msg"].as_str().unwrap().is_empty());
    }
}

#[test]
fn cni_args_name_the_pod_and_ask_for_addresses() {
    let mut request = call("ADD", &with("mtu", json!(1400)));
    request.args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=u1;K8S_POD_INFRA_CONTAINER_ID=x;IP=10.32.4.7,fd00::7/64;MAC=02:00:00:00:00:07;".into();
    let request = add(&request);
    let pod = PodName { namespace: "shop".into(), name: "web-0".into(), uid: "u1".into() };
    assert_eq!(request.pod, pod);
    assert_eq!(
        request.wishes.ips,
        ["10.32.4.7".parse::<std::net::IpAddr>().unwrap(), "fd00::7".parse().unwrap()]
    );
    assert_eq!(request.wishes.mac.unwrap().to_string(), "02:00:00:00:00:07");
    assert_eq!(request.wishes.mtu, Some(1400));
}

#[test]
fn the_runtime_may_ask_for_addresses_in_the_configuration() {
    let mut config = with(
        "runtimeConfig",
        json!({"ips": ["10.32.4.7/24"], "mac": "02:00:00:00:00:07", "portMappings": []}),
    );
    config["args"] = json!({"cni": {"ips": ["fd00::7"]}});
    config["mtu"] = json!(0);
    let wishes = add(&call("ADD", &config)).wishes;
    assert_eq!(wishes.ips.len(), 2);
    assert_eq!(wishes.mac.unwrap().to_string(), "02:00:00:00:00:07");
    assert_eq!(wishes.mtu, None, "0 is the default");
}

#[test]
fn del_needs_no_namespace_and_no_previous_result() {
    let mut request = call("DEL", &with("prevResult", json!("nonsense")));
    request.netns = String::new();
    let Ok(Command::Del(del)) = Command::parse(&request) else { panic!("DEL") };
    assert_eq!(del.netns, None);
}

#[test]
fn gc_reads_the_attachments_under_the_specs_key() {
    let list = json!([{"containerID": "c1", "ifname": "eth0"}, {"containerID": "c2", "ifname": "net1"}]);
    for key in ["cni.dev/valid-attachments", "cni.dev/attachments"] {
        let mut request = call("GC", &with(key, list.clone()));
        (request.container_id, request.netns, request.ifname) = Default::default();
        let Ok(Command::Gc(gc)) = Command::parse(&request) else { panic!("GC") };
        let expected = [AttachmentId::new("c1", "eth0").unwrap(), AttachmentId::new("c2", "net1").unwrap()];
        assert_eq!(gc.valid, expected);
    }
    // What libcni sends for "nothing is valid".
    for config in [config("1.1.0"), with("cni.dev/valid-attachments", Value::Null)] {
        let Ok(Command::Gc(gc)) = Command::parse(&call("GC", &config)) else { panic!("GC") };
        assert!(gc.valid.is_empty());
    }
}

#[test]
fn version_answers_any_input() {
    for (stdin, version) in [
        (&b""[..], "1.1.0"),
        (b"{\"cniVersion\":\"0.4.0\"}", "0.4.0"),
        (b"{\"cniVersion\":\"9\"}", "1.1.0"),
        (b"x", "1.1.0"),
    ] {
        let request = CniRequest { verb: "VERSION".into(), stdin: stdin.into(), ..CniRequest::default() };
        let Ok(Command::Version(found)) = Command::parse(&request) else { panic!("VERSION") };
        let reply = CniReply::new(found, Ok(Success::Versions));
        let body: Value = serde_json::from_slice(&reply.stdout).unwrap();
        assert_eq!(body, json!({"cniVersion": version, "supportedVersions": ["0.4.0", "1.0.0", "1.1.0"]}));
        assert_eq!((reply.exit_code, reply.is_error), (0, false));
    }
}

#[test]
fn a_result_has_the_form_of_its_version() {
    let result: CniResult = serde_json::from_value(spec_result()).unwrap();
    let in_version = |version| serde_json::from_slice::<Value>(&result.to_json(version)).unwrap();
    assert_eq!(in_version(SpecVersion::V1_1_0), spec_result());
    let mut older = spec_result();
    older["cniVersion"] = json!("1.0.0");
    older["interfaces"][2].as_object_mut().unwrap().remove("mtu");
    assert_eq!(in_version(SpecVersion::V1_0_0), older);
    older["cniVersion"] = json!("0.4.0");
    older["ips"][0]["version"] = json!("4");
    assert_eq!(in_version(SpecVersion::V0_4_0), older);
}

#[test]
fn the_daemons_socket_may_be_named_in_the_configuration() {
    let input = serde_json::to_vec(&with("socket", json!("/run/other.sock"))).unwrap();
    assert_eq!(socket_of_input(&input), Some("/run/other.sock".into()));
    assert_eq!(socket_of_input(b"{}"), None);
    assert_eq!(socket_of_input(b"broken"), None);
}

#[test]
fn names_derived_from_an_attachment_are_stable_and_valid() {
    let id = AttachmentId::new("c1", "eth0").unwrap();
    assert_eq!(id.host_ifname(), "weft55d7efa1");
    assert_eq!(id.pod_mac().0[0] & 3, 2);
    assert_ne!(id.pod_mac(), id.host_mac());
    assert_ne!(id.host_ifname(), AttachmentId::new("c1", "net1").unwrap().host_ifname());
    assert_ne!(
        AttachmentId::new("ab", "c").unwrap().host_ifname(),
        AttachmentId::new("a", "bc").unwrap().host_ifname(),
        "the two names do not run together"
    );
}

#[test]
fn messages_of_the_shim_survive_the_socket() {
    use prost::Message;
    let request = Request { body: Some(RequestBody::Cni(call("ADD", &config("1.0.0")))) };
    let bytes = crate::frame::encode(&request);
    let (skip, length) = crate::frame::length(&bytes, crate::frame::MAX_REQUEST_BYTES).unwrap().unwrap();
    assert_eq!(skip + length, bytes.len());
    assert_eq!(Request::decode(&bytes[skip..]).unwrap(), request);
    let failed = Reply { body: Some(ReplyBody::Error(Failure { message: "too many requests".into() })) };
    let error = Reply::from_bytes(&failed.encode_to_vec()).unwrap().into_cni().expect_err("a failure");
    assert_eq!(error.code, Code::TryAgainLater);
    assert!(error.message.contains("too many requests"));
    assert_eq!(Reply::default().into_cni().expect_err("empty").code, Code::TryAgainLater);
}

#[test]
fn a_frame_is_refused_before_its_bytes_are_there() {
    use crate::frame::{FrameError, length};
    assert_eq!(length(&[], 10), Ok(None));
    assert_eq!(length(&[0x80], 10), Ok(None));
    assert_eq!(length(&[10], 10), Ok(Some((1, 10))));
    assert_eq!(length(&[11], 10), Err(FrameError::TooLong { length: 11, limit: 10 }));
    assert_eq!(length(&[0xff; 10], 10), Err(FrameError::Length));
}

fn interface() -> impl Strategy<Value = Interface> {
    ("[a-z]{1,8}", proptest::option::of(68..9000_u32), proptest::option::of("/[a-z]{1,8}"))
        .prop_map(|(name, mtu, sandbox)| Interface { name, mac: "02:00:00:00:00:01".into(), mtu, sandbox })
}

proptest! {
    #[test]
    fn parsing_never_panics(verb in "ADD|DEL|CHECK|GC|STATUS|VERSION|[A-Z]{0,4}", text in ".{0,60}", stdin in proptest::collection::vec(any::<u8>(), 0..200)) {
        let mut request = call(&verb, &config("1.1.0"));
        let _ = Command::parse(&CniRequest { stdin, ..request.clone() });
        let _ = Command::parse(&CniRequest { args: text.clone(), ..request.clone() });
        request.ifname = text.clone();
        request.container_id = text;
        let _ = Command::parse(&request);
    }

    #[test]
    fn an_accepted_interface_name_is_one_to_the_kernel(name in "\\PC{0,17}") {
        if let Ok(id) = AttachmentId::new("c", &name) {
            prop_assert!(id.ifname().len() <= 15 && !id.ifname().contains(['/', ':', ' ']));
        }
    }

    #[test]
    fn a_written_result_reads_back(interfaces in proptest::collection::vec(interface(), 0..4), v4 in any::<[u8; 4]>(), v6 in any::<[u8; 16]>(), gw in any::<[u8; 4]>()) {
        let result = CniResult {
            interfaces,
            ips: vec![
                IpConfig { version: None, interface: Some(0), address: ipnet::IpNet::new(v4.into(), 24).unwrap(), gateway: Some(gw.into()) },
                IpConfig { version: None, interface: None, address: ipnet::IpNet::new(v6.into(), 64).unwrap(), gateway: None },
            ],
            routes: vec![RouteEntry { dst: "0.0.0.0/0".parse().unwrap(), gw: None }],
            dns: Dns::default(),
        };
        let read: CniResult = serde_json::from_slice(&result.to_json(SpecVersion::V1_1_0)).unwrap();
        prop_assert_eq!(read, result);
    }

    #[test]
    fn a_frames_length_never_exceeds_the_limit(bytes in proptest::collection::vec(any::<u8>(), 0..12), limit in 0..100_000_usize) {
        if let Ok(Some((skip, length))) = crate::frame::length(&bytes, limit) {
            prop_assert!(skip <= 10 && length <= limit);
        }
    }
}
