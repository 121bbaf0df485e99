//! The mesh by size: how fast it learns and what it costs, from ten nodes to thousands, as a table and as plots.
//!
//! `make bench-scale`; `SCALE_NODES=10,100` measures other sizes. It writes docs/plots/. `SCALE_SITES=5` measures so many sites, and
//! `SCALE_SIGNERS=all` with it has every node have its site's key.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use weft_tests::figures::quantile;
use weft_tests::plot::{Series, svg};
use weft_tests::sim::meshes::{Meshes, config, facts, name, table};
use weft_tests::sim::size::sites::{self, Signers, SitesSize};
use weft_tests::sim::size::{Event, Measured, Size, Work, reconciler_work};

const SIZES: [usize; 4] = [10, 100, 1000, 5000];

/// Everything that is measured of one size.
struct Row {
    size: Size,
    /// Resident bytes of this process for each node of the simulation, which share their records.
    simulated: f64,
    /// Resident bytes of one mesh that knows all others and shares nothing, as in a daemon.
    alone: f64,
    work: [Work; 3],
    took: f64,
}

/// The resident memory of this process in bytes.
fn resident() -> f64 {
    let status = fs::read_to_string("/proc/self/status").expect("/proc is mounted");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("the kernel tells VmRSS");
    line.trim().trim_end_matches(" kB").parse::<f64>().expect("a number of kB") * 1024.0
}

/// Measures, in a process of its own, what one mesh takes that knows so many others and shares nothing.
fn alone(nodes: usize) -> f64 {
    let program = std::env::current_exe().expect("the program knows where it is");
    let output = Command::new(program).args(["--alone", &nodes.to_string()]).output().expect("it runs again");
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().last().and_then(|line| line.parse().ok()).expect("it prints a number")
}

/// Lets one mesh hear of others that come and go one after another, and prints by how much the process grew.
fn print_alone(nodes: usize) {
    let mut meshes = Meshes::new("one mesh");
    meshes.start(config(0, 1), table(1));
    let before = resident();
    meshes.with(0, |mesh, now| mesh.set_authority(table(nodes + 1), now));
    meshes.announce(0, facts(0));
    for node in 1..=nodes {
        meshes.start(config(node, 1), table(0));
        meshes.announce(node, facts(node));
        while meshes.mesh(0).member(&name(node)).is_none() {
            meshes.run(Duration::from_millis(10));
        }
        meshes.crash(node);
    }
    println!("{}", resident() - before);
}

fn measure(nodes: usize) -> Row {
    let began = Instant::now();
    let trials = (600 / nodes).clamp(1, 10);
    let before = resident();
    let (mesh, size) = Measured::measure(nodes, trials, &format!("{nodes} nodes"));
    let simulated = (resident() - before).max(0.0) / nodes as f64;
    drop(mesh);
    let alone = alone(nodes);
    Row { size, simulated, alone, work: reconciler_work(nodes), took: began.elapsed().as_secs_f64() }
}

fn events(size: &Size) -> [(&'static str, &Event); 5] {
    [
        ("start of all", &size.start),
        ("join", &size.join),
        ("leave", &size.leave),
        ("crash", &size.crash),
        ("heal", &size.heal),
    ]
}

fn plots(rows: &[Row]) -> Vec<(&'static str, String)> {
    let line = |name: &str, figure: &dyn Fn(&Row) -> f64| -> Series {
        (name.to_owned(), rows.iter().map(|row| (row.size.nodes as f64, figure(row))).collect())
    };
    let of_events = |figure: &dyn Fn(&Event) -> f64| -> Vec<Series> {
        (0..5)
            .map(|event| line(events(&rows[0].size)[event].0, &|row| figure(events(&row.size)[event].1)))
            .collect()
    };
    let draw = |title: &str, series: &[Series]| svg(title, "nodes", series);
    vec![
        (
            "median",
            draw("seconds until the median node is right", &of_events(&|event| quantile(&event.times, 0.5))),
        ),
        (
            "worst",
            draw("seconds until the last node is right", &of_events(&|event| quantile(&event.times, 1.0))),
        ),
        ("event-bytes", draw("bytes that a node sends for an event", &of_events(&|event| event.bytes))),
        (
            "rest",
            draw(
                "what a node sends at rest, a second",
                &[
                    line("bytes", &|row| row.size.rest_bytes),
                    line("datagrams", &|row| row.size.rest_datagrams),
                ],
            ),
        ),
        (
            "memory",
            draw(
                "bytes of memory",
                &[line("a daemon's mesh", &|row| row.alone), line("a simulated node", &|row| row.simulated)],
            ),
        ),
        (
            "reconciler",
            draw(
                "microseconds of a pass",
                &["all peers are new", "nothing changed", "one peer more"]
                    .into_iter()
                    .enumerate()
                    .map(|(which, name)| line(name, &|row| row.work[which].time.as_secs_f64() * 1e6))
                    .collect::<Vec<_>>(),
            ),
        ),
    ]
}

fn report(rows: &[Row]) -> String {
    let mut text = String::new();
    let mut add = |line: String| writeln!(text, "{line}").expect("a string can always be written to");
    add("| nodes | event | median | p99 | worst (s) | bytes a node | datagrams a node |".into());
    add("|---|---|---|---|---|---|---|".into());
    for row in rows {
        for (name, event) in events(&row.size) {
            let at = |part| quantile(&event.times, part);
            add(format!(
                "| {} | {name} | {:.2} | {:.2} | {:.2} | {:.0} | {:.0} |",
                row.size.nodes,
                at(0.5),
                at(0.99),
                at(1.0),
                event.bytes,
                event.datagrams
            ));
        }
    }
    add(String::new());
    add("| nodes | bytes/s at rest | datagrams/s at rest | a daemon's mesh (MiB) | pass: all new | nothing | one more | measured in (s) |".into());
    add("|---|---|---|---|---|---|---|---|".into());
    for Row { size, alone, work, took, .. } in rows {
        let [all, none, one] =
            work.map(|work| format!("{} changes, {:.1} ms", work.changes, work.time.as_secs_f64() * 1e3));
        add(format!(
            "| {} | {:.0} | {:.2} | {:.1} | {all} | {none} | {one} | {took:.0} |",
            size.nodes,
            size.rest_bytes,
            size.rest_datagrams,
            alone / 1_048_576.0
        ));
    }
    text
}

fn main() {
    let words: Vec<String> = std::env::args().collect();
    if let Some(place) = words.iter().position(|word| word == "--alone") {
        return print_alone(words[place + 1].parse().expect("--alone is followed by a number"));
    }
    let number =
        |text: &str| -> usize { text.trim().parse().expect("SCALE_NODES and SCALE_SITES are numbers") };
    let sizes: Vec<usize> = match std::env::var("SCALE_NODES") {
        Ok(list) => list.split(',').map(number).collect(),
        Err(_) => SIZES.to_vec(),
    };
    if let Ok(sites) = std::env::var("SCALE_SITES") {
        return measure_sites(number(&sites), &sizes);
    }
    let rows: Vec<Row> = sizes.into_iter().map(measure).collect();
    if rows.len() > 1 {
        draw(plots(&rows));
    }
    print!("{}", report(&rows));
}

fn draw(plots: Vec<(&'static str, String)>) {
    let directory: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/plots");
    fs::create_dir_all(&directory).expect("docs/ can be written to");
    for (name, drawing) in plots {
        fs::write(directory.join(format!("{name}.svg")), drawing).expect("docs/plots/ can be written to");
    }
}

/// Measures so many sites that share so many nodes, for each number of nodes.
fn measure_sites(sites: usize, nodes: &[usize]) {
    let signers = match std::env::var("SCALE_SIGNERS").as_deref() {
        Err(_) => Signers::One,
        Ok("all") => Signers::All,
        Ok(other) => panic!("SCALE_SIGNERS={other}: say all, or leave it out"),
    };
    let measure = |nodes: &usize| {
        let (began, before) = (Instant::now(), resident());
        let (mesh, size) =
            sites::measure(sites, nodes / sites, signers, &format!("{nodes} nodes in {sites} sites"));
        let memory = (resident() - before).max(0.0) / size.nodes as f64;
        drop(mesh);
        // The largest takes hours: what is known is said at once.
        for (name, event) in &size.events {
            let [median, p99, worst] = [0.5, 0.99, 1.0].map(|part| quantile(&event.times, part));
            let (nodes, bytes, datagrams) = (size.nodes, event.bytes, event.datagrams);
            println!(
                "| {nodes} | {name} | {median:.2} | {p99:.2} | {worst:.2} | {bytes:.0} | {datagrams:.0} |"
            );
        }
        (size, memory, began.elapsed().as_secs_f64())
    };
    println!("| nodes | event | median | p99 | worst (s) | bytes a node | datagrams a node |");
    println!("|---|---|---|---|---|---|---|");
    let rows: Vec<(SitesSize, f64, f64)> = nodes.iter().map(measure).collect();
    println!(
        "\n| nodes | bytes/s at rest | datagrams/s at rest | KiB of a simulated node | measured in (s) |"
    );
    println!("|---|---|---|---|---|");
    for (SitesSize { nodes, rest, .. }, memory, took) in &rows {
        println!("| {nodes} | {:.0} | {:.2} | {:.0} | {took:.0} |", rest.0, rest.1, memory / 1024.0);
    }
    if rows.len() > 1 {
        let line = |name: &str, figure: &dyn Fn(&SitesSize) -> f64| -> Series {
            (name.to_owned(), rows.iter().map(|(size, ..)| (size.nodes as f64, figure(size))).collect())
        };
        let of_events = |figure: &dyn Fn(&Event) -> f64| -> Vec<Series> {
            let names = rows[0].0.events.iter().enumerate();
            names.map(|(place, (name, _))| line(name, &|size| figure(&size.events[place].1))).collect()
        };
        let times = of_events(&|event| quantile(&event.times, 1.0));
        let rest = [line("bytes", &|size| size.rest.0), line("datagrams", &|size| size.rest.1)];
        draw(vec![
            ("sites-worst", svg("seconds until the last node is right", "nodes", &times)),
            ("sites-rest", svg("what a node sends at rest, a second", "nodes", &rest)),
        ]);
    }
}
