//! What the local socket asks of sites: how they stand, and what the own one is to say of them.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::oneshot;
use tracing::info;
use weft_wire::api::{PairSecret, Reply, Site, SiteRequest, Sites};
use weft_wire::invite::Token;
use weft_wire::mesh::{LONGEST_INVITATION, MemberState, SiteStanding, SiteView, Terms, Trust};
use weft_wire::site::SiteKey;
use weft_wire::types::{NameError, NodeName, PublicKey, SiteName, Subnet};

use super::Node;
use crate::config::Config;
use crate::control::PairView;
use crate::state;

/// Puts together how other sites are judged; nothing where the configuration names no key.
pub(super) fn trust(config: &Config) -> Result<Option<Trust>, String> {
    let signer = config.site.key_file.as_deref().map(read_key).transpose()?;
    let derived = signer.as_ref().map(SiteKey::public);
    let site = match (config.site.key, derived) {
        (Some(key), Some(derived)) if key != derived => {
            return Err(format!(
                "site.key is not the public key of {} ({derived}): name the file of this site, or that key",
                config.site.key_file.as_deref().unwrap_or(Path::new("site.key_file")).display()
            ));
        }
        (key, derived) => key.or(derived),
    };
    let ranges = config.cluster.carver.cidrs().iter();
    let prefixes = ranges
        .map(|range| Subnet::try_from(range.cidr).map_err(|error| format!("cluster.cidrs: {error}")))
        .collect::<Result<_, _>>()?;
    Ok(site.map(|site| Trust { site, prefixes, signer }))
}

fn read_key(path: &Path) -> Result<SiteKey, String> {
    let text = state::read_secret(path).map_err(|error| error.to_string())?.ok_or_else(|| {
        format!(
            "{} does not exist: make a key with `weft site generate-key` once for the whole site, or remove site.key_file",
            path.display()
        )
    })?;
    SiteKey::from_secret_text(&text).map_err(|error| format!("{}: {error}", path.display()))
}

impl Node {
    pub(super) fn sites(&self, now: Instant) -> Sites {
        let paths = self.site_paths(now);
        let mesh = &self.control.mesh;
        let own = mesh.own_site();
        let site = self.control.config.node.site.to_string();
        let by = |view: &SiteView| match mesh.sites().find(|other| other.key == view.by) {
            Some(other) => other.site.to_string(),
            None => site.clone(),
        };
        let shown = |view: &SiteView| {
            let of_site = || mesh.members().filter(|member| *member.site == view.site);
            let (standing, prefixes) = match &view.standing {
                SiteStanding::Unknown => ("unknown", Vec::new()),
                SiteStanding::Expelled => ("expelled", Vec::new()),
                SiteStanding::Left => ("left", Vec::new()),
                SiteStanding::Member { prefixes, .. } => {
                    ("member", prefixes.iter().map(ToString::to_string).collect())
                }
            };
            let alive = of_site().filter(|member| member.state == MemberState::Alive).count();
            Site {
                site: view.site.to_string(),
                key: view.key.to_string(),
                standing: standing.into(),
                prefixes,
                admitted_by: by(view),
                nodes: of_site().count() as u32,
                alive: alive as u32,
                problems: view.problems.clone(),
                path: paths.iter().find(|path| path.site == view.site.as_str()).cloned(),
            }
        };
        let ranges = self.control.config.cluster.carver.cidrs().iter();
        Sites {
            key: own.map(|(key, _)| key.to_string()).unwrap_or_default(),
            speaks: own.is_some_and(|(_, speaks)| speaks),
            prefixes: ranges.map(|range| range.cidr.to_string()).collect(),
            sites: mesh.sites().map(shown).collect(),
            site,
        }
    }

    /// Returns which secrets this node shares with other sites, and with whom it does without.
    pub(super) fn pair_secrets(&self) -> Vec<PairSecret> {
        let shown = |view: PairView| PairSecret {
            site: view.site.to_string(),
            id: view.latest.as_ref().map(|secret| secret.id().to_string()).unwrap_or_default(),
            generation: view.latest.as_ref().map_or(0, weft_wire::pair::PairSecret::generation),
            without: view.without.iter().map(ToString::to_string).collect(),
        };
        self.control.pair_views().into_iter().map(shown).collect()
    }

    /// Returns what is wrong with other sites, for people.
    pub(super) fn site_problems(&self, now: Instant) -> impl Iterator<Item = String> + '_ {
        let of_site = |view: &SiteView| {
            let site = view.site.clone();
            view.problems.clone().into_iter().map(move |problem| format!("site {site}: {problem}"))
        };
        let said = self.control.problems.site.iter().cloned();
        said.chain(self.control.mesh.sites().flat_map(of_site)).chain(self.control.site_troubles(now))
    }

    /// Has the own site say something.
    pub(super) fn speak(&mut self, request: &SiteRequest, now: Instant) -> Reply {
        let said = match request.action.as_str() {
            "admit" => self.admit(request, now),
            "expel" => self.expel(&request.site, now),
            "void" => self.declare_void(&request.node, now),
            "invite" => self.invite(request, now),
            "leave" => self.leave_sites(now),
            "rekey" => self.rekey(now),
            other => Err((
                1,
                format!("unknown action {other:?}: use admit, expel, void, invite, join, leave or rekey"),
            )),
        };
        match said {
            Ok(sentence) => {
                info!(
                    action = request.action,
                    site = request.site,
                    node = request.node,
                    "the site has spoken"
                );
                Reply::done(sentence)
            }
            Err((code, why)) => Reply::refusal(code, why),
        }
    }

    fn admit(&mut self, request: &SiteRequest, now: Instant) -> Result<String, (u32, String)> {
        let refused = |why: String| (1, why);
        let site: SiteName = request.site.parse().map_err(|error| refused(format!("{error}")))?;
        let key: PublicKey =
            request.key.parse().map_err(|error| refused(format!("{}: {error}", request.key)))?;
        let prefixes = prefixes(request)?;
        if prefixes.is_empty() {
            return Err(refused(format!(
                "name the prefixes that site {site} may announce, for example 10.64.0.0/12"
            )));
        }
        if let Some(misfit) = self.control.mesh.misfit(&site, &key, &prefixes) {
            return Err(refused(misfit));
        }
        let told = self.control.mesh.admit(site.clone(), key, prefixes, now);
        told.map_err(|error| refused(error.to_string()))?;
        Ok(format!(
            "site {site} is let in; it believes this one once it lets {} in too",
            self.control.config.node.site
        ))
    }

    fn expel(&mut self, name: &str, now: Instant) -> Result<String, (u32, String)> {
        let known = self.control.mesh.sites().find(|view| view.site.as_str() == name);
        let (site, key) = known
            .map(|view| (view.site.clone(), view.key))
            .ok_or_else(|| (2, format!("no site {name:?} is known here; `weft sites` lists them")))?;
        self.control.mesh.expel(site.clone(), key, now).map_err(|error| (1, error.to_string()))?;
        let key = self.control.renew_mesh_key(now).map_err(|error| (1, error.to_string()))?;
        Ok(format!(
            "site {site} is expelled, and what came in through it: `weft sites` shows who is left; the others go over to cluster key {key}, which it does not get"
        ))
    }

    fn invite(&mut self, request: &SiteRequest, now: Instant) -> Result<String, (u32, String)> {
        let refused = |why: String| (1, why);
        let site = (!request.site.is_empty()).then(|| request.site.parse()).transpose();
        let site = site.map_err(|error: NameError| refused(error.to_string()))?;
        let mut addresses = Vec::new();
        for text in &request.addresses {
            let port = self.control.config.gossip.port;
            let address = text.parse().or_else(|_| text.parse().map(|ip: IpAddr| SocketAddr::new(ip, port)));
            addresses.push(address.map_err(|_| {
                refused(format!("{text:?} is no address: write 192.0.2.1 or 192.0.2.1:{port}"))
            })?);
        }
        let valid = Duration::from_secs(request.valid_s);
        let longest = LONGEST_INVITATION.as_secs();
        if !(1..=longest).contains(&request.valid_s) {
            return Err(refused(format!("a token is good for 1 to {longest} seconds")));
        }
        let terms = Terms { site, prefixes: prefixes(request)?, valid, addresses };
        self.control.mesh.set_clock(unix_seconds(), now);
        let token = self.control.mesh.invite(terms, now).map_err(|error| refused(error.to_string()))?;
        if token.addresses.is_empty() {
            return Err(refused("this node has no address for others yet: name one with --address".into()));
        }
        Ok(token.to_secret_text())
    }

    /// Begins to join; the caller hears how it ended.
    pub(super) fn start_joining(
        &mut self,
        request: &SiteRequest,
        reply: oneshot::Sender<Reply>,
        now: Instant,
    ) {
        self.control.mesh.set_clock(unix_seconds(), now);
        let token = request.token.parse::<Token>().map_err(|error| error.to_string());
        let begun =
            token.and_then(|token| self.control.join_sites(token, now).map_err(|error| error.to_string()));
        match begun {
            Ok(()) => self.joining = Some(reply),
            Err(why) => {
                self.control.note_site_problem(format!("this site has not joined: {why}"), now);
                let _ = reply.send(Reply::refusal(1, why));
            }
        }
    }

    pub(super) fn finish_joining(&mut self, said: Result<String, String>) {
        if let Some(reply) = self.joining.take() {
            let _ = reply.send(match said {
                Ok(sentence) => Reply::done(sentence),
                Err(why) => Reply::refusal(1, why),
            });
        }
    }

    fn leave_sites(&mut self, now: Instant) -> Result<String, (u32, String)> {
        let others =
            self.control.mesh.sites().filter(|view| matches!(view.standing, SiteStanding::Member { .. }));
        let others: Vec<_> = others.map(|view| view.site.to_string()).collect();
        if others.is_empty() {
            return Err((1, "this site is with no other: there is nothing to leave".into()));
        }
        self.control.leave_sites(now).map_err(|error| (1, error.to_string()))?;
        Ok(format!(
            "site {} leaves {}: they drop its routes within seconds, and its nodes go over to a cluster key of their own",
            self.control.config.node.site,
            others.join(", ")
        ))
    }

    fn rekey(&mut self, now: Instant) -> Result<String, (u32, String)> {
        let key = self.control.renew_mesh_key(now).map_err(|error| (1, error.to_string()))?;
        Ok(format!("all sites go over to cluster key {key}; `weft cluster-key list` shows when a node has"))
    }

    fn declare_void(&mut self, name: &str, now: Instant) -> Result<String, (u32, String)> {
        if name.is_empty() {
            self.control.mesh.declare_void(None, now).map_err(|error| (1, error.to_string()))?;
            return Ok("all certificates so far are void; the nodes of this site get others".into());
        }
        let node: NodeName = name.parse().map_err(|error| (1, format!("{error}")))?;
        let key = self.control.mesh.member(&node).map(|member| member.record.key);
        let key = key.ok_or_else(|| (2, format!("no node {node} is known here; `weft peers` lists them")))?;
        self.control.mesh.declare_void(Some(key), now).map_err(|error| (1, error.to_string()))?;
        Ok(format!("the key of {node} is void in all sites: remove its node.key for it to take another"))
    }
}

fn prefixes(request: &SiteRequest) -> Result<Vec<Subnet>, (u32, String)> {
    let parse = |prefix: &String| prefix.parse::<Subnet>().map_err(|error| (1, error.to_string()));
    request.prefixes.iter().map(parse).collect()
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
