//! What the daemon does with a Kubernetes cluster beside keeping leases there: it follows the Secret with the cluster
//! keys and its own Node, and tells the Node whether pods can talk and what an operator should hear.
//!
//! A shell: it turns objects into plain values for the loop, and what the loop says into patches and Events. What follows
//! from them is decided by `control`, and by pure functions beside the calls. It watches two objects by name and
//! remembers no others. Invariants: nothing in here blocks the loop or takes anything away while the API server does not
//! answer; no more than [`events::A_MINUTE`] Events are written in a minute; what is not permitted is named once, verb by
//! verb.

mod condition;
mod events;
mod follow;
mod foreign;
mod node;
mod permissions;
mod secret;
mod trouble;

use std::path::Path;
use std::time::Duration;

use kube::Client;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tracing::{info, warn};
use weft_ipam::store::KubernetesOptions;
use weft_wire::seal::KeyRing;

pub use events::{Reason, Remark};
pub use node::{NodeView, moved, pod_cidrs};
pub use secret::ensure_keys;

/// How long one request may take.
const DEADLINE: Duration = Duration::from_secs(10);
/// Between two looks at what there is to tell the Node.
const LOOK: Duration = Duration::from_secs(2);
/// How long a daemon that ends may take to say why.
const LAST_WORDS: Duration = Duration::from_secs(4);
/// How much news waits for the loop.
const NEWS: usize = 16;

/// What the cluster tells the loop.
#[derive(Debug)]
pub enum News {
    /// The Secret names these cluster keys, or nothing that could be used.
    Keys(Result<KeyRing, String>),
    /// The Node of this node as it is now, if there is one; boxed for its size.
    Node(Option<Box<NodeView>>),
    /// What an operator should hear of the way to the API server and of the machine; replaces what was told before.
    Remarks(Vec<Remark>),
}

/// What the loop tells the cluster; the last word counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Said {
    /// Whether pods here can talk, and if not, which step is missing.
    pub ready: Result<(), String>,
    /// What an operator should hear.
    pub remarks: Vec<Remark>,
}

/// The tasks that talk to the cluster; they end when this is dropped.
#[derive(Debug)]
pub struct Kubernetes {
    said: watch::Sender<Option<Said>>,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Kubernetes {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Kubernetes {
    /// Starts to follow the cluster; news goes to the returned receiver.
    ///
    /// `key_file` holds the cluster keys that the node uses.
    pub fn start(
        client: Client,
        options: &KubernetesOptions,
        key_file: &Path,
    ) -> (Self, mpsc::Receiver<News>) {
        let (news, inbox) = mpsc::channel(NEWS);
        let (said, hear) = watch::channel(None);
        let (troubles, trouble) = watch::channel(trouble::Troubles::default());
        let (seen, node) = watch::channel(None);
        let name = options.node.to_string();
        let tasks = vec![
            tokio::spawn(secret::follow(
                client.clone(),
                options.namespace.clone(),
                key_file.to_owned(),
                news.clone(),
                troubles.clone(),
            )),
            tokio::spawn(node::follow(client.clone(), name.clone(), news.clone(), seen, troubles.clone())),
            tokio::spawn(permissions::review(client.clone(), options.clone(), troubles.clone())),
            tokio::spawn(tell(client, name, hear, node, troubles)),
            tokio::spawn(pass_on(trouble, news)),
        ];
        (Self { said, tasks }, inbox)
    }

    /// Takes what the Node should show.
    pub fn say(&self, said: Said) {
        self.said.send_if_modified(|last| {
            let news = last.as_ref() != Some(&said);
            *last = Some(said);
            news
        });
    }
}

/// Writes an Event about why the daemon ends, within a bound.
pub async fn last_words(options: &KubernetesOptions, sentence: &str) {
    let remark = Remark { reason: Reason::Ended, sentence: sentence.to_owned() };
    let words = async {
        let client = options.client().await.map_err(|error| error.to_string())?;
        let name = options.node.to_string();
        let uid = node::uid(&client, &name).await;
        events::write(&client, &name, uid, &remark, 1).await
    };
    match tokio::time::timeout(LAST_WORDS, words).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => info!(err = error, "the reason could not be told to the Node"),
        Err(_) => info!("the API server did not take the reason in time"),
    }
}

/// Tells the loop what the tasks found wrong, and what lies about on the machine.
async fn pass_on(mut trouble: watch::Receiver<trouble::Troubles>, news: mpsc::Sender<News>) {
    let mut last = Vec::new();
    loop {
        let mut remarks = trouble.borrow_and_update().remarks();
        remarks.extend(foreign::look(foreign::DIRECTORY));
        if remarks != last {
            last.clone_from(&remarks);
            if news.send(News::Remarks(remarks)).await.is_err() {
                return;
            }
        }
        // The directory sends no word of its own.
        let wait = tokio::time::timeout(foreign::LOOK, trouble.changed()).await;
        if matches!(wait, Ok(Err(_))) {
            return;
        }
    }
}

/// Brings what the loop said to the Node: the condition, and Events.
async fn tell(
    client: Client,
    name: String,
    mut hear: watch::Receiver<Option<Said>>,
    node: watch::Receiver<Option<NodeView>>,
    troubles: watch::Sender<trouble::Troubles>,
) {
    let mut condition = condition::Condition::default();
    let mut events = events::Events::default();
    loop {
        let now = std::time::Instant::now();
        let said = hear.borrow_and_update().clone();
        // Without a Node there is nothing to tell it to.
        let view = node.borrow().clone();
        if let (Some(said), Some(view)) = (said, view) {
            if let Some(wanted) = condition.next(view.network.as_ref(), &said.ready, now) {
                let outcome = condition::patch(&client, &name, &wanted).await;
                trouble::note(&troubles, trouble::Subject::Condition, outcome.err());
            }
            for (remark, count) in events.next(&said.remarks, now) {
                let written = events::write(&client, &name, Some(view.uid.clone()), &remark, count).await;
                if let Err(error) = &written {
                    warn!(err = error, reason = ?remark.reason, "an Event could not be written");
                    events.lost(&remark);
                }
                trouble::note(&troubles, trouble::Subject::Events, written.err());
            }
        }
        if matches!(tokio::time::timeout(LOOK, hear.changed()).await, Ok(Err(_))) {
            return;
        }
    }
}
