//! The 404 for an unknown path: it names the path that was probably meant, or what to use instead of an API that Baton does not offer.

use actix_web::{HttpRequest, HttpResponse};

use super::PATHS;
use crate::error::{ApiError, Dialect, ErrorKind};
use crate::http::respond::error_response;
use crate::openai::table::nearest;

/// Longest part of a path that is quoted.
const PATH_CHARS_MAX: usize = 200;

const TEXT_ONLY: &str = "the models here read and write text";
const NO_FILES: &str = "files are not kept: send what they hold in the request";
const NO_SCORES: &str = "the models here generate text; they give no embeddings, scores or classes";
const NO_LISTS: &str = "there are no lists of requests: send each by itself, with `service_tier` `flex` where it may wait";
const OF_OLLAMA: &str =
    "this is no Ollama server: use `/v1/chat/completions`, `/v1/completions` and `/v1/models`";
const OF_LLAMA_CPP: &str = "use `/v1/completions`";
const OF_THE_SERVER: &str = "use `/v1/models` and `/cluster`";

/// Paths of other servers that Baton does not offer, and what to use instead. A row covers its path and all paths below it.
#[rustfmt::skip]
pub const NOT_OFFERED: &[(&str, &str)] = &[
    ("/v1/embeddings", NO_SCORES),
    ("/embeddings", NO_SCORES),
    ("/v1/rerank", NO_SCORES),
    ("/v2/rerank", NO_SCORES),
    ("/rerank", NO_SCORES),
    ("/score", NO_SCORES),
    ("/v1/score", NO_SCORES),
    ("/pooling", NO_SCORES),
    ("/classify", NO_SCORES),
    ("/v1/audio", TEXT_ONLY),
    ("/v1/images", TEXT_ONLY),
    ("/v1/videos", TEXT_ONLY),
    ("/v1/realtime", TEXT_ONLY),
    ("/v1/moderations", "nothing is moderated"),
    ("/v1/files", NO_FILES),
    ("/v1/uploads", NO_FILES),
    ("/v1/vector_stores", NO_FILES),
    ("/v1/batches", NO_LISTS),
    ("/v1/messages/batches", NO_LISTS),
    ("/v1/fine_tuning", "models are not trained here"),
    ("/v1/assistants", "use `/v1/responses`"),
    ("/v1/threads", "use `/v1/responses`"),
    ("/v1/conversations", "use `previous_response_id` of `/v1/responses`"),
    ("/v1/responses/compact", "nothing is compacted: leave items out of `input`"),
    ("/v1/complete", "use `/v1/messages`"),
    ("/tokenizer_info", "the tokenizer is in the model directory; `/tokenize` and `/detokenize` use it"),
    ("/apply-template", "use `/tokenize` with `messages`"),
    ("/server_info", OF_THE_SERVER),
    ("/get_server_info", OF_THE_SERVER),
    ("/get_model_info", OF_THE_SERVER),
    ("/props", OF_THE_SERVER),
    ("/slots", "use `/requests`"),
    ("/load", "use `/requests` and `/metrics`"),
    ("/generate", OF_LLAMA_CPP),
    ("/generate_stream", OF_LLAMA_CPP),
    ("/completion", OF_LLAMA_CPP),
    ("/infill", OF_LLAMA_CPP),
    ("/api", OF_OLLAMA),
    ("/invocations", "use `/v1/chat/completions`"),
    ("/v2/models", "KServe's protocol is not spoken: use `/v1/chat/completions`"),
];

/// Other words for paths.
const ALIASES: &[(&str, &str)] = &[
    ("/healthz", "/health"),
    ("/health/ready", "/health"),
    ("/health/live", "/live"),
    ("/v1/health", "/health"),
    ("/v1/health/ready", "/health"),
    ("/v1/health/live", "/live"),
    ("/readyz", "/health"),
    ("/ready", "/health"),
    ("/livez", "/live"),
    ("/redoc", "/docs"),
    ("/swagger", "/docs"),
    ("/swagger.json", "/openapi.json"),
    ("/openapi", "/openapi.json"),
    ("/chat", "/v1/chat/completions"),
    ("/v1/chat", "/v1/chat/completions"),
    ("/status", "/cluster"),
];

/// Any other path: 404, and what to do.
pub async fn unknown_path(request: HttpRequest) -> HttpResponse {
    let path = request.path();
    let error = ApiError::new(ErrorKind::UnknownPath, message(path));
    error_response(Dialect::of(path), &error)
}

fn message(path: &str) -> String {
    let short: String = path.chars().take(PATH_CHARS_MAX).collect();
    if let Some(meant) = meant(path) {
        let why = match meant.strip_prefix("/v1") {
            Some(after) if after == path => " The base URL of an OpenAI client ends with /v1",
            _ => "",
        };
        return format!("there is nothing at {short}: do you mean {meant}?{why}");
    }
    let below = |root: &str| {
        path.strip_prefix(root)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    if let Some((root, instead)) = NOT_OFFERED.iter().find(|(root, _)| below(root)) {
        return format!("{root} is not offered: {}", instead.replace('`', ""));
    }
    let known = PATHS.iter().map(|known| known.path);
    match nearest(path, known.filter(|known| !known.contains('{'))) {
        Some(meant) => format!("there is nothing at {short}: do you mean {meant}?"),
        None => format!("there is nothing at {short}; GET /docs shows what there is"),
    }
}

fn is_known(path: &str) -> bool {
    PATHS.iter().any(|known| known.path == path)
}

/// The path that a client certainly meant: one without its `/v1` or with two of them, with a slash at its end, with more before or after
/// it, or by another word.
fn meant(path: &str) -> Option<String> {
    let path = path.trim_end_matches('/');
    if path.len() > PATH_CHARS_MAX {
        return None;
    }
    if is_known(path) {
        return Some(path.to_owned());
    }
    let alias = ALIASES.iter().find(|(alias, _)| *alias == path);
    if let Some((_, meant)) = alias {
        return Some((*meant).to_owned());
    }
    if let Some(at) = path.rfind("/v1/")
        && is_known(&path[at..])
    {
        return Some(path[at..].to_owned());
    }
    let with_version = format!("/v1{path}");
    if is_known(&with_version) {
        return Some(with_version);
    }
    // A base URL that was a whole path, to which the client added its own.
    let mut posts = PATHS.iter().filter(|known| known.door.is_some());
    let twice = posts.find(|known| {
        let rest = path.strip_prefix(known.path);
        rest.is_some_and(|rest| rest.starts_with('/') && known.path.ends_with(rest))
    });
    twice.map(|known| known.path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_meant_is_said() {
        for (path, said) in [
            (
                "/models",
                "do you mean /v1/models? The base URL of an OpenAI client ends with /v1",
            ),
            ("/chat/completions", "do you mean /v1/chat/completions?"),
            ("/v1/v1/messages", "do you mean /v1/messages?"),
            ("/openai/v1/completions", "do you mean /v1/completions?"),
            (
                "/v1/chat/completions/chat/completions",
                "do you mean /v1/chat/completions?",
            ),
            ("/v1/models/", "do you mean /v1/models?"),
            ("/v1/chat/completion", "do you mean /v1/chat/completions?"),
            ("/v1/message", "do you mean /v1/messages?"),
            ("/healthz", "do you mean /health?"),
            ("/swagger", "do you mean /docs?"),
            (
                "/v1/embeddings",
                "/v1/embeddings is not offered: the models",
            ),
            ("/v1/audio/speech", "/v1/audio is not offered"),
            ("/api/tags", "this is no Ollama server: use /v1/chat"),
            ("/wibble", "there is nothing at /wibble; GET /docs shows"),
            ("/apis", "there is nothing at /apis"),
        ] {
            let message = message(path);
            assert!(message.contains(said), "{path}: {message}");
        }
        assert!(message(&"/x".repeat(10_000)).len() < 300);
    }

    #[test]
    fn what_is_not_offered_is_no_path() {
        for (path, _) in NOT_OFFERED {
            assert!(!is_known(path), "{path}");
            let said = message(path);
            assert!(said.contains("is not offered"), "{path}: {said}");
        }
        for (alias, meant) in ALIASES {
            assert!(!is_known(alias) && is_known(meant), "{alias}");
        }
    }

    /// `docs/api.md` has the same table.
    #[test]
    fn the_page_has_what_is_not_offered() {
        let page = include_str!("../../../../docs/api.md");
        let (_, rest) = page
            .split_once("<!-- not offered -->\n")
            .expect("a beginning");
        let (on_page, _) = rest
            .split_once("<!-- end of not offered -->")
            .expect("an end");
        let mut table = String::from("| not offered | instead |\n|---|---|\n");
        let mut at = 0;
        while let Some((_, instead)) = NOT_OFFERED.get(at) {
            let same = NOT_OFFERED[at..]
                .iter()
                .take_while(|(_, other)| other == instead);
            let paths: Vec<String> = same.map(|(path, _)| format!("`{path}`")).collect();
            at += paths.len();
            table += &format!("| {} | {instead} |\n", paths.join(", "));
        }
        assert!(on_page == table, "docs/api.md should hold:\n{table}");
    }
}
