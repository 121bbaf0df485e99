//! The lab's routers translate as their kinds say (RFC 4787), and what is between sites can be impaired one way. The
//! daemons have no part in it.

use weft_tests::lab::{Capture, Families, Impairment, Lab, LabOptions, Nat, Request};

/// The mapping that the routers keep for the tunnels' port of n3: the third node's second port.
const MAPPED: &str = "10031";

/// n1 and n2 on the public network, n3 behind r2 and n4 behind r3; no daemon runs.
fn lab(name: &str, nat: &[Nat]) -> Lab {
    let options = LabOptions::new(name).nodes(4).started(0).pods(0).sites(3).nat(nat);
    Lab::up(options.underlay(Families::Dual))
}

/// Sends one datagram from a port to a port.
fn send(lab: &Lab, from: (&str, &str), to: (&str, &str)) {
    lab.sh(from.0, &format!("echo {} | nc.openbsd -u -q 0 -p {} {} {}", from.1, from.1, to.0, to.1));
}

/// The port that the public network sees a datagram of n3 from port 51820 come from.
fn seen_from(lab: &Lab, to: (&str, &str)) -> String {
    let filter = format!("udp and dst host {} and dst port {}", to.0, to.1);
    let script = format!("timeout 30 tcpdump -nn -l -c 1 -i lab0 '{filter}'");
    let tcpdump = lab.background("underlay", &["sh", "-c", &script]);
    // tcpdump listens some time after it was started: a datagram that it misses is repeated.
    let again = lab.background("n3", &["sh", "-c", &repeat(to)]);
    let text = tcpdump.finish();
    again.interrupt();
    let source = text.split_once(" > ").and_then(|(left, _)| left.rsplit('.').next());
    source.unwrap_or_else(|| panic!("no datagram: {text}")).to_owned()
}

fn repeat((address, port): (&str, &str)) -> String {
    format!("for i in $(seq 100); do echo x | nc.openbsd -u -q 0 -p 51820 {address} {port}; sleep 0.1; done")
}

/// Who of others, each an address of a node and a port, reaches n3 at its mapping after it sent to n1's port 7000 alone.
fn admitted(lab: &Lab) -> Vec<&'static str> {
    let capture = Capture::start(lab, "n3", "eth0");
    send(lab, ("n3", "51820"), ("192.0.2.1", "7000"));
    for from in [("n2", "7002"), ("n1", "7001"), ("n1", "7000")] {
        send(lab, from, ("192.0.2.202", MAPPED));
    }
    // The last one may always pass, and none overtakes another.
    let counts = capture.finish_with(
        "udp dst port 51820 and src port 7000",
        &["udp dst port 51820 and src port 7000", "src port 7001", "src port 7002"],
    );
    let names = ["the port", "the address", "everybody"];
    names.into_iter().zip(counts).filter(|(_, count)| *count > 0).map(|(name, _)| name).collect()
}

#[test]
fn routers_map_and_filter_as_their_kinds_say() {
    let lab = lab("kinds", &[Nat::None, Nat::FullCone, Nat::Double]);
    let kinds = [
        (Nat::FullCone, vec!["the port", "the address", "everybody"]),
        (Nat::AddressRestricted, vec!["the port", "the address"]),
        (Nat::PortRestricted, vec!["the port"]),
    ];
    for (nat, expected) in kinds {
        lab.tell(Request::Nat { router: "r2".into(), nat });
        assert_eq!(admitted(&lab), expected, "{nat:?}");
        let ports = [("192.0.2.1", "7010"), ("192.0.2.2", "7010")].map(|to| seen_from(&lab, to));
        assert_eq!(ports, [MAPPED, MAPPED], "{nat:?}");
    }
    lab.tell(Request::Nat { router: "r2".into(), nat: Nat::Symmetric });
    let ports = [("192.0.2.1", "7010"), ("192.0.2.2", "7010")].map(|to| seen_from(&lab, to));
    assert_ne!(ports[0], ports[1], "a symmetric NAT has one port a destination");

    let refused = Request::Nat { router: "r3".into(), nat: Nat::FullCone };
    let refused = lab.handle().request(&refused).expect_err("the lab refuses").to_string();
    assert!(refused.contains("r3 cannot change between one router, two and none"), "{refused}");
}

/// One that answers a probe on the public network, with another one at another address (RFC 5780 s4): it says where a datagram came
/// from, and sends from a port that nobody has sent to, itself or through the other.
const ANSWERS: &str = r#"
    use IO::Socket; use IO::Select;
    my ($own, $other) = @ARGV;
    my %at = map { $_ => IO::Socket::INET->new(Proto => 'udp', LocalAddr => $own, LocalPort => $_) // die } 7010 .. 7013;
    my $select = IO::Select->new(values %at);
    while (1) { for my $socket ($select->can_read) {
        my $from = $socket->recv(my $said, 100) // next;
        my ($port, $ip) = unpack_sockaddr_in($from);
        if (my ($host, $at) = $said =~ /^tell (\S+) (\d+)/) { $at{7013}->send('address', 0, pack_sockaddr_in($at, inet_aton($host))) }
        elsif ($said eq 'port') { $at{7013}->send('port', 0, $from) }
        elsif ($said eq 'address') { $at{7012}->send('tell ' . inet_ntoa($ip) . " $port", 0, pack_sockaddr_in(7012, inet_aton($other))) }
        else { $socket->send('seen ' . inet_ntoa($ip) . " $port", 0, $from) }
    } }"#;

/// Asks those two from a port, and says what it learned of mapping, filtering and hairpinning. What does not come counts as filtered
/// when a later answer has been there for a second.
const PROBES: &str = r#"
    use IO::Socket; use IO::Select;
    my ($one, $other) = @ARGV;
    my $socket = IO::Socket::INET->new(Proto => 'udp', LocalPort => 51820) // die;
    my %heard;
    sub hear { while (IO::Select->new($socket)->can_read($_[0])) {
        $socket->recv(my $said, 100);
        $heard{$said =~ s/^seen .*/seen/r} = $said;
    } }
    sub say { my ($ip, $port, $what) = @_; $socket->send($what, 0, pack_sockaddr_in($port, inet_aton($ip))) }
    sub seen {
        delete $heard{seen};
        for (1 .. 50) { say(@_, 'where'); hear(0.3); return $heard{seen} if $heard{seen} }
        die "no answer of @_";
    }
    my $first = seen($one, 7010);
    say($one, 7010, $_) for qw(address port address port);
    seen($one, 7010); hear(1);
    my $filter = $heard{address} ? 'independent' : $heard{port} ? 'address' : 'address-and-port';
    my ($port, $address) = (seen($one, 7011), seen($other, 7010));
    my $map = $port ne $first ? 'address-and-port' : $address ne $first ? 'address' : 'independent';
    my $neighbour = IO::Socket::INET->new(Proto => 'udp', LocalPort => 51821) // die;
    my (undef, $ip, $at) = split / /, $first;
    $neighbour->send('hairpin', 0, pack_sockaddr_in($at, inet_aton($ip))) for 1 .. 2;
    seen($one, 7010); hear(1);
    print "mapping $map, filtering $filter, hairpin ", $heard{hairpin} ? 'yes' : 'no';"#;

#[test]
fn a_probe_by_rfc_5780_finds_each_kind_to_be_what_its_name_says() {
    let lab = lab("probe", &[Nat::None, Nat::FullCone, Nat::Double]);
    let perl = |script, own: &str, other: &str| ["perl", "-e", script, own, other].map(ToOwned::to_owned);
    let answering =
        [("n1", "192.0.2.1", "192.0.2.2"), ("n2", "192.0.2.2", "192.0.2.1")].map(|(node, own, other)| {
            let words = perl(ANSWERS, own, other);
            lab.background(node, &words.each_ref().map(String::as_str))
        });
    let probe = |node| {
        let words = perl(PROBES, "192.0.2.1", "192.0.2.2");
        lab.run(node, &words.each_ref().map(String::as_str))
    };
    let kinds = [
        (Nat::FullCone, "mapping independent, filtering independent, hairpin no"),
        (Nat::AddressRestricted, "mapping independent, filtering address, hairpin no"),
        (Nat::PortRestricted, "mapping independent, filtering address-and-port, hairpin no"),
        (Nat::Symmetric, "mapping address-and-port, filtering address-and-port, hairpin no"),
    ];
    for (nat, expected) in kinds {
        lab.tell(Request::Nat { router: "r2".into(), nat });
        assert_eq!(probe("n3"), expected, "{nat:?}");
    }
    assert_eq!(probe("n4"), kinds[2].1, "two port-restricted routers in a row");
    drop(answering);
}

#[test]
fn nodes_behind_routers_reach_the_public_network_and_nobody_reaches_them() {
    let lab = lab("behind", &[Nat::None, Nat::Symmetric, Nat::Double]);
    let ping = |from: &str, to: &str| lab.ping(from, to.parse().expect("an address"));
    for from in ["n3", "n4"] {
        assert!(ping(from, "192.0.2.1"), "{from} reaches the public network");
        assert!(!ping(from, "198.51.100.3") || from == "n3", "the networks inside are not one");
    }
    assert!(!ping("n1", "198.51.100.3") && !ping("n1", "198.51.100.4"));
    // IPv6 is not translated, and comes in only with a flow from inside; two routers in a row have none.
    assert!(ping("n3", "2001:db8::1"), "n3's IPv6 does not come out");
    assert!(!ping("n1", "2001:db8:0:2::3") && !ping("n4", "2001:db8::1"));

    // One way only, and by the names that the public network has.
    lab.tell(Request::Impair(Impairment { from: "n1".into(), to: "r2".into(), ms: 0, loss_percent: 100 }));
    assert!(!ping("n3", "192.0.2.1") && ping("n3", "192.0.2.2") && ping("n4", "192.0.2.1"));
    lab.tell(Request::Impair(Impairment { from: "n1".into(), to: "r2".into(), ms: 0, loss_percent: 0 }));
    assert!(ping("n3", "192.0.2.1") && lab.state().impairments.is_empty());
    let refused = lab.handle().request(&Request::Cut { a: "n1".into(), b: "n3".into() });
    let refused = refused.expect_err("the lab refuses").to_string();
    assert!(refused.contains("n3 is behind r2: name r2"), "{refused}");

    // A path on which UDP is blocked carries all else.
    lab.tell(Request::CutUdp { a: "n1".into(), b: "r2".into() });
    assert!(ping("n3", "192.0.2.1"));
    let capture = Capture::start(&lab, "n1", "eth0");
    send(&lab, ("n3", "51820"), ("192.0.2.1", "7000"));
    assert!(ping("n3", "192.0.2.1"));
    let counts = capture.finish_with("icmp", &["udp"]);
    assert_eq!(counts, [0], "UDP passes");
}
