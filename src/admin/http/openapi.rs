//! The API's description in the form of OpenAPI 3.1, made from [`operations`] and from the types that are sent.

use schemars::generate::SchemaSettings;
use schemars::{Schema, SchemaGenerator};
use serde_json::{Map, Value, json};

use super::idempotency;
use super::operation::{Answers, Operation};
use super::operations;
use super::problem;
use crate::admin::table::{Column, Kind};

const DESCRIPTION: &str = "The API of a running pgcutover. Reading is open to whoever reaches the address; what changes \
    state needs the bearer token of `[admin] token` or, where none is configured, a caller on the same machine. \
    Objects may get more keys in later versions, and lose none. Unknown values are null, never 0.";

/// The document.
pub(super) fn document() -> Value {
    let settings = || {
        SchemaSettings::draft2020_12().with(|settings| {
            settings.definitions_path = "/components/schemas".into();
            settings.meta_schema = None;
        })
    };
    let mut sent = settings().for_serialize().into_generator();
    let mut read = settings().for_deserialize().into_generator();
    let mut paths: Map<String, Value> = Map::new();
    for operation in operations::all() {
        let described = describe(&operation, &mut sent, &mut read);
        let methods = paths.entry(operation.path).or_insert_with(|| json!({}));
        methods[operation.method] = described;
    }
    let problem = sent.subschema_for::<problem::Body>();
    let mut schemas = sent.take_definitions(true);
    schemas.extend(read.take_definitions(true));
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "pgcutover",
            "version": env!("CARGO_PKG_VERSION"),
            "description": DESCRIPTION,
            "license": { "name": "MIT OR Apache-2.0", "identifier": "MIT OR Apache-2.0" },
        },
        "servers": [{ "url": "/" }],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": {
                "Problem": {
                    "description": "It was not carried out (RFC 9457)",
                    "content": { "application/problem+json": { "schema": problem } },
                },
            },
            "securitySchemes": { "token": { "type": "http", "scheme": "bearer" } },
        },
    })
}

fn describe(operation: &Operation, sent: &mut SchemaGenerator, read: &mut SchemaGenerator) -> Value {
    let mut parameters: Vec<Value> = operation.path.split('/').filter_map(of_path).collect();
    if operation.id == "listMigrations" {
        let schema = read.subschema_for::<crate::admin::command::Filter>();
        let text = "`active`: neither finished nor failed nor cancelled";
        parameters.push(json!({ "name": "filter", "in": "query", "description": text, "schema": schema }));
    }
    if operation.id == "createMigration" {
        parameters.push(json!({
            "name": idempotency::HEADER, "in": "header", "schema": { "type": "string", "minLength": 1, "maxLength": 255 },
            "description": "The same key with the same body again has no further effect",
        }));
    }
    let mut described = json!({
        "operationId": operation.id,
        "summary": operation.summary,
        "parameters": parameters,
        "responses": responses(operation, sent),
    });
    if operation.method != "get" {
        described["security"] = json!([{ "token": [] }, {}]);
    }
    if let Some(body) = &operation.body {
        let schema = (body.shape)(read);
        described["requestBody"] =
            json!({ "required": body.required, "content": { "application/json": { "schema": schema } } });
    }
    described
}

fn responses(operation: &Operation, sent: &mut SchemaGenerator) -> Value {
    let of_type = |description: &str, kind: &str, schema: Value| json!({ "description": description, "content": { (kind): { "schema": schema } } });
    let mut responses = Map::new();
    let mut put = |status: u16, response| {
        responses.insert(status.to_string(), response);
    };
    match &operation.answers {
        Answers::Json(shape) => put(200, of_type("Done", "application/json", shape(sent).to_value())),
        Answers::Rows(columns) => put(200, of_type("Rows", "application/json", rows(columns))),
        Answers::Document => put(200, of_type("The document", "application/json", json!({ "type": "object" }))),
        Answers::Stream(shape) => {
            let text = "Each event's data is JSON of this shape";
            put(200, of_type(text, "text/event-stream", shape(sent).to_value()));
        }
        Answers::Created(shape) => {
            let schema: Schema = shape(sent);
            let text = "The same key has created it before";
            put(200, of_type(text, "application/json", schema.clone().to_value()));
            let mut created = of_type("It is accepted", "application/json", schema.to_value());
            created["headers"] = json!({ "Location": { "schema": { "type": "string" } } });
            put(201, created);
        }
    }
    // Whoever asks by a strange name is refused before all else.
    let guarded: &[u16] = if operation.method == "get" { &[403] } else { &[401, 403] };
    let named: &[u16] = if operation.path.contains('{') { &[400] } else { &[] };
    let taken: &[u16] = if operation.body.is_some() { &[400, 413] } else { &[] };
    for status in [guarded, named, taken, operation.problems].into_iter().flatten() {
        put(*status, json!({ "$ref": "#/components/responses/Problem" }));
    }
    Value::Object(responses)
}

/// A part of a path that stands for something.
fn of_path(part: &str) -> Option<Value> {
    let name = part.strip_prefix('{')?.strip_suffix('}')?;
    let schema = match name {
        "name" => json!({ "type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9-]{0,39}$" }),
        "pid" => json!({ "type": "integer", "minimum": 0, "maximum": i32::MAX }),
        "id" => json!({ "type": "integer", "minimum": 0, "maximum": u64::MAX }),
        _ => json!({ "type": "string", "minLength": 1 }),
    };
    Some(json!({ "name": name, "in": "path", "required": true, "schema": schema }))
}

fn rows(columns: &[Column]) -> Value {
    let kind = |kind: &Kind| match kind {
        Kind::Text => "string",
        Kind::Integer => "integer",
        Kind::Float => "number",
    };
    let properties: Map<String, Value> =
        columns.iter().map(|(name, of)| ((*name).to_owned(), json!({ "type": [kind(of), "null"] }))).collect();
    let names: Vec<&str> = columns.iter().map(|(name, _)| *name).collect();
    json!({ "type": "array", "items": { "type": "object", "properties": properties, "required": names } })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Every `$ref` below `value`.
    fn references<'a>(value: &'a Value, found: &mut BTreeSet<&'a str>) {
        match value {
            Value::Object(map) => {
                found.extend(map.get("$ref").and_then(Value::as_str));
                map.values().for_each(|value| references(value, found));
            }
            Value::Array(list) => list.iter().for_each(|value| references(value, found)),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }

    #[test]
    fn every_reference_of_the_document_leads_somewhere() {
        let document = document();
        let mut found = BTreeSet::new();
        references(&document, &mut found);
        assert!(found.len() > 20, "{found:?}");
        for reference in found {
            let pointer = reference.strip_prefix('#').expect("within the document");
            assert!(document.pointer(pointer).is_some(), "{reference}");
        }
    }

    #[test]
    fn every_operation_has_an_id_of_its_own() {
        let mut ids = BTreeSet::new();
        for operation in operations::all() {
            assert!(ids.insert(operation.id), "{} twice", operation.id);
            assert!(!operation.summary.is_empty());
        }
    }
}
