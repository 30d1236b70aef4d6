//! What the lab says on its console: lines `@lab {json}` are results, all
//! others are a log for people.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

const MARK: &str = "@lab ";

#[derive(Debug, PartialEq)]
pub enum Event {
    Log(String),
    /// A test of this name begins.
    Begin(String),
    Test(Test),
    Demo(Map<String, Value>),
    Bench(Value),
    Soak(Round),
    Exit(u8),
    Error(String),
    Done,
}

#[derive(Debug, PartialEq, Deserialize)]
pub struct Test {
    #[serde(rename = "test")]
    pub name: String,
    pub result: Verdict,
    #[serde(default)]
    pub why: String,
}

/// What came of a hostile guest's attack.
#[derive(Debug, PartialEq, Deserialize)]
pub struct Round {
    pub accepted: u64,
    pub refused: u64,
    pub plugged: u64,
    pub longest_ms: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Ok,
    Failed,
    Skipped,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::Ok => "ok",
            Self::Failed => "failed",
            Self::Skipped => "skipped",
        })
    }
}

/// Reads one line. A result that cannot be read is an error, never a log line.
pub fn parse(line: &str) -> Event {
    // The kernel may have written to the console just before.
    let Some((_, json)) = line.split_once(MARK) else {
        return Event::Log(line.to_owned());
    };
    result(json).unwrap_or_else(|| Event::Error(format!("the lab said {json}")))
}

fn result(json: &str) -> Option<Event> {
    let mut value: Value = serde_json::from_str(json.trim()).ok()?;
    let object = value.as_object_mut()?;
    if object.contains_key("test") {
        return serde_json::from_value(value).ok().map(Event::Test);
    }
    if let Some(name) = object.get("begin") {
        return name.as_str().map(|name| Event::Begin(name.to_owned()));
    }
    if let Some(Value::Object(demo)) = object.remove("demo") {
        return Some(Event::Demo(demo));
    }
    if let Some(bench) = object.remove("bench") {
        return Some(Event::Bench(bench));
    }
    if let Some(round) = object.remove("soak") {
        return serde_json::from_value(round).ok().map(Event::Soak);
    }
    if let Some(status) = object.get("exit") {
        // Like a shell: anything odd is a failure.
        let status = status.as_u64().and_then(|status| u8::try_from(status).ok());
        return Some(Event::Exit(status.unwrap_or(u8::MAX)));
    }
    if let Some(error) = object.get("error") {
        return Some(Event::Error(error.as_str().unwrap_or(json).to_owned()));
    }
    (object.get("done") == Some(&Value::Bool(true))).then_some(Event::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_told_from_the_log() {
        assert_eq!(parse("booting"), Event::Log("booting".into()));
        assert_eq!(parse(r#"@lab {"done": true}"#), Event::Done);
        assert_eq!(parse(r#"[ 1.0] noise @lab {"exit": 3}"#), Event::Exit(3));
        assert_eq!(parse(r#"@lab {"exit": -1}"#), Event::Exit(255));
        assert_eq!(
            parse(r#"@lab {"begin": "holes"}"#),
            Event::Begin("holes".into())
        );
        let test = Test {
            name: "holes".into(),
            result: Verdict::Skipped,
            why: "no cachestat".into(),
        };
        let line = r#"@lab {"test": "holes", "result": "skipped", "why": "no cachestat"}"#;
        assert_eq!(parse(line), Event::Test(test));
    }

    #[test]
    fn broken_results_are_errors() {
        for line in [
            r#"@lab {"test": "holes", "result": "fine"}"#,
            r#"@lab {"test": "#,
            r#"@lab {"begin": 3}"#,
            r#"@lab {"done": false}"#,
            r#"@lab {"soak": {"accepted": 3}}"#,
            "@lab 3",
        ] {
            assert!(matches!(parse(line), Event::Error(_)), "{line}");
        }
    }
}
