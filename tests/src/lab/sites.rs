//! A lab of several sites: each has a store, ranges and a key of its own, and the first of its nodes speaks for it.
//!
//! With one site nothing of this is configured.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use anyhow::Context;
use weft_wire::site::SiteKey;

use super::enter::{self, Place};
use super::home::Handle;
use super::model::{Options, State};
use super::tools;

/// Where a node that speaks for its site has the secret key.
pub(crate) const SITE_KEY: &str = "/etc/weft/site.key";
/// The ranges that fit below 10.0.0.0/8 beside those of the first site.
pub(crate) const MOST: usize = 13;

/// Returns the number of a node's site, counted from 1 as the nodes are.
pub fn site_of(options: &Options, node: usize) -> usize {
    (node - 1) * options.sites / options.nodes + 1
}

/// Returns the number of the site of the node with this name.
pub(crate) fn of(options: &Options, name: &str) -> usize {
    site_of(options, name.trim_start_matches('n').parse().unwrap_or(1))
}

/// Returns the file of a site's cluster key among what is shared: one for all unless they begin apart.
pub(crate) fn cluster_key(options: &Options, site: usize) -> String {
    if options.apart && site > 1 { format!("cluster-{site}.key") } else { "cluster.key".to_owned() }
}

/// Returns the name of a site.
pub fn name(site: usize) -> String {
    format!("s{site}")
}

/// Returns the range of pods of a site, IPv4 and IPv6.
pub fn ranges(site: usize) -> (String, String) {
    (format!("10.{}.0.0/12", 16 * (site + 1)), format!("fd00:{}::/48", 31 + site))
}

fn key_file(handle: &Handle, site: usize) -> PathBuf {
    handle.shared().join(format!("site-{site}.key"))
}

/// Makes the key of each site.
pub(crate) fn write_keys(handle: &Handle, options: &Options) -> anyhow::Result<()> {
    for site in (1..=options.sites).filter(|_| options.sites > 1) {
        let mut secret = [0; 32];
        File::open("/dev/urandom")?.read_exact(&mut secret)?;
        let path = key_file(handle, site);
        fs::write(&path, &*SiteKey::from_secret(secret).to_secret_text())?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    }
    Ok(())
}

/// Returns the key of a site.
///
/// # Errors
/// In a lab of one site, which has none.
pub fn key(handle: &Handle, site: usize) -> anyhow::Result<SiteKey> {
    let path = key_file(handle, site);
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(SiteKey::from_secret_text(&text)?)
}

/// Returns a node's part of the configuration that tells its site from others.
pub(crate) fn config(handle: &Handle, options: &Options, node: usize) -> anyhow::Result<String> {
    if options.sites == 1 {
        return Ok(String::new());
    }
    let site = site_of(options, node);
    let mut text =
        format!("[node]\nsite = \"{}\"\n[site]\nkey = \"{}\"\n", name(site), key(handle, site)?.public());
    if speaks(options, node) {
        text += &format!("key_file = \"{SITE_KEY}\"\n");
    }
    Ok(text + "[encryption]\npolicy = \"cross-site\"\n")
}

/// Returns whether a node speaks for its site.
pub(crate) fn speaks(options: &Options, node: usize) -> bool {
    options.sites > 1 && (node == 1 || site_of(options, node - 1) != site_of(options, node))
}

/// Returns the node that speaks for a site.
pub fn speaker(options: &Options, site: usize) -> String {
    let node = (1..=options.nodes).find(|node| site_of(options, *node) == site && speaks(options, *node));
    format!("n{}", node.unwrap_or(1))
}

/// Has each site let all others in.
pub(crate) fn befriend(handle: &Handle, state: &State) -> anyhow::Result<()> {
    let options = &state.options;
    let pairs = (1..=options.sites).flat_map(|site| (1..=options.sites).map(move |other| (site, other)));
    for (site, other) in pairs.filter(|(site, other)| site != other) {
        let (v4, v6) = ranges(other);
        let wanted = [(options.overlay.v4(), v4), (options.overlay.v6(), v6)];
        let mut words = enter::from_keeper(state, &Place::Node(speaker(options, site)))?;
        let key = key(handle, other)?.public().to_string();
        words.extend(["weft", "site", "admit", &name(other), &key].map(str::to_owned));
        words.extend(wanted.into_iter().filter(|(is_wanted, _)| *is_wanted).map(|(_, range)| range));
        let output = tools::output(&mut enter::command(&words))?;
        anyhow::ensure!(output.status.success(), "{}: {}", words.join(" "), tools::said(&output));
    }
    Ok(())
}
