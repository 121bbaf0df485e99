//! Every pod to every other pod, over every family both have.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde::Serialize;

use super::home::Handle;
use super::tools;

/// Pings each of the addresses it is given at once; one line each: address, exit code, milliseconds.
const PINGS: &str = r#"for ip; do {
    said=$(ping -n -q -c 1 -W 2 "$ip" 2>&1); code=$?
    echo "$ip $code $(printf %s "$said" | sed -n 's#^rtt[^=]*= \([^/]*\)/.*#\1#p')"
} & done; wait"#;

/// How many pods ping at the same time.
const WORKERS: usize = 4;

/// One ping.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Pair {
    /// The pod that sent, as `node/pod`.
    pub from: String,
    /// The pod that was to answer, as `node/pod`.
    pub to: String,
    /// The address that was pinged.
    pub ip: IpAddr,
    /// How long the answer took; none when it did not come within 2 s.
    pub rtt_ms: Option<f64>,
}

/// The answers of a whole lab.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Matrix {
    /// Every ordered pair of pods and address of the second.
    pub pairs: Vec<Pair>,
}

impl Matrix {
    /// Pings. Blocks for as long as the slowest answer takes, times the pods over the workers.
    ///
    /// # Errors
    /// When the lab is not up; a ping without an answer is not an error here.
    pub fn measure(handle: &Handle) -> anyhow::Result<Self> {
        let state = handle.state()?;
        let pods: Vec<(String, Vec<IpAddr>)> = state
            .pods()
            .map(|(node, pod)| (format!("{}/{}", node.name, pod.name), pod.ips.clone()))
            .collect();
        let next = AtomicUsize::new(0);
        let found = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..WORKERS.min(pods.len()))
                .map(|_| {
                    scope.spawn(|| -> anyhow::Result<()> {
                        while let Some((from, ips)) = pods.get(next.fetch_add(1, Ordering::Relaxed)) {
                            let pairs = from_pod(handle, from, ips, &pods)?;
                            found.lock().expect("no worker panics with the lock").extend(pairs);
                        }
                        Ok(())
                    })
                })
                .collect();
            workers.into_iter().try_for_each(|worker| worker.join().expect("a worker does not panic"))
        })?;
        let mut pairs = found.into_inner().expect("no worker panics with the lock");
        let rank: BTreeMap<&str, usize> =
            pods.iter().enumerate().map(|(rank, (name, _))| (name.as_str(), rank)).collect();
        pairs.sort_by_key(|pair| (rank[pair.from.as_str()], rank[pair.to.as_str()], pair.ip));
        Ok(Matrix { pairs })
    }

    /// The pings that got no answer.
    pub fn losses(&self) -> Vec<&Pair> {
        self.pairs.iter().filter(|pair| pair.rtt_ms.is_none()).collect()
    }
}

fn from_pod(
    handle: &Handle,
    from: &str,
    own: &[IpAddr],
    pods: &[(String, Vec<IpAddr>)],
) -> anyhow::Result<Vec<Pair>> {
    let mut to: BTreeMap<IpAddr, &str> = BTreeMap::new();
    for (name, ips) in pods.iter().filter(|(name, _)| name != from) {
        to.extend(
            ips.iter()
                .filter(|ip| own.iter().any(|own| own.is_ipv4() == ip.is_ipv4()))
                .map(|ip| (*ip, name.as_str())),
        );
    }
    let targets: Vec<String> = to.keys().map(IpAddr::to_string).collect();
    let mut words = vec!["sh", "-c", PINGS, "sh"];
    words.extend(targets.iter().map(String::as_str));
    let output = tools::output(&mut handle.command(from, &words)?)?;
    let mut answers: BTreeMap<IpAddr, f64> = BTreeMap::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let mut fields = line.split_ascii_whitespace();
        let (ip, code, rtt) = (fields.next(), fields.next(), fields.next());
        if let (Some(Ok(ip)), Some("0"), Some(Ok(rtt))) = (ip.map(str::parse), code, rtt.map(str::parse)) {
            answers.insert(ip, rtt);
        }
    }
    Ok(to
        .into_iter()
        .map(|(ip, name)| Pair {
            from: from.to_owned(),
            to: name.to_owned(),
            ip,
            rtt_ms: answers.get(&ip).copied(),
        })
        .collect())
}
