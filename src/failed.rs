//! The last requests that failed, for whoever asks later.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use crate::error::Error;
use crate::state::Side;

/// As many are kept; a guest may send as many as it likes.
const KEPT: usize = 8;

/// A request to convert memory that failed.
#[derive(Clone, Debug)]
pub struct FailedConversion {
    /// Which one of all it is, from 1.
    pub number: u64,
    pub time: SystemTime,
    /// As it was asked for, which need not be a range that there is.
    pub gpa: u64,
    /// In bytes.
    pub size: u64,
    pub to: Side,
    /// See [`Error::errno`].
    pub errno: i32,
    pub message: String,
}

#[derive(Default)]
pub(crate) struct FailedConversions(Mutex<VecDeque<FailedConversion>>);

impl FailedConversions {
    pub(crate) fn add(&self, gpa: u64, size: u64, to: Side, error: &Error) {
        let message = error.to_string();
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let number = kept.front().map_or(1, |last| last.number + 1);
        kept.truncate(KEPT - 1);
        kept.push_front(FailedConversion {
            number,
            time: SystemTime::now(),
            gpa,
            size,
            to,
            errno: error.errno(),
            message,
        });
    }

    /// The one that came `index` before the last.
    pub(crate) fn get(&self, index: usize) -> Option<FailedConversion> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.get(index).cloned()
    }
}
