//! `weft-lab`: a weft cluster on one machine, for trying things and for the tests.
#![forbid(unsafe_code)]

use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::Context;
use clap::{Parser, Subcommand, ValueEnum};
use serde_json::{Value, json};
use weft_tests::lab::{
    Backend, Families, Handle, Impairment, Lab, Matrix, Nat, Options, Place, Presence, Request, State, Store,
    sites,
};

#[derive(Parser)]
#[command(
    name = "weft-lab",
    version,
    about = "A weft cluster on one machine: nodes and pods as network namespaces"
)]
struct Cli {
    /// Which lab
    #[arg(long, global = true, default_value = "lab")]
    name: String,
    /// Answer in JSON
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Bring the lab up
    Up(Up),
    /// Show the nodes and pods
    Status,
    /// Run a command in a node, in a pod (NODE/POD), or on the switch between the nodes (underlay)
    Exec {
        /// n1, n1/a, or underlay
        place: String,
        /// The command and its arguments
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Add or remove a pod
    #[command(subcommand)]
    Pod(Pod),
    /// Let two nodes or routers no longer hear each other
    Cut {
        /// One of them
        a: String,
        /// The other
        b: String,
        /// No UDP of each other: all else passes
        #[arg(long)]
        udp: bool,
    },
    /// Undo a cut
    Heal {
        /// One of them
        a: String,
        /// The other
        b: String,
        /// A cut of UDP
        #[arg(long)]
        udp: bool,
    },
    /// Delay what two nodes or routers send each other, each way; 0 takes the delay away
    Delay {
        /// One of them
        a: String,
        /// The other
        b: String,
        /// Milliseconds
        ms: u64,
        /// Milliseconds from the second to the first, where that is another time
        #[arg(long)]
        back: Option<u64>,
        /// So many frames of a hundred are lost, each way
        #[arg(long, default_value_t = 0)]
        loss: u8,
    },
    /// Have a router translate in another way, and forget its mappings as one that starts anew
    Nat {
        /// r1 is the router before site s1
        router: String,
        /// How
        #[arg(value_enum)]
        nat: Nat,
    },
    /// End a node's daemon with SIGKILL
    Kill {
        /// The node
        node: String,
    },
    /// End a node's daemon with SIGTERM
    Stop {
        /// The node
        node: String,
    },
    /// Start a node's daemon
    Start {
        /// The node
        node: String,
    },
    /// Show what a node's daemon wrote
    Logs {
        /// The node
        node: String,
        /// Go on showing what it writes
        #[arg(short, long)]
        follow: bool,
    },
    /// Ping every pod from every pod; exits 1 on a loss
    Ping,
    /// Say how to look around
    Hints,
    /// Take the lab down
    Down {
        /// Every lab of this user
        #[arg(long)]
        all: bool,
    },
    #[command(hide = true)]
    Keeper {
        /// The lab's directory
        dir: PathBuf,
    },
}

#[derive(Subcommand)]
enum Pod {
    /// Make a pod and attach it through weft-cni
    Add {
        /// The node
        node: String,
        /// The pod's name
        pod: String,
    },
    /// Detach a pod and remove it
    Rm {
        /// The node
        node: String,
        /// The pod's name
        pod: String,
    },
}

#[derive(clap::Args)]
struct Up {
    /// How many nodes
    #[arg(long, default_value_t = 3)]
    nodes: usize,
    /// How many of them run their daemon from the start [default: all]
    #[arg(long)]
    started: Option<usize>,
    /// How many pods each node gets
    #[arg(long, default_value_t = 2)]
    pods: usize,
    /// How many sites the nodes are spread over
    #[arg(long, default_value_t = 1)]
    sites: usize,
    /// What stands before each site, the first one first: it leaves one at least without
    #[arg(long, value_enum, value_delimiter = ',')]
    nat: Vec<Nat>,
    /// How pod traffic crosses between nodes
    #[arg(long, value_enum, default_value = "vxlan")]
    backend: Backend,
    /// Where leases are kept
    #[arg(long, value_enum, default_value = "sqlite")]
    store: Store,
    /// IPv4 and IPv6, between the nodes and for the pods
    #[arg(long)]
    dual_stack: bool,
    /// The families between the nodes [default: v4]
    #[arg(long, value_enum, conflicts_with = "dual_stack")]
    underlay: Option<Families>,
    /// The families of the pods [default: v4]
    #[arg(long, value_enum, conflicts_with = "dual_stack")]
    overlay: Option<Families>,
    /// A TOML file that is merged into every node's configuration
    #[arg(long)]
    config: Option<PathBuf>,
    /// Where weftd, weft and weft-cni are [default: $WEFT_BIN_DIR, or beside weft-lab]
    #[arg(long)]
    bin_dir: Option<PathBuf>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match act(&cli) {
        Ok(code) => code,
        // Whoever read the output has seen enough.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            if cli.json {
                print_json(&json!({ "error": format!("{error:#}") })).ok();
            }
            eprintln!("weft-lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

fn act(cli: &Cli) -> anyhow::Result<ExitCode> {
    let handle = Handle::new(&cli.name);
    let tell = |request: Request, said: String| -> anyhow::Result<ExitCode> {
        let state = handle.request(&request)?;
        show(cli, &said, &state)
    };
    match &cli.command {
        Verb::Up(up) => bring_up(cli, &handle, up),
        Verb::Status => {
            let state = handle.request(&Request::Status)?;
            show(cli, &table(&state), &state)
        }
        Verb::Exec { place, command } => {
            let place: Place = place.as_str().into();
            let words: Vec<&str> = command.iter().map(String::as_str).collect();
            // Returns only when it fails: the command takes this process's place.
            let error = handle.command(place, &words)?.exec();
            Err(error).context("cannot run nsenter: is util-linux installed?")
        }
        Verb::Pod(Pod::Add { node, pod }) => {
            let state = handle.request(&Request::PodAdd { node: node.clone(), pod: pod.clone() })?;
            let view = state.node(node)?.pod(pod)?;
            let ips: Vec<String> = view.ips.iter().map(ToString::to_string).collect();
            if cli.json {
                print_json(&json!(view))
            } else {
                writeln!(io::stdout(), "{node}/{pod} has {}", ips.join(" and "))?;
                Ok(ExitCode::SUCCESS)
            }
        }
        Verb::Pod(Pod::Rm { node, pod }) => {
            tell(Request::PodRemove { node: node.clone(), pod: pod.clone() }, format!("{node}/{pod} is gone"))
        }
        Verb::Cut { a, b, udp } => {
            let (one, other) = (a.clone(), b.clone());
            let (request, what) = match udp {
                false => (Request::Cut { a: one, b: other }, "each other"),
                true => (Request::CutUdp { a: one, b: other }, "UDP of each other"),
            };
            tell(request, format!("{a} and {b} do not hear {what}"))
        }
        Verb::Heal { a, b, udp } => {
            let (one, other) = (a.clone(), b.clone());
            let request = match udp {
                false => Request::Heal { a: one, b: other },
                true => Request::HealUdp { a: one, b: other },
            };
            tell(request, format!("{a} and {b} hear each other"))
        }
        Verb::Delay { a, b, ms, back, loss } => {
            let back = back.unwrap_or(*ms);
            let one_way = |from: &String, to: &String, ms: u64| {
                let (from, to) = (from.clone(), to.clone());
                Request::Impair(Impairment { from, to, ms, loss_percent: *loss })
            };
            handle.request(&one_way(a, b, *ms))?;
            let said =
                format!("from {a} to {b} it takes {ms} ms longer, and {back} ms back; {loss} % is lost");
            tell(one_way(b, a, back), said)
        }
        Verb::Nat { router, nat } => {
            let said = format!("{router} translates anew");
            tell(Request::Nat { router: router.clone(), nat: *nat }, said)
        }
        Verb::Kill { node } => {
            tell(Request::Kill { node: node.clone() }, format!("the daemon of {node} was killed"))
        }
        Verb::Stop { node } => {
            tell(Request::Stop { node: node.clone() }, format!("the daemon of {node} stopped"))
        }
        Verb::Start { node } => {
            tell(Request::Start { node: node.clone(), ahead_s: 0 }, format!("the daemon of {node} runs"))
        }
        Verb::Logs { node, follow } => logs(cli, &handle, node, *follow),
        Verb::Ping => ping(cli, &handle),
        Verb::Hints => {
            print!("{}", hints(&handle.state()?));
            Ok(ExitCode::SUCCESS)
        }
        Verb::Down { all } => take_down(cli, &handle, *all),
        Verb::Keeper { dir } => {
            weft_tests::lab::keep(&cli.name, dir)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn print_json(value: &Value) -> anyhow::Result<ExitCode> {
    let mut value = value.clone();
    value["schema_version"] = json!(1);
    writeln!(io::stdout(), "{value:#}")?;
    Ok(ExitCode::SUCCESS)
}

fn show(cli: &Cli, said: &str, state: &State) -> anyhow::Result<ExitCode> {
    if cli.json {
        print_json(&json!(state))
    } else {
        writeln!(io::stdout(), "{}", said.trim_end())?;
        Ok(ExitCode::SUCCESS)
    }
}

fn bring_up(cli: &Cli, handle: &Handle, up: &Up) -> anyhow::Result<ExitCode> {
    let families = |given: Option<Families>| match given {
        Some(families) => families,
        None if up.dual_stack => Families::Dual,
        None => Families::V4,
    };
    let config = match &up.config {
        None => toml::Table::new(),
        Some(path) => std::fs::read_to_string(path)
            .with_context(|| format!("cannot read {}", path.display()))?
            .parse()
            .with_context(|| format!("{} is not TOML", path.display()))?,
    };
    let options = Options {
        name: cli.name.clone(),
        nodes: up.nodes,
        started: up.started.unwrap_or(up.nodes),
        pods: up.pods,
        sites: up.sites,
        nat: up.nat.clone(),
        backend: up.backend,
        store: up.store,
        underlay: families(up.underlay),
        overlay: families(up.overlay),
        config,
        node_config: Default::default(),
        bin_dir: up.bin_dir.clone().unwrap_or_default(),
    };
    if handle.presence() == Presence::Alive {
        match already_up(cli, handle, &options) {
            // It was on its way down.
            Err(_) if handle.presence() != Presence::Alive => {}
            result => return result,
        }
    }
    let lab = Lab::try_up(options, &mut |line| eprintln!("{line}"))?;
    let handle = lab.let_go()?;
    let state = handle.state()?;
    show(cli, &format!("\n{}\nLab {} is up.", table(&state), cli.name), &state)
}

/// A second `up` changes nothing. It is an error only if it asks for another lab than the one that is there.
fn already_up(cli: &Cli, handle: &Handle, options: &Options) -> anyhow::Result<ExitCode> {
    let state = handle.request(&Request::Status)?;
    let there = Options { bin_dir: options.bin_dir.clone(), ..state.options.clone() };
    anyhow::ensure!(
        there == *options,
        "lab {0} is up with other options ({1} nodes): take it down first with `weft-lab --name {0} down`, or use another --name",
        cli.name,
        state.options.nodes
    );
    show(cli, &format!("{}\nLab {} was up already.", table(&state), cli.name), &state)
}

fn take_down(cli: &Cli, handle: &Handle, all: bool) -> anyhow::Result<ExitCode> {
    let handles = if all { Handle::all() } else { vec![handle.clone()] };
    let mut gone = Vec::new();
    for handle in handles {
        if handle.down()? {
            gone.push(handle.name().to_owned());
        }
    }
    if cli.json {
        return print_json(&json!({ "down": gone }));
    }
    match gone.as_slice() {
        [] if all => writeln!(io::stdout(), "No lab was up.")?,
        [] => writeln!(io::stdout(), "Lab {} was not up.", cli.name)?,
        names => writeln!(io::stdout(), "Down: {}.", names.join(", "))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn logs(cli: &Cli, handle: &Handle, node: &str, follow: bool) -> anyhow::Result<ExitCode> {
    handle.state()?.node(node)?;
    let path = handle.log(node);
    if follow {
        return Err(Command::new("tail").args(["-n", "+1", "-f"]).arg(&path).exec())
            .context("cannot run tail");
    }
    let text =
        std::fs::read_to_string(&path).with_context(|| format!("{node} has no log yet: was it started?"))?;
    if cli.json {
        return print_json(&json!({ "node": node, "lines": text.lines().collect::<Vec<_>>() }));
    }
    io::stdout().write_all(text.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

fn ping(cli: &Cli, handle: &Handle) -> anyhow::Result<ExitCode> {
    let state = handle.state()?;
    eprintln!("pinging between {} pods; a ping without an answer takes 2 s", state.pods().count());
    let matrix = Matrix::measure(handle)?;
    let losses = matrix.losses();
    if cli.json {
        print_json(&json!({ "pairs": matrix.pairs, "sent": matrix.pairs.len(), "lost": losses.len() }))?;
    } else {
        writeln!(io::stdout(), "{}", matrix_table(&state, &matrix))?;
        writeln!(io::stdout(), "{} pings, {} lost", matrix.pairs.len(), losses.len())?;
        for pair in &losses {
            writeln!(io::stdout(), "LOST {} -> {} ({})", pair.from, pair.to, pair.ip)?;
        }
    }
    Ok(if losses.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn new_table() -> comfy_table::Table {
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table
}

fn table(state: &State) -> String {
    let mut table = new_table();
    table.set_header(["NODE", "UNDERLAY", "DAEMON", "PODS"]);
    for node in &state.nodes {
        let underlay: Vec<String> = node.underlay.iter().map(ToString::to_string).collect();
        let pods: Vec<String> = node
            .pods
            .iter()
            .map(|pod| {
                let ips: Vec<String> = pod.ips.iter().map(ToString::to_string).collect();
                format!("{} {}", pod.name, ips.join(" "))
            })
            .collect();
        let daemon = if node.daemon.is_some() { "runs" } else { "stopped" };
        table.add_row([node.name.clone(), underlay.join("\n"), daemon.to_owned(), pods.join("\n")]);
    }
    let mut text = table.to_string() + "\n";
    for (a, b) in &state.cuts {
        text.push_str(&format!("cut: {a} and {b} do not hear each other\n"));
    }
    for (a, b) in &state.udp_cuts {
        text.push_str(&format!("cut: {a} and {b} do not hear UDP of each other\n"));
    }
    for Impairment { from, to, ms, loss_percent } in &state.impairments {
        text.push_str(&format!("from {from} to {to}: {ms} ms longer, {loss_percent} % lost\n"));
    }
    for router in &state.routers {
        let addresses: Vec<String> = router.addresses.iter().map(ToString::to_string).collect();
        let kind = router.nat.to_possible_value().map(|kind| kind.get_name().to_owned()).unwrap_or_default();
        text.push_str(&format!(
            "router {} before {}: {kind}, {}\n",
            router.name,
            sites::name(router.site),
            addresses.join(" ")
        ));
    }
    text
}

/// One row a sender, one column a receiver; the slower family's milliseconds, or `lost`.
fn matrix_table(state: &State, matrix: &Matrix) -> String {
    let names: Vec<String> = state.pods().map(|(node, pod)| format!("{}/{}", node.name, pod.name)).collect();
    let mut table = new_table();
    table.set_header(std::iter::once("ms".to_owned()).chain(names.iter().cloned()));
    for from in &names {
        let mut row = vec![from.clone()];
        for to in &names {
            let times: Vec<Option<f64>> = matrix
                .pairs
                .iter()
                .filter(|pair| pair.from == *from && pair.to == *to)
                .map(|pair| pair.rtt_ms)
                .collect();
            row.push(match times.iter().copied().collect::<Option<Vec<f64>>>() {
                None => "lost".to_owned(),
                Some(times) if times.is_empty() => "-".to_owned(),
                Some(times) => format!("{:.2}", times.into_iter().fold(0.0, f64::max)),
            });
        }
        table.add_row(row);
    }
    table.to_string()
}

fn hints(state: &State) -> String {
    let program = std::env::args().next().unwrap_or_else(|| "weft-lab".into());
    let name = &state.options.name;
    let lab = if name == "lab" { program } else { format!("{program} --name {name}") };
    let far = state.nodes.last().and_then(|node| node.pods.first()).and_then(|pod| pod.ips.first());
    let far = far.map_or_else(|| "192.0.2.1".to_owned(), ToString::to_string);
    format!(
        "\nLook around:\n  \
         {lab} exec n1/a -- ping -c 3 {far}\n  \
         {lab} exec n1 -- weft status\n  \
         {lab} exec n1 -- weft routes\n  \
         {lab} exec n1 -- bash          # a shell on node n1\n  \
         {lab} exec underlay -- tcpdump -ni lab0 udp port 8472\n  \
         {lab} cut n1 n2; {lab} ping; {lab} heal n1 n2\n  \
         {lab} logs n1\n\
         Take it down:\n  {lab} down\n"
    )
}
