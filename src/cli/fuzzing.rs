//! What must hold for any properties file. Built for tests and fuzzing only.

use serde_json::json;

use super::properties;

/// The JSON of another service: read or refused, and its secrets never repeated.
pub fn properties(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(properties) = properties::parse(text) else { return };
    assert!(properties.notes().iter().all(|note| note.starts_with("properties: ")));
    let config = json!([{"key": "source.host", "value": "a"}, {"key": "source.port", "value": "5432"}]);
    let _same = properties.compare(&config);
}
