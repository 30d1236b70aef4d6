//! A QMP client: one connection, one command at a time, every wait with a deadline.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use serde_json::{Value, json};

use crate::watch::Watch;

/// Far more than anything takes here: reaching it means that something hangs.
pub const DEADLINE: Duration = Duration::from_secs(120);

pub struct Qmp(Arc<Watch>);

impl Qmp {
    /// Greets; returns once QEMU runs its main loop, that is, once the machine exists.
    pub fn new(watch: Arc<Watch>) -> Result<Qmp> {
        let mut qmp = Qmp(watch);
        qmp.answer("the QMP greeting")?;
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
        let sent = self
            .0
            .send(&json!({"execute": command, "arguments": arguments}));
        let mut answer = match sent {
            Ok(()) => self.answer(&format!("the answer to QMP {command}"))?,
            Err(error) => return Err(self.0.not_sent(&format!("QMP {command}"), error)),
        };
        Ok(match answer["error"]["desc"].as_str() {
            Some(text) => Err(text.into()),
            None => Ok(answer["return"].take()),
        })
    }

    fn answer(&self, awaited: &str) -> Result<Value> {
        self.0.wait(awaited, |told| told.answers.pop_front())
    }

    /// Waits for the event, or takes the oldest that came before; gives its data.
    pub fn event(&mut self, name: &str) -> Result<Value> {
        let awaited = format!("the QMP event {name}");
        self.0.wait(&awaited, |told| told.take_event(name))
    }
}
