//! etcd with certificates, users and passwords; each way to get them wrong is one sentence.

use serde_json::json;
use weft_ipam::store::etcd::EtcdOptions;

use super::authority::{Authority, FUTURE, NOW, PAST, Validity};
use super::etcd::{base64, open};
use super::server::{self, Etcd, free_ports, options};
use super::*;

/// An etcd that shows a certificate and, if `clients` says so, wants one.
struct Secured {
    directory: Directory,
    ca: Authority,
    etcd: Etcd,
    port: u16,
}

impl Secured {
    fn start(name: &str, validity: Validity, clients: bool) -> Self {
        let directory = Directory::new();
        let ca = Authority::new("the CA of etcd");
        let ca_file = ca.write(&directory, "ca");
        let (cert, key) = ca.sign(&directory, "server", name, validity);
        let [port] = free_ports();
        // The plain address is the test's own way in.
        let mut arguments = vec![
            format!("--listen-client-urls=https://127.0.0.1:{port},HTTP"),
            format!("--cert-file={}", cert.display()),
            format!("--key-file={}", key.display()),
        ];
        if clients {
            arguments.push(format!("--trusted-ca-file={}", ca_file.display()));
            arguments.push("--client-cert-auth".into());
        }
        Self { etcd: Etcd::with(|_| arguments), directory, ca, port }
    }

    fn options(&self) -> EtcdOptions {
        EtcdOptions {
            ca_file: Some(self.directory.join("ca.pem")),
            ..options(&[format!("https://127.0.0.1:{}", self.port)])
        }
    }

    fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }
}

/// What a list fails with.
fn refusal(options: EtcdOptions) -> String {
    runtime().block_on(async { sentence(open(options).list().await) })
}

#[test]
fn a_certificate_on_both_sides_is_enough_and_each_wrong_one_is_named() {
    if server::missing() {
        return;
    }
    let secured = Secured::start("127.0.0.1", NOW, true);
    let (directory, url) = (&secured.directory, secured.url());
    let client = secured.ca.sign(directory, "client", "n1", NOW);
    let good = EtcdOptions { identity: Some(client.clone()), ..secured.options() };
    runtime().block_on(async {
        let store = open(good.clone());
        let mut watch = store.watch();
        let revision = store.put_if(key(1), Expect::Absent, b"a".to_vec()).await.expect("absent");
        learns_of(&mut watch, revision).await;
        assert_eq!(store.list().await.expect("up").entries.len(), 1);
    });

    let without = refusal(secured.options());
    assert!(without.starts_with(&format!("etcd at {url} wants a client certificate")), "{without}");
    let expired = secured.ca.sign(directory, "expired", "n1", PAST);
    let other = Authority::new("the CA of others");
    let foreign = other.sign(directory, "foreign", "n1", NOW);
    for identity in [expired, foreign] {
        let said = refusal(EtcdOptions { identity: Some(identity), ..good.clone() });
        assert!(said.starts_with(&format!("etcd at {url} refuses this node's certificate (")), "{said}");
        assert!(said.contains("renew store.cert_file") && said.contains("compare the clocks"), "{said}");
    }
    let ca_file = Some(other.write(directory, "other-ca"));
    assert_eq!(
        refusal(EtcdOptions { ca_file, ..good.clone() }),
        format!(
            "the certificate of etcd at {url} is not signed by the CA in store.ca_file: name the CA that signed it"
        )
    );

    // What the files get wrong is found before anything is asked.
    let broken = |identity, ca_file| EtcdStore::open(EtcdOptions { identity, ca_file, ..good.clone() });
    let mixed = Some((client.0.clone(), directory.join("foreign.key")));
    let error = broken(mixed, good.ca_file.clone()).expect_err("two that do not belong together").to_string();
    assert!(error.contains("is not the key of store.cert_file"), "{error}");
    let error = broken(None, Some(directory.join("server.key"))).expect_err("a key").to_string();
    assert!(error.contains("holds no certificate in PEM"), "{error}");
    let swapped = Some((client.0.clone(), client.0.clone()));
    let error = broken(swapped, good.ca_file.clone()).expect_err("a certificate").to_string();
    assert!(error.contains("holds no private key in PEM"), "{error}");
    let error = broken(None, Some(directory.join("nothing"))).expect_err("no file").to_string();
    assert!(error.contains("store.ca_file") && error.contains("cannot be read"), "{error}");
}

#[test]
fn a_renewed_certificate_is_used_without_a_restart() {
    if server::missing() {
        return;
    }
    let secured = Secured::start("127.0.0.1", NOW, true);
    let client = secured.ca.sign(&secured.directory, "client", "n1", PAST);
    runtime().block_on(async {
        let store = open(EtcdOptions { identity: Some(client), ..secured.options() });
        sentence(store.list().await);
        secured.ca.sign(&secured.directory, "client", "n1", NOW);
        store.list().await.expect("the new one is good");
    });
}

#[test]
fn a_server_whose_certificate_cannot_be_believed_is_named_with_the_reason() {
    if server::missing() {
        return;
    }
    let expired = Secured::start("127.0.0.1", PAST, false);
    assert_eq!(
        refusal(expired.options()),
        format!(
            "the certificate of etcd at {} has expired by this node's clock: renew it, or set the clock",
            expired.url()
        )
    );
    let future = Secured::start("127.0.0.1", FUTURE, false);
    assert_eq!(
        refusal(future.options()),
        format!(
            "the certificate of etcd at {} is not valid yet by this node's clock: set the clock, or renew the certificate",
            future.url()
        )
    );
    let other = Secured::start("etcd.example", NOW, false);
    assert_eq!(
        refusal(other.options()),
        format!(
            "the certificate of etcd at {} is not for 127.0.0.1: write a name of the certificate in store.endpoints",
            other.url()
        )
    );
    // With TLS to where there is none, and without to where there is.
    let plain = format!("https://127.0.0.1:{}", other.etcd.port);
    let tls = EtcdOptions { ca_file: other.options().ca_file, ..options(std::slice::from_ref(&plain)) };
    assert_eq!(
        refusal(tls),
        format!(
            "etcd at {plain} does not speak TLS: write http:// in store.endpoints, or give it a certificate"
        )
    );
    let bare = format!("http://127.0.0.1:{}", other.port);
    let said = refusal(options(std::slice::from_ref(&bare)));
    assert!(said.starts_with(&format!("etcd at {bare} cannot be reached")), "{said}");
    assert!(said.contains("(https:// if it wants TLS)"), "{said}");
}

/// Makes users and roles through the gateway: root, and `weft` with a role for the keys of weft.
fn enable_users(etcd: &Etcd) {
    let ask = |path: &str, body| {
        let answer = etcd.post(path, &body);
        assert!(answer["error"].is_null(), "{path}: {answer}");
    };
    for (user, password) in [("root", "toor"), ("weft", "secret"), ("other", "secret")] {
        ask("auth/user/add", json!({"name": user, "password": password}));
    }
    for role in ["root", "weft"] {
        ask("auth/role/add", json!({"name": role}));
        ask("auth/user/grant", json!({"user": role, "role": role}));
    }
    grant(etcd, None, "/weft/v1/");
    ask("auth/enable", json!({}));
}

/// Lets the role use a prefix.
fn grant(etcd: &Etcd, token: Option<&str>, prefix: &str) {
    let end = format!("{}0", prefix.trim_end_matches('/'));
    let permission = json!({"permType": "READWRITE", "key": base64(prefix), "range_end": base64(&end)});
    let answer = etcd.post_as(token, "auth/role/grant", &json!({"name": "weft", "perm": permission}));
    assert!(answer.is_some_and(|answer| answer["error"].is_null()), "{prefix}");
}

#[test]
fn users_and_passwords_open_what_their_role_allows() {
    if server::missing() {
        return;
    }
    let secured = Secured::start("127.0.0.1", NOW, true);
    let etcd = &secured.etcd;
    let client = secured.ca.sign(&secured.directory, "client", "nobody", NOW);
    let bare = EtcdOptions { identity: Some(client), ..secured.options() };
    let user = |name: &str, password: &str| {
        let file = secured.directory.join(&format!("password-{name}-{password}"));
        std::fs::write(&file, format!("{password}\n")).expect("a file");
        EtcdOptions { user: Some((name.into(), file)), ..bare.clone() }
    };
    // Before users are enabled a login is as good as none.
    runtime().block_on(open(user("weft", "secret")).list()).expect("up");
    enable_users(etcd);
    assert_eq!(
        refusal(user("weft", "wrong")),
        "etcd refuses the user weft or the password: correct store.user and store.password_file"
    );
    assert_eq!(
        refusal(user("nobody", "secret")),
        "etcd refuses the user nobody or the password: correct store.user and store.password_file"
    );
    assert_eq!(
        refusal(user("other", "secret")),
        "etcd lets other not use the keys of weft: run `etcdctl role grant-permission ROLE readwrite --prefix=true /weft/v1/`"
    );
    // The name in the certificate is a user to etcd; there is none of that name.
    let said = refusal(bare.clone());
    assert_eq!(
        said,
        "etcd lets this node's certificate not use the keys of weft: run `etcdctl role grant-permission ROLE readwrite --prefix=true /weft/v1/`"
    );
    runtime().block_on(async {
        let store = open(user("weft", "secret"));
        let mut watch = store.watch();
        let first = store.put_if(key(1), Expect::Absent, b"a".to_vec()).await.expect("absent");
        learns_of(&mut watch, first).await;
        // A change of roles makes every token old; nobody should notice.
        let login = etcd.post("auth/authenticate", &json!({"name": "root", "password": "toor"}));
        grant(etcd, login["token"].as_str(), "/elsewhere/");
        let second = store.put_if(key(1), Expect::Revision(first), b"b".to_vec()).await.expect("current");
        learns_of(&mut watch, second).await;
    });
}

#[test]
fn a_login_that_a_restart_forgot_is_renewed() {
    if server::missing() {
        return;
    }
    let mut etcd = Etcd::start();
    let directory = Directory::new();
    let file = directory.join("password");
    std::fs::write(&file, "secret").expect("a file");
    enable_users(&etcd);
    runtime().block_on(async {
        let store = open(EtcdOptions { user: Some(("weft".into(), file)), ..etcd.options() });
        let first = store.put_if(key(1), Expect::Absent, b"a".to_vec()).await.expect("absent");
        let mut watch = store.watch();
        etcd.restart();
        let after = listed(&store).await;
        assert_eq!(after.entries[&key(1)].revision, first);
        let second = store.put_if(key(1), Expect::Revision(first), b"b".to_vec()).await.expect("current");
        learns_of(&mut watch, second).await;
    });
}
