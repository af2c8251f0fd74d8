//! The page at `/`: one file that holds everything it needs, and may load or run nothing else.

use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use sha2::{Digest, Sha256};

/// The page.
const PAGE: &str = include_str!("page/index.html");

/// Answers with the page.
pub async fn page() -> Response {
    let headers = [
        (CONTENT_TYPE, "text/html; charset=utf-8".to_string()),
        (CONTENT_SECURITY_POLICY, policy(PAGE)),
        (X_CONTENT_TYPE_OPTIONS, "nosniff".to_string()),
        (REFERRER_POLICY, "no-referrer".to_string()),
        (CACHE_CONTROL, "no-cache".to_string()),
    ];
    (headers, PAGE).into_response()
}

/// Its own scripts by their hashes, its own styles, images of its own making, and requests to this server: nothing else.
fn policy(page: &str) -> String {
    let hashes: Vec<String> = scripts(page)
        .map(|script| format!("'sha256-{}'", BASE64_STANDARD.encode(Sha256::digest(script.as_bytes()))))
        .collect();
    format!(
        "default-src 'none'; script-src {}; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        hashes.join(" ")
    )
}

/// The contents of the script elements.
fn scripts(page: &str) -> impl Iterator<Item = &str> {
    page.split("<script").skip(1).filter_map(|rest| {
        let (_, rest) = rest.split_once('>')?;
        Some(rest.split_once("</script>")?.0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts_are_named_by_their_hashes() {
        // printf 'alert(1)' | openssl dgst -sha256 -binary | base64
        let policy = policy("<body><script type=\"module\">alert(1)</script> <b>x</b></body>");
        assert!(policy.contains("script-src 'sha256-bhHHL3z2vDgxUt0W3dWQOrprscmda2Y5pLsLg4GF+pI='; "), "{policy}");
    }

    /// What the policy would forbid, or what would leave this machine, must not be in the page.
    #[test]
    fn the_page_holds_everything_it_needs() {
        assert!(scripts(PAGE).count() > 0);
        let lower = PAGE.to_lowercase();
        for forbidden in
            [" onclick=", " onload=", " onsubmit=", " oninput=", " onkeydown=", "javascript:", "<script src", "@import"]
        {
            assert!(!lower.contains(forbidden), "{forbidden}");
        }
        for outside in ["src=\"http", "href=\"http", "src=\"//", "url(http"] {
            assert!(!lower.contains(outside), "{outside}");
        }
    }
}
