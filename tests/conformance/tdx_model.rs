//! A TDX VM on a MODEL of the TDX module.

use crate::common::firmware::TdxModule;
use crate::model::OnModel;

conformance_tests!(OnModel<TdxModule>);
