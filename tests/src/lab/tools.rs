//! Running the machine's tools, with errors that say what was run and what it answered.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, bail};

/// Runs a command to its end and returns what it wrote.
pub(crate) fn run(command: &mut Command) -> anyhow::Result<String> {
    let output = output(command)?;
    if !output.status.success() {
        bail!("{} failed ({}): {}", words(command), output.status, said(&output));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a command to its end, whatever its exit code.
pub(crate) fn output(command: &mut Command) -> anyhow::Result<Output> {
    command.stdin(Stdio::null());
    command.output().with_context(|| format!("cannot run {}: is it installed? (make deps)", words(command)))
}

/// Runs a command with this on its standard input.
pub(crate) fn feed(command: &mut Command, input: &str) -> anyhow::Result<Output> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("cannot run {}", words(command)))?;
    let mut stdin = child.stdin.take().expect("standard input was asked to be a pipe");
    // A command may end without reading its input; its exit code and words then say why.
    stdin.write_all(input.as_bytes()).ok();
    drop(stdin);
    Ok(child.wait_with_output()?)
}

/// Runs a tool with words that are separated by blanks.
pub(crate) fn tool(line: &str) -> anyhow::Result<String> {
    let mut words = line.split_ascii_whitespace();
    let name = words.next().expect("a command line has a first word");
    run(Command::new(name).args(words))
}

/// What a command that failed wrote: standard error, or else standard output.
pub(crate) fn said(output: &Output) -> String {
    let text = if output.stderr.is_empty() { &output.stdout } else { &output.stderr };
    String::from_utf8_lossy(text).trim().to_owned()
}

fn words(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        text.push(' ');
        text.push_str(&arg.to_string_lossy());
    }
    text
}
