//! What a machine says and what becomes of it. One thread reads QEMU's serial line, its standard
//! error and its QMP connection; all waits are [`Watch::wait`], which ends at once, with the
//! reason, when the machine has died.
//!
//! The thread keeps the order of events: what QEMU wrote to the serial line or to its standard
//! error before it sent a QMP message is known before the message is.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Error, Result, anyhow, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::kernel_log;
use crate::qmp::DEADLINE;

/// As much as a pipe holds: one read empties it.
const PIPE: usize = 64 << 10;
/// How many of the serial line's last lines are kept for reports, taken or not.
const RECENT: usize = 200;
/// How many lines a report has of a log that does not say where the failure begins.
const TAIL: usize = 10;
/// How many lines of standard error a report has: the registers of one vCPU are 25.
const ERRORS: usize = 40;
/// How the last line begins of a guest that stands still from then on: our guest after an
/// exception that it does not expect, and a Linux after a panic without panic= on its command line.
const DEATHS: &[&str] = &["trap ", "---[ end Kernel panic"];
/// The id of the thread's own QMP command.
const STATUS: &str = "watch-status";
/// The states of a VM that has stopped by itself and cannot go on.
const STOPPED_FOR_GOOD: &[&str] = &["internal-error", "io-error", "guest-panicked", "shutdown"];

pub struct Watch {
    told: Mutex<Told>,
    news: Condvar,
    qmp: Mutex<UnixStream>,
}

/// What the machine has said and done.
#[derive(Default)]
pub struct Told {
    /// Lines of the serial port that no wait has taken.
    pub lines: VecDeque<String>,
    /// Answers to QMP commands, not taken.
    pub answers: VecDeque<Value>,
    /// QMP events, not taken: name and data, the oldest first. What a test expects it takes, and
    /// what is left may be the reason why a wait fails.
    events: Vec<(String, Value)>,
    /// All of QEMU's standard error.
    pub errors: String,
    /// QEMU has ended; nothing comes after that.
    pub ended: Option<ExitStatus>,
    recent: VecDeque<String>,
    /// A guest's last line, where it has no way to end the machine.
    died: Option<String>,
    /// The VM's state after the last STOP event.
    stopped: Option<String>,
}

impl Watch {
    /// Watches the process `pid`, a child of this one that nobody reaps before it has ended.
    pub fn start(pid: u32, serial: OwnedFd, errors: OwnedFd, qmp: UnixStream) -> Result<Arc<Self>> {
        let reader = qmp.try_clone()?;
        let watch = Arc::new(Watch {
            told: Mutex::default(),
            news: Condvar::new(),
            qmp: Mutex::new(qmp),
        });
        let readers = [serial, errors, reader.into()].map(Lines::new);
        let thread = watch.clone();
        thread::spawn(move || thread.follow(pid, readers));
        Ok(watch)
    }

    fn follow(&self, pid: u32, [mut serial, mut errors, mut qmp]: [Lines; 3]) {
        while serial.open || errors.open || qmp.open {
            wait_readable(&[&serial, &errors, &qmp]);
            // QMP first: what came before a message on the other ways can be read by then.
            let messages = qmp.read();
            let (serial, errors) = (serial.read(), errors.read());
            let mut told = self.lock();
            serial.into_iter().for_each(|line| told.add_line(line));
            errors.iter().for_each(|line| told.add_error(line));
            let stops = messages
                .iter()
                .filter(|line| told.add_message(line))
                .count();
            drop(told);
            self.news.notify_all();
            if stops > 0 {
                // If this fails, QEMU is ending, which will be the reason.
                let _ = self.send(&json!({"execute": "query-status", "id": STATUS}));
            }
        }
        if let Some(status) = exit_status(pid) {
            self.lock().ended = Some(status);
            self.news.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a QMP command.
    pub fn send(&self, command: &Value) -> std::io::Result<()> {
        let mut qmp = self.qmp.lock().unwrap_or_else(PoisonError::into_inner);
        qmp.write_all(format!("{command}\n").as_bytes())
    }

    /// The error of a write to the machine: QEMU has ended, or is about to.
    pub fn not_sent(&self, what: &str, error: std::io::Error) -> Error {
        let cause = self.until(DEADLINE, |told| told.cause_of_death());
        let (cause, report) = (cause.unwrap_or_default(), self.lock().report());
        anyhow!("sending {what}: {error}; {cause}{report}")
    }

    /// Waits until `look` finds something. It is an error if the machine dies before.
    pub fn wait<T>(&self, awaited: &str, look: impl FnMut(&mut Told) -> Option<T>) -> Result<T> {
        match self.within(DEADLINE, awaited, look)? {
            Some(found) => Ok(found),
            None => Err(self.timed_out(awaited)),
        }
    }

    pub fn timed_out(&self, awaited: &str) -> Error {
        let (limit, report) = (DEADLINE.as_secs(), self.lock().report());
        anyhow!("{awaited} did not come within {limit} s{report}")
    }

    /// As [`Watch::wait`], for so long.
    pub fn within<T>(
        &self,
        limit: Duration,
        awaited: &str,
        mut look: impl FnMut(&mut Told) -> Option<T>,
    ) -> Result<Option<T>> {
        let found = self.until(limit, |told| match look(told) {
            Some(found) => Some(Ok(found)),
            None => told.cause_of_death().map(Err),
        });
        match found {
            Some(Err(cause)) => bail!("{cause}; awaited was {awaited}{}", self.lock().report()),
            Some(Ok(found)) => Ok(Some(found)),
            None => Ok(None),
        }
    }

    /// Waits until `look` finds something, whatever becomes of the machine.
    pub fn until<T>(
        &self,
        limit: Duration,
        mut look: impl FnMut(&mut Told) -> Option<T>,
    ) -> Option<T> {
        let end = Instant::now() + limit;
        let mut told = self.lock();
        loop {
            if let Some(found) = look(&mut told) {
                return Some(found);
            }
            let left = end.checked_duration_since(Instant::now())?;
            let waited = self.news.wait_timeout(told, left);
            told = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Told {
    fn add_line(&mut self, line: String) {
        if DEATHS.iter().any(|death| line.starts_with(death)) {
            self.died.get_or_insert_with(|| line.clone());
        }
        self.recent.push_back(line.clone());
        if self.recent.len() > RECENT {
            self.recent.pop_front();
        }
        self.lines.push_back(line);
    }

    fn add_error(&mut self, line: &str) {
        println!("qemu: {line}");
        self.errors.push_str(line);
        self.errors.push('\n');
    }

    /// Returns whether the VM has stopped, so that its state is to be asked for.
    fn add_message(&mut self, line: &str) -> bool {
        let mut message: Value = serde_json::from_str(line)
            .unwrap_or_else(|_| json!({"error": {"desc": format!("QEMU sent no JSON: {line}")}}));
        if message["id"] == STATUS {
            self.stopped = message["return"]["status"].as_str().map(String::from);
            return false;
        }
        let data = message["data"].take();
        let Some(name) = message["event"].as_str() else {
            self.answers.push_back(message);
            return false;
        };
        self.events.push((name.to_owned(), data));
        let stops = name == "STOP";
        if stops {
            self.stopped = None;
        }
        stops
    }

    /// Takes the oldest event of this name; returns its data.
    pub fn take_event(&mut self, name: &str) -> Option<Value> {
        let at = self.events.iter().position(|(event, _)| event == name)?;
        Some(self.events.remove(at).1)
    }

    /// Why the guest reset or ended the machine by itself, if it did.
    fn by_guest(&self, name: &str) -> Option<&Value> {
        let mut events = self.events.iter();
        events.find_map(|(event, data)| {
            (event == name && data["guest"] == true).then_some(&data["reason"])
        })
    }

    /// Why nothing that is awaited will come any more.
    fn cause_of_death(&self) -> Option<String> {
        if let Some(status) = self.ended {
            return Some(match self.by_guest("SHUTDOWN") {
                Some(reason) => format!("the guest ended the machine ({reason}), {status}"),
                None => format!("QEMU ended, {status}"),
            });
        }
        if let Some(line) = &self.died {
            return Some(format!("the guest died: {line}"));
        }
        if let Some(reason) = self.by_guest("RESET") {
            return Some(format!("the guest reset the machine ({reason})"));
        }
        // A test that expects the stop has taken the event.
        let state = self.stopped.as_deref()?;
        let unexpected = self.events.iter().any(|(event, _)| event == "STOP");
        (unexpected && STOPPED_FOR_GOOD.contains(&state))
            .then(|| format!("the VM stopped by itself, its state is {state}"))
    }

    /// The ends of the serial line and of standard error.
    fn report(&self) -> String {
        let errors: Vec<_> = self.errors.lines().collect();
        let errors = &errors[errors.len().saturating_sub(ERRORS)..];
        let serial: Vec<_> = self.recent.iter().map(String::as_str).collect();
        let serial = match kernel_log::last_words(&serial) {
            Some(words) => words,
            None => &serial[serial.len().saturating_sub(TAIL)..],
        };
        let mut report = String::new();
        for (name, lines) in [("serial line", serial), ("QEMU's stderr", errors)] {
            if !lines.is_empty() {
                report += &format!("\n{name}:\n  {}", lines.join("\n  "));
            }
        }
        report
    }
}

/// Lines from a pipe or a socket, of which no read blocks.
struct Lines {
    from: File,
    /// The beginning of a line.
    rest: Vec<u8>,
    open: bool,
}

impl Lines {
    fn new(from: OwnedFd) -> Lines {
        Lines {
            from: from.into(),
            rest: Vec::new(),
            open: true,
        }
    }

    /// The lines that have come; at the end of the stream, also what is left without a newline.
    fn read(&mut self) -> Vec<String> {
        if !self.open || !is_readable(self.from.as_fd()) {
            return Vec::new();
        }
        let mut bytes = vec![0; PIPE];
        let size = self.from.read(&mut bytes).unwrap_or(0);
        self.rest.extend(&bytes[..size]);
        self.open = size > 0;
        let end = match self.open {
            true => self
                .rest
                .iter()
                .rposition(|byte| *byte == b'\n')
                .map_or(0, |at| at + 1),
            false => self.rest.len(),
        };
        let lines: Vec<_> = self.rest.drain(..end).collect();
        let lines = String::from_utf8_lossy(&lines);
        lines
            .lines()
            .map(|line| line.trim_end().to_owned())
            .collect()
    }
}

fn wait_readable(all: &[&Lines]) {
    let open = all.iter().filter(|lines| lines.open);
    let mut fds: Vec<_> = open.map(|lines| readable(lines.from.as_fd())).collect();
    // Whether it was interrupted does not matter: nothing is read that is not there.
    let _ = poll(&mut fds, PollTimeout::NONE);
}

fn is_readable(fd: BorrowedFd) -> bool {
    matches!(poll(&mut [readable(fd)], PollTimeout::ZERO), Ok(1))
}

fn readable(fd: BorrowedFd) -> PollFd {
    PollFd::new(fd, PollFlags::POLLIN)
}

/// Waits until the child has ended, and leaves it to be reaped. None if that has been done.
fn exit_status(pid: u32) -> Option<ExitStatus> {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
    match waitid(Id::Pid(Pid::from_raw(pid as i32)), flags).ok()? {
        WaitStatus::Exited(_, code) => Some(ExitStatus::from_raw(code << 8)),
        WaitStatus::Signaled(_, signal, dumped) => {
            Some(ExitStatus::from_raw(signal as i32 | i32::from(dumped) << 7))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, PipeWriter, pipe};
    use std::process::{Child, Command};

    use super::*;

    struct Killed(Child);

    impl Drop for Killed {
        fn drop(&mut self) {
            // Either fails where the test has done it.
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    /// The test in QEMU's place, but for the process, which is a shell's.
    struct Fake {
        child: Killed,
        serial: PipeWriter,
        errors: PipeWriter,
        qmp: BufReader<UnixStream>,
        watch: Arc<Watch>,
    }

    impl Fake {
        fn start() -> Result<Fake> {
            let child = Killed(Command::new("sleep").arg("1000").spawn()?);
            let (serial, errors) = (pipe()?, pipe()?);
            let (ours, theirs) = UnixStream::pair()?;
            Ok(Fake {
                watch: Watch::start(child.0.id(), serial.0.into(), errors.0.into(), ours)?,
                child,
                serial: serial.1,
                errors: errors.1,
                qmp: BufReader::new(theirs),
            })
        }

        fn sends(&mut self, message: Value) -> Result<()> {
            Ok(writeln!(self.qmp.get_mut(), "{message}")?)
        }

        /// The VM stops, and says why when it is asked.
        fn stops(&mut self, status: &str) -> Result<()> {
            self.sends(json!({"event": "STOP"}))?;
            let mut command = String::new();
            self.qmp.read_line(&mut command)?;
            let command: Value = serde_json::from_str(&command)?;
            assert_eq!(command["execute"], "query-status");
            self.sends(json!({"return": {"status": status}, "id": command["id"]}))
        }

        fn line(&self) -> Result<String> {
            self.watch.wait("a line", |told| told.lines.pop_front())
        }

        /// Why a wait for a line fails.
        fn failure(&self) -> Result<String> {
            match self.line() {
                Ok(line) => bail!("there is a line: {line}"),
                Err(error) => Ok(format!("{error:#}")),
            }
        }

        /// The process ends by this signal, and its files are closed.
        fn ends_by(mut self, signal: &str) -> Result<Arc<Watch>> {
            let kill = ["-s", signal, &self.child.0.id().to_string()].map(String::from);
            assert!(Command::new("kill").args(kill).status()?.success());
            let watch = self.watch.clone();
            drop(self.serial);
            drop(self.errors);
            drop(self.qmp);
            let ended = watch.until(DEADLINE, |told| told.ended);
            assert!(
                ended.is_some_and(|status| self.child.0.wait().is_ok_and(|real| real == status))
            );
            Ok(watch)
        }
    }

    #[test]
    fn a_crash_of_qemu_is_named_with_its_text() -> Result<()> {
        let mut fake = Fake::start()?;
        writeln!(fake.serial, "linux ready")?;
        write!(fake.errors, "q.c:7: f: Assertion `x' failed.")?;
        let watch = fake.ends_by("SEGV")?;
        // What it said before comes first.
        assert!(watch.wait("a line", |told| told.lines.pop_front()).is_ok());
        let error = watch
            .wait("the shell", |told| told.lines.pop_front())
            .unwrap_err();
        let text = format!("{error:#}");
        for part in [
            "QEMU ended, signal: 11 (SIGSEGV)",
            "the shell",
            "Assertion",
            "linux ready",
        ] {
            assert!(text.contains(part), "no '{part}' in: {text}");
        }
        let sent = watch.not_sent("'check'", std::io::ErrorKind::BrokenPipe.into());
        assert!(
            format!("{sent:#}").contains("'check': broken pipe; QEMU ended"),
            "{sent:#}"
        );
        Ok(())
    }

    #[test]
    fn an_internal_error_is_named_unless_the_test_expects_the_stop() -> Result<()> {
        let mut fake = Fake::start()?;
        writeln!(
            fake.errors,
            "KVM internal error. Suberror: 1\nRIP=0000000040000000"
        )?;
        fake.stops("internal-error")?;
        let text = fake.failure()?;
        for part in [
            "its state is internal-error",
            "Suberror: 1",
            "RIP=0000000040000000",
        ] {
            assert!(text.contains(part), "no '{part}' in: {text}");
        }
        fake.watch.wait("STOP", |told| told.take_event("STOP"))?;
        writeln!(fake.serial, "after the reset")?;
        assert_eq!(fake.line()?, "after the reset");
        // The next one is not confused with the one before.
        fake.stops("paused")?;
        writeln!(fake.serial, "after 'cont'")?;
        assert_eq!(fake.line()?, "after 'cont'");
        Ok(())
    }

    #[test]
    fn a_guest_that_resets_itself_is_named_with_its_panic() -> Result<()> {
        let mut fake = Fake::start()?;
        fake.sends(json!({"event": "RESET", "data": {"guest": false, "reason": "host-qmp"}}))?;
        writeln!(fake.serial, "the operator's reset is none of its own")?;
        fake.line()?;
        writeln!(
            fake.serial,
            "x\nkernel BUG at a.c:1!\nRIP: 0010:f+0x1/0x2\nKernel panic - y"
        )?;
        (0..4).try_for_each(|_| fake.line().map(drop))?;
        fake.sends(json!({"event": "RESET", "data": {"guest": true, "reason": "guest-reset"}}))?;
        let text = fake.failure()?;
        let expected = "the guest reset the machine (\"guest-reset\"); awaited was a line\n\
                        serial line:\n  kernel BUG at a.c:1!\n  RIP: 0010:f+0x1/0x2\n  Kernel panic - y";
        assert_eq!(text, expected);
        Ok(())
    }

    #[test]
    fn a_guest_that_ends_the_machine_is_named() -> Result<()> {
        let mut fake = Fake::start()?;
        fake.sends(json!({"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}))?;
        let watch = fake.ends_by("TERM")?;
        let error = watch
            .wait("a line", |told| told.lines.pop_front())
            .unwrap_err();
        let expected = "the guest ended the machine (\"guest-reset\"), signal: 15 (SIGTERM)";
        assert!(error.to_string().starts_with(expected), "{error:#}");
        Ok(())
    }

    #[test]
    fn a_guest_that_stands_still_is_named() -> Result<()> {
        for last in [
            "trap 13 rip=0xf0000",
            "---[ end Kernel panic - not syncing: x ]---",
        ] {
            let mut fake = Fake::start()?;
            writeln!(fake.serial, "{last}")?;
            fake.line()?;
            let text = fake.failure()?;
            assert!(
                text.starts_with(&format!("the guest died: {last}; ")),
                "{text}"
            );
        }
        Ok(())
    }

    /// Otherwise a guest's last line could be lost to the news of its end.
    #[test]
    fn what_was_said_before_an_event_is_known_before_it() -> Result<()> {
        for _ in 0..200 {
            let mut fake = Fake::start()?;
            writeln!(fake.serial, "guest-linux ok")?;
            writeln!(fake.errors, "a warning")?;
            fake.sends(json!({"event": "RESET", "data": {"guest": true}}))?;
            assert_eq!(fake.line()?, "guest-linux ok");
            let text = fake.failure()?;
            assert!(text.contains("a warning"), "{text}");
        }
        Ok(())
    }

    #[test]
    fn what_does_not_come_is_not_called_a_death() -> Result<()> {
        let fake = Fake::start()?;
        let nothing = fake
            .watch
            .within(Duration::from_millis(1), "a line", |told| {
                told.lines.pop_front()
            });
        assert!(nothing?.is_none());
        Ok(())
    }
}
