//! One suite for every trust agent: what a guest and its VMM may rely on,
//! whoever keeps the private contents.
//!
//! | module | owns |
//! |---|---|
//! | `machine` | what an agent must bring to be tested, and what rules are written with |
//! | `rules`, `random` | the rules |
//! | `emulated`, `kvm`, `model`, `tdx_model`, `snp_model` | the agents |
//!
//! Every rule is a test of every agent, such as `kvm::changed_side_reads_zero`.
//! A new rule is named in the list below. A new agent is a module that
//! implements [`machine::Machine`] and ends with `conformance_tests!`.
//!
//! The lab runs the same program on a kernel that has private memory.

/// One test for each rule, on machines of type `$machine`.
macro_rules! conformance_tests {
    ($machine:ty) => {
        conformance_tests! { $machine:
            rules::changed_side_reads_zero,
            rules::neighbours_keep_contents,
            rules::what_is_so_already_stays,
            rules::sides_do_not_show_through,
            rules::what_a_device_writes_late_does_not_come_up,
            rules::memory_is_held_on_one_side,
            rules::one_request_over_bindings_and_regions,
            rules::what_is_not_bound_is_shared_already,
            rules::state_and_contents_follow_the_region,
            rules::reset_makes_all_shared,
            rules::what_begins_private_returns_to_that,
            rules::a_store_that_keeps_pages_shows_them_again,
            rules::preallocated_memory_is_held_where_it_is,
            rules::what_is_discarded_reads_zero_on_either_side,
            rules::a_failed_page_comes_back_empty,
            rules::a_saved_state_is_loaded_with_contents_or_not_at_all,
            rules::a_loaded_region_holds_what_it_is_to_preallocate,
            rules::private_memory_moves_or_all_is_as_it_was,
            rules::listeners_see_exactly_the_runs,
            rules::listener_that_refuses_changes_nothing,
            rules::threads_convert_disjoint_ranges,
            rules::threads_convert_what_the_guest_touches,
            random::long_sequence_agrees_with_a_simple_model,
        }
    };
    ($machine:ty: $($module:ident::$rule:ident,)*) => {
        $(#[test]
        fn $rule() {
            $crate::check::<$machine>($crate::$module::$rule);
        })*
    };
}

#[path = "../common/mod.rs"]
mod common;

mod emulated;
mod kvm;
mod machine;
mod model;
mod random;
mod rules;
mod snp_model;
mod tdx_model;

use machine::{Guest, Machine};

/// Tests one rule on a new machine, if there can be one here.
fn check<M: Machine + 'static>(rule: fn(&mut Guest)) {
    match M::missing() {
        Some(what) => println!("skipped: {what}"),
        None => rule(&mut Guest::new(M::new())),
    }
}
