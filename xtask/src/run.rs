//! Running other programs: steps with progress and a log, and quick questions.
//!
//! A step's whole output goes to a file of the cache. The terminal shows a line
//! when it starts and when it ends, and what it is at in between; if it fails,
//! the end of the log and where the rest is.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead as _, BufReader, IsTerminal as _, PipeReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::cache::Cache;

/// How many of a log's last lines a failure shows.
const SHOWN_ON_FAILURE: usize = 30;

/// How a command ended, and where its output is.
pub struct Ended {
    pub success: bool,
    pub log: PathBuf,
    status: ExitStatus,
}

/// Runs a long command as one step; it must succeed.
pub fn step(cache: &Cache, label: &str, command: Command) -> Result<()> {
    let ended = attempt(cache, label, command)?;
    ensure!(
        ended.success,
        "{label}: {}; the full log is {}",
        ended.status,
        ended.log.display()
    );
    Ok(())
}

/// Runs a long command as one step. If it fails, the end of its output is
/// shown, and what that means is up to the caller.
pub fn attempt(cache: &Cache, label: &str, command: Command) -> Result<Ended> {
    let log = cache.dir("logs")?.join(slug(label) + ".log");
    let mut progress = Progress::start(label);
    let (status, tail) = logged(command, &log, &mut progress)?;
    if status.success() {
        progress.finish();
    } else {
        progress.clear();
        for line in &tail {
            eprintln!("    | {line}");
        }
    }
    Ok(Ended {
        success: status.success(),
        log,
        status,
    })
}

/// Runs work of our own as one step.
pub fn work<T>(label: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let progress = Progress::start(label);
    let result = work().with_context(|| label.to_owned())?;
    progress.finish();
    Ok(result)
}

/// The command's standard output, trimmed; its standard error only if it fails.
pub fn ask(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {}", shown(command)))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{}: {}: {}", shown(command), output.status, stderr.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The command line, as a user could type it.
pub fn shown(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}

pub fn jobs() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn logged(
    mut command: Command,
    log: &Path,
    progress: &mut Progress,
) -> Result<(ExitStatus, VecDeque<String>)> {
    let mut log = File::create(log)?;
    writeln!(log, "$ {}", shown(&command))?;
    let (reader, writer) = io::pipe()?;
    command
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer);
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot run {}", shown(&command)))?;
    // The command holds our ends for writing: the pipe ends when they are gone.
    drop(command);
    let tail = follow(reader, &mut log, progress)?;
    Ok((child.wait()?, tail))
}

/// Copies lines into the log until the pipe ends; returns the last of them.
fn follow(reader: PipeReader, log: &mut File, progress: &mut Progress) -> Result<VecDeque<String>> {
    let (send, lines) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(reader).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            if send.send(line).is_err() {
                break;
            }
        }
    });
    let mut tail = VecDeque::new();
    loop {
        match lines.recv_timeout(Duration::from_millis(500)) {
            Ok(line) => {
                writeln!(log, "{line}")?;
                tail.push_back(line);
                if tail.len() > SHOWN_ON_FAILURE {
                    tail.pop_front();
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(tail),
        }
        progress.tick(tail.back().map_or("", String::as_str));
    }
}

/// What the user sees of a step.
pub struct Progress {
    label: String,
    started: Instant,
    last_shown: Instant,
    terminal: bool,
}

impl Progress {
    pub fn start(label: &str) -> Self {
        let terminal = io::stderr().is_terminal();
        if terminal {
            eprint!("  {label} ...");
        } else {
            eprintln!("  {label} ...");
        }
        Self {
            label: label.to_owned(),
            started: Instant::now(),
            last_shown: Instant::now(),
            terminal,
        }
    }

    /// Shows the newest line: a terminal's line changes, a log gets few.
    pub fn tick(&mut self, line: &str) {
        let pause = Duration::from_millis(if self.terminal { 250 } else { 10_000 });
        if self.last_shown.elapsed() < pause {
            return;
        }
        self.last_shown = Instant::now();
        let seconds = self.started.elapsed().as_secs();
        let room = if self.terminal { 60 } else { 100 };
        let line: String = line
            .chars()
            .filter(|c| !c.is_control())
            .take(room)
            .collect();
        if self.terminal {
            eprint!("\r\x1b[K  {}: {seconds} s: {line}", self.label);
        } else {
            eprintln!("    {}: {seconds} s: {line}", self.label);
        }
    }

    fn clear(&self) {
        if self.terminal {
            eprint!("\r\x1b[K");
        }
    }

    pub fn finish(self) {
        self.clear();
        let seconds = self.started.elapsed().as_secs_f32();
        eprintln!("  {}: done in {seconds:.1} s", self.label);
    }
}

fn slug(label: &str) -> String {
    label
        .chars()
        .map(|c| match c {
            'a'..='z' | '0'..='9' | '.' => c,
            'A'..='Z' => c.to_ascii_lowercase(),
            _ => '-',
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_become_file_names() {
        assert_eq!(slug("build QEMU 10.2.2+ds"), "build-qemu-10.2.2-ds");
    }

    #[test]
    fn a_failed_question_says_what_was_asked() {
        let error = ask(Command::new("sh").args(["-c", "echo oops >&2; exit 3"])).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("sh -c") && text.contains("oops"), "{text}");
    }
}
