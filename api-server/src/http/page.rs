//! The page at `/`: chat, cluster, load. Its sources are in `page/`; what is embedded here is what they were built into.
//!
//! It is served without a key, because it says nothing: whatever it shows it asks for with the key that its reader gives it.

use std::sync::LazyLock;

use actix_web::http::header::{self, HeaderValue};
use actix_web::{HttpRequest, HttpResponse};
use sha2::{Digest, Sha256};

/// Only its own script and style, only this server to talk to, and in nobody's frame. Styles of elements are set by the
/// script, which the policy does not hinder.
const POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; base-uri 'none'; \
     form-action 'none'; frame-ancestors 'none'",
);

/// What each path has. All of them are asked for by name, without a key.
pub const PATHS: [&str; 4] = ["/", "/page/page.js", "/page/page.css", "/page/licences.txt"];

struct File {
    path: &'static str,
    kind: &'static str,
    text: &'static str,
    tag: String,
}

static FILES: LazyLock<[File; 4]> = LazyLock::new(|| {
    let file = |path, kind, text: &'static str| File {
        path,
        kind,
        text,
        tag: tag(text),
    };
    let [index, script, style, licences] = PATHS;
    [
        file(
            index,
            "text/html; charset=utf-8",
            include_str!("../../../page/dist/index.html"),
        ),
        file(
            script,
            "text/javascript; charset=utf-8",
            include_str!("../../../page/dist/page.js"),
        ),
        file(
            style,
            "text/css; charset=utf-8",
            include_str!("../../../page/dist/page.css"),
        ),
        file(
            licences,
            "text/plain; charset=utf-8",
            include_str!("../../../page/dist/licences.txt"),
        ),
    ]
});

/// Another text has another.
fn tag(text: &str) -> String {
    let digest = Sha256::digest(text);
    let hex: String = digest.iter().take(12).map(|b| format!("{b:02x}")).collect();
    format!("\"{hex}\"")
}

/// One of [`PATHS`]. A browser asks each time whether it has changed, so that nobody sees the page of another version.
pub async fn page(request: HttpRequest) -> HttpResponse {
    let Some(file) = FILES.iter().find(|file| file.path == request.path()) else {
        return super::paths::unknown_path(request).await;
    };
    let known = request.headers().get_all(header::IF_NONE_MATCH);
    let is_known = known
        .filter_map(|tags| tags.to_str().ok())
        .any(|tags| tags.contains(&file.tag));
    let mut response = match is_known {
        true => HttpResponse::NotModified(),
        false => HttpResponse::Ok(),
    };
    response
        .insert_header((header::CONTENT_TYPE, file.kind))
        .insert_header((header::CONTENT_SECURITY_POLICY, POLICY))
        .insert_header((header::X_CONTENT_TYPE_OPTIONS, "nosniff"))
        .insert_header((header::REFERRER_POLICY, "no-referrer"))
        .insert_header((header::CACHE_CONTROL, "no-cache"))
        .insert_header((header::ETAG, file.tag.as_str()));
    match is_known {
        true => response.finish(),
        false => response.body(file.text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_small_and_names_only_paths_that_are_served() {
        let bytes: usize = FILES.iter().map(|file| file.text.len()).sum();
        assert!(bytes < 1 << 20, "{bytes} bytes");
        let index = FILES[0].text;
        for part in index
            .split('"')
            .filter(|part| part.starts_with("/page/") || *part == "/")
        {
            assert!(PATHS.contains(&part), "{part}");
        }
        assert!(index.contains(PATHS[1]) && index.contains(PATHS[2]));
    }
}
