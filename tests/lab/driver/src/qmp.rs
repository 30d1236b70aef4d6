//! A QMP client: one connection, one command at a time, every wait with a deadline.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};

/// Far more than anything takes here: reaching it means that something hangs.
pub const DEADLINE: Duration = Duration::from_secs(120);

pub struct Qmp {
    socket: BufReader<UnixStream>,
    /// Name and data, the oldest first.
    events: Vec<(String, Value)>,
}

impl Qmp {
    /// Greets; returns once QEMU runs its main loop, that is, once the machine exists.
    pub fn new(socket: UnixStream) -> Result<Qmp> {
        socket.set_read_timeout(Some(DEADLINE))?;
        socket.set_write_timeout(Some(DEADLINE))?;
        let mut qmp = Qmp {
            socket: BufReader::new(socket),
            events: Vec::new(),
        };
        qmp.receive("the QMP greeting")?;
        qmp.call("qmp_capabilities", json!({}))?;
        qmp.call("query-status", json!({}))?;
        Ok(qmp)
    }

    /// A command that must succeed.
    pub fn call(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.execute(command, &arguments)?
            .map_err(|text| anyhow!("QMP {command} {arguments} was refused: {text}"))
    }

    /// A command that must be refused; gives the error's text.
    pub fn refused(&mut self, command: &str, arguments: Value) -> Result<String> {
        match self.execute(command, &arguments)? {
            Ok(_) => bail!("QMP {command} {arguments} should have been refused"),
            Err(text) => Ok(text),
        }
    }

    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Result<Value, String>> {
        let mut line = json!({"execute": command, "arguments": arguments}).to_string();
        line.push('\n');
        self.socket
            .get_mut()
            .write_all(line.as_bytes())
            .with_context(|| format!("sending QMP {command}"))?;
        loop {
            let mut answer = self.receive(&format!("the answer to QMP {command}"))?;
            if self.keep_event(&mut answer) {
                continue;
            }
            return Ok(match answer["error"]["desc"].as_str() {
                Some(text) => Err(text.into()),
                None => Ok(answer["return"].take()),
            });
        }
    }

    /// Waits for the event, or takes the oldest that came before; gives its data.
    pub fn event(&mut self, name: &str) -> Result<Value> {
        loop {
            if let Some(at) = self.events.iter().position(|(event, _)| event == name) {
                return Ok(self.events.remove(at).1);
            }
            let mut answer = self.receive(&format!("the QMP event {name}"))?;
            self.keep_event(&mut answer);
        }
    }

    /// Whether what was received is an event.
    fn keep_event(&mut self, answer: &mut Value) -> bool {
        let name = answer["event"].as_str().map(String::from);
        let data = answer["data"].take();
        let kept = name.map(|name| self.events.push((name, data)));
        kept.is_some()
    }

    fn receive(&mut self, awaited: &str) -> Result<Value> {
        let mut line = String::new();
        match self.socket.read_line(&mut line) {
            Ok(0) => bail!("QEMU closed its QMP socket; awaited was {awaited}"),
            Ok(_) => {
                serde_json::from_str(&line).with_context(|| format!("QEMU sent no JSON: {line}"))
            }
            Err(e) => Err(e).with_context(|| format!("no end of waiting for {awaited}")),
        }
    }
}
