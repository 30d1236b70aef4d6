//! Moving private contents to another place while the guest runs.
//!
//! Who moves a private page? Its trust agent does, asked by the one who knows
//! where the guest sees it and can keep everybody else off it. Order: lock the
//! range, so that nobody converts, discards or moves it; hold off the guest's
//! writers (they wait in the kernel); have the agent move the contents; map the
//! new place over the old one; let the writers go on, on the new place; free the
//! old one. A step that fails leaves the guest on the old place, contents
//! included, and the new one empty.
//!
//! Memory that was moved to a file on a disk is what others call swapped out: the
//! kernel's page cache drops it, and reads it again for whoever touches it. No
//! thread of ours answers faults, so that there is no lock that one who faults
//! could hold against it, and a disk that fails is to the guest what it is for
//! any RAM that lies in a file: SIGBUS for the thread that touched it. Moving it
//! home is swapping it in.
//!
//! Held off is who uses the VMM's mapping, the kernel on its behalf included.
//! Who has pinned pages before, such as DMA under way, writes to the old place:
//! what it writes is lost, as in a conversion.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::agent::Move;
use crate::error::{Error, Result};
use crate::kernel::Blocked;
use crate::places::Part;
use crate::range::{GRANULE, Range};
use crate::region::Region;
use crate::state::Side;
use crate::store::Store;
use crate::vm::{Bindings, Vm, overlapping};

/// How much is moved at once: `PG_LEVEL_*` of KVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    Size4K = 1,
    Size2M = 2,
    Size1G = 3,
}

impl Level {
    /// In bytes.
    pub fn size(self) -> u64 {
        GRANULE << (9 * (self as u32 - 1))
    }
}

/// Where private contents are to lie.
#[derive(Clone, Copy, Debug)]
pub enum Destination<'a> {
    /// At their own offset of the region's private store, where all begins. What
    /// is there already stays: to take its pages anew, move it elsewhere first.
    Home,
    /// At `offset` of a memfd, or of a file on a disk, open for reading and
    /// writing, large enough, and nobody else's there. What it held is lost. The
    /// fd is duplicated.
    File { fd: BorrowedFd<'a>, offset: u64 },
}

/// What a move has done.
#[derive(Default)]
struct Done {
    /// Of how many parts the guest may be held off, and by what.
    parts: usize,
    blocked: Vec<Blocked>,
    /// The new place may be what the guest sees.
    mapped: bool,
}

/// Private memory that is to be moved.
struct Request<'a> {
    region: &'a Region,
    gpa: Range,
    offsets: Range,
    level: Level,
}

impl Vm {
    /// Moves the private contents of the `level`'s size at guest-physical `gpa`,
    /// a multiple of it, while the guest runs: it sees the same contents
    /// throughout, and writers wait meanwhile. All of it must be private, and
    /// one stretch of one region.
    ///
    /// What was moved is at home again once it is converted (unless the region
    /// keeps private pages), discarded or reset; its place is punched then, as it
    /// is when the region goes.
    ///
    /// Callable from any thread. On failure all is where it was, but for
    /// [`Error::OldPlace`] and [`Error::Stranded`], which say what is not.
    pub fn relocate(&self, gpa: u64, level: Level, to: Destination) -> Result<()> {
        if !gpa.is_multiple_of(level.size()) {
            let size = level.size();
            let text =
                format!("guest-physical address {gpa:#x} is not a multiple of {size:#x} bytes");
            return Err(Error::InvalidArgument(text));
        }
        let gpa = Range::new(gpa, level.size())?;
        self.agent.check_relocate()?;
        if !self.is_open() {
            return Err(Error::CannotRelocate {
                agent: self.agent.name().to_owned(),
                why: "KVM's memory slots name one guest_memfd for all of their private memory",
            });
        }
        let bindings = self.bindings();
        let request = Request::new(&bindings, gpa, level)?;
        let region = request.region;
        let _held = region.lock.acquire(request.offsets);
        request.check_private()?;
        match to {
            Destination::Home => {
                let away = region.elsewhere(request.offsets).next().is_some();
                let home = region.own_store(Side::Private).clone();
                let home = request.part(home, request.offsets);
                if away { request.run(home) } else { Ok(()) }
            }
            Destination::File { fd, offset } => {
                let to = request.destination(&bindings, fd, offset)?;
                let result = request.run(to.clone());
                if !matches!(result, Ok(()) | Err(Error::OldPlace(_))) {
                    region.release(&to);
                }
                result
            }
        }
    }
}

impl<'a> Request<'a> {
    fn new(bindings: &'a Bindings, gpa: Range, level: Level) -> Result<Request<'a>> {
        let found = overlapping(bindings, gpa.first())
            .first()
            .and_then(|binding| {
                let part = binding.gpa.intersection(&gpa)?;
                Some((binding, part))
            });
        let Some((binding, part)) = found else {
            let gpa = gpa.start();
            return Err(Error::NotPrivateCapable { gpa });
        };
        if part != gpa {
            let text = format!(
                "only {part} of guest-physical {gpa} is one stretch of region '{}'",
                binding.region.name()
            );
            return Err(Error::InvalidArgument(text));
        }
        Ok(Request {
            region: &binding.region,
            gpa,
            offsets: gpa.rebase(binding.gpa.start(), binding.offset),
            level,
        })
    }

    fn check_private(&self) -> Result<()> {
        match self.region.runs_on(Side::Shared, self.offsets).next() {
            None => Ok(()),
            Some(shared) => Err(Error::NotPrivate {
                gpa: self.seen(shared).start(),
            }),
        }
    }

    /// Where the guest sees `offsets`.
    fn seen(&self, offsets: Range) -> Range {
        offsets.rebase(self.offsets.start(), self.gpa.start())
    }

    fn part(&self, store: Arc<Store>, file: Range) -> Part {
        let offsets = self.offsets;
        Part {
            offsets,
            store,
            file,
        }
    }

    /// A place in a file of the caller's, taken.
    fn destination(&self, bindings: &Bindings, fd: BorrowedFd, offset: u64) -> Result<Part> {
        let refused = |text: String| Err(Error::InvalidArgument(text));
        let file = Range::new(offset, self.gpa.len())?;
        let vm = &self.region.vm;
        let store = Store::elsewhere(&vm.kernel, fd)?;
        let facts = store.facts()?;
        match facts.size {
            None => return refused("the destination is no memfd or file of ordinary pages".into()),
            Some(size) if file.end() > size => {
                return refused(format!("{file} ends beyond the file of {size:#x} bytes"));
            }
            Some(_) => {}
        }
        for region in bindings.iter().map(|binding| &binding.region) {
            for side in [Side::Private, Side::Shared] {
                if region.store(side).facts()?.id == facts.id {
                    return refused(format!(
                        "the destination is a store of region '{}'",
                        region.name()
                    ));
                }
            }
        }
        vm.taken.take(facts.id, file)?;
        Ok(self.part(Arc::new(store), file))
    }

    /// Moves what does not lie at `to` yet.
    fn run(&self, to: Part) -> Result<()> {
        let region = self.region;
        let parts: Vec<Part> = region.parts(Side::Private, self.offsets).collect();
        let is_there = |part: &Part| part.store.is_own() && to.store.is_own();
        let old: Vec<Part> = parts.into_iter().filter(|part| !is_there(part)).collect();
        let mut done = Done::default();
        if let Err(cause) = self.move_contents(&old, &to, &mut done) {
            return Err(self.undo(&old, &to, &done, cause));
        }
        region.places.remove(self.offsets);
        if !to.store.is_own() {
            region.places.insert(to.clone());
        }
        drop(done);
        to.store.evict(to.file);
        let freed = old.iter().map(Part::punch).fold(Ok(()), Result::and);
        // Others may have it only now.
        old.iter().for_each(|part| region.release(part));
        freed.map_err(|cause| Error::OldPlace(Box::new(cause)))
    }

    /// All that can fail before the new place counts.
    fn move_contents(&self, old: &[Part], to: &Part, done: &mut Done) -> Result<()> {
        let region = self.region;
        self.prepare(old, to)?;
        for run in old.chunk_by(Part::are_neighbours_in_memory) {
            let offsets = run[0].offsets.through(&run[run.len() - 1].offsets);
            // The kernel cannot block what lies on a disk: its new place is
            // mapped there at once, and whoever touches that waits.
            let over = (!run[0].is_in_memory()).then(|| self.place_in(to, &run[0]));
            // Even if it fails: it may have unmapped the old place by then.
            done.parts += run.len();
            let blocked = region.vm.block(region, offsets, over.as_ref())?;
            done.blocked.extend(blocked);
        }
        for part in old {
            region.vm.agent.relocate(Move {
                gpa: self.seen(part.offsets),
                level: self.level,
                from: &part.store,
                from_offsets: part.file,
                to: &to.store,
                to_offsets: self.place_in(to, part).file,
            })?;
        }
        to.store.write_back()?;
        done.mapped = true;
        region.vm.map_part(region, to)
    }

    /// The part of `to` for what lies in `old`.
    fn place_in(&self, to: &Part, old: &Part) -> Part {
        Part {
            offsets: old.offsets,
            store: to.store.clone(),
            file: old.offsets.rebase(self.offsets.start(), to.file.start()),
        }
    }

    /// Empties the new place. Room on a disk is taken at once, for all that the
    /// guest may write there; memory where that is wanted.
    fn prepare(&self, old: &[Part], to: &Part) -> Result<()> {
        let region = self.region;
        let on_disk = !to.store.is_in_memory();
        for part in old {
            if on_disk && !part.is_in_memory() {
                let text = "what lies in a file on a disk is moved home, or to a memfd, first";
                return Err(Error::InvalidArgument(text.to_owned()));
            }
            let new = self.place_in(to, part);
            new.punch()?;
            if on_disk || region.allocates(Side::Private) {
                region.take(&new)?;
            }
        }
        Ok(())
    }

    /// Puts the guest back on the old places; the new one is emptied.
    fn undo(&self, old: &[Part], to: &Part, done: &Done, cause: Error) -> Error {
        let region = self.region;
        // Some kernels unmap the old place before they find that they cannot
        // map the new one: all of it, with what was at home already.
        let shown: Vec<Part> = match done.mapped {
            true => region.parts(Side::Private, self.offsets).collect(),
            false => {
                let blocked = old.iter().take(done.parts);
                blocked
                    .filter(|part| !part.is_in_memory())
                    .cloned()
                    .collect()
            }
        };
        let back = |part: &&Part| region.vm.map_part(region, part).is_err();
        let stranded: u64 = shown
            .iter()
            .filter(back)
            .map(|part| part.offsets.len())
            .sum();
        for part in old {
            let _ = self.place_in(to, part).punch();
        }
        if stranded == 0 {
            return cause;
        }
        let cause = Box::new(cause);
        Error::Stranded { cause, stranded }
    }
}
