//! The console of a lab that runs: hands on what the driver reports, and says why
//! a lab broke off, with the text of the kernel that died.

use std::collections::VecDeque;
use std::path::Path;
use std::time::Instant;

use anyhow::{Error, Result, anyhow};

use crate::kernel_log;
use crate::protocol::{self, Event};

/// How many of the log's last lines are kept.
const RECENT: usize = 200;
/// How many of them a report has where no kernel says what is wrong.
const TAIL: usize = 10;
/// How the kernel begins to say that it turns the machine off or resets it.
const REBOOT: &str = "reboot: ";

#[derive(Default)]
pub struct Console {
    done: bool,
    /// The test that runs, and since when.
    running: Option<(String, Instant)>,
    recent: VecDeque<String>,
}

impl Console {
    /// One more line, and the event that it is. When all is done, what the kernel
    /// says while it goes down is none.
    pub fn hear(&mut self, line: &str) -> Option<Event> {
        let event = protocol::parse(line);
        match &event {
            Event::Log(line) => {
                self.recent.push_back(line.clone());
                if self.recent.len() > RECENT {
                    self.recent.pop_front();
                }
            }
            Event::Begin(test) => self.running = Some((test.clone(), Instant::now())),
            Event::Test(_) => self.running = None,
            _ => {}
        }
        let shown = !(self.done && matches!(event, Event::Log(_)));
        self.done |= matches!(event, Event::Done | Event::Exit(_));
        shown.then_some(event)
    }

    /// Whether the lab came to its end. `machine` is how its QEMU ended.
    pub fn verdict(&self, machine: Result<()>, log: &Path) -> Result<()> {
        let error = match machine {
            Ok(()) if self.done => return Ok(()),
            Ok(()) => anyhow!("{}", self.end()),
            Err(error) => error,
        };
        Err(self.explained(error, log))
    }

    /// How a machine ended that was reset or turned off before the driver was done.
    fn end(&self) -> &'static str {
        let says = |text| self.recent.iter().any(|line| line.contains(text));
        if kernel_log::last_words(&self.lines()).is_some() {
            "the lab's kernel died"
        } else if says(REBOOT) {
            "the lab ended before it was done"
        } else {
            "the lab's machine was reset, and its kernel said nothing: a triple fault, or a reset \
             by a device"
        }
    }

    fn explained(&self, error: Error, log: &Path) -> Error {
        let lines = self.lines();
        let text = match kernel_log::last_words(&lines) {
            Some(words) => words,
            None => &lines[lines.len().saturating_sub(TAIL)..],
        };
        let running = self
            .running
            .as_ref()
            .map_or_else(String::new, |(test, begun)| {
                let seconds = begun.elapsed().as_secs_f32();
                format!(" while {test} ran, for {seconds:.1} s")
            });
        let log = log.display();
        let text: String = text.iter().flat_map(|line| ["\n", line]).collect();
        anyhow!("{error:#}{running}; its console is in {log}{text}")
    }

    fn lines(&self) -> Vec<&str> {
        self.recent.iter().map(String::as_str).collect()
    }
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    const OOPS: &str = "\
BUG: kernel NULL pointer dereference, address: 0000000000000010
#PF: supervisor read access in kernel mode
Oops: Oops: 0000 [#1] SMP NOPTI
RIP: 0010:kvm_gmem_populate+0x12/0x340
Call Trace:
 <TASK>
 kvm_vm_ioctl+0x1/0x2
 </TASK>
---[ end trace 0000000000000000 ]---
Kernel panic - not syncing: Fatal exception";

    /// Why the lab broke off that said this.
    fn reason(console: &str, machine: Result<()>) -> String {
        let mut heard = Console::default();
        console.lines().for_each(|line| drop(heard.hear(line)));
        match heard.verdict(machine, Path::new("/logs/lab.log")) {
            Ok(()) => "none".to_owned(),
            Err(error) => format!("{error:#}"),
        }
    }

    fn told(before: &str, last: &str) -> String {
        format!("kernel 7.3.4\n@lab {{\"begin\": \"holes\"}}\n{before}\n{last}")
    }

    #[test]
    fn a_kernel_that_dies_is_named_with_its_text_and_the_test() {
        let reason = reason(&told("  a remark", OOPS), Ok(()));
        let rest = reason.strip_prefix("the lab's kernel died while holes ran, for ");
        let (seconds, text) = rest.and_then(|rest| rest.split_once(" s; ")).unwrap();
        assert!(seconds.parse::<f32>().is_ok());
        assert_eq!(text, format!("its console is in /logs/lab.log\n{OOPS}"));
    }

    #[test]
    fn other_ends_of_a_kernel_are_named() {
        for sign in [
            "Oops: general protection fault, probably for non-canonical address 0x1: 0000 [#1]",
            "kernel BUG at mm/filemap.c:123!",
            "[   12.5] watchdog: BUG: soft lockup - CPU#0 stuck for 130s! [qemu:77]",
            "rcu: INFO: rcu_preempt self-detected stall on CPU",
            "INFO: task qemu:77 blocked for more than 120 seconds.",
            "demo: cutKernel panic - not syncing: Attempted to kill init! exitcode=0x00000b00",
        ] {
            let reason = reason(&told("", sign), Ok(()));
            assert!(
                reason.starts_with("the lab's kernel died while holes"),
                "{reason}"
            );
            assert!(reason.ends_with(sign), "{reason}");
        }
    }

    #[test]
    fn a_reset_without_a_word_is_named() {
        let silent = reason(&told("  a remark", "qemu: a warning"), Ok(()));
        assert!(
            silent.starts_with("the lab's machine was reset, and its kernel"),
            "{silent}"
        );
        assert!(silent.contains("while holes ran"), "{silent}");
        assert!(
            silent.ends_with("\n  a remark\nqemu: a warning"),
            "{silent}"
        );
        let told_so = reason(&told("", "reboot: Restarting system"), Ok(()));
        assert!(
            told_so.starts_with("the lab ended before it was done"),
            "{told_so}"
        );
    }

    #[test]
    fn a_hang_and_a_crash_of_the_lab_s_qemu_keep_their_reason() {
        let hangs = || bail!("the lab did not end within 3 s");
        let reason = reason(&told("", OOPS), hangs());
        assert!(
            reason.starts_with("the lab did not end within 3 s while holes ran"),
            "{reason}"
        );
        assert!(reason.ends_with(OOPS), "{reason}");
    }

    #[test]
    fn what_comes_after_the_end_is_for_the_log_only() {
        let mut console = Console::default();
        assert_eq!(console.hear("@lab {\"done\": true}"), Some(Event::Done));
        assert_eq!(console.hear("reboot: Power down"), None);
        assert!(console.verdict(Ok(()), Path::new("log")).is_ok());
        let crash = console.verdict(Err(anyhow!("signal: 11")), Path::new("log"));
        assert!(crash.is_err_and(|error| error.to_string().starts_with("signal: 11; its")));
    }

    #[test]
    fn a_test_that_has_its_verdict_does_not_run() {
        let test = r#"@lab {"test": "holes", "result": "ok"}"#;
        let reason = reason(&told("", test), Ok(()));
        assert!(!reason.contains("while"), "{reason}");
    }
}
