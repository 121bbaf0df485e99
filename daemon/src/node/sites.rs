//! What the local socket asks of sites: how they stand, and what the own one is to say of them.

use std::path::Path;
use std::time::Instant;

use tracing::info;
use weft_wire::api::{Reply, Site, SiteRequest, Sites};
use weft_wire::mesh::{MemberState, SiteStanding, SiteView, Trust};
use weft_wire::site::SiteKey;
use weft_wire::types::{NodeName, PublicKey, SiteName, Subnet};

use super::Node;
use crate::config::Config;
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

    /// Returns what is wrong with other sites, for people.
    pub(super) fn site_problems(&self) -> impl Iterator<Item = String> + '_ {
        let of_site = |view: &SiteView| {
            let site = view.site.clone();
            view.problems.clone().into_iter().map(move |problem| format!("site {site}: {problem}"))
        };
        self.control.problems.site.iter().cloned().chain(self.control.mesh.sites().flat_map(of_site))
    }

    /// Has the own site say something.
    pub(super) fn speak(&mut self, request: &SiteRequest, now: Instant) -> Reply {
        let said = match request.action.as_str() {
            "admit" => self.admit(request, now),
            "expel" => self.expel(&request.site, now),
            "void" => self.declare_void(&request.node, now),
            other => Err((1, format!("unknown action {other:?}: use admit, expel or void"))),
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
        let prefixes = request
            .prefixes
            .iter()
            .map(|prefix| prefix.parse::<Subnet>().map_err(|error| refused(error.to_string())))
            .collect::<Result<Vec<_>, _>>()?;
        if prefixes.is_empty() {
            return Err(refused(format!(
                "name the prefixes that site {site} may announce, for example 10.64.0.0/12"
            )));
        }
        let own = self.control.config.cluster.carver.cidrs().iter();
        let own = own.map(|range| (range.cidr, &self.control.config.node.site));
        let others =
            self.control.mesh.sites().filter(|view| view.key != key).flat_map(|view| match &view.standing {
                SiteStanding::Member { prefixes, .. } => {
                    prefixes.iter().map(|taken| (taken.net(), &view.site)).collect()
                }
                SiteStanding::Unknown | SiteStanding::Expelled => Vec::new(),
            });
        for (taken, holder) in own.chain(others) {
            let shares = |prefix: &&Subnet| {
                prefix.net().contains(&taken.network()) || taken.contains(&prefix.network())
            };
            if let Some(prefix) = prefixes.iter().find(shares) {
                return Err(refused(format!(
                    "{prefix} overlaps {taken} of site {holder}: give one of the two sites another range first"
                )));
            }
        }
        if site == self.control.config.node.site {
            return Err(refused(format!("this site is named {site} itself: rename one of the two")));
        }
        if let Some(view) = self.control.mesh.sites().find(|view| view.site == site && view.key != key)
            && view.standing != SiteStanding::Expelled
        {
            return Err(refused(format!(
                "a site named {site} is in already, with key {}: expel it first, or rename one of the two",
                view.key.short()
            )));
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
        Ok(format!("site {site} is expelled, and what came in through it: `weft sites` shows who is left"))
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
