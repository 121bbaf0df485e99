//! The node daemon: arguments, configuration, logging, the loop.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use tracing_subscriber::EnvFilter;
use weft_daemon::config::{Config, LogConfig};
use weft_daemon::node;

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
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let config = match Config::load(&arguments.config) {
        Ok(config) => config,
        Err(error) => return fail(&error),
    };
    if arguments.check_config {
        println!("{}: ok", arguments.config.display());
        return ExitCode::SUCCESS;
    }
    if let Err(error) = init_logging(&config.log) {
        return fail(&error);
    }
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error),
    };
    let outcome = runtime.block_on(async {
        let node = node::start(config)?;
        // Fails only where no service manager waits for it.
        let _ = sd_notify::notify(false, &[sd_notify::NotifyState::Ready]);
        let outcome = node.run().await;
        // The answer to `weft leave` is still on its way out of the socket.
        tokio::time::sleep(Duration::from_millis(100)).await;
        outcome
    });
    runtime.shutdown_timeout(Duration::from_secs(2));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
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
