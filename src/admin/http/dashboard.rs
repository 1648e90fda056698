//! The dashboard: pages that the program carries with it.
//!
//! Nothing is loaded from elsewhere, and the pages may not either: the policy lets them fetch from this address alone,
//! and nobody may put them into a frame, where a click could be stolen.

use std::sync::Arc;

use axum::Router;
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use super::Site;

const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
    base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";

/// Address, type and text of every file.
const FILES: [(&str, &str, &str); 10] = [
    ("/", HTML, include_str!("web/index.html")),
    ("/assets/style.css", CSS, include_str!("web/style.css")),
    ("/assets/app.js", SCRIPT, include_str!("web/app.js")),
    ("/assets/api.js", SCRIPT, include_str!("web/api.js")),
    ("/assets/dom.js", SCRIPT, include_str!("web/dom.js")),
    ("/assets/chart.js", SCRIPT, include_str!("web/chart.js")),
    ("/assets/wizard.js", SCRIPT, include_str!("web/wizard.js")),
    ("/assets/detail.js", SCRIPT, include_str!("web/detail.js")),
    ("/assets/cutover.js", SCRIPT, include_str!("web/cutover.js")),
    ("/assets/mend.js", SCRIPT, include_str!("web/mend.js")),
];

/// Adds the files' addresses.
pub(super) fn routes(router: Router<Arc<Site>>) -> Router<Arc<Site>> {
    FILES.into_iter().fold(router, |router, (address, kind, text)| {
        router.route(address, get(move || async move { file(kind, text) }))
    })
}

fn file(kind: &'static str, text: &'static str) -> Response {
    let mut headers = HeaderMap::new();
    let pairs = [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::REFERRER_POLICY, "no-referrer"),
        // A new version of the program has new files under the same addresses.
        (header::CACHE_CONTROL, "no-cache"),
    ];
    for (name, value) in pairs {
        headers.insert(name, HeaderValue::from_static(value));
    }
    (headers, text).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pages_load_nothing_from_elsewhere_and_have_no_script_within_them() {
        for (address, _, text) in FILES {
            for outside in ["http://", "https://", "url(//", "@import"] {
                let mut lines = text.lines().filter(|line| !line.contains("www.w3.org/"));
                assert!(!lines.any(|line| line.contains(outside)), "{address} names {outside}");
            }
            for inline in ["onclick=", "style=\"", "<style", "javascript:", "innerHTML", "eval("] {
                assert!(!text.contains(inline), "{address} has {inline}");
            }
        }
    }
}
