//! Which tables are copied, which of their columns, and in which format.

use crate::ident::{QualifiedName, quote_ident, quote_literal};
use crate::migration::copy::SourceTable;
use crate::postgres::{Control, RawConnection, RawError, TextRows};

/// Ordinary, permanent, not of the system, not ours; of an extension's tables only those that it has marked as holding
/// the user's data (`pg_extension_config_dump`), which is what pg_dump does. Those of pg_cron stay: as soon as its jobs were
/// in the target's table, the target would run them, beside the source and beside what the stream applies.
const LISTED: &str = "\
FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN (SELECT u.relation, u.condition FROM pg_extension x
           CROSS JOIN LATERAL unnest(x.extconfig, x.extcondition) AS u (relation, condition)
            WHERE x.extname <> 'pg_cron') e ON e.relation = c.oid
WHERE c.relkind = 'r' AND c.relpersistence = 'p'
  AND n.nspname NOT IN ('information_schema', 'pgcutover') AND n.nspname !~ '^pg_'
  AND (e.relation IS NOT NULL
       OR NOT EXISTS (SELECT FROM pg_depend d
                      WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e'))
ORDER BY 4 DESC, 1, 2";

/// Waits for whoever has locked a table exclusively.
pub(super) const MEASURED: &str = "coalesce(pg_table_size(c.oid), 0)";

/// Waits for nobody.
pub(super) const UNMEASURED: &str = "0::bigint";

/// See [`super::list_tables`]; `size` is one of the above.
pub(super) async fn list(source: &Control, size: &str) -> Result<Vec<SourceTable>, tokio_postgres::Error> {
    let select = format!(
        "SELECT n.nspname::text, c.relname::text, c.oid, {size}, c.reltuples::float8, c.relpages, e.condition, e.relation IS NOT NULL\n{LISTED}"
    );
    let rows = source.query(&select, &[]).await?;
    Ok(rows
        .iter()
        .map(|row| {
            let (tuples, pages): (f64, i32) = (row.get(4), row.get(5));
            // Never analysed: -1 from PostgreSQL 14 on, 0 rows in 0 pages before.
            let known = tuples > 0.0 || (tuples == 0.0 && pages > 0);
            SourceTable {
                name: QualifiedName::new(row.get::<_, String>(0), row.get::<_, String>(1)),
                oid: row.get(2),
                bytes: u64::try_from(row.get::<_, i64>(3)).unwrap_or(0),
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an estimate")]
                rows_estimate: known.then_some(tuples as u64),
                of_extension: row.get(7),
                filter: row.get::<_, Option<String>>(6).filter(|condition| !condition.trim().is_empty()),
            }
        })
        .collect())
}

/// A column as it matters for a copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Column {
    pub(super) name: String,
    /// `format_type`, schema-qualified for types of users.
    pub(super) type_name: String,
    /// Computed by the server; COPY takes no value for it.
    pub(super) generated: bool,
    /// Built in, and its binary form is the same in every version from 10 on.
    pub(super) binary: bool,
}

/// How rows travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// Smaller and cheaper, for built-in types.
    Binary,
    /// For everything else: types of users carry OIDs in their binary form, and those differ between servers.
    Text,
}

/// The columns of a table in a transaction that holds a lock on it.
pub(super) async fn columns(connection: &mut RawConnection, table: &QualifiedName) -> Result<Vec<Column>, RawError> {
    let generated = if connection.version_num() >= 120_000 { "a.attgenerated <> ''" } else { "false" };
    // reg* values are OIDs in binary; the statistics types and pg_node_tree refuse binary input; aclitem has none.
    let fit = |t: &str| {
        format!(
            "({t}.oid < 16384 AND {t}.typnamespace = 'pg_catalog'::regnamespace AND {t}.typtype IN ('b', 'r', 'm') \
             AND {t}.typreceive <> 0 AND {t}.typsend <> 0 AND {t}.typname !~ '^(reg|pg_(node_tree|ndistinct|dependencies|mcv_list|brin|ddl))')"
        )
    };
    let sql = format!(
        "SELECT a.attname, format_type(a.atttypid, a.atttypmod), {generated}, {} AND (t.typcategory <> 'A' OR {}) \
         FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
         JOIN pg_type t ON t.oid = a.atttypid LEFT JOIN pg_type e ON e.oid = t.typelem \
         WHERE n.nspname = {} AND c.relname = {} AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum",
        fit("t"),
        fit("e"),
        quote_literal(&table.schema),
        quote_literal(&table.name),
    );
    let rows = connection.simple_query(&sql).await?;
    Ok(rows.into_iter().filter_map(column).collect())
}

fn column(row: Vec<Option<String>>) -> Option<Column> {
    let mut cells = row.into_iter();
    let mut next = || cells.next().flatten();
    Some(Column {
        name: next()?,
        type_name: next()?,
        generated: next()? == "t",
        binary: next().is_some_and(|value| value == "t"),
    })
}

/// What the two servers disagree on, in words; none where a copy fits. An extension's newer version may have more columns:
/// COPY names those that it fills, and the others have their defaults.
pub(super) fn difference(source: &[Column], target: &[Column], of_extension: bool) -> Option<String> {
    let describe = |column: &Column| {
        format!("{} {}{}", column.name, column.type_name, if column.generated { " generated" } else { "" })
    };
    let mut only_source: Vec<String> = source.iter().map(describe).collect();
    let is_compared = |column: &&Column| !of_extension || source.iter().any(|own| own.name == column.name);
    let mut only_target: Vec<String> = target.iter().filter(is_compared).map(describe).collect();
    let both = only_source.clone();
    only_source.retain(|column| !only_target.contains(column));
    only_target.retain(|column| !both.contains(column));
    if only_source.is_empty() && only_target.is_empty() {
        return None;
    }
    let list = |columns: &[String]| if columns.is_empty() { "nothing".to_owned() } else { columns.join(", ") };
    Some(format!("the source alone has {}; the target alone has {}", list(&only_source), list(&only_target)))
}

/// Binary where every column allows it and no character is converted on the way; a database in another encoding than
/// UTF8 is copied as text in its own, so that nothing is converted either.
pub(super) fn format(columns: &[Column], encoding: &str) -> Format {
    let all = columns.iter().filter(|column| !column.generated).all(|column| column.binary);
    if all && encoding == "UTF8" { Format::Binary } else { Format::Text }
}

/// The names that COPY takes values for, as a list for SQL; none: the table has no such column, or none at all, and
/// COPY without a list means just that.
pub(super) fn column_list(columns: &[Column]) -> Option<String> {
    let names: Vec<String> =
        columns.iter().filter(|column| !column.generated).map(|column| quote_ident(&column.name)).collect();
    (!names.is_empty()).then(|| names.join(", "))
}

/// The first value of the first row.
pub(super) fn single(rows: &TextRows) -> Option<&str> {
    rows.first().and_then(|row| row.first()).and_then(|value| value.as_deref())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(name: &str, type_name: &str, generated: bool, binary: bool) -> Column {
        Column { name: name.to_owned(), type_name: type_name.to_owned(), generated, binary }
    }

    #[test]
    fn text_unless_every_copied_column_is_built_in() {
        let columns = [column("a", "integer", false, true), column("b", "app.mood", true, false)];
        assert_eq!(format(&columns, "UTF8"), Format::Binary, "a generated column does not travel");
        assert_eq!(format(&columns, "LATIN1"), Format::Text);
        assert_eq!(format(&[column("a", "app.mood", false, false)], "UTF8"), Format::Text);
        assert_eq!(column_list(&columns).as_deref(), Some("\"a\""));
        assert_eq!(column_list(&columns[1..]), None);
    }

    #[test]
    fn a_difference_names_both_sides() {
        let source = [column("a", "integer", false, true), column("b", "bigint", false, true)];
        let target = [column("b", "integer", false, true), column("a", "integer", false, true)];
        assert_eq!(
            difference(&source, &target, false).as_deref(),
            Some("the source alone has b bigint; the target alone has b integer")
        );
        let turned = [source[1].clone(), source[0].clone()];
        assert_eq!(difference(&source, &turned, false), None, "columns are named, so their order is free");
        let newer = [source.as_slice(), &[column("more", "text", false, true)]].concat();
        assert!(difference(&source, &newer, false).is_some());
        assert_eq!(difference(&source, &newer, true), None, "of a newer version of the extension");
        assert!(difference(&newer, &source, true).is_some(), "there is no place for its values");
    }
}
