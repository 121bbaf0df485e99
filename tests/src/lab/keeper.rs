//! The keeper: the one process that owns a lab, and its only writer.
//!
//! Requests come one at a time over a socket in the lab's directory. While the lab comes up, and for as long as its
//! maker has not let it go, the keeper ends with its maker: a lab never outlives the run that wanted it by accident.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Child;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};

use super::etcd::{self, Etcd};
use super::home::Handle;
use super::model::{Impairment, NodeView, Options, Request, State, Store};
use super::nat::{self, Nat, Router};
use super::relay::Relay;
use super::underlay::Cut;
use super::{node, runtime, sites, tools, underlay};

/// What a keeper tells its maker, one JSON object a line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Word {
    /// Something was done, or is waited for.
    Progress(String),
    /// The lab is up.
    Ready,
    /// The lab cannot be made.
    Failed(String),
}

/// The line by which a maker lets the keeper go on alone.
pub(crate) const LET_GO: &str = "let go";

/// How long a started node may take until it answers and knows its peers.
const PATIENCE: Duration = Duration::from_secs(180);

/// Runs a keeper to its end. Expects to be in fresh mount, network and process namespaces.
///
/// # Errors
/// When the lab cannot be made; the maker has then been told.
pub fn keep(name: &str, dir: &Path) -> anyhow::Result<()> {
    let handle = Handle::at(name, dir);
    end_with_the_maker(handle.clone());
    let began = Instant::now();
    let said = make(&handle, began);
    match said {
        Ok((mut keeper, listener)) => {
            say(&Word::Ready);
            keeper.serve(&listener)
        }
        Err(error) => {
            say(&Word::Failed(format!("{error:#}")));
            Err(error)
        }
    }
}

fn say(word: &Word) {
    let mut line = serde_json::to_vec(word).expect("a word is plain data");
    line.push(b'\n');
    // The maker may have gone its way.
    std::io::stdout().write_all(&line).ok();
}

fn end_with_the_maker(handle: Handle) {
    let free = Arc::new(AtomicBool::new(false));
    std::thread::spawn(move || {
        for line in BufReader::new(std::io::stdin()).lines() {
            if line.is_ok_and(|line| line == LET_GO) {
                free.store(true, Ordering::Relaxed);
            }
        }
        if !free.load(Ordering::Relaxed) {
            handle.remove().ok();
            std::process::exit(0);
        }
    });
}

fn make(handle: &Handle, began: Instant) -> anyhow::Result<(Keeper, UnixListener)> {
    let options: Options = serde_json::from_str(
        &std::fs::read_to_string(handle.dir().join("options.json")).context("the lab has no options")?,
    )?;
    let listener = UnixListener::bind(handle.socket()).context("cannot listen in the lab's directory")?;
    node::write_shared(handle, &options)?;
    underlay::make()?;
    let nodes = options.nodes;
    let started = options.started;
    let mut keeper = Keeper {
        handle: handle.clone(),
        state: State {
            options,
            ready: false,
            nodes: Vec::new(),
            routers: Vec::new(),
            cuts: Vec::new(),
            udp_cuts: Vec::new(),
            impairments: Vec::new(),
            floors: Vec::new(),
        },
        holders: Vec::new(),
        routers: Vec::new(),
        daemons: BTreeMap::new(),
        etcd: None,
        relay: None,
        began,
        last_word: began,
        pods_made: 0,
    };
    if keeper.state.options.store == Store::Etcd {
        keeper.etcd = Some(Etcd::start(handle, &keeper.state.options)?);
        keeper.progress("etcd runs beside the nodes");
    }
    keeper.make_routers()?;
    for index in 1..=nodes {
        let site = sites::site_of(&keeper.state.options, index);
        let router = keeper.routers.iter().find(|router| router.view.site == site);
        let (view, holder) = node::make(handle, &keeper.state.options, index, router)?;
        keeper.holders.push(holder);
        keeper.state.nodes.push(view);
        keeper.progress_if_quiet(|| format!("{index} of {nodes} nodes"));
    }
    keeper.publish()?;
    keeper.wait_for_links()?;
    keeper.progress(&format!("{nodes} nodes on 192.0.2.0/24, with no way out"));

    let names: Vec<String> = keeper.state.nodes.iter().take(started).map(|node| node.name.clone()).collect();
    for name in &names {
        keeper.launch(name, 0)?;
    }
    for name in &names {
        keeper.wait_for_subnets(name)?;
    }
    keeper.progress(&format!("{started} daemons have their subnets"));
    let options = &keeper.state.options;
    if options.sites > 1 && !options.apart && started == nodes {
        sites::befriend(handle, &keeper.state)?;
        keeper.progress(&format!("{} sites have let each other in", keeper.state.options.sites));
    }
    for name in &names {
        keeper.default_pods(name)?;
        keeper.progress_if_quiet(|| format!("the pods of {name} are attached"));
    }
    keeper.progress(&format!("{} pods attached through weft-cni", keeper.state.pods().count()));
    for name in &names {
        keeper.wait_for_routes(name)?;
        keeper.progress_if_quiet(|| format!("{name} has all its routes"));
    }
    keeper.progress("every node has a route to every other node's pods");
    keeper.state.ready = true;
    keeper.publish()?;
    Ok((keeper, listener))
}

/// How long the keeper may work without a word.
const QUIET: Duration = Duration::from_millis(1500);

struct Keeper {
    handle: Handle,
    state: State,
    /// The processes that hold the nodes' namespaces. They end with the keeper.
    holders: Vec<Child>,
    routers: Vec<Router>,
    daemons: BTreeMap<String, Child>,
    etcd: Option<Etcd>,
    relay: Option<Relay>,
    began: Instant,
    last_word: Instant,
    pods_made: u64,
}

impl Keeper {
    fn serve(&mut self, listener: &UnixListener) -> anyhow::Result<()> {
        loop {
            let (stream, _) = listener.accept()?;
            if self.answer(stream) {
                return Ok(());
            }
        }
    }

    /// Answers one request. True if the lab ends.
    fn answer(&mut self, mut stream: UnixStream) -> bool {
        // A client that connects and says nothing must not stop the lab.
        stream.set_read_timeout(Some(Duration::from_secs(5))).ok();
        let mut line = String::new();
        if BufReader::new(&stream).read_line(&mut line).is_err() || line.is_empty() {
            return false;
        }
        let request: Result<Request, _> = serde_json::from_str(&line);
        let down = matches!(request, Ok(Request::Down));
        let answer = match request {
            Ok(request) => self.handle_request(request).map_err(|error| format!("{error:#}")),
            Err(error) => Err(format!("not a request: {error}")),
        };
        let mut line = serde_json::to_vec(&answer).expect("an answer is plain data");
        line.push(b'\n');
        stream.write_all(&line).ok();
        down
    }

    fn handle_request(&mut self, request: Request) -> anyhow::Result<State> {
        match request {
            Request::Status | Request::Down => {}
            Request::PodAdd { node, pod } => self.pod_add(&node, &pod)?,
            Request::PodRemove { node, pod } => self.pod_remove(&node, &pod)?,
            Request::Cut { a, b } => {
                let pair = self.pair(&a, &b)?;
                if !self.state.cuts.contains(&pair) {
                    underlay::cut(Cut::All, &self.macs(&pair)?)?;
                    self.state.cuts.push(pair);
                }
            }
            Request::Heal { a, b } => {
                let pair = self.pair(&a, &b)?;
                if self.state.cuts.contains(&pair) {
                    underlay::heal(Cut::All, &self.macs(&pair)?)?;
                    self.state.cuts.retain(|cut| *cut != pair);
                }
            }
            Request::CutUdp { a, b } => {
                let pair = self.pair(&a, &b)?;
                if !self.state.udp_cuts.contains(&pair) {
                    underlay::cut(Cut::Udp, &self.macs(&pair)?)?;
                    self.state.udp_cuts.push(pair);
                }
            }
            Request::HealUdp { a, b } => {
                let pair = self.pair(&a, &b)?;
                if self.state.udp_cuts.contains(&pair) {
                    underlay::heal(Cut::Udp, &self.macs(&pair)?)?;
                    self.state.udp_cuts.retain(|cut| *cut != pair);
                }
            }
            Request::Delay { a, b, ms } => {
                for (from, to) in [(&a, &b), (&b, &a)] {
                    self.impair(Impairment { from: from.clone(), to: to.clone(), ms, loss_percent: 0 })?;
                }
            }
            Request::Impair(impairment) => self.impair(impairment)?,
            Request::Nat { router, nat } => self.change_nat(&router, nat)?,
            Request::Befriend => sites::befriend(&self.handle, &self.state)?,
            Request::Floor { a, b, bytes } => self.floor(&a, &b, bytes)?,
            Request::Kill { node } => self.end_daemon(&node, nix::sys::signal::Signal::SIGKILL)?,
            Request::Stop { node } => self.end_daemon(&node, nix::sys::signal::Signal::SIGTERM)?,
            Request::Start { node, ahead_s } => self.start(&node, ahead_s)?,
        }
        self.refresh();
        self.publish()?;
        Ok(self.state.clone())
    }

    fn pair(&self, a: &str, b: &str) -> anyhow::Result<(String, String)> {
        self.state.public_mac(a)?;
        self.state.public_mac(b)?;
        if a == b {
            bail!("{a} and {b} are the same node");
        }
        Ok(if a < b { (a.to_owned(), b.to_owned()) } else { (b.to_owned(), a.to_owned()) })
    }

    fn macs(&self, pair: &(String, String)) -> anyhow::Result<(String, String)> {
        Ok((self.state.public_mac(&pair.0)?.to_owned(), self.state.public_mac(&pair.1)?.to_owned()))
    }

    fn impair(&mut self, impairment: Impairment) -> anyhow::Result<()> {
        let Impairment { from, to, ms, loss_percent } = &impairment;
        self.pair(from, to)?;
        anyhow::ensure!(*loss_percent <= 100, "a loss of {loss_percent} %: use 0 to 100");
        let macs = self.macs(&(from.clone(), to.clone()))?;
        if self.relay.is_none() {
            let nodes = self.state.nodes.iter().filter(|node| self.state.public_mac(&node.name).is_ok());
            let names =
                nodes.map(|node| &node.name).chain(self.state.routers.iter().map(|router| &router.name));
            self.relay = Some(Relay::start(&names.map(|name| underlay::port(name)).collect::<Vec<_>>())?);
        }
        let relay = self.relay.as_ref().expect("the relay was just started");
        relay.set(&macs, Duration::from_millis(*ms), *loss_percent)?;
        self.state.impairments.retain(|other| (&other.from, &other.to) != (from, to));
        if *ms > 0 || *loss_percent > 0 {
            self.state.impairments.push(impairment);
        }
        Ok(())
    }

    fn floor(&mut self, a: &str, b: &str, bytes: u32) -> anyhow::Result<()> {
        let pair = self.pair(a, b)?;
        let macs = self.macs(&pair)?;
        if self.state.floors.iter().any(|(a, b, _)| (a, b) == (&pair.0, &pair.1)) {
            underlay::lift(&macs)?;
            self.state.floors.retain(|(a, b, _)| (a, b) != (&pair.0, &pair.1));
        }
        if bytes > 0 {
            // Behind a router there may be any of them.
            let ends = |node: &&NodeView| {
                [a, b].contains(&node.name.as_str()) || [a, b].iter().any(|end| self.state.node(end).is_err())
            };
            for node in self.state.nodes.iter().filter(ends) {
                underlay::segment(&self.state, &node.name)?;
            }
            underlay::floor(&macs, bytes)?;
            self.state.floors.push((pair.0, pair.1, bytes));
        }
        Ok(())
    }

    fn make_routers(&mut self) -> anyhow::Result<()> {
        let options = self.state.options.clone();
        for site in (1..=options.sites).filter(|site| nat::of_site(&options, *site) != Nat::None) {
            let router = Router::start(&options, site)?;
            self.state.routers.push(router.view.clone());
            self.routers.push(router);
        }
        if !self.routers.is_empty() {
            self.progress(&format!("{} sites are behind NAT", self.routers.len()));
        }
        Ok(())
    }

    fn change_nat(&mut self, name: &str, nat: Nat) -> anyhow::Result<()> {
        self.state.router(name)?;
        for router in self.routers.iter_mut().filter(|router| router.view.name == name) {
            router.change(&self.state.options, nat)?;
        }
        self.state.routers = self.routers.iter().map(|router| router.view.clone()).collect();
        Ok(())
    }

    fn pod_add(&mut self, node: &str, pod: &str) -> anyhow::Result<()> {
        self.pods_made += 1;
        let container = format!("{}-{node}-{pod}-{}", self.state.options.name, self.pods_made);
        let view = runtime::add(&self.state, node, pod, &container)?;
        let node = self.state.node_mut(node)?;
        node.pods.push(view);
        node.pods.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(())
    }

    fn pod_remove(&mut self, node: &str, pod: &str) -> anyhow::Result<()> {
        runtime::remove(&self.state, node, pod)?;
        self.state.node_mut(node)?.pods.retain(|view| view.name != pod);
        Ok(())
    }

    fn default_pods(&mut self, node: &str) -> anyhow::Result<()> {
        for letter in ('a'..='z').take(self.state.options.pods) {
            let pod = letter.to_string();
            if self.state.node(node)?.pod(&pod).is_err() {
                self.pod_add(node, &pod)?;
            }
        }
        Ok(())
    }

    fn launch(&mut self, name: &str, ahead_s: u64) -> anyhow::Result<()> {
        let child = node::launch(&self.handle, &self.state, name, ahead_s)?;
        self.state.node_mut(name)?.daemon = Some(child.id());
        self.daemons.insert(name.to_owned(), child);
        Ok(())
    }

    fn start(&mut self, name: &str, ahead_s: u64) -> anyhow::Result<()> {
        if let Some(etcd) = self.etcd.as_mut().filter(|_| name == etcd::NAME) {
            return etcd.launch();
        }
        self.state.node(name)?;
        self.refresh();
        if self.daemons.contains_key(name) {
            bail!("the daemon of {name} runs already");
        }
        self.launch(name, ahead_s)?;
        self.wait_for_subnets(name)?;
        self.default_pods(name)
    }

    fn end_daemon(&mut self, name: &str, signal: nix::sys::signal::Signal) -> anyhow::Result<()> {
        if let Some(etcd) = self.etcd.as_mut().filter(|_| name == etcd::NAME) {
            return etcd.end(signal);
        }
        self.state.node(name)?;
        self.refresh();
        let Some(mut child) = self.daemons.remove(name) else {
            bail!("the daemon of {name} does not run");
        };
        let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id())?);
        nix::sys::signal::kill(pid, signal).context("cannot signal the daemon")?;
        let patience = Instant::now() + Duration::from_secs(15);
        while child.try_wait()?.is_none() {
            if Instant::now() > patience {
                self.daemons.insert(name.to_owned(), child);
                bail!("the daemon of {name} did not end within 15 s of {signal}: see weft-lab logs {name}");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        self.state.node_mut(name)?.daemon = None;
        Ok(())
    }

    /// Notices daemons that ended by themselves.
    fn refresh(&mut self) {
        self.daemons.retain(|_, child| matches!(child.try_wait(), Ok(None)));
        for node in &mut self.state.nodes {
            node.daemon = self.daemons.get(&node.name).map(Child::id);
        }
    }

    fn wait_for_subnets(&mut self, name: &str) -> anyhow::Result<()> {
        let mut last = String::new();
        self.wait_for(name, "gets ready", |keeper| {
            let ended =
                keeper.daemons.get_mut(name).is_none_or(|child| !matches!(child.try_wait(), Ok(None)));
            if ended {
                let end = node::last_words(&keeper.handle, name);
                bail!("the daemon of {name} ended while it started. Its last words:\n{end}");
            }
            let answer = node::status(&keeper.state, name)?;
            let done = answer.as_ref().is_ok_and(|status| {
                let some = status["subnets"].as_array().is_some_and(|subnets| !subnets.is_empty());
                some && status["ready"] != false
            });
            last = answer.map_or_else(
                |said| said,
                |status| format!("{} {}", status["blocked"].as_str().unwrap_or_default(), status["warnings"]),
            );
            Ok(if done { None } else { Some(last.clone()) })
        })
    }

    /// Waits until what one node sends another comes there.
    fn wait_for_links(&self) -> anyhow::Result<()> {
        let began = Instant::now();
        loop {
            let mut down = underlay::not_up(tools::tool)?;
            for machine in self.routers.iter().flat_map(Router::machines) {
                down.extend(underlay::not_up(|line| machine.tool(line))?);
            }
            for node in &self.state.nodes {
                down.extend(underlay::not_up(|line| node::run_within(node, line))?);
            }
            if down.is_empty() {
                return Ok(());
            }
            ensure!(began.elapsed() < PATIENCE, "these devices do not pass frames: {}", down.join(", "));
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn wait_for_routes(&mut self, name: &str) -> anyhow::Result<()> {
        self.wait_for(name, "waits for routes", |keeper| {
            let missing = node::missing_routes(&keeper.state, name)?;
            Ok(if missing.is_empty() {
                None
            } else {
                Some(format!("no route yet to {}", missing.join(", ")))
            })
        })
    }

    /// Waits until the check finds nothing that is still missing.
    fn wait_for(
        &mut self,
        node: &str,
        what: &str,
        mut check: impl FnMut(&mut Self) -> anyhow::Result<Option<String>>,
    ) -> anyhow::Result<()> {
        let began = Instant::now();
        while let Some(missing) = check(self)? {
            if began.elapsed() > PATIENCE {
                let end = node::last_words(&self.handle, node);
                bail!("{node} {what} for {} s: {missing}. Its last words:\n{end}", PATIENCE.as_secs());
            }
            self.progress_if_quiet(|| format!("{node} {what}: {missing}"));
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Says something if nothing was said for a while.
    fn progress_if_quiet(&mut self, what: impl FnOnce() -> String) {
        if self.last_word.elapsed() > QUIET {
            self.progress(&what());
        }
    }

    fn progress(&mut self, what: &str) {
        self.last_word = Instant::now();
        say(&Word::Progress(format!("[{:5.1} s] {what}", self.began.elapsed().as_secs_f32())));
    }

    fn publish(&self) -> anyhow::Result<()> {
        self.handle.write("lab.json", &self.state)
    }
}
