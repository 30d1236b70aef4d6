//! Where private contents lie: at the same offset of the private store, which is
//! their home, or for what was moved in a stretch of another file.
//!
//! What lies elsewhere is kept by region, in runs; entries of a range change
//! only with that range locked. The files' stretches in use are kept by VM, so
//! that no two granules get one place.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use crate::error::{Error, Result};
use crate::kernel::FileId;
use crate::range::Range;
use crate::region::Region;
use crate::state::Side;
use crate::store::Store;

/// A part of a region whose contents lie in one stretch of one file.
#[derive(Clone)]
pub(crate) struct Part {
    /// Offsets into the region.
    pub(crate) offsets: Range,
    pub(crate) store: Arc<Store>,
    /// As many bytes: offsets into the file of the store.
    pub(crate) file: Range,
}

impl Part {
    /// What it has of `offsets`.
    fn cut(&self, offsets: Range) -> Option<Part> {
        let offsets = self.offsets.intersection(&offsets)?;
        Some(Part {
            offsets,
            file: offsets.rebase(self.offsets.start(), self.file.start()),
            ..self.clone()
        })
    }

    /// What it has before and after `offsets`.
    fn without(&self, offsets: Range) -> impl Iterator<Item = Part> {
        let around = self.offsets.without(&offsets);
        around
            .into_iter()
            .flatten()
            .filter_map(|rest| self.cut(rest))
    }

    pub(crate) fn is_in_memory(&self) -> bool {
        self.store.is_in_memory()
    }

    pub(crate) fn are_neighbours_in_memory(&self, next: &Part) -> bool {
        let neighbours = self.offsets.end() == next.offsets.start();
        neighbours && self.is_in_memory() && next.is_in_memory()
    }

    pub(crate) fn punch(&self) -> Result<()> {
        self.store.punch(self.file)
    }
}

/// What of a region lies elsewhere, by its first offset.
#[derive(Default)]
pub(crate) struct Places {
    parts: RwLock<BTreeMap<u64, Part>>,
    /// Nothing was ever moved: nobody has to look.
    used: AtomicBool,
}

impl Places {
    #[inline]
    pub(crate) fn are_used(&self) -> bool {
        self.used.load(Ordering::Acquire)
    }

    /// The part at the start of `offsets` that lies in one place; without a
    /// place where that is home.
    #[inline]
    fn first(&self, offsets: Range) -> (Range, Option<Part>) {
        match self.are_used() {
            false => (offsets, None),
            true => self.first_of_some(offsets),
        }
    }

    /// As much of the start of `offsets` as lies in one place.
    #[inline]
    pub(crate) fn in_one_place(&self, offsets: Range) -> Range {
        match self.are_used() {
            false => offsets,
            true => self.first_of_some(offsets).0,
        }
    }

    #[cold]
    fn first_of_some(&self, offsets: Range) -> (Range, Option<Part>) {
        let parts = self.parts.read().unwrap_or_else(PoisonError::into_inner);
        let before = parts.range(..=offsets.start()).next_back();
        if let Some(found) = before.and_then(|(_, part)| part.cut(offsets)) {
            return (found.offsets, Some(found));
        }
        let next = parts.range(offsets.start()..offsets.end()).next();
        let home = next.and_then(|(_, part)| offsets.without(&part.offsets)[0]);
        (home.unwrap_or(offsets), None)
    }

    pub(crate) fn insert(&self, part: Part) {
        self.used.store(true, Ordering::Release);
        let mut parts = self.parts.write().unwrap_or_else(PoisonError::into_inner);
        parts.insert(part.offsets.start(), part);
    }

    /// Forgets what of `offsets` lies elsewhere, and returns it.
    #[cold]
    pub(crate) fn remove(&self, offsets: Range) -> Vec<Part> {
        let mut parts = self.parts.write().unwrap_or_else(PoisonError::into_inner);
        let overlapping = parts.range(..offsets.end()).rev();
        let overlapping: Vec<Part> = overlapping
            .map(|(_, part)| part.clone())
            .take_while(|part| part.offsets.overlaps(&offsets))
            .collect();
        for part in &overlapping {
            parts.remove(&part.offsets.start());
            for rest in part.without(offsets) {
                parts.insert(rest.offsets.start(), rest);
            }
        }
        let removed = overlapping.iter();
        removed.filter_map(|part| part.cut(offsets)).collect()
    }
}

/// Which stretches of files of the caller's hold private contents of a VM.
#[derive(Default)]
pub(crate) struct Taken(Mutex<BTreeMap<(FileId, u64), Range>>);

impl Taken {
    fn stretches(&self) -> MutexGuard<'_, BTreeMap<(FileId, u64), Range>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes `stretch` of a file, if none of it is taken.
    pub(crate) fn take(&self, file: FileId, stretch: Range) -> Result<()> {
        let mut stretches = self.stretches();
        let before = stretches.range(..(file, stretch.end())).next_back();
        if before.is_some_and(|((of, _), other)| *of == file && other.overlaps(&stretch)) {
            return Err(Error::PlaceTaken(stretch));
        }
        stretches.insert((file, stretch.start()), stretch);
        Ok(())
    }

    /// Gives back a part of what was taken at once.
    pub(crate) fn release(&self, file: FileId, stretch: Range) {
        let mut stretches = self.stretches();
        let all = stretches.range(..=(file, stretch.start())).next_back();
        let all = all.filter(|((of, _), all)| *of == file && all.overlaps(&stretch));
        let Some((key, all)) = all.map(|(key, all)| (*key, *all)) else {
            return;
        };
        stretches.remove(&key);
        for rest in all.without(&stretch).into_iter().flatten() {
            stretches.insert((file, rest.start()), rest);
        }
    }
}

impl Region {
    /// Where contents of `offsets` lie on one side, in order. All that reads,
    /// writes, maps, takes, counts or frees contents asks here.
    pub(crate) fn parts(&self, side: Side, offsets: Range) -> impl Iterator<Item = Part> {
        let placed = self.placed(side, offsets);
        placed.map(move |(offsets, place)| {
            place.unwrap_or_else(|| Part {
                offsets,
                store: self.own_store(side).clone(),
                file: offsets,
            })
        })
    }

    /// As [`Region::parts`], for who wants to know only how they are cut: a
    /// conversion does not touch the count of a store's users, which threads
    /// share.
    pub(crate) fn placed(
        &self,
        side: Side,
        offsets: Range,
    ) -> impl Iterator<Item = (Range, Option<Part>)> {
        let mut rest = Some(offsets);
        std::iter::from_fn(move || {
            let wanted = rest?;
            let (offsets, place) = match side {
                Side::Private => self.places.first(wanted),
                Side::Shared => (wanted, None),
            };
            rest = wanted.without(&offsets)[1];
            Some((offsets, place))
        })
    }

    /// What of `offsets` lies elsewhere, or would if it were private.
    pub(crate) fn elsewhere(&self, offsets: Range) -> impl Iterator<Item = Part> {
        let parts = self.parts(Side::Private, offsets);
        parts.filter(|part| !part.store.is_own())
    }

    /// What of `offsets` lies elsewhere is at home from now on; its contents are
    /// gone.
    #[inline(always)]
    pub(crate) fn forget_places(&self, offsets: Range) {
        if self.places.are_used() {
            let parts = self.places.remove(offsets);
            parts.iter().for_each(|part| self.release(part));
        }
    }

    pub(crate) fn release(&self, part: &Part) {
        if let Some(file) = part.store.file() {
            self.vm.taken.release(file.id, part.file);
        }
    }

    /// Frees the places of `offsets` that lie elsewhere, and shows the guest
    /// their home, of which nothing is held.
    pub(crate) fn send_home(&self, offsets: Range) -> Result<()> {
        for part in self.elsewhere(offsets).collect::<Vec<_>>() {
            part.punch()?;
            self.own_store(Side::Private).punch(part.offsets)?;
            let store = self.own_store(Side::Private).clone();
            for offsets in self.runs_on(Side::Private, part.offsets) {
                let (store, file) = (store.clone(), offsets);
                let home = Part {
                    offsets,
                    store,
                    file,
                };
                // Some kernels unmap the old place before they find that they
                // cannot map the new one. It reads zero as well.
                let back = || part.cut(offsets).map(|old| self.vm.map_part(self, &old));
                self.vm
                    .map_part(self, &home)
                    .inspect_err(|_| drop(back()))?;
            }
            self.forget_places(part.offsets);
        }
        Ok(())
    }

    pub(crate) fn read(&self, side: Side, offsets: Range, mut buffer: &mut [u8]) -> Result<()> {
        for part in self.parts(side, offsets) {
            let (now, rest) = buffer.split_at_mut(part.file.len() as usize);
            part.store.read(part.file.start(), now)?;
            buffer = rest;
        }
        Ok(())
    }

    pub(crate) fn write(&self, side: Side, offsets: Range, mut buffer: &[u8]) -> Result<()> {
        for part in self.parts(side, offsets) {
            let (now, rest) = buffer.split_at(part.file.len() as usize);
            part.store.write(part.file.start(), now)?;
            buffer = rest;
        }
        Ok(())
    }
}

impl Drop for Region {
    /// Nothing of a guest's stays behind in files of the caller's.
    fn drop(&mut self) {
        for part in self.places.remove(self.size) {
            let _ = part.punch();
            self.release(&part);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::range::GRANULE;

    fn range(granules: std::ops::Range<u64>) -> Range {
        let size = granules.end - granules.start;
        Range::new(granules.start * GRANULE, size * GRANULE).unwrap()
    }

    #[test]
    fn a_stretch_is_taken_once_and_given_back_in_parts() {
        let taken = Taken::default();
        let [a, b] = [1, 2].map(|inode| FileId { device: 7, inode });
        taken.take(a, range(10..20)).unwrap();
        for overlapping in [9..11, 10..20, 12..13, 19..21, 5..25] {
            let refused = taken.take(a, range(overlapping));
            assert!(matches!(refused, Err(Error::PlaceTaken(_))));
        }
        taken.take(a, range(20..22)).unwrap();
        taken.take(b, range(12..13)).unwrap();
        taken.release(a, range(12..14));
        taken.take(a, range(12..14)).unwrap();
        taken.take(a, range(11..12)).unwrap_err();
        taken.take(a, range(14..15)).unwrap_err();
        for part in [10..12, 12..14, 14..20, 20..22] {
            taken.release(a, range(part));
        }
        taken.take(a, range(0..30)).unwrap();
        taken.take(b, range(12..13)).unwrap_err();
    }
}
