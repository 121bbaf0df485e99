//! The node daemon: arguments, configuration, logging, the loop.

use std::path::PathBuf;
use std::pin::pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Parser;
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};
use tracing_subscriber::EnvFilter;
use weft_daemon::config::{Config, LogConfig, NodeConfig, StoreKind};
use weft_daemon::handover::{self, Heritage};
use weft_daemon::kubernetes;
use weft_daemon::node::{self, Ended, Fatal, Origin};
use weft_daemon::state;

/// The node daemon of weft: leases, gossips, programs the kernel and attaches pods.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The configuration file.
    #[arg(long, default_value = "/etc/weft/weft.toml")]
    config: PathBuf,
    /// Check the configuration file and exit.
    #[arg(long)]
    check_config: bool,
    /// Take over from the weftd that runs on this node, without a lost packet, and start as usual where none does.
    #[arg(long)]
    take_over: bool,
    /// After another weftd took over, rest until told to stop rather than end: for who restarts what ends, as a kubelet does.
    /// One that is restarted all the same while its successor runs rests at once, if WEFT_INSTANCE tells the two apart.
    #[arg(long, requires = "take_over")]
    rest: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let config = match Config::load(&arguments.config) {
        Ok(config) => config,
        Err(error) => return fail(&error),
    };
    if arguments.check_config {
        let checked = match &config.store.kind {
            StoreKind::Etcd(options) => options.check_files().map_err(|error| error.to_string()),
            StoreKind::Kubernetes(options) => options.check_files().map_err(|error| error.to_string()),
            StoreKind::Sqlite(_) | StoreKind::Static(_) => Ok(()),
        };
        if let Err(error) = checked {
            return fail(&error);
        }
        println!("{}: ok", arguments.config.display());
        return ExitCode::SUCCESS;
    }
    if let Err(error) = init_logging(&config.log) {
        return fail(&error);
    }
    let NodeConfig { state_dir, instance, .. } = &config.node;
    let superseded = instance.as_ref().is_some_and(|own| state::is_superseded(state_dir, own));
    if arguments.rest && superseded && handover::runs(state_dir) {
        info!("this daemon has handed over to one that runs, it rests until it is told to stop");
        return match rest() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error),
        };
    }
    let mut origin = if arguments.take_over { Origin::TakeOver } else { Origin::Alone };
    loop {
        match run(config.clone(), origin, arguments.rest) {
            Ok(None) => return ExitCode::SUCCESS,
            Ok(Some(heritage)) => origin = Origin::Back(heritage),
            Err(error) => return fail(&error),
        }
    }
}

/// Runs the node to its end, and then for as long as another daemon needs what is left of it, or with `rest` until a signal;
/// returns with what it left if that one did not take over.
fn run(config: Config, origin: Origin, rest: bool) -> Result<Option<Heritage>, Box<dyn std::error::Error>> {
    let NodeConfig { state_dir, instance, .. } = config.node.clone();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let kind = config.store.kind.clone();
    let ended = runtime.block_on(async {
        let ended = live(config, origin).await;
        if let (Err(Fatal(sentence)), StoreKind::Kubernetes(options)) = (&ended, &kind) {
            kubernetes::last_words(options, sentence).await;
        }
        ended
    });
    // Closes every socket but those that are left.
    runtime.shutdown_timeout(Duration::from_secs(2));
    let Ended::HandOver(heritage) = ended? else { return Ok(None) };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(async {
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let mut handed = tokio::task::spawn_blocking(move || handover::hand_over(heritage, &told));
        let mut stopped = pin!(stopped()?);
        let outcome = tokio::select! {
            outcome = &mut handed => outcome,
            () = &mut stopped => {
                stop.store(true, Ordering::Relaxed);
                handed.await
            }
        };
        let outcome = outcome.map_err(std::io::Error::other)?;
        // What is left of this daemon by now is this thread and its log.
        if rest && outcome.is_ok() && !stop.load(Ordering::Relaxed) {
            if let Some(Err(error)) = instance.map(|own| state::note_superseded(&state_dir, &own)) {
                warn!(err = %error, "if this daemon is restarted it takes over again");
            }
            info!("this daemon rests until it is told to stop");
            stopped.await;
        }
        std::io::Result::Ok(outcome)
    })?;
    Ok(outcome.err())
}

/// Rests until SIGTERM or SIGINT.
fn rest() -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        stopped()?.await;
        Ok(())
    })
}

/// Listens for SIGTERM and SIGINT from now on; the future ends with the first.
fn stopped() -> std::io::Result<impl Future<Output = ()>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

/// Starts the node and runs it to its end.
async fn live(config: Config, origin: Origin) -> Result<Ended, Fatal> {
    if let StoreKind::Kubernetes(options) = &config.store.kind {
        let stopped = stopped().map_err(|error| Fatal(format!("signals cannot be heard: {error}")))?;
        tokio::select! {
            outcome = kubernetes::ensure_keys(options, &config.cluster.key_file) => outcome.map_err(Fatal)?,
            () = stopped => return Ok(Ended::Stopped),
        }
    }
    let node = node::start(config, origin).await?;
    // Fails only where no service manager waits for it; which process is the main one is news after a hand-over.
    let states = [NotifyState::MainPid(std::process::id()), NotifyState::Ready];
    let _ = sd_notify::notify(false, &states);
    let ended = node.run().await;
    if matches!(ended, Ok(Ended::Stopped)) {
        // The answer to `weft leave` is still on its way out of the socket.
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    ended
}

fn fail(error: &dyn std::fmt::Display) -> ExitCode {
    eprintln!("weftd: {error}");
    ExitCode::FAILURE
}

fn init_logging(log: &LogConfig) -> Result<(), String> {
    let filter = EnvFilter::try_new(&log.filter).map_err(|error| {
        format!(
            "log.filter {:?} is not valid: {error}; write for example \"info\" or \"weft_daemon=debug\"",
            log.filter
        )
    })?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if log.json {
        builder.json().init()
    } else {
        builder.with_ansi(false).init()
    }
    Ok(())
}
