//! What the stream's tables look like on the target, for the planner.
//!
//! A shape is read when the source tells of a table. Once a definition was changed by the stream itself, what is committed on
//! the target is behind what was applied: from then on shapes are read in the session that applies, when it has executed
//! everything before. And a change of one definition may show in the shape of any table (a type that was renamed), of which
//! the source says nothing: so every table is looked at again before its next change.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::applier::{ApplyError, Link};
use super::shape::{ColumnKind, KeyPart, SHAPE_SQL, TableShape, TargetColumn};
use crate::ident::{QualifiedName, quote_literal};
use crate::pgoutput::{Message, Relation};
use crate::postgres::Control;

/// See the module.
#[derive(Debug)]
pub(super) struct Shapes {
    /// For the target's catalogue, as long as no definition was changed.
    control: Arc<Control>,
    altered: bool,
    /// What the source has told of its tables, by their OID.
    relations: HashMap<u32, Relation>,
    /// Those that were not used since a definition was changed.
    stale: HashSet<u32>,
}

impl Shapes {
    pub(super) fn new(control: Arc<Control>) -> Self {
        Self { control, altered: false, relations: HashMap::new(), stale: HashSet::new() }
    }

    /// A definition is changed behind everything that was handed over so far.
    pub(super) fn altered(&mut self) {
        self.altered = true;
        self.stale = self.relations.keys().copied().collect();
    }

    /// Whether a table of the message has to be looked at again.
    pub(super) fn is_stale(&self, message: &Message) -> bool {
        !self.stale.is_empty() && relations_of(message).iter().any(|oid| self.stale.contains(oid))
    }

    /// Those tables.
    pub(super) fn take_stale(&mut self, message: &Message) -> Vec<Relation> {
        let stale: Vec<u32> = relations_of(message).iter().copied().filter(|oid| self.stale.remove(oid)).collect();
        stale.iter().filter_map(|oid| self.relations.get(oid).cloned()).collect()
    }

    /// What the table looks like now.
    pub(super) async fn of(&mut self, relation: &Relation, link: &Link) -> Result<TableShape, ApplyError> {
        let table = QualifiedName::new(&relation.schema, &relation.name);
        self.stale.remove(&relation.oid);
        self.relations.insert(relation.oid, relation.clone());
        if self.altered {
            let sql = SHAPE_SQL.replace("$1", &quote_literal(&table.to_string()));
            return Ok(TableShape::new(link.look(sql).await?.into_iter().filter_map(column)));
        }
        let rows = self.control.query(SHAPE_SQL, &[&table.to_string()]).await;
        let rows = rows.map_err(|source| ApplyError::Shape { table, source })?;
        Ok(TableShape::new(rows.iter().map(|row| {
            let column = TargetColumn {
                type_sql: row.get(1),
                kind: ColumnKind::from_catalogue(row.get(2)),
                equality: row.get(3),
                primary_key: KeyPart::from_catalogue(row.get(4)),
                cast_from_text: row.get(5),
                cast_to_text: row.get(6),
            };
            (row.get(0), column)
        })))
    }
}

/// A row of [`SHAPE_SQL`] as text.
fn column(row: Vec<Option<String>>) -> Option<(String, TargetColumn)> {
    let [name, type_sql, kind, equality, primary_key, from_text, to_text] = <[_; 7]>::try_from(row).ok()?;
    let column = TargetColumn {
        type_sql: type_sql?,
        kind: ColumnKind::from_catalogue(&kind?),
        equality,
        primary_key: KeyPart::from_catalogue(&primary_key?),
        cast_from_text: from_text? == "t",
        cast_to_text: to_text? == "t",
    };
    Some((name?, column))
}

fn relations_of(message: &Message) -> &[u32] {
    match message {
        Message::Insert(insert) => std::slice::from_ref(&insert.relation),
        Message::Update(update) => std::slice::from_ref(&update.relation),
        Message::Delete(delete) => std::slice::from_ref(&delete.relation),
        Message::Truncate(truncate) => &truncate.relations,
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_of_text_says_what_a_row_of_values_does() {
        let row = ["c", "integer", "/a", "pg_catalog.=", "unique", "f", "t"].map(|text| Some(text.to_owned()));
        let (name, read) = column(row.to_vec()).expect("whole");
        assert_eq!((name.as_str(), read.type_sql.as_str(), read.kind), ("c", "integer", ColumnKind::IdentityAlways));
        assert!(
            read.primary_key == KeyPart::Unique && !read.cast_from_text && read.cast_to_text && read.equality.is_some()
        );
        let mut row = row.to_vec();
        row[3] = None;
        assert!(column(row.clone()).is_some_and(|(_, read)| read.equality.is_none()));
        row.pop();
        assert!(column(row).is_none());
    }
}
