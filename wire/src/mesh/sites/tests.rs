use super::*;
use crate::site::SiteKey;

const CLUSTER: &str = "test";

fn key(site: &str) -> SiteKey {
    let mut secret = [0; 32];
    secret[..site.len()].copy_from_slice(site.as_bytes());
    SiteKey::from_secret(secret)
}

fn prefixes(prefixes: &[&str]) -> Vec<Subnet> {
    prefixes.iter().map(|prefix| prefix.parse().expect("a prefix")).collect()
}

fn name(site: &str) -> SiteName {
    site.parse().expect("a name")
}

/// What the site with this key says of itself under a name.
fn says(of: &str, site: &str, version: u64, nets: &[&str]) -> Arc<SignedStatement> {
    let (key, record) = (key(of), (name(site), prefixes(nets)));
    let (site, prefixes) = record;
    let record = SiteRecord {
        site,
        key: key.public(),
        version,
        prefixes,
        least_serial: 0,
        void: Vec::new(),
        left: false,
    };
    Arc::new(key.sign(CLUSTER, Statement::Site(record)).expect("within the limits"))
}

fn word(by: &str, of: &str, site: &str, version: u64, nets: &[&str], expelled: bool) -> Arc<SignedStatement> {
    let (by, key, prefixes) = (key(by), key(of).public(), prefixes(nets));
    let admission = Admission { by: by.public(), site: name(site), key, version, prefixes, expelled };
    Arc::new(by.sign(CLUSTER, Statement::Admission(admission)).expect("within the limits"))
}

fn admits(by: &str, of: &str, nets: &[&str]) -> Arc<SignedStatement> {
    word(by, of, of, 1, nets, false)
}

fn of_a() -> Sites {
    let mut sites = Sites::default();
    sites.stand_on(name("a"), key("a").public(), prefixes(&["10.1.0.0/16"]), Vec::new());
    sites
}

/// The sites that are in, and what they may announce.
fn members(sites: &Sites) -> Vec<(String, Vec<Subnet>)> {
    let of = |view: &SiteView| match &view.standing {
        SiteStanding::Member { prefixes, .. } => Some((view.site.to_string(), prefixes.clone())),
        _ => None,
    };
    sites.views().values().filter_map(of).collect()
}

fn problems(sites: &Sites) -> String {
    sites.views().values().flat_map(|view| &view.problems).cloned().collect::<Vec<_>>().join("; ")
}

#[test]
fn a_chain_of_admissions_lets_a_site_in_and_nothing_else_is_kept() {
    let mut sites = of_a();
    let b = says("b", "b", 1, &["10.2.0.0/16"]);
    assert!(!sites.merge(Arc::clone(&b)), "nobody let it in");
    assert!(!sites.merge(admits("b", "c", &["10.3.0.0/16"])));
    assert_eq!(sites.all().count(), 0);
    assert!(sites.merge(admits("a", "b", &["10.2.0.0/16"])));
    assert_eq!(sites.views()[&name("b")].standing, SiteStanding::Unknown);
    assert!(sites.merge(Arc::clone(&b)));
    assert!(!sites.merge(b), "it is no news the second time");
    assert!(sites.merge(admits("b", "c", &["10.3.0.0/16"])));
    assert!(sites.merge(says("c", "c", 1, &["10.3.0.0/16"])));
    let expected = [("b", "10.2.0.0/16"), ("c", "10.3.0.0/16")];
    assert_eq!(members(&sites), expected.map(|(site, net)| (site.to_owned(), prefixes(&[net]))));
}

#[test]
fn what_an_expelled_site_brought_in_goes_with_it_and_is_forgotten() {
    let mut sites = of_a();
    for statement in [
        admits("a", "b", &["10.2.0.0/16"]),
        says("b", "b", 1, &["10.2.0.0/16"]),
        admits("b", "c", &["10.3.0.0/16"]),
        says("c", "c", 1, &["10.3.0.0/16"]),
    ] {
        assert!(sites.merge(statement));
    }
    let sum = sites.sum();
    assert!(sites.merge(word("a", "b", "b", 2, &[], true)));
    assert_eq!(members(&sites), []);
    assert_eq!(sites.views()[&name("b")].standing, SiteStanding::Expelled);
    assert_eq!(sites.all().count(), 1, "the own word alone");
    assert!(!sites.merge(says("b", "b", 2, &["10.2.0.0/16"])));
    assert!(!sites.merge(admits("a", "b", &["10.2.0.0/16"])), "an earlier word of the own site");
    // Let in again, everything comes back as it was.
    for statement in [
        word("a", "b", "b", 3, &["10.2.0.0/16"], false),
        says("b", "b", 1, &["10.2.0.0/16"]),
        admits("b", "c", &["10.3.0.0/16"]),
        says("c", "c", 1, &["10.3.0.0/16"]),
    ] {
        assert!(sites.merge(statement));
    }
    assert_eq!(members(&sites).len(), 2);
    assert_ne!(sites.sum(), sum, "one statement is of another version");
}

#[test]
fn the_own_expulsion_outweighs_the_admissions_of_others() {
    let mut sites = of_a();
    for statement in [
        admits("a", "b", &["10.2.0.0/16"]),
        says("b", "b", 1, &["10.2.0.0/16"]),
        word("a", "c", "c", 1, &[], true),
        admits("b", "c", &["10.3.0.0/16"]),
    ] {
        assert!(sites.merge(statement));
    }
    assert!(!sites.merge(says("c", "c", 1, &["10.3.0.0/16"])));
    assert_eq!(members(&sites).len(), 1);
}

#[test]
fn a_site_announces_no_more_than_it_was_let_in_with() {
    let mut sites = of_a();
    sites.merge(admits("a", "b", &["10.2.0.0/16"]));
    sites.merge(says("b", "b", 1, &["10.2.128.0/17", "10.9.0.0/16"]));
    assert_eq!(members(&sites), [("b".to_owned(), prefixes(&["10.2.128.0/17"]))]);
    assert_eq!(problems(&sites), "it was not let in with 10.9.0.0/16: invite it again");
}

#[test]
fn overlapping_prefixes_stay_with_whoever_had_them() {
    let mut sites = of_a();
    sites.merge(admits("a", "c", &["10.0.0.0/8"]));
    sites.merge(says("c", "c", 1, &["10.3.0.0/16"]));
    // The own site's are nobody else's, and c was there before b.
    sites.merge(admits("a", "b", &["10.0.0.0/8", "fd00::/32"]));
    sites.merge(says("b", "b", 1, &["10.1.64.0/18", "10.3.0.0/18", "fd00::/32"]));
    let expected = [("b", "fd00::/32"), ("c", "10.3.0.0/16")];
    assert_eq!(members(&sites), expected.map(|(site, net)| (site.to_owned(), prefixes(&[net]))));
    let problems = problems(&sites);
    assert!(
        problems.contains("its 10.1.64.0/18 overlaps 10.1.0.0/16 of site a, which keeps it"),
        "{problems}"
    );
    assert!(
        problems.contains("its 10.3.0.0/18 overlaps 10.3.0.0/16 of site c, which keeps it"),
        "{problems}"
    );
}

#[test]
fn a_second_site_of_one_name_is_named_and_not_believed() {
    let mut sites = of_a();
    sites.merge(admits("a", "b", &["10.2.0.0/16"]));
    sites.merge(says("b", "b", 1, &["10.2.0.0/16"]));
    sites.merge(word("a", "b2", "b", 1, &["10.4.0.0/16"], false));
    sites.merge(word("a", "a2", "a", 1, &["10.5.0.0/16"], false));
    assert!(!sites.merge(says("b2", "b", 1, &["10.4.0.0/16"])));
    assert_eq!(members(&sites), [("b".to_owned(), prefixes(&["10.2.0.0/16"]))]);
    let problems = problems(&sites);
    assert!(problems.contains("a second site is named b (key"), "{problems}");
    assert!(problems.contains("a second site is named a (key"), "{problems}");
    // Put out, it leaves its name to the other.
    sites.merge(word("a", "b", "b", 2, &[], true));
    sites.merge(says("b2", "b", 1, &["10.4.0.0/16"]));
    assert_eq!(members(&sites), [("b".to_owned(), prefixes(&["10.4.0.0/16"]))]);
}

#[test]
fn the_order_of_statements_does_not_matter() {
    let all = [
        admits("a", "b", &["10.2.0.0/16"]),
        says("a", "a", 1, &["10.1.0.0/16"]),
        says("b", "b", 1, &["10.2.0.0/16"]),
        says("b", "b", 2, &["10.2.0.0/17"]),
        admits("b", "a", &["10.1.0.0/16"]),
        admits("b", "c", &["10.3.0.0/16"]),
        says("c", "c", 5, &["10.3.0.0/16"]),
    ];
    let mut outcomes = Vec::new();
    for start in 0..all.len() {
        let mut sites = of_a();
        // As anti-entropy does: again and again until nothing is news.
        let mut news = true;
        while std::mem::take(&mut news) {
            for place in 0..all.len() {
                news |= sites.merge(Arc::clone(&all[(start + place) % all.len()]));
            }
        }
        outcomes.push((members(&sites), sites.sum()));
    }
    assert!(outcomes.windows(2).all(|pair| pair[0] == pair[1]), "{outcomes:?}");
    assert_eq!(outcomes[0].0[0].1, prefixes(&["10.2.0.0/17"]));
}

#[test]
fn a_node_without_a_site_key_takes_no_statements() {
    let mut sites = Sites::default();
    assert!(!sites.merge(says("b", "b", 1, &[])));
    assert_eq!(sites.sum(), 0);
    assert_ne!(of_a().sum(), 0);
}
