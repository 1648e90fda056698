//! The types of a table's columns and everything that they are made of, read from the catalogue.

use std::collections::HashMap;

use super::VerifyError;
use super::shape::{Shape, is_number};
use crate::postgres::Control;

/// Number, kind, name (with its schema unless that is `pg_catalog`, unquoted), output function, quoted name, the type under a
/// domain, of elements or of bounds, and names and types of columns.
const TYPES: &str = "
WITH RECURSIVE used AS (
    SELECT a.atttypid AS oid FROM pg_attribute a WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped
    UNION
    SELECT x.oid FROM used u JOIN pg_type t ON t.oid = u.oid CROSS JOIN LATERAL (
        SELECT t.typbasetype WHERE t.typtype = 'd'
        UNION ALL SELECT t.typelem WHERE t.typcategory = 'A' AND t.typelem <> 0
        UNION ALL SELECT r.rngsubtype FROM pg_range r WHERE r.rngtypid = t.oid
        UNION ALL SELECT a.atttypid FROM pg_attribute a
                   WHERE t.typtype = 'c' AND a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped) x (oid))
SELECT t.oid, CASE WHEN t.typcategory = 'A' AND t.typelem <> 0 THEN 'a' ELSE t.typtype::text END,
       CASE WHEN n.nspname = 'pg_catalog' THEN t.typname::text ELSE n.nspname || '.' || t.typname END,
       format('%I.%I', m.nspname, p.proname), format('%I.%I', n.nspname, t.typname),
       CASE WHEN t.typtype = 'd' THEN t.typbasetype ELSE coalesce((SELECT r.rngsubtype FROM pg_range r WHERE r.rngtypid = t.oid), t.typelem) END,
       ARRAY(SELECT a.attname::text FROM pg_attribute a WHERE a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum),
       ARRAY(SELECT a.atttypid FROM pg_attribute a WHERE a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum)
  FROM used u JOIN pg_type t ON t.oid = u.oid JOIN pg_namespace n ON n.oid = t.typnamespace
  JOIN pg_proc p ON p.oid = t.typoutput JOIN pg_namespace m ON m.oid = p.pronamespace";

struct Type {
    kind: String,
    name: String,
    output: String,
    quoted: String,
    of: u32,
    columns: Vec<(String, u32)>,
}

/// Types by their number on one server.
#[derive(Default)]
pub(super) struct Types(HashMap<u32, Type>);

impl Types {
    /// Those that the columns of a table need.
    pub(super) async fn of_table(server: &Control, table: u32) -> Result<Self, VerifyError> {
        let rows = server.query(TYPES, &[&table]).await.map_err(VerifyError::query("reading types"))?;
        let read = |row: &tokio_postgres::Row| {
            let (names, types): (Vec<String>, Vec<u32>) = (row.get(6), row.get(7));
            let columns = names.into_iter().zip(types).collect();
            let (kind, name, output, quoted) = (row.get(1), row.get(2), row.get(3), row.get(4));
            (row.get(0), Type { kind, name, output, quoted, of: row.get(5), columns })
        };
        Ok(Self(rows.iter().map(read).collect()))
    }

    /// What a type is made of; none: it is not among them.
    pub(super) fn shape(&self, oid: u32) -> Option<Shape> {
        let found = self.0.get(&oid)?;
        let shape = match found.kind.as_str() {
            _ if is_number(&found.name) => Shape::Number(found.name.clone()),
            "a" => Shape::Array(Box::new(self.shape(found.of)?)),
            "r" => Shape::Range(Box::new(self.shape(found.of)?)),
            "d" => {
                let base = &self.0.get(&found.of)?.quoted;
                Shape::Domain(base.clone(), Box::new(self.shape(found.of)?))
            }
            "c" => {
                let column = |(name, oid): &(String, u32)| Some((name.clone(), self.shape(*oid)?));
                Shape::Composite(found.columns.iter().map(column).collect::<Option<_>>()?)
            }
            _ => Shape::Other(found.output.clone()),
        };
        // Of a domain the base type is kept: the output function may take no domain.
        let is_kept = shape.holds_numbers() || found.kind == "d";
        Some(if is_kept { shape } else { Shape::Other(found.output.clone()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_followed_to_what_they_are_made_of() {
        let made = |kind: &str, name: &str, of: u32, columns: &[(&str, u32)]| Type {
            kind: kind.to_owned(),
            name: name.to_owned(),
            output: format!("o.{name}"),
            quoted: format!("q.{name}"),
            of,
            columns: columns.iter().map(|(name, oid)| ((*name).to_owned(), *oid)).collect(),
        };
        let types = Types(HashMap::from([
            (701, made("b", "float8", 0, &[])),
            (25, made("b", "text", 0, &[])),
            (600, made("b", "point", 701, &[])),
            (1, made("d", "s.ratio", 701, &[])),
            (2, made("c", "s.pair", 0, &[("x", 1), ("t", 25)])),
            (3, made("a", "s._pair", 2, &[])),
            (4, made("c", "s.lost", 0, &[("x", 99)])),
            (5, made("a", "_text", 25, &[])),
            (6, made("e", "s.mood", 0, &[])),
            (7, made("d", "s.dmood", 6, &[])),
        ]));
        let number = Shape::Number("float8".to_owned());
        let domain = Shape::Domain("q.float8".to_owned(), Box::new(number));
        let text = Shape::Other("o.text".to_owned());
        let pair = Shape::Composite(vec![("x".to_owned(), domain), ("t".to_owned(), text)]);
        assert_eq!(types.shape(3), Some(Shape::Array(Box::new(pair))));
        assert_eq!(types.shape(600), Some(Shape::Number("point".to_owned())));
        assert_eq!(types.shape(5), Some(Shape::Other("o._text".to_owned())), "not taken apart for nothing");
        let mood = Shape::Other("o.s.mood".to_owned());
        assert_eq!(types.shape(7), Some(Shape::Domain("q.s.mood".to_owned(), Box::new(mood))));
        assert_eq!((types.shape(4), types.shape(99)), (None, None));
    }
}
