//! What one call of the API is: what the router and the OpenAPI document are both made from. Knows no call of its own.

use std::sync::Arc;

use axum::routing::MethodRouter;
use schemars::{Schema, SchemaGenerator};

use super::Site;
use crate::admin::table::Column;

/// A JSON shape, made when the document is.
pub(super) type Shape = fn(&mut SchemaGenerator) -> Schema;

/// What a call answers when it goes well.
pub(super) enum Answers {
    /// JSON of this shape.
    Json(Shape),
    /// Rows under these columns.
    Rows(&'static [Column]),
    /// The migration that was made, with its address.
    Created(Shape),
    /// Server-sent events.
    Stream(Shape),
    /// The OpenAPI document.
    Document,
}

/// One call.
pub(super) struct Operation {
    pub(super) method: &'static str,
    pub(super) path: &'static str,
    /// The document's `operationId`.
    pub(super) id: &'static str,
    pub(super) summary: &'static str,
    pub(super) body: Option<Taken>,
    pub(super) answers: Answers,
    /// Statuses of problems, beside those that every call of its kind can have.
    pub(super) problems: &'static [u16],
    pub(super) handler: MethodRouter<Arc<Site>>,
}

/// What a call takes.
pub(super) struct Taken {
    pub(super) shape: Shape,
    pub(super) required: bool,
}
