//! The rows of `/v1/responses`.

use super::Field;

/// In the order of the page.
pub const FIELDS: &[Field] = &[];
