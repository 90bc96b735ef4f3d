//! The table of all paths, and what is made of it: the OpenAPI document, the page at `/docs`, and the 404 for an unknown path.

mod docs;
mod openapi;
mod unknown;

use crate::openai::table::Door;

pub use self::docs::docs;
pub use self::openapi::openapi;
pub use self::unknown::unknown_path;

/// Paths of this folder that need no API key: they describe the release, not this server.
pub const OPEN: [&str; 2] = ["/docs", "/openapi.json"];

/// A path, with `{name}` where a part of it may be anything.
#[derive(Clone, Copy, Debug)]
pub struct Path {
    /// What a client asks for.
    pub path: &'static str,
    /// HTTP methods; HEAD is answered wherever GET is.
    pub methods: &'static [&'static str],
    /// Selects the fields of its body in [`crate::openai::table`]; `None` if it takes no body.
    pub door: Option<Door>,
    /// What it does.
    pub about: &'static str,
}

const fn asks(door: Door, about: &'static str) -> Path {
    Path {
        path: door.path(),
        methods: &["POST"],
        door: Some(door),
        about,
    }
}

const fn other(path: &'static str, methods: &'static [&'static str], about: &'static str) -> Path {
    Path {
        path,
        methods,
        door: None,
        about,
    }
}

const GET: &[&str] = &["GET"];
const POST: &[&str] = &["POST"];

/// All of them, in the order of `docs/api.md`.
#[rustfmt::skip]
pub const PATHS: &[Path] = &[
    asks(Door::Chat, "OpenAI's chat completions, with vLLM's additions"),
    asks(Door::Text, "OpenAI's text completions, with vLLM's additions"),
    asks(Door::Responses, "OpenAI's responses"),
    other("/v1/responses/{id}", &["GET", "DELETE"], "a response that is kept"),
    other("/v1/responses/{id}/input_items", GET, "what a response that is kept was asked with"),
    other("/v1/responses/{id}/cancel", POST, "always 400: no response is made in the background"),
    asks(Door::Messages, "Anthropic's messages"),
    asks(Door::CountTokens, "the tokens of such a request's prompt: `{\"input_tokens\"}`"),
    asks(Door::Tokenize, "`prompt` or `messages` as token ids: `{\"count\", \"max_model_len\", \"tokens\", \"token_strs\"}`"),
    asks(Door::Detokenize, "`tokens` as text, special tokens included: `{\"prompt\"}`"),
    other("/v1/models", GET, "the model, once for each of its names"),
    other("/v1/models/{model}", GET, "the model by one of its names"),
    other("/health", GET, "200 if a request could be served now, else 503, with reasons"),
    other("/ping", &["GET", "POST"], "the same as `/health`"),
    other("/live", GET, "the process answers"),
    other("/version", GET, "the release: `{\"version\"}`"),
    other("/workers/{name}/drain", POST, "a worker finishes what it has and leaves; only with an API key"),
    other("/metrics", GET, "Prometheus' text format"),
    other("/cluster", GET, "the workers and API servers, and what they are doing"),
    other("/requests", GET, "the requests that are running, and where the time of the last ones went"),
    other("/", GET, "a page: chat, cluster, load"),
    other("/docs", GET, "the paths and fields of this release, as a page"),
    other("/openapi.json", GET, "the same as an OpenAPI 3.1 document"),
];

#[cfg(test)]
mod tests {
    use super::*;

    /// `docs/api.md` has the same table.
    #[test]
    fn the_page_has_the_paths_that_there_are() {
        let page = include_str!("../../../../docs/api.md");
        let (_, rest) = page.split_once("<!-- paths -->\n").expect("a beginning");
        let (on_page, _) = rest.split_once("<!-- end of paths -->").expect("an end");
        let mut table = String::from("| path | method | what |\n|---|---|---|\n");
        for path in PATHS {
            let methods = path.methods.join(", ");
            table += &format!("| `{}` | {methods} | {} |\n", path.path, path.about);
        }
        assert!(on_page == table, "docs/api.md should hold:\n{table}");
    }

    #[test]
    fn every_door_is_a_path() {
        for door in Door::ALL {
            let rows = PATHS.iter().filter(|path| path.door == Some(door));
            assert_eq!(rows.count(), 1, "{door:?}");
        }
        for open in OPEN {
            assert!(PATHS.iter().any(|path| path.path == open), "{open}");
        }
    }
}
