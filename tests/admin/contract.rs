//! The OpenAPI document is true: what it describes is served, what is answered has the shape it says, and nothing else
//! is there. And what a client may rely on beyond shapes: keys of idempotency, the stream of live state, the pages.

use std::collections::BTreeSet;

use pgcutover::config::Secret;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::fake::{Admin, admin};

/// What is wrong with `value` as an instance of `schema`: the part of JSON Schema that the document uses.
fn faults(document: &Value, schema: &Value, value: &Value, place: &str) -> Vec<String> {
    let mut found = Vec::new();
    let known = [
        "$ref",
        "type",
        "properties",
        "required",
        "items",
        "anyOf",
        "oneOf",
        "allOf",
        "enum",
        "const",
        "additionalProperties",
        "description",
        "format",
        "pattern",
        "minimum",
        "maximum",
        "default",
        "title",
        "minLength",
        "maxLength",
    ];
    let Some(object) = schema.as_object() else {
        return if schema == &json!(true) { found } else { vec![format!("{place}: not a schema: {schema}")] };
    };
    found.extend(object.keys().filter(|key| !known.contains(&key.as_str())).map(|key| format!("{place}: {key}?")));
    if let Some(reference) = schema["$ref"].as_str() {
        let target = document.pointer(&reference[1..]).unwrap();
        found.extend(faults(document, target, value, place));
    }
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    let kinds: Vec<&str> = match &schema["type"] {
        Value::String(one) => vec![one],
        Value::Array(many) => many.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    let fits = kinds.contains(&kind) || (kind == "integer" && kinds.contains(&"number"));
    if !kinds.is_empty() && !fits {
        found.push(format!("{place}: {value} is not of {kinds:?}"));
    }
    if let Some(values) = schema["enum"].as_array()
        && !values.contains(value)
    {
        found.push(format!("{place}: {value} is none of {values:?}"));
    }
    if object.contains_key("const") && &schema["const"] != value {
        found.push(format!("{place}: {value} is not {}", schema["const"]));
    }
    for key in ["anyOf", "oneOf"] {
        if let Some(choices) = schema[key].as_array() {
            let fits = choices.iter().any(|choice| faults(document, choice, value, place).is_empty());
            found.extend((!fits).then(|| format!("{place}: {value} fits none of {key}")));
        }
    }
    for part in schema["allOf"].as_array().into_iter().flatten() {
        found.extend(faults(document, part, value, place));
    }
    if let Some(fields) = value.as_object() {
        for name in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            found.extend((!fields.contains_key(name)).then(|| format!("{place}.{name} is missing")));
        }
        for (name, field) in fields {
            match (schema["properties"].get(name), schema.get("additionalProperties")) {
                (Some(of_field), _) => found.extend(faults(document, of_field, field, &format!("{place}.{name}"))),
                (None, Some(of_others)) => found.extend(faults(document, of_others, field, &format!("{place}.{name}"))),
                // A key that is answered and not described is a lie by omission.
                (None, None) if schema.get("properties").is_some() => {
                    found.push(format!("{place}.{name} is not described"))
                }
                (None, None) => {}
            }
        }
    }
    for (index, item) in value.as_array().into_iter().flatten().enumerate() {
        if let Some(items) = schema.get("items") {
            found.extend(faults(document, items, item, &format!("{place}[{index}]")));
        }
    }
    found
}

/// The address with something that exists in the place of each parameter.
fn filled(path: &str) -> String {
    path.replace("{name}", "m1")
        .replace("{pid}", "42")
        .replace("{id}", "1")
        .replace("{database}", "shop")
        .replace("{key}", "limits.idle_timeout")
}

async fn document_of(admin: &Admin) -> Value {
    let (status, document) = admin.get("/api/v1/openapi.json").await;
    assert_eq!(status, 200);
    document
}

#[tokio::test]
async fn every_call_of_the_document_is_answered_as_it_says() {
    let admin = admin(|_| {}).await;
    let document = document_of(&admin).await;
    assert_eq!(admin.post("/api/v1/migrations", &json!({"name": "m1"})).await.0, 201);
    let (mut calls, mut good) = (0, 0);
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            // The stream has no end, and the fake's session never goes, which the others would wait for.
            if ["live", "waitClose", "waitCloseAll"].iter().any(|id| operation["operationId"] == json!(id)) {
                continue;
            }
            let body = match operation["operationId"].as_str().unwrap() {
                "createMigration" => json!({"name": "m2", "mode": "offline", "databases": ["shop"]}).to_string(),
                "cutOver" | "rollBack" => {
                    json!({"dry_run": true, "max_pause": "2s", "stragglers": "abort", "force": true}).to_string()
                }
                "shadowMigration" => json!({"share": 5, "for": "1min"}).to_string(),
                "verifyMigration" => json!({"repair": true}).to_string(),
                "fixRule" => json!({"rule": "always_triggers", "apply": true}).to_string(),
                "set" => json!({"value": "5s"}).to_string(),
                "shutdown" => json!({"wait_for": "clients"}).to_string(),
                _ => String::new(),
            };
            assert_eq!(body.is_empty(), operation.get("requestBody").is_none(), "{method} {path}");
            if !body.is_empty() {
                let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
                assert_eq!(faults(&document, schema, &serde_json::from_str(&body).unwrap(), "body"), [""; 0], "{path}");
            }
            let (status, kind, text) = admin.http(&method.to_uppercase(), &filled(path), &[], &body).await;
            let described = &operation["responses"][status.to_string()];
            assert!(described.is_object(), "{method} {path} answered {status}, which is not described: {text}");
            let described = match described["$ref"].as_str() {
                Some(reference) => document.pointer(&reference[1..]).unwrap(),
                None => described,
            };
            let schema = &described["content"][kind.as_str()]["schema"];
            assert!(schema.is_object(), "{method} {path} answered {kind}, which is not described");
            let value: Value = serde_json::from_str(&text).unwrap();
            assert_eq!(faults(&document, schema, &value, "$"), [""; 0], "{method} {path}");
            calls += 1;
            good += usize::from(status < 300);
        }
    }
    assert!(calls > 45 && good > 35, "{calls} calls, {good} of them good");
}

/// The check above can fail.
#[test]
fn a_wrong_answer_is_seen() {
    let document = json!({"components": {"schemas": {"A": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}}}});
    let schema = json!({"type": "array", "items": {"$ref": "#/components/schemas/A"}});
    for (value, expected) in [
        (json!([{"n": 1}]), ""),
        (json!([{"n": "1"}]), "$[0].n: \"1\" is not of [\"integer\"]"),
        (json!([{}]), "$[0].n is missing"),
        (json!([{"n": 1, "m": 2}]), "$[0].m is not described"),
        (json!({}), "$: {} is not of [\"array\"]"),
    ] {
        assert_eq!(faults(&document, &schema, &value, "$").concat(), expected);
    }
}

#[tokio::test]
async fn what_changes_state_is_guarded_and_says_so() {
    let admin = admin(|config| config.admin.token = Some(Secret::new("t0ken"))).await;
    let document = document_of(&admin).await;
    let mut guarded = BTreeSet::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap().iter().filter(|(method, _)| *method != "get") {
            let body = if operation.get("requestBody").is_some() { r#"{"name": "m1", "value": "5s"}"# } else { "" };
            // What is not asked for by anybody known must not even be read.
            let (status, _, text) = admin.http(&method.to_uppercase(), &filled(path), &[], body).await;
            let refused = status == 401 || (status == 400 && !body.is_empty());
            assert!(refused, "{method} {path}: {status} {text}");
            assert!(operation["responses"]["401"].is_object() && operation["security"].is_array());
            guarded.insert((method, path));
        }
    }
    assert!(guarded.len() > 20, "{guarded:?}");
    assert_eq!(admin.fake.orders(), [""; 0]);
}

#[tokio::test]
async fn a_call_with_the_same_key_creates_once() {
    let admin = admin(|_| {}).await;
    let (body, key) = (json!({"name": "m1"}).to_string(), [("idempotency-key", "a-1")]);
    let (first, again) = tokio::join!(
        admin.http("POST", "/api/v1/migrations", &key, &body),
        admin.http("POST", "/api/v1/migrations", &key, &body)
    );
    let mut statuses = [first.0, again.0];
    statuses.sort_unstable();
    assert_eq!(statuses, [200, 201], "{first:?} {again:?}");
    assert_eq!(admin.fake.orders(), ["create m1 "]);
    let other = json!({"name": "m2"}).to_string();
    let (status, _, text) = admin.http("POST", "/api/v1/migrations", &key, &other).await;
    assert_eq!(status, 422, "{text}");
    assert_eq!(admin.http("POST", "/api/v1/migrations", &[("idempotency-key", "")], &other).await.0, 400);
    assert_eq!(admin.fake.orders(), ["create m1 "]);
}

#[tokio::test]
async fn a_misspelt_key_of_a_new_migration_is_an_error() {
    let admin = admin(|_| {}).await;
    let (status, problem) = admin.post("/api/v1/migrations", &json!({"name": "m1", "database": ["shop"]})).await;
    assert_eq!(status, 400);
    assert!(problem["detail"].as_str().unwrap().ends_with("unknown field `database`"), "{problem}");
}

#[tokio::test]
async fn followers_see_a_new_migration_and_the_stream_ends_with_the_server() {
    let admin = admin(|_| {}).await;
    let mut stream = tokio::net::TcpStream::connect(admin.http).await.unwrap();
    stream.write_all(b"GET /api/v1/live HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    let mut seen = String::new();
    let mut read = async |until: &str| {
        let mut buffer = [0; 4096];
        while !seen.contains(until) {
            let count = stream.read(&mut buffer).await.unwrap();
            assert!(count > 0, "the stream ended before {until:?}: {seen}");
            seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
        }
    };
    read("event: live").await;
    assert_eq!(admin.post("/api/v1/migrations", &json!({"name": "m1"})).await.0, 201);
    read("\"name\":\"m1\"").await;
    admin.tasks.stop();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.unwrap();
    let document_shape = "text/event-stream";
    assert!(seen.contains(document_shape), "{seen}");
}

/// Who may not give orders is told so before it has sent what it would order, and takes no memory for it.
#[tokio::test]
async fn an_order_without_the_token_is_refused_before_its_body_is_read() {
    let admin = admin(|config| config.admin.token = Some(Secret::new("t0ken"))).await;
    let mut stream = tokio::net::TcpStream::connect(admin.http).await.unwrap();
    let head = "POST /api/v1/migrations HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
                content-length: 1000000\r\n\r\n{";
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 401");
}

/// The descriptors of idle connections are those that clients of the proxy need.
#[tokio::test]
async fn idle_connections_take_no_more_than_their_places() {
    let admin = admin(|_| {}).await;
    let mut idle = Vec::new();
    for _ in 0..256 {
        let mut stream = tokio::net::TcpStream::connect(admin.http).await.unwrap();
        // Answered, so it has its place.
        stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 200");
        idle.push(stream);
    }
    let mut late = std::pin::pin!(admin.get("/healthz"));
    let waits = tokio::time::timeout(std::time::Duration::from_millis(300), &mut late).await;
    assert!(waits.is_err(), "{waits:?}");
    idle.pop();
    assert_eq!(late.await.0, 200);
}

#[tokio::test]
async fn what_happens_is_on_record_and_named_after_its_migration() {
    let admin = admin(|_| {}).await;
    assert_eq!(admin.post("/api/v1/migrations", &json!({"name": "m1"})).await.0, 201);
    assert_eq!(admin.post("/api/v1/migrations/m1/retry", &Value::Null).await.0, 409);
    let events = admin.get("/api/v1/events").await.1;
    let of =
        |text: &str| events.as_array().unwrap().iter().find(|event| event["text"] == json!(text)).cloned().unwrap();
    assert_eq!(of("order create")["failed"], json!(false));
    for order in ["rollback", "complete"] {
        admin.post(&format!("/api/v1/migrations/m1/{order}"), &Value::Null).await;
    }
    let later = admin.get("/api/v1/events").await.1;
    for text in ["order rollback", "order complete"] {
        let event = later.as_array().unwrap().iter().find(|event| event["text"] == json!(text)).unwrap();
        assert_eq!(event["migration"], json!("m1"), "{text}");
    }
    let refused = of("order retry: it has not failed");
    assert_eq!((&refused["migration"], &refused["failed"]), (&json!("m1"), &json!(true)));
}

#[tokio::test]
async fn the_pages_come_with_a_strict_policy() {
    let admin = admin(|_| {}).await;
    let (status, kind, page) = admin.http("GET", "/", &[], "").await;
    assert_eq!((status, kind.as_str()), (200, "text/html; charset=utf-8"));
    for asset in page.split('"').filter(|part| part.starts_with("/assets/")) {
        assert_eq!(admin.http("GET", asset, &[], "").await.0, 200, "{asset}");
    }
    let mut stream = tokio::net::TcpStream::connect(admin.http).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    for header in
        ["content-security-policy: default-src 'none'", "x-content-type-options: nosniff", "x-frame-options: DENY"]
    {
        assert!(answer.contains(header), "{header}");
    }
}

#[tokio::test]
async fn what_cannot_be_read_is_a_problem_like_every_other() {
    let admin = admin(|_| {}).await;
    for (method, path) in [("GET", "/api/v1/migrations/%ff"), ("POST", "/api/v1/databases/%ff/pause")] {
        let (status, kind, text) = admin.http(method, path, &[], "").await;
        assert_eq!((status, kind.as_str()), (400, "application/problem+json"), "{path}: {text}");
    }
}

#[tokio::test]
async fn a_verification_can_be_asked_for_afterwards() {
    let admin = admin(|_| {}).await;
    assert_eq!(admin.post("/api/v1/migrations", &json!({"name": "m1"})).await.0, 201);
    let path = "/api/v1/migrations/m1/verification";
    assert_eq!(admin.get(path).await, (200, Value::Null));
    let (_, report) = admin.post("/api/v1/migrations/m1/verify", &Value::Null).await;
    assert_eq!(admin.get(path).await, (200, report));
    let rows = admin.connect("ann").await.query("SHOW VERIFICATION m1", &[]).await.unwrap();
    assert_eq!(rows[1].get::<_, &str>("object"), "table \"public\".\"item\"");
}

/// A page whose name somebody makes to lead to this machine is of one origin with what answers there.
#[tokio::test]
async fn a_name_that_is_not_ours_reads_nothing() {
    let admin = admin(|config| config.admin.address = Some(([127, 0, 0, 1], 8432).into())).await;
    assert_eq!(admin.get("/api/v1/status").await.0, 200);
    for path in ["/", "/api/v1/status", "/api/v1/live", "/metrics"] {
        let (status, kind, text) = admin.http("GET", path, &[("host", "evil.example:8432")], "").await;
        assert_eq!((status, kind.as_str()), (403, "application/problem+json"), "{path}: {text}");
        assert!(text.contains("[admin] hosts"), "{text}");
    }
}

#[tokio::test]
async fn a_page_from_elsewhere_changes_nothing() {
    let admin = admin(|_| {}).await;
    for header in
        [("origin", "https://evil.example"), ("sec-fetch-site", "cross-site"), ("sec-fetch-site", "same-site")]
    {
        let (status, _, text) = admin.http("POST", "/api/v1/reload", &[header], "").await;
        assert_eq!(status, 403, "{header:?}: {text}");
        assert!(text.contains("set [admin] token"), "{text}");
    }
    assert_eq!(admin.http("POST", "/api/v1/reload", &[("sec-fetch-site", "same-origin")], "").await.0, 200);
    assert_eq!(admin.fake.orders(), ["reload"]);
}
