//! An SEV-SNP VM on a MODEL of its firmware.

use crate::common::firmware::SnpFirmware;
use crate::model::OnModel;

conformance_tests!(OnModel<SnpFirmware>);
