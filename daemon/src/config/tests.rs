use weft_ipam::store::kubernetes::Mode;

use super::*;

const CIDR: &str = "[cluster]\ncidrs = [{ cidr = \"10.32.0.0/12\", node_prefix = 24 }]\n";

fn parse(text: &str) -> Result<Config, String> {
    Config::parse(text, Path::new("weft.toml"), "host-1").map_err(|error| error.to_string())
}

#[test]
fn defaults_are_those_of_the_documentation() {
    let config = parse(CIDR).expect("valid");
    assert_eq!(config.node.name.as_str(), "host-1");
    assert_eq!((config.overlay.vni, config.overlay.port, config.gossip.port), (1, 8472, 7117));
    assert_eq!(config.store.kind, StoreKind::Sqlite("/var/lib/weft/store.db".into()));
    assert!(config.masquerade.enabled && config.pods.hairpin);
}

/// A configuration with etcd and these lines.
fn etcd(lines: &str) -> String {
    format!("{CIDR}[store]\ntype = \"etcd\"\n{lines}\n")
}

#[test]
fn entries_in_etcd_outlive_a_lease_by_far() {
    let day = std::time::Duration::from_secs(24 * 3600);
    for (lease_ttl, expected) in [("1h", day * 7), ("24h", day * 24)] {
        let config = parse(&etcd(&format!(
            "endpoints = [\"http://[2001:db8::1]:2379\"]\nlease_ttl = \"{lease_ttl}\""
        )));
        let StoreKind::Etcd(options) = config.expect("valid").store.kind else { panic!("another store") };
        assert_eq!((options.abandon_after, options.prefix.as_str()), (expected, "/weft"));
        assert_eq!(options.node.as_str(), "host-1");
        assert_eq!(options.endpoints[0].to_string(), "http://[2001:db8::1]:2379");
    }
}

#[test]
fn blocks_that_the_cluster_cuts_need_no_size_here() {
    let cidrs = "[cluster]\ncidrs = [{ cidr = \"10.32.0.0/12\" }, { cidr = \"fd00:32::/48\" }]\n";
    let store = "[store]\ntype = \"kubernetes\"\nmode = \"node-podcidr\"\n";
    let carver = parse(&format!("{cidrs}{store}")).expect("valid").cluster.carver;
    assert!(carver.allows("10.32.4.0/23".parse().expect("a subnet")), "of whatever size");
    assert!(!carver.allows("10.48.4.0/24".parse().expect("a subnet")));
}

/// A configuration with Kubernetes and these lines.
fn kubernetes(lines: &str) -> String {
    format!("{CIDR}[store]\ntype = \"kubernetes\"\n{lines}\n")
}

#[test]
fn kubernetes_needs_no_more_than_its_name() {
    for (lines, mode, kubeconfig) in [
        ("", Mode::WeftIpam, None),
        ("mode = \"weft-ipam\"\nkubeconfig = \"/k\"", Mode::WeftIpam, Some("/k".into())),
        ("mode = \"node-podcidr\"", Mode::NodePodCidr, None),
    ] {
        let config = parse(&kubernetes(lines)).expect("valid");
        let node = "host-1".parse().expect("a name");
        let options = KubernetesOptions { kubeconfig, namespace: "weft-system".into(), node, mode };
        assert_eq!(config.store.kind, StoreKind::Kubernetes(options));
        assert_eq!(config.cluster.key_file.to_str(), Some("/var/lib/weft/cluster.key"));
    }
}

#[test]
fn every_mistake_is_one_sentence_with_its_place() {
    for (text, sentence) in [
        ("[overlay]\nvnni = 3\n", "weft.toml:2: unknown key \"vnni\"; did you mean \"vni\"?"),
        ("[gosip]\n", "weft.toml:1: unknown key \"gosip\"; did you mean \"gossip\"?"),
        ("[store]\nlease_ttl = \"5 parsecs\"\n", "weft.toml:2: \"5 parsecs\" is not a duration"),
        ("[node]\nname = \"No_Good\"\n", "weft.toml:2: node name \"No_Good\" is not valid"),
        (&format!("{CIDR}[overlay]\nvni = 0\n"), "weft.toml: overlay.vni 0 is out of range"),
        (&format!("{CIDR}[underlay]\nmtu = 900\n"), "weft.toml: underlay.mtu 900 is out of range"),
        (&format!("{CIDR}[store]\ntype = \"static\"\n"), "needs the node's subnets"),
        (&format!("{CIDR}[store]\nsubnets = [\"10.32.1.0/24\"]\n"), "belongs to store.type"),
        (&format!("{CIDR}[store]\nprefix = \"/a\"\n"), "store.prefix belongs to store.type = \"etcd\""),
        (&etcd(""), "needs store.endpoints, for example"),
        (&etcd("endpoints = [\"10.0.0.1:2379\"]"), "\"10.0.0.1:2379\" has no scheme: write \"https://"),
        (&etcd("endpoints = [\"ftp://10.0.0.1:2379\"]"), "is no address of an etcd member"),
        (&etcd("endpoints = [\"https://u:p@a:2379\"]"), "is no address of an etcd member"),
        (
            &etcd("endpoints = [\"https://a\"]"),
            "is no address of an etcd member: write \"https://HOST:2379\"",
        ),
        (&etcd("endpoints = [\"https://a:1\", \"http://b:2\"]"), "mixes https and http"),
        (&etcd("endpoints = [\"https://a:1\"]"), "https://a:1 needs store.ca_file"),
        (
            &etcd("endpoints = [\"http://a:1\"]\nca_file = \"/ca\""),
            "store.ca_file is of no use with http://a:1",
        ),
        (
            &etcd("endpoints = [\"http://a:1\"]\ncert_file = \"/c\""),
            "store.cert_file needs store.key_file too",
        ),
        (&etcd("endpoints = [\"http://a:1\"]\nuser = \"u\""), "store.user needs store.password_file too"),
        (&etcd("endpoints = [\"http://a:1\"]\nprefix = \"weft/\""), "store.prefix \"weft/\" cannot be used"),
        (&etcd("endpoints = [\"http://a:1\"]\nsubnets = [\"10.32.1.0/24\"]"), "belongs to store.type"),
        (
            "[cluster]\ncidrs = [{ cidr = \"10.32.0.0/12\" }]\n",
            "10.32.0.0/12 has no node_prefix: say how long the prefix of a node's block is, for example 24",
        ),
        (&kubernetes("namespace = \"Weft\""), "store.namespace \"Weft\" is no name of a namespace"),
        (&kubernetes("mode = \"both\""), "unknown variant"),
        (&kubernetes("prefix = \"/a\""), "store.prefix belongs to store.type = \"etcd\""),
        (
            &format!("{CIDR}[store]\nmode = \"weft-ipam\""),
            "store.mode belongs to store.type = \"kubernetes\"",
        ),
        (&format!("{CIDR}[metrics]\nlisten = \"7118\"\n"), "no address with a port"),
        ("", "cluster.cidrs: no cluster CIDR is configured"),
    ] {
        let error = parse(text).expect_err(text);
        assert!(error.contains(sentence), "{error}\nshould contain\n{sentence}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

#[test]
fn what_differs_by_node_comes_from_the_environment() {
    let overrides = |name: &str, addresses: &str| {
        Overrides::from_environment(|variable| match variable {
            "WEFT_NODE_NAME" => Some(name.into()),
            "WEFT_NODE_ADDRESSES" => Some(addresses.into()),
            "WEFT_METRICS_LISTEN" => Some("[::]:7118".into()),
            INSTANCE => Some("a-uid".into()),
            _ => None,
        })
    };
    let text = format!("[node]\nname = \"of-the-file\"\n{CIDR}[underlay]\naddress = [\"192.0.2.9\"]\n");
    let resolve =
        |overrides| Config::parse_with(&text, Path::new("weft.toml"), "host-1", overrides).expect("valid");
    let config = resolve(overrides("worker-1", "192.0.2.1,2001:db8::1,192.0.2.7").expect("valid"));
    assert_eq!(config.node.name.as_str(), "worker-1");
    assert_eq!(config.metrics, Some("[::]:7118".parse().unwrap()));
    assert_eq!(config.node.instance.as_deref(), Some("a-uid"));
    assert!(config.underlay.of_cluster);
    // The first of each family.
    assert_eq!(
        config.underlay.addresses,
        ["192.0.2.1", "2001:db8::1"].map(|text| text.parse::<IpAddr>().unwrap())
    );
    for nothing in [overrides("", "").expect("valid"), Overrides::from_environment(|_| None).expect("valid")]
    {
        let config = resolve(nothing);
        assert_eq!(config.node.name.as_str(), "of-the-file");
        assert_eq!(config.underlay.addresses, ["192.0.2.9".parse::<IpAddr>().unwrap()]);
        assert!(!config.underlay.of_cluster, "a person said so");
    }
    let wrong = overrides("No_Good", "").expect_err("no node name");
    assert!(wrong.starts_with("WEFT_NODE_NAME: node name \"No_Good\" is not valid"), "{wrong}");
    let wrong = overrides("", "192.0.2.1,none").expect_err("no address");
    assert!(wrong.contains("WEFT_NODE_ADDRESSES: \"none\" is no IP address"), "{wrong}");
}
