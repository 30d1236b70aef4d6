//! Running other programs: steps with progress and a log, and quick questions.
//!
//! A step's whole output goes to a file of the cache. The terminal shows a line
//! when it starts and when it ends, and what it is at in between; if it fails,
//! the end of the log and where the rest is.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, IsTerminal as _, PipeReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
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
    let progress = Progress::start(label);
    let (status, hung, tail) = logged(command, &log, &progress, limit)?;
    if status.success() {
        progress.finish();
    } else {
        drop(progress);
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
    progress: &Progress,
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
    let watchdog = limit.map(|limit| Watchdog::start(child.id(), limit));
    let tail = follow(reader, &mut log, progress)?;
    let hung = watchdog.is_some_and(Watchdog::has_killed);
    Ok((child.wait()?, hung, tail))
}

/// Kills a child that runs for too long.
struct Watchdog {
    done: Sender<()>,
    thread: JoinHandle<bool>,
}

impl Watchdog {
    fn start(child: u32, limit: Duration) -> Self {
        let (done, ended) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let hung = ended.recv_timeout(limit) == Err(RecvTimeoutError::Timeout);
            if hung {
                kill(child);
            }
            hung
        });
        Self { done, thread }
    }

    /// The child has ended, or closed its output: whether it was killed.
    fn has_killed(self) -> bool {
        drop(self.done);
        self.thread.join().unwrap_or(false)
    }
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

/// Copies lines into the log until the pipe ends; returns the last of them.
fn follow(reader: PipeReader, log: &mut File, progress: &Progress) -> Result<VecDeque<String>> {
    let mut tail = VecDeque::new();
    for line in BufReader::new(reader).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line).trim_end().to_owned();
        writeln!(log, "{line}")?;
        progress.line(&line);
        tail.push_back(line);
        if tail.len() > SHOWN_ON_FAILURE {
            tail.pop_front();
        }
    }
    Ok(tail)
}

/// What the user sees of a step while it runs, also while it says nothing. A
/// terminal's line changes; a log gets a line now and then.
pub struct Progress {
    state: Arc<Mutex<State>>,
    /// Dropped, it ends the thread that shows the state.
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

struct State {
    label: String,
    started: Instant,
    /// The part of the step that runs, and since when.
    part: Option<(String, Instant)>,
    /// The newest line of the step's output.
    line: String,
    terminal: bool,
    output: Box<dyn Write + Send>,
}

impl Progress {
    pub fn start(label: &str) -> Self {
        let terminal = io::stderr().is_terminal();
        let pause = Duration::from_millis(if terminal { 500 } else { 10_000 });
        Self::show_in(label, terminal, pause, Box::new(io::stderr()))
    }

    fn show_in(
        label: &str,
        terminal: bool,
        pause: Duration,
        output: Box<dyn Write + Send>,
    ) -> Self {
        let mut state = State {
            label: label.to_owned(),
            started: Instant::now(),
            part: None,
            line: String::new(),
            terminal,
            output,
        };
        state.print(&format!("  {label} ..."));
        let state = Arc::new(Mutex::new(state));
        let (stop, stopped) = mpsc::channel();
        let shown = state.clone();
        let thread = std::thread::spawn(move || {
            while stopped.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
                let mut state = lock(&shown);
                let text = state.text(Instant::now());
                state.print(&text);
            }
        });
        Self {
            state,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    /// The newest line of the step's output.
    pub fn line(&self, line: &str) {
        lock(&self.state).line = line.to_owned();
    }

    /// Which part of the step begins to run, if any.
    pub fn part(&self, part: Option<&str>) {
        let mut state = lock(&self.state);
        state.part = part.map(|part| (part.to_owned(), Instant::now()));
        state.line.clear();
    }

    /// Prints a line to standard output, which stays.
    pub fn print(&self, line: &str) {
        lock(&self.state).clear();
        println!("{line}");
    }

    pub fn finish(mut self) {
        self.end();
        let state = lock(&self.state);
        let seconds = state.started.elapsed().as_secs_f32();
        eprintln!("  {}: done in {seconds:.1} s", state.label);
    }

    fn end(&mut self) {
        self.stop.take();
        // A thread that panicked has told so.
        let _ = self.thread.take().map(JoinHandle::join);
        lock(&self.state).clear();
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.end();
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    fn text(&self, now: Instant) -> String {
        let since = |then: Instant| now.saturating_duration_since(then).as_secs();
        let mut doing = self.line.clone();
        if let Some((part, begun)) = &self.part {
            doing = format!("{part} for {} s: {doing}", since(*begun));
        }
        let room = if self.terminal { 60 } else { 100 };
        let doing = doing.chars().filter(|c| !c.is_control()).take(room);
        let (label, seconds) = (&self.label, since(self.started));
        let indent = if self.terminal { "" } else { "  " };
        format!(
            "{indent}  {label}: {seconds} s: {}",
            doing.collect::<String>()
        )
    }

    /// Nobody is left to tell where it cannot be written.
    fn print(&mut self, text: &str) {
        self.clear();
        let end = if self.terminal { "" } else { "\n" };
        let _ = write!(self.output, "{text}{end}");
        let _ = self.output.flush();
    }

    fn clear(&mut self) {
        if self.terminal {
            let _ = write!(self.output, "\r\x1b[K");
            let _ = self.output.flush();
        }
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
        let progress = Progress::start("hang");
        let limit = Some(Duration::from_millis(100));
        let (status, hung, tail) = logged(command, &log, &progress, limit).unwrap();
        assert!(hung && !status.success());
        assert_eq!(tail, ["begun"]);
        let mut quick = Command::new("true");
        quick.env_clear();
        let limit = Some(Duration::from_secs(1000));
        let (status, hung, _) = logged(quick, &log, &progress, limit).unwrap();
        assert!(!hung && status.success());
    }

    #[test]
    fn progress_names_the_part_that_runs_and_its_time() {
        let second = |number| Duration::from_secs(number);
        let started = Instant::now();
        let mut state = State {
            label: "lab 10.2".to_owned(),
            started,
            part: None,
            line: "kernel 7.3\r".to_owned(),
            terminal: false,
            output: Box::new(io::sink()),
        };
        assert_eq!(state.text(started), "    lab 10.2: 0 s: kernel 7.3");
        state.part = Some(("accounting".to_owned(), started + second(3)));
        let text = state.text(started + second(123));
        assert_eq!(
            text,
            "    lab 10.2: 123 s: accounting for 120 s: kernel 7.3"
        );
        state.line = "x".repeat(200);
        assert_eq!(state.text(started).len(), "    lab 10.2: 0 s: ".len() + 100);
    }

    #[test]
    fn progress_is_shown_while_nothing_is_said() -> Result<()> {
        let (reader, writer) = io::pipe()?;
        let pause = Duration::from_millis(1);
        let progress = Progress::show_in("lab 10.2", false, pause, Box::new(writer));
        progress.part(Some("accounting"));
        let (send, shown) = mpsc::channel();
        std::thread::spawn(move || {
            let lines = BufReader::new(reader).lines().map_while(Result::ok);
            lines.for_each(|line| drop(send.send(line)));
        });
        // It comes at once, but a test that hangs tells nothing.
        let limit = Duration::from_secs(60);
        while !shown.recv_timeout(limit)?.contains("accounting") {}
        // Its thread ends with it.
        drop(progress);
        let end = loop {
            if let Err(end) = shown.recv_timeout(limit) {
                break end;
            }
        };
        assert_eq!(end, RecvTimeoutError::Disconnected);
        Ok(())
    }

    #[test]
    fn a_failed_question_says_what_was_asked() {
        let error = ask(Command::new("sh").args(["-c", "echo oops >&2; exit 3"])).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("sh -c") && text.contains("oops"), "{text}");
    }
}
