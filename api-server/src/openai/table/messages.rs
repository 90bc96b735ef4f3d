//! The rows of `/v1/messages` and `/v1/messages/count_tokens`.

use super::Field;

/// In the order of the page.
pub const FIELDS: &[Field] = &[];
