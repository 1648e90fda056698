//! The definitions of a database on both servers, object by object.
//!
//! Every kind of object that a migration carries over is written out by its own server and compared as text: what is on
//! one server only, and what is defined differently. Servers of different majors write the same definition differently
//! (qualified columns of views, EXECUTE PROCEDURE), so between those white space is left out first, and where a definition may
//! hold a query, parentheses and qualifications too; what remains are names, types, operators and constants, in their order. What
//! is a keyword, and so stands in quotes, differs too (`json` is one since version 16): an ordinary name is compared without them.
//!
//! Not compared: what a migration changes on purpose (replica identities, its own event triggers); what it does not carry over (publications,
//! subscriptions); what a cutover brings over once more by itself (roles with their settings, settings of the database,
//! large objects, rows of unlogged tables and of materialized views); the members of extensions, which belong to the
//! extension's version, and that version between majors, of which each brings its own.

use std::collections::{BTreeMap, HashSet};

use serde::{Deserialize, Serialize};

use super::align::Sides;
use super::{VerifyError, sequences};
use crate::migration::late;
use crate::postgres::Control;

/// `kind`, `name`, `definition` of everything.
const DEFINITIONS: &str = include_str!("definitions.sql");

/// A definition that is not the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct DefinitionDifference {
    /// `table`, `function`, …
    pub kind: String,
    /// Its name, with what it belongs to.
    pub name: String,
    /// `missing` on the target, `extra` there, `differs`; of a sequence `ahead`, where somebody has used or set it on the target,
    /// and `behind`, where no cutover will set it any more.
    pub difference: String,
}

/// Compares the definitions, and where the sequences stand.
pub async fn compare(sides: &Sides) -> Result<Vec<DefinitionDifference>, VerifyError> {
    let source = sides.enter_source("verify-definitions").await?;
    let target = sides.enter_target("verify-definitions").await?;
    // What is kept for the cutover is compared as it will be, and taken back.
    let come_late = late::rehearse(&target).await? > 0;
    let alike = source.version_num() / 10_000 == target.version_num() / 10_000;
    let (mut here, mut there) = (read(&source, alike).await?, read(&target, alike).await?);
    if come_late {
        target.batch_execute("ROLLBACK").await.map_err(VerifyError::query("taking back what comes late"))?;
        // They are validated once sessions are there.
        [&mut here, &mut there].into_iter().for_each(leave_out_validity);
    }
    let mut found = differences(&here, &there);
    let cutover_to_come = sides.gate.is_some();
    found.extend(tablespace_of_database(&source, &target, &sides.database).await?);
    found.extend(sequences::compare(&source, &target, cutover_to_come).await?);
    Ok(found)
}

/// A database is made in the tablespace of the source's where the target has one of that name.
async fn tablespace_of_database(
    source: &Control,
    target: &Control,
    database: &str,
) -> Result<Option<DefinitionDifference>, VerifyError> {
    let failed = VerifyError::query("reading the tablespace of the database");
    let own = "SELECT t.spcname::text FROM pg_database d JOIN pg_tablespace t ON t.oid = d.dattablespace WHERE d.datname = current_database()";
    let (here, there) = tokio::try_join!(source.query_one(own, &[]), target.query_one(own, &[])).map_err(&failed)?;
    let (here, there): (&str, &str) = (here.get(0), there.get(0));
    let known = target.query_opt("SELECT FROM pg_tablespace WHERE spcname::text = $1", &[&here]).await;
    let differs = here != there && known.map_err(&failed)?.is_some();
    let told = || DefinitionDifference {
        kind: TABLESPACE.to_owned(),
        name: format!("database {database}"),
        difference: "differs".to_owned(),
    };
    Ok(differs.then(told))
}

/// Objects of one name (overloads are told apart by their arguments) stand side by side.
type Definitions = BTreeMap<(String, String), Vec<String>>;

/// Whether rows from before a constraint were looked at.
fn leave_out_validity(definitions: &mut Definitions) {
    for (_, texts) in definitions.iter_mut().filter(|((kind, _), _)| kind == "constraint") {
        for text in texts {
            let stripped = text.strip_suffix("NOT VALID").or_else(|| text.strip_suffix("NOTVALID"));
            if let Some(valid) = stripped {
                *text = valid.trim_end().to_owned();
            }
        }
    }
}

/// What each major brings in a version of its own.
const VERSIONED: &str = "extension version";

/// The columns of a table in their order.
const ORDER: &str = "column order";

/// Where a table or an index lies.
const TABLESPACE: &str = "tablespace";

/// Kinds in which nothing is a query: every major writes their expressions alike, parentheses included.
const EXACT: [&str; 7] = ["column", ORDER, "constraint", "index", "statistics", TABLESPACE, "trigger"];

async fn read(server: &Control, alike: bool) -> Result<Definitions, VerifyError> {
    let rows = server.query(DEFINITIONS, &[]).await.map_err(VerifyError::query("reading definitions"))?;
    let mut definitions = Definitions::new();
    for row in &rows {
        let (kind, name): (String, String) = (row.get(0), row.get(1));
        let text = row.get::<_, Option<&str>>(2).unwrap_or_default();
        if alike {
            definitions.entry((kind, name)).or_default().push(text.to_owned());
        } else if kind != VERSIONED {
            let text = if EXACT.contains(&kind.as_str()) { spaceless(text) } else { bare(text) };
            definitions.entry((kind, unquoted(&name))).or_default().push(text);
        }
    }
    definitions.values_mut().for_each(|texts| texts.sort_unstable());
    Ok(definitions)
}

fn differences(source: &Definitions, target: &Definitions) -> Vec<DefinitionDifference> {
    let told = |(kind, name): &(String, String), difference: &str| DefinitionDifference {
        kind: kind.clone(),
        name: name.clone(),
        difference: difference.to_owned(),
    };
    let here = source.iter().filter_map(|(object, definition)| match target.get(object) {
        None => Some(told(object, "missing")),
        Some(other) if !is_same(&object.0, definition, other) => Some(told(object, "differs")),
        Some(_) => None,
    });
    let there = target.keys().filter(|object| !source.contains_key(object)).map(|object| told(object, "extra"));
    let mut found: Vec<DefinitionDifference> = here.chain(there).collect();
    // Of what is on one server only, or has other columns, that is told already.
    let other_columns: HashSet<String> = found
        .iter()
        .filter(|one| one.kind == "column" && one.difference != "differs")
        .map(|one| one.name.clone())
        .collect();
    let has_other_columns = |table: &str| {
        other_columns.iter().any(|column| column.strip_prefix(table).is_some_and(|rest| rest.starts_with('.')))
    };
    found.retain(|one| match one.kind.as_str() {
        ORDER => one.difference == "differs" && !has_other_columns(&one.name),
        TABLESPACE => one.difference == "differs",
        _ => true,
    });
    found
}

/// Whether two definitions of one kind come to the same. What is in the tablespace of its database, on both, is where it
/// was asked to be: a database is made in the default one where the target has none of that name.
fn is_same(kind: &str, source: &[String], target: &[String]) -> bool {
    let places = |texts: &[String]| texts.first().map(|text| text.strip_prefix('*').unwrap_or(text).to_owned());
    let of_database = |texts: &[String]| texts.first().is_some_and(|text| text.starts_with('*'));
    source == target
        || kind == TABLESPACE && (places(source) == places(target) || of_database(source) && of_database(target))
}

/// The text without the quotes around ordinary names, which are there where the name is a keyword. String constants stay
/// as they are.
pub(super) fn unquoted(text: &str) -> String {
    let mut unquoted = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find(['"', '\'']) {
        let (before, quoted) = rest.split_at(start);
        unquoted.push_str(before);
        // A quote that is doubled begins another piece, which hangs on to this one.
        let quote = &quoted[..1];
        let end = quoted[1..].find(quote).map_or(quoted.len(), |end| end + 2);
        let (piece, after) = quoted.split_at(end);
        let name = piece.trim_matches('"');
        let ordinary = quote == "\""
            && !unquoted.ends_with('"')
            && !after.starts_with('"')
            && name.starts_with(|c: char| c.is_ascii_lowercase() || c == '_')
            && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_' || c == '$');
        unquoted.push_str(if ordinary { name } else { piece });
        rest = after;
    }
    unquoted.push_str(rest);
    unquoted
}

/// The text without white space, but for what is in quotes, and without quotes around ordinary names.
fn spaceless(text: &str) -> String {
    let text = unquoted(&text.replace("EXECUTE PROCEDURE", "EXECUTE FUNCTION"));
    let mut quoted = None;
    let stays = |c: &char| {
        match quoted {
            Some(quote) if quote == *c => quoted = None,
            None if matches!(c, '\'' | '"') => quoted = Some(*c),
            Some(_) | None => {}
        }
        quoted.is_some() || !c.is_whitespace()
    };
    text.chars().filter(stays).collect()
}

/// The text without what majors write differently; quoted strings stay as they are.
fn bare(text: &str) -> String {
    let text = unquoted(&text.replace("EXECUTE PROCEDURE", "EXECUTE FUNCTION"));
    let mut bare = String::with_capacity(text.len());
    // Where the identifier began that may turn out to be a qualification.
    let mut word = 0;
    let mut quoted = None;
    for c in text.chars() {
        match (quoted, c) {
            (Some(quote), _) => {
                bare.push(c);
                if c == quote {
                    quoted = None;
                }
            }
            (None, '\'') => {
                bare.push(c);
                quoted = Some(c);
                word = bare.len();
            }
            (None, '"') => {
                bare.push(c);
                quoted = Some(c);
            }
            (None, '.') if !bare[word..].is_empty() && !bare[word..].starts_with(|c: char| c.is_ascii_digit()) => {
                bare.truncate(word);
            }
            (None, '(' | ')') => word = bare.len(),
            (None, c) if c.is_whitespace() => word = bare.len(),
            (None, c) if c.is_alphanumeric() || c == '_' || c == '$' => bare.push(c),
            (None, c) => {
                bare.push(c);
                word = bare.len();
            }
        }
    }
    bare
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_majors_write_differently_is_left_out_and_nothing_else() {
        assert_eq!(bare("SELECT t.a,\n  (t.b + 1.5) FROM s.t"), bare("SELECT a, b + 1.5 FROM t"));
        assert_eq!(bare("EXECUTE PROCEDURE public.f()"), bare("EXECUTE FUNCTION f()"));
        assert_ne!(bare("CHECK (a > 1)"), bare("CHECK (a > 2)"));
        assert_ne!(bare("DEFAULT 'a b'"), bare("DEFAULT 'ab'"));
        assert_ne!(bare("DEFAULT 1.5"), bare("DEFAULT 2.5"));
        assert_eq!(bare("\"Odd \"\"x\".\"Y\""), "\"Y\"");
        assert_eq!(bare("SELECT t.\"json\", 'a \"b\"'"), bare("SELECT t.json, 'a \"b\"'"));
    }

    #[test]
    fn parentheses_and_schemas_count_where_nothing_is_a_query() {
        assert_ne!(spaceless("CHECK ((a OR b) AND c)"), spaceless("CHECK (a OR (b AND c))"));
        assert_ne!(spaceless("REFERENCES s1.t(id)"), spaceless("REFERENCES s2.t(id)"));
        assert_ne!(spaceless("DEFAULT 'a b'"), spaceless("DEFAULT 'ab'"));
        assert_eq!(spaceless("CHECK  (\"json\" >\n 0)"), spaceless("CHECK (json > 0)"));
        assert_eq!(spaceless("'it''s  so'"), "'it''s  so'");
    }

    #[test]
    fn ordinary_names_lose_their_quotes_and_no_other_text_does() {
        assert_eq!(unquoted("app.\"json\".\"merge_action\""), "app.json.merge_action");
        for text in
            ["\"Odd \"\"name\".x", "'it''s \"json\"'", "a\"", "\"two words\"", "\"1a\"", "\"a\"\"b\"", "''", "\"\""]
        {
            assert_eq!(unquoted(text), text);
        }
    }

    #[test]
    fn order_and_place_are_told_by_themselves_alone() {
        let set = |list: &[(&str, &str, &str)]| -> Definitions {
            list.iter()
                .map(|(kind, name, text)| (((*kind).to_owned(), (*name).to_owned()), vec![(*text).to_owned()]))
                .collect()
        };
        let told = |source: &[(&str, &str, &str)], target: &[(&str, &str, &str)]| -> Vec<String> {
            differences(&set(source), &set(target))
                .into_iter()
                .map(|one| format!("{} {}", one.kind, one.name))
                .collect()
        };
        assert_eq!(told(&[(ORDER, "s.t", "a,b")], &[(ORDER, "s.t", "b,a")]), ["column order s.t"]);
        let lacks = told(
            &[(ORDER, "s.t", "a,b"), (ORDER, "s.t2", "a,b"), ("column", "s.t.b", "int")],
            &[(ORDER, "s.t", "a"), (ORDER, "s.t2", "b,a")],
        );
        assert_eq!(lacks, ["column s.t.b", "column order s.t2"]);
        assert_eq!(told(&[(ORDER, "s.t", "a"), (TABLESPACE, "s.t", "fast")], &[]), [""; 0], "the table is told");
        let moved = |here: &str, there: &str| told(&[(TABLESPACE, "s.t", here)], &[(TABLESPACE, "s.t", there)]).len();
        assert_eq!((moved("fast", "*pg_default"), moved("fast", "slow"), moved("*fast", "slow")), (1, 1, 1));
        assert_eq!(
            (moved("pg_default", "*pg_default"), moved("*fast", "*pg_default"), moved("fast", "fast")),
            (0, 0, 0)
        );
    }

    #[test]
    fn each_kind_of_difference_is_named() {
        let one = |name: &str, text: &str| (("table".to_owned(), name.to_owned()), vec![text.to_owned()]);
        let source = Definitions::from([one("a", "1"), one("b", "1"), one("c", "1")]);
        let target = Definitions::from([one("b", "2"), one("c", "1"), one("d", "1")]);
        let found: Vec<(String, String)> =
            differences(&source, &target).into_iter().map(|found| (found.name, found.difference)).collect();
        let wanted = [("a", "missing"), ("b", "differs"), ("d", "extra")];
        assert_eq!(found, wanted.map(|(name, difference)| (name.to_owned(), difference.to_owned())));
    }
}
