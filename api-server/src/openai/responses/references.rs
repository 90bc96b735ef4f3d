//! `item_reference`: an item of an earlier answer by its id, as clients send it back that know that the answer is kept.

use serde_json::Value;

use super::store::Kept;
use crate::error::{ApiError, ErrorKind};
use crate::openai::tools::beginning;

/// The items, each reference replaced by the item that it names. `room`: bytes that answers which are looked into may have together, so that
/// a short body does not become more work than the longest.
///
/// # Errors
/// 404 for an item that is not kept, 400 if it has no id or they are too much.
pub fn resolved(
    items: Vec<Value>,
    mut room: usize,
    find: &dyn Fn(&str) -> Option<Kept>,
) -> Result<Vec<Value>, ApiError> {
    let item = |(i, item): (usize, Value)| {
        if item.get("type").is_none_or(|kind| kind != "item_reference") {
            return Ok(item);
        }
        let at = format!("input[{i}].id");
        let Some(id) = item.get("id").and_then(Value::as_str) else {
            return Err(ApiError::param(&at, format!("{at} is required")));
        };
        let kept = response_of(id).and_then(|response| find(&response));
        let output = kept.and_then(|kept| kept.turns.last().cloned());
        let output = output.ok_or_else(|| not_kept(&at, id))?;
        room = room.checked_sub(output.output.len()).ok_or_else(|| {
            let message = format!("{at}: the items that input refers to are too long together: use previous_response_id");
            ApiError::param(&at, message)
        })?;
        let all: Vec<Value> = serde_json::from_str(&output.output).unwrap_or_default();
        let mut found = all.into_iter().filter(|item| item["id"] == id);
        found.next().ok_or_else(|| not_kept(&at, id))
    };
    items.into_iter().enumerate().map(item).collect()
}

/// The response of an item's id, which is made of its kind, the request's id and its place.
fn response_of(item: &str) -> Option<String> {
    let (_, rest) = item.split_once('_')?;
    let (request, _) = rest.rsplit_once('_')?;
    Some(format!("resp_{request}"))
}

fn not_kept(at: &str, id: &str) -> ApiError {
    let message = format!(
        "Item with id {:?} not found: each API server keeps the items of its own answers, for a day at most and as long as there is room. Send the item itself",
        beginning(id)
    );
    ApiError {
        param: Some(at.to_owned()),
        ..ApiError::new(ErrorKind::UnknownResponse, message)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::super::store::Segment;
    use super::*;

    #[test]
    fn a_reference_stands_for_the_item_that_it_names() {
        let thought = json!({"type": "reasoning", "id": "rs_ab_0", "content": []});
        let said =
            json!({"type": "message", "id": "msg_ab_1", "role": "assistant", "content": "two"});
        let output = json!([thought, said]).to_string();
        let bytes = output.len();
        let turn = |output: &str| {
            Arc::new(Segment {
                input: "[]".to_owned(),
                output: output.to_owned(),
            })
        };
        let kept = Kept {
            response: "{}".into(),
            turns: vec![turn("[]"), turn(&output)],
        };
        let find = |id: &str| (id == "resp_ab").then(|| kept.clone());
        let reference = |id: &str| json!({"type": "item_reference", "id": id});
        let user = json!({"role": "user", "content": "one"});
        let items = vec![user.clone(), reference("rs_ab_0"), reference("msg_ab_1")];
        assert_eq!(
            resolved(items.clone(), 2 * bytes, &find).unwrap(),
            [user, thought, said]
        );
        let error = resolved(items, 2 * bytes - 1, &find).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("input[2].id"));
        for id in ["msg_ab_7", "msg_cd_0", "x", "", "msg__"] {
            let error = resolved(vec![reference(id)], bytes, &find).unwrap_err();
            assert_eq!(error.kind, ErrorKind::UnknownResponse, "{id}");
            assert!(error.message.starts_with("Item with id"), "{error}");
        }
        let error = resolved(vec![json!({"type": "item_reference"})], bytes, &find).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("input[0].id"));
    }
}
