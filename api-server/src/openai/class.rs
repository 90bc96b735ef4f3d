//! Who goes first: `service_tier` and `priority`.

use baton_protocol::Tier;

use super::fields::Fields;
use crate::error::ApiError;
use crate::service::Class;

/// What `service_tier` and `priority` of a body say.
///
/// # Errors
/// 400 that names the field.
pub fn read(fields: &Fields) -> Result<Class, ApiError> {
    let class = match fields.string("service_tier")? {
        None | Some("auto" | "scale" | "standard_only") => Class::default(),
        Some("default") => Class {
            never_batch: true,
            ..Class::default()
        },
        Some("flex") => Class {
            tier: Tier::Batch,
            ..Class::default()
        },
        Some("priority") => Class {
            priority: 1,
            never_batch: true,
            ..Class::default()
        },
        Some(_) => {
            let message = "service_tier must be one of auto, default, flex, scale, priority and standard_only";
            return Err(ApiError::param("service_tier", message));
        }
    };
    // As in vLLM the lower number goes first.
    let bound = i64::from(i32::MAX);
    Ok(match fields.integer("priority", -bound, bound)? {
        Some(priority) => Class {
            priority: -(priority as i32),
            ..class
        },
        None => class,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::table::Door;
    use super::*;

    fn read(body: &Value) -> Result<Class, ApiError> {
        super::read(&Fields::parse(Door::Chat, body.to_string().as_bytes())?)
    }

    #[test]
    fn bodies_say_the_class() {
        let class = |body: Value| read(&body).unwrap();
        assert_eq!(class(json!({})), Class::default());
        let flex = class(json!({"service_tier": "flex", "priority": 3}));
        assert_eq!((flex.tier, flex.priority), (Tier::Batch, -3));
        let first = class(json!({"service_tier": "priority"}));
        assert_eq!((first.tier, first.priority), (Tier::Interactive, 1));
        assert!(class(json!({"service_tier": "default"})).never_batch);
        for (wrong, name) in [
            (json!({"service_tier": "gold"}), "service_tier"),
            (json!({"priority": 1.5}), "priority"),
            (json!({"priority": 1_u64 << 40}), "priority"),
        ] {
            assert_eq!(read(&wrong).unwrap_err().param.as_deref(), Some(name));
        }
    }
}
