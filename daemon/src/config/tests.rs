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
        (&format!("{CIDR}[metrics]\nlisten = \"7118\"\n"), "no address with a port"),
        ("", "cluster.cidrs: no cluster CIDR is configured"),
    ] {
        let error = parse(text).expect_err(text);
        assert!(error.contains(sentence), "{error}\nshould contain\n{sentence}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}
