//! `GET /docs`: the paths and fields as a page that needs no script. It is made of the tables that requests are checked with.

use std::fmt::Write as _;
use std::sync::LazyLock;

use actix_web::HttpResponse;
use actix_web::http::header;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};

use super::unknown::NOT_OFFERED;
use super::{PATHS, Path};
use crate::openai::table::{Does, Door, fields};

const STYLE: &str = "
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin-top: 2.5rem; font-size: 1.2rem }
code { font-family: ui-monospace, monospace; font-size: .92em }
pre { overflow-x: auto; padding: .8rem; border: 1px solid #8886; border-radius: 6px }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #8884 }
td:first-child { white-space: nowrap }
summary { cursor: pointer; margin: .8rem 0 }
";

static PAGE: LazyLock<String> = LazyLock::new(page);

/// Nothing but its own style.
static POLICY: LazyLock<String> = LazyLock::new(|| {
    let digest = STANDARD.encode(Sha256::digest(STYLE));
    format!(
        "default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
});

/// `GET /docs`.
pub async fn docs() -> HttpResponse {
    HttpResponse::Ok()
        .insert_header((header::CONTENT_TYPE, "text/html; charset=utf-8"))
        .insert_header((header::CONTENT_SECURITY_POLICY, POLICY.as_str()))
        .insert_header((header::X_CONTENT_TYPE_OPTIONS, "nosniff"))
        .insert_header((header::REFERRER_POLICY, "no-referrer"))
        .insert_header((header::CACHE_CONTROL, "no-cache"))
        .body(PAGE.as_str())
}

fn page() -> String {
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>Baton: the API</title>\
         <meta name=\"viewport\" content=\"width=device-width\"><style>{STYLE}</style></head><body><main>\
         <h1>Baton {}: the API</h1>\
         <p>What changes an answer is done, or refused with a 400 that names the field; a field that is not here is refused too. \
         As a document: <a href=\"/openapi.json\">/openapi.json</a>. <a href=\"/\">Chat, cluster and load</a>.</p>\
         <pre>curl -N $URL/v1/chat/completions -H 'Content-Type: application/json' \\\n  \
         -d '{{\"stream\": true, \"messages\": [{{\"role\": \"user\", \"content\": \"What is the capital of France?\"}}]}}'</pre>\
         <table><thead><tr><th>Path<th>Method<th>What</thead><tbody>",
        env!("CARGO_PKG_VERSION")
    );
    for path in PATHS {
        let shown = match path.door {
            Some(_) => format!("<a href=\"#{}\">{}</a>", anchor(path), code(path.path)),
            None => code(path.path),
        };
        // Writing to memory cannot fail.
        let _ = write!(
            out,
            "<tr><td>{shown}<td>{}<td>{}",
            path.methods.join(", "),
            marked(path.about)
        );
    }
    out.push_str("</tbody></table>");
    for path in PATHS {
        if let Some(door) = path.door {
            body(&mut out, path, door);
        }
    }
    out.push_str("<h2>Not offered</h2><table><thead><tr><th>Path<th>Instead</thead><tbody>");
    for (path, instead) in NOT_OFFERED {
        let _ = write!(out, "<tr><td>{}<td>{}", code(path), marked(instead));
    }
    out.push_str("</tbody></table></main></body></html>\n");
    out
}

/// The fields of one body.
fn body(out: &mut String, path: &Path, door: Door) {
    let known = || fields().filter(move |field| field.doors.has(door));
    let _ = write!(
        out,
        "<h2 id=\"{}\">POST {}</h2><table><thead><tr><th>Field<th>What is done</thead><tbody>",
        anchor(path),
        code(path.path)
    );
    for field in known().filter(|field| field.does == Does::It) {
        let _ = write!(
            out,
            "<tr><td>{}<td>{}",
            code(field.name),
            marked(field.about)
        );
    }
    out.push_str("</tbody></table>");
    for (title, refused) in [
        ("Accepted, and changes nothing", false),
        ("Refused by name", true),
    ] {
        let rows: Vec<_> = known()
            .filter(|field| match field.does {
                Does::It => false,
                Does::Nothing => !refused,
                Does::Refuses(_) => refused,
            })
            .collect();
        if rows.is_empty() {
            continue;
        }
        let _ = write!(
            out,
            "<details><summary>{title}: {}</summary><table><tbody>",
            rows.len()
        );
        for field in rows {
            let harmless = match field.does {
                Does::Refuses(harmless) if !harmless.is_empty() => {
                    let values: Vec<String> = harmless.iter().map(|text| code(text)).collect();
                    format!(" (but for {})", values.join(", "))
                }
                _ => String::new(),
            };
            let about = marked(field.about);
            let _ = write!(out, "<tr><td>{}<td>{about}{harmless}", code(field.name));
        }
        out.push_str("</tbody></table></details>");
    }
}

fn anchor(path: &Path) -> String {
    path.path.trim_start_matches('/').replace('/', "-")
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

fn code(text: &str) -> String {
    format!("<code>{}</code>", escaped(text))
}

/// What the tables have of Markdown: code between backticks, and links, of which the text is left.
fn marked(text: &str) -> String {
    let mut out = String::new();
    for (i, part) in without_links(text).split('`').enumerate() {
        match i % 2 {
            0 => out.push_str(&escaped(part)),
            _ => out.push_str(&code(part)),
        }
    }
    out
}

fn without_links(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("](") {
        let Some((_, behind)) = after.split_once(')') else {
            break;
        };
        let open = before.rfind('[').unwrap_or(before.len());
        out.push_str(&before[..open]);
        out.push_str(before.get(open + 1..).unwrap_or(""));
        rest = behind;
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_has_every_path_and_field() {
        let page = page();
        for path in PATHS {
            assert!(page.contains(&code(path.path)), "{}", path.path);
        }
        for field in fields() {
            assert!(page.contains(&code(field.name)), "{}", field.name);
        }
        assert!(!page.contains("<script"), "nothing runs on it");
        assert!(page.len() < 1 << 20, "{} bytes", page.len());
    }

    #[test]
    fn marks_become_code_and_links_become_text() {
        assert_eq!(
            marked("as `a<b` ([Messages](#messages)), not [x] y"),
            "as <code>a&lt;b</code> (Messages), not [x] y"
        );
    }
}
