//! The Secret with the cluster keys: followed, and made where there is none.
//!
//! It holds the text of a key file, and a file of the node's holds what the node uses, so that a daemon starts without
//! the API server. How a node goes from one to the other is `control::ring`'s matter. Invariant: a Secret that is there
//! is never written to; of several nodes that make one at the same time one succeeds, and the others read what it made.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Client;
use kube::api::{Api, PostParams};
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};
use tracing::{info, warn};
use weft_ipam::store::KubernetesOptions;
use weft_wire::seal::{ClusterKey, KeyRing};

use super::events::{self, Reason, Remark};
use super::follow::Answer;
use super::trouble::{self, Ask, Subject, Troubles, sentence};
use super::{DEADLINE, News, follow, node, permissions};
use crate::ring_file::{parse_ring, read_ring, write_ring};
use crate::state;

/// The Secret, and the key in it.
pub(super) const NAME: &str = "weft-cluster-key";
const KEY: &str = "cluster.key";
/// A Secret that is gone may be on its way back, as `kubectl replace --force` brings it.
const GONE: Duration = Duration::from_secs(60);
/// The first and the longest wait between two attempts at a first key.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));

/// Follows the Secret for ever.
pub(super) async fn follow(
    client: Client,
    namespace: String,
    key_file: PathBuf,
    news: mpsc::Sender<News>,
    troubles: watch::Sender<Troubles>,
) {
    let api: Api<Secret> = Api::namespaced(client, &namespace);
    let place = format!("Secret {namespace}/{NAME}");
    let (tell, mut hear) = mpsc::channel::<Answer<Secret>>(1);
    let follow = follow::follow(api.clone(), NAME, "secrets", tell);
    let take = async move {
        while let Some(answer) = hear.recv().await {
            trouble::note(&troubles, Subject::Secret, answer.as_ref().err().cloned());
            let keys = match answer {
                Err(_) => continue,
                Ok(Some(secret)) => read(&secret, &place),
                Ok(None) => {
                    tokio::spawn(restore(api.clone(), key_file.clone()));
                    Err(format!(
                        "{place} is gone: it is made again from the keys of a node, unless you do so first"
                    ))
                }
            };
            if news.send(News::Keys(keys)).await.is_err() {
                return;
            }
        }
    };
    tokio::join!(follow, take);
}

/// Makes a Secret again that is still gone after a while, from the keys that this node uses.
async fn restore(api: Api<Secret>, key_file: PathBuf) {
    sleep(GONE).await;
    let ring = match read_ring(&key_file) {
        Ok(ring) => ring,
        Err(error) => return warn!(err = error, "the Secret with the cluster keys cannot be made again"),
    };
    match create(&api, &ring).await {
        Ok(true) => info!("the Secret with the cluster keys was gone and is made again"),
        Ok(false) => {}
        Err(error) => warn!(err = error, "the Secret with the cluster keys cannot be made again"),
    }
}

/// Returns whether it was made; not where there is one already.
async fn create(api: &Api<Secret>, ring: &KeyRing) -> Result<bool, String> {
    let text: String = ring.keys().map(|key| key.to_secret_text() + "\n").collect();
    let secret = Secret {
        metadata: ObjectMeta { name: Some(NAME.into()), ..ObjectMeta::default() },
        data: Some(BTreeMap::from([(KEY.to_owned(), ByteString(text.into_bytes()))])),
        type_: Some("Opaque".into()),
        ..Secret::default()
    };
    match timeout(DEADLINE, api.create(&PostParams::default(), &secret)).await {
        Ok(Ok(_)) => Ok(true),
        Ok(Err(kube::Error::Api(status))) if status.code == 409 => Ok(false),
        Ok(Err(error)) => Err(sentence(&Ask { verb: "create", what: "secrets" }, &error)),
        Err(_) => Err("the API server did not take the Secret with the cluster keys in time".to_owned()),
    }
}

fn read(secret: &Secret, place: &str) -> Result<KeyRing, String> {
    let text = secret
        .data
        .as_ref()
        .and_then(|data| data.get(KEY))
        .and_then(|bytes| std::str::from_utf8(&bytes.0).ok());
    let what_to_do = "write keys of 64 hexadecimal digits into it, one a line, the one to use first; the nodes go on with the keys that they have";
    let text = text.ok_or_else(|| format!("{place} has no text under {KEY}: {what_to_do}"))?;
    parse_ring(text, place).map_err(|error| format!("{error}; {what_to_do}"))
}

/// Sees to it that the node has cluster keys: its own file, or else the Secret, or else a new key that becomes the Secret.
///
/// Waits for the API server for as long as that takes, and says why. Cancelled, it leaves the file whole or absent.
///
/// # Errors
/// A file that cannot be written, or credentials that cannot be used: one sentence.
pub async fn ensure_keys(options: &KubernetesOptions, key_file: &Path) -> Result<(), String> {
    if key_file.exists() {
        return Ok(());
    }
    if let Some(directory) = key_file.parent() {
        std::fs::create_dir_all(directory).map_err(|error| {
            format!("cannot make {}: {error}; choose another node.state_dir", directory.display())
        })?;
    }
    let client = options.client().await.map_err(|error| error.to_string())?;
    let api: Api<Secret> = Api::namespaced(client.clone(), &options.namespace);
    let place = format!("Secret {}/{NAME}", options.namespace);
    let (mut wait, mut told) = (BACKOFF.0, String::new());
    loop {
        match first_keys(&api, &place).await {
            Ok(ring) => {
                let ids: Vec<_> = ring.ids().collect();
                info!(keys = ?ids, "the cluster keys are those of the Secret");
                return write_ring(key_file, &ring).map_err(|error| error.to_string());
            }
            Err(why) if why != told => {
                warn!(err = why, "no cluster keys yet");
                tell(&client, options, &why).await;
                told = why;
            }
            Err(_) => {}
        }
        sleep(wait).await;
        wait = (wait * 2).min(BACKOFF.1);
    }
}

async fn first_keys(api: &Api<Secret>, place: &str) -> Result<KeyRing, String> {
    // Twice at most: whoever was first has made it.
    for _ in 0..2 {
        let secret = match timeout(DEADLINE, api.get_opt(NAME)).await {
            Ok(answer) => answer.map_err(|error| sentence(&Ask { verb: "get", what: "secrets" }, &error))?,
            Err(_) => return Err(format!("the API server did not answer within {} s", DEADLINE.as_secs())),
        };
        if let Some(secret) = secret {
            return read(&secret, place);
        }
        let key = ClusterKey::from_bytes(state::random().map_err(|error| error.to_string())?);
        let ring = KeyRing::new(vec![key]).map_err(|error| error.to_string())?;
        if create(api, &ring).await? {
            return Ok(ring);
        }
    }
    Err(format!("{place} comes and goes: see who deletes it"))
}

/// Tells the Node, as far as that is permitted; what is not is logged.
async fn tell(client: &Client, options: &KubernetesOptions, why: &str) {
    let missing = permissions::missing(client, options).await.flatten();
    let mut remarks = vec![Remark { reason: Reason::ClusterKey, sentence: why.to_owned() }];
    remarks.extend(missing.map(|sentence| Remark { reason: Reason::MissingPermission, sentence }));
    let name = options.node.to_string();
    let uid = node::uid(client, &name).await;
    for remark in remarks {
        if remark.reason == Reason::MissingPermission {
            warn!("{}", remark.sentence);
        }
        if let Err(error) = events::write(client, &name, uid.clone(), &remark, 1).await {
            info!(err = error, "an Event could not be written");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(key: &str, text: &[u8]) -> Secret {
        let data = Some(BTreeMap::from([(key.to_owned(), ByteString(text.to_vec()))]));
        Secret { data, ..Secret::default() }
    }

    #[test]
    fn nonsense_in_the_secret_is_a_sentence_that_shows_no_key() {
        let place = "Secret weft-system/weft-cluster-key";
        let (one, two) = ("1".repeat(64), "2".repeat(64));
        let good = format!("# the new one\n{two}\n{one}\n");
        assert_eq!(read(&secret(KEY, good.as_bytes()), place).expect("a ring").ids().count(), 2);
        for (data, said) in [
            (secret("other", good.as_bytes()), "has no text under cluster.key"),
            (secret(KEY, b"\xff\xfe"), "has no text under cluster.key"),
            (secret(KEY, b"\n# nothing\n"), "the cluster key ring is empty"),
            (secret(KEY, format!("{one}\n{}\n", &two[1..]).as_bytes()), "weft-cluster-key:2: "),
            (secret(KEY, format!("{one}\n{one}\n").as_bytes()), "twice"),
        ] {
            let error = read(&data, place).expect_err("nonsense");
            assert!(error.starts_with(place) && error.contains(said), "{error}");
            assert!(!error.contains(&two[1..]) && !error.contains(&one), "{error}");
        }
    }
}
