//! Whether a lab is whole once it is quiet, by the kernel's word, by ping, and by what the daemons logged.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use weft_tests::lab::Request;

use super::world::{NODES, World};

/// How long a lab may take to be whole again.
const PATIENCE: Duration = Duration::from_secs(40);

/// Waits until the lab is whole.
///
/// # Errors
/// What was still wrong in the end.
pub fn whole(world: &World) -> Result<Duration, String> {
    let began = Instant::now();
    loop {
        match [routes, pods, foreign, health, reach].iter().try_for_each(|check| check(world)) {
            Ok(()) => break,
            Err(wrong) if began.elapsed() > PATIENCE => {
                return Err(format!("not whole after {PATIENCE:?}: {wrong}"));
            }
            Err(_) => {}
        }
    }
    logs(world)?;
    // It is counted without a break, so this is about the whole of the trouble.
    match world.clear_packets() {
        0 if !world.encrypted => Err("the count of clear packets counts nothing".into()),
        clear if world.encrypted && clear > 0 => Err(format!("{clear} packets of pods crossed in clear")),
        _ => Ok(began.elapsed()),
    }
}

fn routes(world: &World) -> Result<(), String> {
    let names = World::names();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let wrong = world.lab.wrong_routes(&names);
    if !wrong.is_empty() {
        return Err(wrong.join("; "));
    }
    for node in &names {
        let picture = world.lab.picture(node);
        let count = |part: &str| picture[part].as_array().map_or(0, Vec::len);
        // One tunnel to each other node; both families of pods go through it. Encrypted ones need neither.
        let others = if world.encrypted { 0 } else { NODES - 1 };
        let (tunnels, neighbours) = (count("fdb"), count("neighbours"));
        if tunnels != others || neighbours != 2 * others {
            return Err(format!(
                "{node} has {tunnels} forwarding entries and {neighbours} neighbours: {picture}"
            ));
        }
        if picture["nft"].to_string().contains("planted") {
            return Err(format!("{node}: the table of weft has a chain that is none of its own"));
        }
        if count("nft") == 0 {
            return Err(format!("{node} has no nftables table"));
        }
    }
    Ok(())
}

/// Every pod has its addresses, no two have the same, and weft knows of no others.
fn pods(world: &World) -> Result<(), String> {
    let mut users = BTreeMap::new();
    for node in &world.lab.state().nodes {
        let mut known = world.known_pods(&node.name);
        let mut there: Vec<String> = node.pods.iter().map(|pod| pod.container.clone()).collect();
        known.sort();
        there.sort();
        if known != there {
            return Err(format!("{}: weft knows the pods {known:?}, there are {there:?}", node.name));
        }
        let ends =
            world.lab.sh(node.name.as_str(), "ls /sys/class/net | grep -cE '^weft[0-9a-f]{8}$' || true");
        if ends.trim() != there.len().to_string() {
            return Err(format!("{}: {} host ends for {} pods", node.name, ends.trim(), there.len()));
        }
        for pod in &node.pods {
            let addresses = world.addresses(&node.name, &pod.name);
            let given: Vec<String> = pod.ips.iter().map(ToString::to_string).collect();
            if addresses != given {
                return Err(format!("{}/{} has {addresses:?}, was given {given:?}", node.name, pod.name));
            }
            for address in addresses {
                let user = format!("{}/{}", node.name, pod.name);
                if let Some(other) = users.insert(address.clone(), user.clone()) {
                    return Err(format!("{address} is of {other} and of {user}"));
                }
            }
        }
    }
    Ok(())
}

/// What another program made is as it made it.
fn foreign(world: &World) -> Result<(), String> {
    for (node, there) in World::names().iter().zip(world.foreign) {
        let route = world.lab.sh(node.as_str(), "ip route show 172.31.0.0/24");
        if there && (!route.contains("dev foreign0") || !route.contains("metric 7")) {
            return Err(format!("{node}: the foreign route is gone"));
        }
    }
    let lost = world.deeds.lost_tables(&world.lab);
    if !lost.is_empty() {
        return Err(format!("the table of another program is gone from {lost:?}"));
    }
    Ok(())
}

fn health(world: &World) -> Result<(), String> {
    for node in World::names() {
        let doctor = world.lab.weft(&node, &["doctor"]);
        if doctor["ok"] != true {
            return Err(format!("{node}: weft doctor: {doctor}"));
        }
    }
    Ok(())
}

fn reach(world: &World) -> Result<(), String> {
    let matrix =
        weft_tests::lab::Matrix::measure(world.lab.handle()).map_err(|error| format!("{error:#}"))?;
    let losses = matrix.losses();
    if losses.is_empty() { Ok(()) } else { Err(format!("pods do not reach each other: {losses:?}")) }
}

/// No daemon panicked, and none logged an error.
fn logs(world: &World) -> Result<(), String> {
    for node in World::names() {
        let log = std::fs::read_to_string(world.lab.handle().log(&node)).unwrap_or_default();
        let bad = log.lines().find(|line| line.contains("panicked at") || line.contains(" ERROR "));
        if let Some(line) = bad {
            return Err(format!("{node} logged: {line}"));
        }
    }
    Ok(())
}

/// Prints what the daemons had to say of late, for whoever looks into a failure.
pub fn print_last_words(world: &World) {
    for node in World::names() {
        let log = std::fs::read_to_string(world.lab.handle().log(&node)).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let status = world.lab.exec(node.as_str(), &["weft", "-o", "json", "status"]);
        println!("--- {node}\n{}", String::from_utf8_lossy(&status.stdout));
        println!("{}", lines[lines.len().saturating_sub(25)..].join("\n"));
    }
}

/// Removes every pod: nothing of any is left.
pub fn nothing_leaks(world: &World) -> Result<(), String> {
    for node in world.lab.state().nodes {
        for pod in node.pods {
            world.lab.tell(Request::PodRemove { node: node.name.clone(), pod: pod.name });
        }
    }
    pods(world)
}
