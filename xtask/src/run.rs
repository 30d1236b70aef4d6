//! Running other programs: steps with progress and a log, and quick questions.
//!
//! A step's whole output goes to a file of the cache. The terminal shows a line
//! when it starts and when it ends, and what it is at in between; if it fails,
//! the end of the log and where the rest is.

use std::collections::VecDeque;
use std::fs::{self, File};
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
    /// It did not end by itself.
    pub hung: bool,
    pub log: PathBuf,
    status: ExitStatus,
}

/// Runs a long command as one step; it must succeed.
pub fn step(cache: &Cache, label: &str, command: Command) -> Result<()> {
    step_within(cache, label, command, None)
}

/// As [`step`]; it must end within `limit` as well.
pub fn step_within(
    cache: &Cache,
    label: &str,
    command: Command,
    limit: Option<Duration>,
) -> Result<()> {
    let ended = attempt_within(cache, label, command, limit)?;
    ensure!(
        !ended.hung,
        "{label}: it hung, and was ended; the full log is {}",
        ended.log.display()
    );
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
    attempt_within(cache, label, command, None)
}

/// As [`attempt`]. A command that is still running after `limit` is killed, with all
/// that it has started.
pub fn attempt_within(
    cache: &Cache,
    label: &str,
    command: Command,
    limit: Option<Duration>,
) -> Result<Ended> {
    let log = cache.dir("logs")?.join(slug(label) + ".log");
    let mut progress = Progress::start(label);
    let (status, hung, tail) = logged(command, &log, &mut progress, limit)?;
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
        hung,
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
    limit: Option<Duration>,
) -> Result<(ExitStatus, bool, VecDeque<String>)> {
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
    let deadline = limit.map(|limit| Instant::now() + limit);
    let mut hung = false;
    let tail = follow(reader, &mut log, progress, || {
        if deadline.is_some_and(|deadline| Instant::now() > deadline) {
            hung = true;
            kill(child.id());
        }
    })?;
    Ok((child.wait()?, hung, tail))
}

/// Kills a child of ours and all that it has started, so that nobody holds its pipe.
fn kill(child: u32) {
    let pids = family(child, &parents());
    // One that has ended meanwhile need not be killed.
    let pids = pids.iter().map(u32::to_string);
    let _ = Command::new("kill").arg("-KILL").args(pids).output();
}

/// A process, its children, theirs, and so on.
fn family(first: u32, parents: &[(u32, u32)]) -> Vec<u32> {
    let mut all = vec![first];
    let mut next = 0;
    while let Some(parent) = all.get(next).copied() {
        let children = parents.iter().filter(|(_, of)| *of == parent);
        all.extend(children.map(|(pid, _)| *pid));
        next += 1;
    }
    all
}

/// Each process of this machine, with its parent.
fn parents() -> Vec<(u32, u32)> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let parent = |entry: fs::DirEntry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        // After the name, which may contain anything: the state, and the parent.
        let (_, fields) = stat.rsplit_once(')')?;
        let parent = fields.split_whitespace().nth(1)?.parse().ok()?;
        Some((pid, parent))
    };
    processes.filter_map(parent).collect()
}

/// Copies lines into the log until the pipe ends; returns the last of them. Calls
/// `meanwhile` now and then.
fn follow(
    reader: PipeReader,
    log: &mut File,
    progress: &mut Progress,
    mut meanwhile: impl FnMut(),
) -> Result<VecDeque<String>> {
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
        meanwhile();
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
    fn what_hangs_is_ended_with_all_that_it_has_started() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let mut command = Command::new("sh");
        // The second shell holds the pipe as well.
        command.args(["-c", "echo begun; sh -c 'sleep 1000; true'; true"]);
        let mut progress = Progress::start("hang");
        let limit = Some(Duration::from_millis(100));
        let (status, hung, tail) = logged(command, &log, &mut progress, limit).unwrap();
        assert!(hung && !status.success());
        assert_eq!(tail, ["begun"]);
        let mut quick = Command::new("true");
        quick.env_clear();
        let limit = Some(Duration::from_secs(1000));
        let (status, hung, _) = logged(quick, &log, &mut progress, limit).unwrap();
        assert!(!hung && status.success());
    }

    #[test]
    fn a_failed_question_says_what_was_asked() {
        let error = ask(Command::new("sh").args(["-c", "echo oops >&2; exit 3"])).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("sh -c") && text.contains("oops"), "{text}");
    }
}
