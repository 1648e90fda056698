//! What a table looks like on the target, as far as applying to it is concerned. Pure; [`SHAPE_SQL`] is how it is read.

use std::collections::HashMap;

use crate::ident::quote_ident;

/// A table of the target.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TableShape {
    /// Its columns by name.
    pub columns: HashMap<String, TargetColumn>,
    /// Columns of its primary key, where that is checked row by row; empty: none.
    pub primary_key: Vec<String>,
}

/// A column of the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetColumn {
    /// Its type as SQL, qualified where it is not built in, without a length.
    pub type_sql: String,
    /// What may be written into it.
    pub kind: ColumnKind,
    /// The equality operator of a unique index on the column, ready for `OPERATOR(…)`. Types such as citext have
    /// theirs outside pg_catalog, and with the wrong one the index is not used or the comparison is another.
    pub equality: Option<String>,
    /// Its part in the primary key.
    pub primary_key: KeyPart,
    /// A cast from text to the type is a function of its own: it may read a text otherwise than the type's input does
    /// (regclass takes no number, for one).
    pub cast_from_text: bool,
    /// A cast to text is a function that may take two values for one: the application's own, or that of a bpchar without a
    /// length, which leaves blanks out.
    pub cast_to_text: bool,
}

/// What a column is to the primary key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KeyPart {
    /// Nothing.
    #[default]
    None,
    /// Part of one that no two rows share at any time.
    Unique,
    /// Part of one that is deferrable: within a transaction two rows may share it.
    Deferrable,
}

/// What may be written into a column.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ColumnKind {
    /// Anything.
    #[default]
    Plain,
    /// `GENERATED ALWAYS AS (…)`: computed by the server, never written.
    Generated,
    /// `GENERATED ALWAYS AS IDENTITY`: an INSERT can override it, an UPDATE cannot set it.
    IdentityAlways,
}

/// Reads the shape of the table whose quoted name is `$1`: name, type, `attgenerated`, `attidentity`, equality, part in the
/// primary key, cast from text, cast to text. No row: no table. Columns of the catalogue that older servers lack are read through jsonb.
///
/// The index of a key WITHOUT OVERLAPS (PostgreSQL 18) is GiST, where every operator class numbers its operators as it
/// likes: equality is known by its name. Such a key is as unique as others are: equal ranges overlap, and empty ones are
/// refused. Other GiST indexes, those of exclusion constraints among them, are not `indisunique`.
pub const SHAPE_SQL: &str = "
SELECT a.attname::text,
       pg_catalog.format_type(a.atttypid, -1),
       coalesce(pg_catalog.to_jsonb(a) ->> 'attgenerated', '') || '/' || a.attidentity::text,
       (SELECT pg_catalog.quote_ident(n.nspname) || '.' || o.oprname
          FROM pg_catalog.pg_index i
          CROSS JOIN LATERAL unnest(i.indclass::oid[], i.indkey::int2[]) AS k (opclass, attnum)
          JOIN pg_catalog.pg_opclass c ON c.oid = k.opclass
          JOIN pg_catalog.pg_am am ON am.oid = c.opcmethod AND am.amname IN ('btree', 'gist')
          JOIN pg_catalog.pg_amop m ON m.amopfamily = c.opcfamily
               AND m.amoplefttype = c.opcintype AND m.amoprighttype = c.opcintype
          JOIN pg_catalog.pg_operator o ON o.oid = m.amopopr
               AND CASE am.amname WHEN 'btree' THEN m.amopstrategy = 3 ELSE m.amoppurpose = 's' AND o.oprname = '=' END
          JOIN pg_catalog.pg_namespace n ON n.oid = o.oprnamespace
         WHERE i.indrelid = a.attrelid AND i.indisunique AND k.attnum = a.attnum
         ORDER BY i.indisprimary DESC, i.indexrelid LIMIT 1),
       coalesce((SELECT CASE WHEN i.indimmediate THEN 'unique' ELSE 'deferrable' END FROM pg_catalog.pg_index i
                WHERE i.indrelid = a.attrelid AND i.indisprimary AND i.indisvalid
                  AND a.attnum = ANY ((i.indkey::int2[])[0:coalesce((pg_catalog.to_jsonb(i) ->> 'indnkeyatts')::int, i.indnatts) - 1])), ''),
       EXISTS (SELECT FROM pg_catalog.pg_cast k
                WHERE k.castsource = 'pg_catalog.text'::pg_catalog.regtype AND k.castmethod = 'f'
                  AND k.casttarget IN (a.atttypid, (SELECT t.typbasetype FROM pg_catalog.pg_type t WHERE t.oid = a.atttypid))),
       EXISTS (WITH RECURSIVE base (oid, typmod) AS (
                      SELECT a.atttypid, a.atttypmod
                       UNION ALL SELECT t.typbasetype, t.typtypmod
                        FROM base d JOIN pg_catalog.pg_type t ON t.oid = d.oid WHERE t.typtype = 'd')
               SELECT FROM base b JOIN pg_catalog.pg_cast k ON k.castsource = b.oid
                WHERE k.casttarget = 'pg_catalog.text'::pg_catalog.regtype AND k.castmethod = 'f'
                  AND (k.oid >= '16384'::pg_catalog.oid OR b.oid = 'pg_catalog.bpchar'::pg_catalog.regtype AND b.typmod < 0))
  FROM pg_catalog.pg_attribute a
 WHERE a.attrelid = pg_catalog.to_regclass($1) AND a.attnum > 0 AND NOT a.attisdropped";

/// How values of a column travel in sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Element {
    /// As texts, which the type's input function reads on the target.
    Text,
    /// As integers of so many bytes: what most keys are, and much cheaper for the target than a text.
    Integer(u8),
}

impl Element {
    /// The type of an array of them.
    pub(super) fn array_sql(self) -> &'static str {
        match self {
            Self::Integer(2) => "pg_catalog.int2[]",
            Self::Integer(4) => "pg_catalog.int4[]",
            Self::Integer(_) => "pg_catalog.int8[]",
            Self::Text => "pg_catalog.text[]",
        }
    }

    /// `pg_type.oid`.
    pub(super) fn oid(self) -> u32 {
        match self {
            Self::Integer(2) => 21,
            Self::Integer(4) => 23,
            Self::Integer(_) => 20,
            Self::Text => 25,
        }
    }

    /// Whether a text can travel like this: its value is an integer that fits.
    pub(super) fn holds(self, text: &[u8]) -> bool {
        match self {
            Self::Text => true,
            Self::Integer(bytes) => integer(text).is_some_and(|value| {
                let beyond = 64 - 8 * u32::from(bytes);
                value << beyond >> beyond == value
            }),
        }
    }
}

/// The value of a text, if it is a whole number as PostgreSQL writes one.
pub(super) fn integer(text: &[u8]) -> Option<i64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

impl ColumnKind {
    /// From `attgenerated/attidentity` as [`SHAPE_SQL`] gives them.
    pub fn from_catalogue(text: &str) -> Self {
        match text {
            "/" | "/d" => Self::Plain,
            "/a" => Self::IdentityAlways,
            _ => Self::Generated,
        }
    }
}

impl KeyPart {
    /// As [`SHAPE_SQL`] gives it.
    pub fn from_catalogue(text: &str) -> Self {
        match text {
            "unique" => Self::Unique,
            "deferrable" => Self::Deferrable,
            _ => Self::None,
        }
    }
}

impl TableShape {
    /// A shape of these columns.
    pub fn new(columns: impl IntoIterator<Item = (String, TargetColumn)>) -> Self {
        let columns: HashMap<_, _> = columns.into_iter().collect();
        let unique = columns.iter().filter(|(_, column)| column.primary_key == KeyPart::Unique);
        let mut primary_key: Vec<String> = unique.map(|(name, _)| name.clone()).collect();
        primary_key.sort();
        Self { columns, primary_key }
    }
}

impl TargetColumn {
    /// How its values travel in sets. Only types that are built in have these names: others are qualified or quoted.
    pub(super) fn element(&self) -> Element {
        match self.type_sql.as_str() {
            "smallint" => Element::Integer(2),
            "integer" => Element::Integer(4),
            "bigint" => Element::Integer(8),
            _ => Element::Text,
        }
    }

    /// `column = $n` by the index's own operator, or by text where there is no index.
    pub(super) fn equals(&self, name: &str, parameter: usize) -> String {
        match &self.equality {
            Some(operator) => {
                format!("{} OPERATOR({operator}) ${parameter}::{}", quote_ident(name), self.type_sql)
            }
            None => self.same_text(name, parameter),
        }
    }

    /// `column IS NOT DISTINCT FROM $n`, compared as text: every type has a text form, not every type has an equality,
    /// and equality is not identity (1.0 and 1.00, or two texts that a nondeterministic collation takes for one). The text is
    /// that of the type's output function: a record is written by those of its columns, whatever casts they have. The index of
    /// a primary key, which is never null, narrows it down.
    pub(super) fn same_text(&self, name: &str, parameter: usize) -> String {
        let (column, type_sql) = (quote_ident(name), &self.type_sql);
        let row = if self.cast_to_text { "ROW" } else { "" };
        let left = if self.cast_to_text { format!("ROW({column})") } else { column };
        let same = format!(
            "{left}::text COLLATE \"C\" IS NOT DISTINCT FROM {row}(${parameter}::{type_sql})::text COLLATE \"C\""
        );
        match (self.primary_key, &self.equality) {
            (KeyPart::Deferrable, Some(_)) => format!("{} AND {same}", self.equals(name, parameter)),
            _ => same,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_travels_as_one_only_where_it_fits() {
        for (bytes, text, holds) in [
            (2, "32767", true),
            (2, "-32768", true),
            (2, "32768", false),
            (4, "-2147483648", true),
            (4, "2147483648", false),
            (8, "9223372036854775807", true),
            (8, "9223372036854775808", false),
            (8, "1.0", false),
            (8, "", false),
        ] {
            assert_eq!(Element::Integer(bytes).holds(text.as_bytes()), holds, "{text} in {bytes} bytes");
        }
        assert!(Element::Text.holds(b"1.0"));
    }
}
