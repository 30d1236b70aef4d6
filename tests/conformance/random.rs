//! A long random sequence of conversions and touches, against a model too
//! simple to be wrong. The sequence is the same each time.

use std::ops::Range;
use std::sync::Arc;

use privmem::Side::{Private, Shared};
use privmem::{GRANULE, Region, Side};

use crate::machine::{Guest, assert_if_known, picture};

const STEPS: u64 = 300;
/// Guest-physical granules, some of which are not bound.
const GRANULES: u64 = 160;

/// A granule: its side, and what the pages of the two sides hold, if anything.
#[derive(Clone, Copy)]
struct Page {
    side: Side,
    shared: Option<u8>,
    private: Option<u8>,
}

impl Page {
    const NEW: Page = Page {
        side: Shared,
        shared: None,
        private: None,
    };

    fn convert(&mut self, to: Side) {
        if self.side != to {
            *self = Page {
                side: to,
                ..Page::NEW
            };
        }
    }

    /// What the guest reaches; a page that is touched is held from then on.
    fn touch(&mut self) -> &mut u8 {
        let reached = match self.side {
            Shared => &mut self.shared,
            Private => &mut self.private,
        };
        reached.get_or_insert(0)
    }
}

/// A stretch of a region, and its guest-physical granules.
struct Stretch {
    region: usize,
    granules: Range<u64>,
    gpa: u64,
}

/// Two regions, one of them in two stretches in another order, with a hole
/// between; then nothing.
const LAYOUT: [Stretch; 3] = [
    Stretch {
        region: 0,
        granules: 32..96,
        gpa: 0,
    },
    Stretch {
        region: 0,
        granules: 0..32,
        gpa: 64,
    },
    Stretch {
        region: 1,
        granules: 0..40,
        gpa: 110,
    },
];

/// Where the guest sees a granule of a region, and the region.
fn place(gpa: u64) -> Option<(usize, u64)> {
    LAYOUT.iter().find_map(|stretch| {
        let granule = stretch.granules.start + gpa.checked_sub(stretch.gpa)?;
        let within = stretch.granules.contains(&granule);
        within.then_some((stretch.region, granule))
    })
}

/// xorshift64: any sequence does, if it is long and looks like none.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

pub fn long_sequence_agrees_with_a_simple_model(guest: &mut Guest) {
    let regions = [guest.region(96), guest.region(40)];
    for stretch in LAYOUT {
        guest.bind(&regions[stretch.region], stretch.granules, stretch.gpa);
    }
    let mut model = [vec![Page::NEW; 96], vec![Page::NEW; 40]];
    let mut random = Random(0x7072_6976_6d65_6d21);
    for step in 0..STEPS {
        for _ in 0..3 {
            let gpa = random.below(GRANULES);
            let Some((region, granule)) = place(gpa) else {
                continue;
            };
            let page = model[region][granule as usize].touch();
            if random.below(2) == 0 {
                *page = random.below(256) as u8;
                guest.write(gpa, *page);
            }
            assert_eq!(guest.read(gpa), *page, "step {step}, granule {gpa}");
        }
        let start = random.below(GRANULES - 1);
        let request = start..start + 1 + random.below(40.min(GRANULES - start));
        let to = [Shared, Private][random.below(2) as usize];
        let places: Vec<_> = request.clone().map(place).collect();
        let allowed = to == Shared || places.iter().all(Option::is_some);
        assert_eq!(guest.convert(request, to).is_ok(), allowed, "step {step}");
        if allowed {
            for (region, granule) in places.into_iter().flatten() {
                model[region][granule as usize].convert(to);
            }
        }
        for (region, model) in regions.iter().zip(&model) {
            assert_agree(region, model, step);
        }
    }
    for gpa in 0..GRANULES {
        if let Some((region, granule)) = place(gpa) {
            let expected = *model[region][granule as usize].touch();
            assert_eq!(guest.read(gpa), expected, "granule {gpa} in the end");
        }
    }
}

fn assert_agree(region: &Arc<Region>, model: &[Page], step: u64) {
    let sides: String = model
        .iter()
        .map(|page| if page.side == Private { '#' } else { '.' })
        .collect();
    assert_eq!(picture(region), sides, "step {step}");
    let held = |side: fn(&Page) -> Option<u8>| model.iter().filter_map(side).count() as u64;
    let info = region.info();
    assert_if_known(info.private_held, held(|page| page.private) * GRANULE);
    assert_if_known(info.shared_held, held(|page| page.shared) * GRANULE);
    assert_if_known(info.held_twice, 0);
}
