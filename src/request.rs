//! A guest's request to convert memory, which takes as many steps as it needs and
//! is undone as a whole where one of them fails.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::range::{GRANULE, Range};
use crate::state::{Side, StateMap};
use crate::vm::Vm;

/// Which granules a request has changed so far. Kept only for requests of several
/// steps: one bit a granule, which costs memory where steps were done.
#[derive(Default)]
pub(crate) struct Changed(Option<Granules>);

struct Granules {
    /// Guest-physical.
    span: Range,
    map: StateMap,
}

/// In the map of [`Granules`], which has nothing to do with sides.
const CHANGED: Side = Side::Private;

impl Changed {
    /// To be called before a step that another one follows. All memory of the
    /// request lies within `span`: what the guest asks for may be much larger.
    pub(crate) fn prepare(&mut self, span: Range) -> Result<()> {
        if self.0.is_none() {
            let map = StateMap::new(span.granules().len(), CHANGED.other())?;
            self.0 = Some(Granules { span, map });
        }
        Ok(())
    }

    /// (Memory that was plugged since the first step is as it was plugged: shared.)
    pub(crate) fn add(&self, gpa: Range) {
        if let Some(Granules { span, map }) = &self.0
            && let Some(gpa) = gpa.intersection(span)
        {
            map.set(gpa.rebase(span.start(), 0).granules(), CHANGED);
        }
    }

    /// The first run of what was changed from `gpa` on.
    fn first_from(&self, gpa: u64) -> Option<Range> {
        let Granules { span, map } = self.0.as_ref()?;
        let from = (gpa.saturating_sub(span.start()) / GRANULE) as usize;
        let run = map.first_on(CHANGED, from.min(map.len())..map.len())?;
        Some(Range::from_granules(run).rebase(0, span.start()))
    }
}

/// A request for guest-physical memory to become private or shared.
///
/// Every step is bounded in time, and between two of them no lock is held: the
/// caller lets others run, and may take as long as it likes. Where a step fails,
/// those before it are undone, by as many steps again: all that the request has
/// changed is on its old side then, but without the contents that were freed. To
/// drop a request that is not done keeps what it has done.
///
/// Another request for the same memory in between is not a whole to this one: what
/// both wanted on the same side goes back with this one.
pub struct Conversion {
    vm: Arc<Vm>,
    request: Range,
    to: Side,
    changed: Changed,
    /// Guest-physical address up to which it is done, or undone.
    at: u64,
    failed: Option<Undo>,
}

/// Why, and how far, a request is undone; see [`Error::Undone`].
struct Undo {
    cause: Error,
    contents_lost: u64,
    stuck: u64,
    unmapped: u64,
    stale: u64,
}

impl Undo {
    fn new(cause: Error) -> Undo {
        let mut undo = Undo {
            cause,
            contents_lost: 0,
            stuck: 0,
            unmapped: 0,
            stale: 0,
        };
        undo.cause = match undo.cause {
            Error::Undone {
                cause,
                contents_lost,
                stuck,
                unmapped,
                stale,
            } => {
                (undo.contents_lost, undo.stuck) = (contents_lost, stuck);
                (undo.unmapped, undo.stale) = (unmapped, stale);
                *cause
            }
            cause => cause,
        };
        undo
    }

    fn into_error(self) -> Error {
        Error::undone(
            self.cause,
            self.contents_lost,
            self.stuck,
            self.unmapped,
            self.stale,
        )
    }
}

impl Vm {
    /// A request as for [`Vm::convert`], for all of `size` bytes; nothing is done
    /// yet.
    pub fn request(self: &Arc<Vm>, gpa: u64, size: u64, to: Side) -> Result<Conversion> {
        let request =
            Range::new(gpa, size).inspect_err(|error| self.failed.add(gpa, size, to, error))?;
        Ok(Conversion {
            vm: self.clone(),
            request,
            to,
            changed: Changed::default(),
            at: gpa,
            failed: None,
        })
    }
}

impl Conversion {
    /// Does the next step; returns how many bytes are left to do, or to undo. To be
    /// called again until there are none, or it fails: all is undone then, as far as
    /// can be, and nothing is left to do.
    pub fn step(&mut self) -> Result<u64> {
        let result = match &self.failed {
            None => self.step_on(),
            Some(_) => self.step_back(),
        };
        result.inspect_err(|error| {
            let (gpa, size) = (self.request.start(), self.request.len());
            self.vm.failed.add(gpa, size, self.to, error);
        })
    }

    fn step_on(&mut self) -> Result<u64> {
        let end = self.request.end();
        let Ok(rest) = Range::new(self.at, end - self.at) else {
            return Ok(0);
        };
        match self.vm.step(rest, self.to, Some(&mut self.changed)) {
            Ok(done) => {
                self.at += done;
                Ok(end - self.at)
            }
            Err(cause) => {
                self.failed = Some(Undo::new(cause));
                self.at = self.request.start();
                self.step_back()
            }
        }
    }

    fn step_back(&mut self) -> Result<u64> {
        let end = self.request.end();
        if let Some(run) = self.changed.first_from(self.at) {
            let (undone, failed) = match self.vm.step_back(run, self.to.other()) {
                Ok(undone) => (undone, None),
                // What is left of the run stays where it is.
                Err(error) => (run, Some(Undo::new(error))),
            };
            let (lost, stuck) = self.vm.undone(undone, self.to.other());
            self.at = undone.end();
            if let Some(undo) = &mut self.failed {
                undo.contents_lost += lost;
                undo.stuck += stuck;
                undo.unmapped += failed.as_ref().map_or(0, |failed| failed.unmapped);
                undo.stale += failed.as_ref().map_or(0, |failed| failed.stale);
            }
        }
        if self.changed.first_from(self.at).is_some() {
            return Ok(end - self.at);
        }
        self.at = end;
        let failed = self.failed.take();
        failed.map_or(Ok(0), |undo| Err(undo.into_error()))
    }
}
