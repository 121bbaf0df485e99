//! The node daemon: arguments, configuration, logging, the loop.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Parser;
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;
use weft_daemon::config::{Config, LogConfig, StoreKind};
use weft_daemon::handover::{self, Heritage};
use weft_daemon::kubernetes;
use weft_daemon::node::{self, Ended, Fatal, Origin};

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
    let mut origin = if arguments.take_over { Origin::TakeOver } else { Origin::Alone };
    loop {
        match run(config.clone(), origin) {
            Ok(None) => return ExitCode::SUCCESS,
            Ok(Some(heritage)) => origin = Origin::Back(heritage),
            Err(error) => return fail(&error),
        }
    }
}

/// Runs the node to its end, and then for as long as another daemon needs what is left of it; returns with what it left if
/// that one did not take over.
fn run(config: Config, origin: Origin) -> Result<Option<Heritage>, Box<dyn std::error::Error>> {
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
        let handed = tokio::task::spawn_blocking(move || handover::hand_over(heritage, &told));
        let signals = [signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?];
        for mut signal in signals {
            let stop = Arc::clone(&stop);
            tokio::spawn(async move {
                signal.recv().await;
                stop.store(true, Ordering::Relaxed);
            });
        }
        handed.await.map_err(std::io::Error::other)
    })?;
    Ok(outcome.err())
}

/// Starts the node and runs it to its end.
async fn live(config: Config, origin: Origin) -> Result<Ended, Fatal> {
    if let StoreKind::Kubernetes(options) = &config.store.kind {
        let listen = |kind| signal(kind).map_err(|error| Fatal(format!("signals cannot be heard: {error}")));
        let mut signals = [listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?];
        let [term, int] = &mut signals;
        tokio::select! {
            outcome = kubernetes::ensure_keys(options, &config.cluster.key_file) => outcome.map_err(Fatal)?,
            _ = term.recv() => return Ok(Ended::Stopped),
            _ = int.recv() => return Ok(Ended::Stopped),
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
