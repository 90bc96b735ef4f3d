//! `GET /openapi.json`: the paths and the fields of their bodies as an OpenAPI 3.1 document, made of the tables that requests are checked
//! with.

use std::sync::LazyLock;

use actix_web::HttpResponse;
use actix_web::http::StatusCode;
use serde_json::{Map, Value, json};

use super::{PATHS, Path};
use crate::http::respond;
use crate::openai::table::{Does, Door, fields, json_type};

static DOCUMENT: LazyLock<String> = LazyLock::new(|| document().to_string());

/// `GET /openapi.json`.
pub async fn openapi() -> HttpResponse {
    respond::json(StatusCode::OK, DOCUMENT.as_bytes())
}

fn document() -> Value {
    let paths: Map<String, Value> = PATHS
        .iter()
        .map(|path| (path.path.to_owned(), item(path)))
        .collect();
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Baton",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "What changes an answer is done, or refused with a 400 that names the field. A field that is not here is refused too.",
        },
        "servers": [{"url": "/"}],
        // Without keys, nothing is asked for.
        "security": [{}, {"bearer": []}, {"x-api-key": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
            "schemas": {
                "Error": {
                    "type": "object",
                    "required": ["error"],
                    "properties": {"error": {
                        "type": "object",
                        "required": ["message", "type"],
                        "properties": {
                            "message": {"type": "string"},
                            "type": {"type": "string"},
                            "param": {"type": ["string", "null"]},
                            "code": {"type": ["string", "null"]},
                        },
                    }},
                },
            },
        },
    })
}

fn item(path: &Path) -> Value {
    let mut item = Map::new();
    let names: Vec<Value> = parameters(path.path).collect();
    if !names.is_empty() {
        item.insert("parameters".to_owned(), names.into());
    }
    for method in path.methods {
        let method = method.to_lowercase();
        let mut operation = json!({
            "operationId": operation_id(&method, path.path),
            "summary": path.about,
            "responses": {
                "200": {"description": "what was asked for", "content": contents(path)},
                "default": {
                    "description": "an error",
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
                },
            },
        });
        if let Some(door) = path.door {
            operation["requestBody"] = json!({
                "required": true,
                "content": {"application/json": {"schema": body(door)}},
            });
        }
        item.insert(method, operation);
    }
    Value::Object(item)
}

/// The kinds of answer.
fn contents(path: &Path) -> Value {
    let streams = path.door.is_some_and(|door| row(door, "stream").is_some());
    match path.path {
        "/" | "/docs" => json!({"text/html": {}}),
        "/metrics" => json!({"text/plain": {}}),
        _ if streams => json!({"application/json": {}, "text/event-stream": {}}),
        _ => json!({"application/json": {}}),
    }
}

fn parameters(path: &str) -> impl Iterator<Item = Value> {
    let names = path.split('{').skip(1);
    names
        .filter_map(|rest| rest.split_once('}'))
        .map(|(name, _)| {
            json!({"name": name, "in": "path", "required": true, "schema": {"type": "string"}})
        })
}

/// `post_v1_chat_completions`: what generated clients call it.
fn operation_id(method: &str, path: &str) -> String {
    let words = path.split(|c: char| !c.is_ascii_alphanumeric());
    let words = words.filter(|word| !word.is_empty());
    std::iter::once(method)
        .chain(words)
        .collect::<Vec<_>>()
        .join("_")
}

fn row(door: Door, name: &str) -> Option<&'static crate::openai::table::Field> {
    fields().find(|field| field.name == name && field.doors.has(door))
}

/// The fields of a body that are done or accepted. Those that are refused are left out: a client need not know them.
fn body(door: Door) -> Value {
    let mut properties: Map<String, Value> = Map::new();
    let known = fields().filter(|field| field.doors.has(door));
    for field in known.filter(|field| !matches!(field.does, Does::Refuses(_))) {
        let about = match field.does {
            Does::Nothing => format!("accepted, changes nothing: {}", field.about),
            _ => field.about.to_owned(),
        };
        let mut schema = json!({"description": about});
        if let Some(kind) = json_type(door, field.name) {
            schema["type"] = kind.into();
        }
        match field.name.split_once('.') {
            None => {
                properties.insert(field.name.to_owned(), schema);
            }
            Some((parent, name)) => {
                let parent = properties.entry(parent).or_insert_with(|| json!({}));
                parent["type"] = "object".into();
                parent["properties"][name] = schema;
            }
        }
    }
    json!({"type": "object", "properties": properties, "required": required(door)})
}

fn required(door: Door) -> &'static [&'static str] {
    match door {
        Door::Chat | Door::CountTokens => &["messages"],
        Door::Text => &["prompt"],
        Door::Responses => &["input"],
        Door::Messages => &["messages", "max_tokens"],
        // A prompt or messages.
        Door::Tokenize => &[],
        Door::Detokenize => &["tokens"],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_has_every_path_and_field() {
        let document = document();
        for path in PATHS {
            let item = &document["paths"][path.path];
            for method in path.methods {
                let operation = &item[method.to_lowercase()];
                assert_eq!(operation["summary"], path.about, "{}", path.path);
            }
        }
        let chat = &document["paths"]["/v1/chat/completions"]["post"];
        let body = &chat["requestBody"]["content"]["application/json"]["schema"];
        assert_eq!(body["properties"]["max_tokens"]["type"], "integer");
        assert_eq!(body["properties"]["stream"]["type"], "boolean");
        let options = &body["properties"]["stream_options"];
        assert_eq!(
            options["properties"]["include_usage"]["type"], "boolean",
            "{options}"
        );
        assert!(body["properties"]["best_of"].is_null(), "it is refused");
        assert!(chat["responses"]["200"]["content"]["text/event-stream"].is_object());
        let of_model = &document["paths"]["/v1/models/{model}"];
        assert_eq!(of_model["parameters"][0]["name"], "model");
        assert_eq!(of_model["get"]["operationId"], "get_v1_models_model");
    }
}
