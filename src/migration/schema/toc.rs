//! A plain-text dump, cut into its entries. Pure.
//!
//! `pg_dump --verbose` heads every entry with a comment block, and names the same entry on standard error in the same
//! order:
//!
//! ```text
//! (blank line)                                                      pg_dump: creating TABLE "public.actor"
//! --
//! -- TOC entry 218 (class 1259 OID 16420)
//! -- Dependencies: 4 680
//! -- Name: actor; Type: TABLE; Schema: public; Owner: postgres
//! --
//! (blank line)
//! CREATE TABLE public.actor (
//! ```
//!
//! A function body or a comment may hold such a block too. It is taken for a header only when it is the very entry that
//! standard error names next; a dump whose two accounts do not agree to the end is refused. `_printTocEntry` and
//! `restore_toc_entry` in PostgreSQL's `pg_backup_archiver.c` write both.

use std::borrow::Cow;
use std::collections::HashMap;

use sha2::{Digest, Sha256};

/// One entry of a dump.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its number in the dump, what [`Entry::dependencies`] of others refer to.
    pub dump_id: u32,
    /// Catalogue that holds the object (`pg_class`: 1259, `pg_constraint`: 2606, …); 0: none.
    pub class_oid: u32,
    /// The object's OID on the source; 0: none.
    pub oid: u32,
    /// Entries that this one needs.
    pub dependencies: Vec<u32>,
    /// `TABLE`, `INDEX`, `FK CONSTRAINT`, …
    pub kind: String,
    /// Schema; none: an object without one.
    pub schema: Option<String>,
    /// Name as the dump says it: for a constraint the table's name, a space and its own.
    pub name: String,
    /// `SET default_tablespace …` and `SET default_table_access_method …` in force here.
    pub settings: Vec<String>,
    /// The statements.
    pub sql: String,
    /// Stands for the entry across restarts: a digest of what is executed.
    pub key: String,
}

impl Entry {
    /// Schema and name, for messages.
    pub fn object(&self) -> String {
        match &self.schema {
            Some(schema) => format!("{schema}.{}", self.name),
            None => self.name.clone(),
        }
    }
}

/// A dump, cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Toc {
    /// Whether string literals in it are to be read with `standard_conforming_strings`.
    pub standard_strings: bool,
    /// In the dump's own order.
    pub entries: Vec<Entry>,
}

/// The dump is not what pg_dump writes, or not all of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TocError {
    /// The last line is missing.
    #[error("the dump ends before \"PostgreSQL database dump complete\"")]
    Truncated,
    /// Standard error named an entry whose header was not found.
    #[error("the dump announces {announced}, but its entry was not found after {after}")]
    Missing {
        /// What standard error said.
        announced: String,
        /// The last entry that was found.
        after: String,
    },
    /// Text that belongs to no entry.
    #[error("the dump holds statements before its first entry: {0:?}")]
    Stray(String),
}

const ANNOUNCEMENT: &str = "pg_dump: creating ";
const FOOTER: &str = "\n--\n-- PostgreSQL database dump complete\n--\n";

/// Cuts `dump` along what `stderr` (of `pg_dump --verbose`, messages not translated) announces.
pub fn parse(dump: &str, stderr: &str) -> Result<Toc, TocError> {
    let body = &dump[..dump.rfind(FOOTER).ok_or(TocError::Truncated)?];
    let body = strip_completed(body);
    let mut announced = Announcements::new(stderr);
    let mut headers = Vec::new();
    let mut from = 0;
    while let Some(found) = body[from..].find("\n\n--\n-- TOC entry ") {
        // The header begins with its `--` line, after the blank one.
        let start = from + found + 2;
        match Header::parse(&body[start..], &mut announced) {
            Some(header) => {
                from = start + header.length;
                headers.push((start, header));
            }
            None => from = start,
        }
    }
    if let Some(left) = announced.peek() {
        let after = headers.last().map_or_else(|| "the beginning".to_owned(), |(_, header)| header.name.clone());
        return Err(TocError::Missing { announced: left, after });
    }
    let preamble = &body[..headers.first().map_or(body.len(), |(start, _)| *start)];
    let (preamble, settings) = split_settings(preamble);
    let standard_strings = read_preamble(preamble)?;
    Ok(Toc { standard_strings, entries: cut(body, headers, settings) })
}

/// Bodies between headers; trailing settings belong to the next entry.
fn cut(body: &str, headers: Vec<(usize, Header)>, preamble_settings: Vec<String>) -> Vec<Entry> {
    let ends: Vec<usize> = headers.iter().skip(1).map(|(start, _)| *start).chain([body.len()]).collect();
    let mut in_force: Vec<String> = Vec::new();
    apply_settings(&mut in_force, preamble_settings);
    let mut seen: HashMap<String, u32> = HashMap::new();
    let mut entries = Vec::with_capacity(headers.len());
    for ((start, header), end) in headers.into_iter().zip(ends) {
        let (sql, next_settings) = split_settings(&body[start + header.length..end]);
        let sql = without_attribute_versions(&header.kind, sql);
        let mut key = digest(&header, &sql);
        let repeats = seen.entry(key.clone()).or_default();
        *repeats += 1;
        if *repeats > 1 {
            key = format!("{key}#{repeats}");
        }
        entries.push(Entry {
            dump_id: header.dump_id,
            class_oid: header.class_oid,
            oid: header.oid,
            dependencies: header.dependencies,
            kind: header.kind,
            schema: header.schema,
            name: header.name,
            settings: in_force.clone(),
            sql: sql.trim_matches('\n').to_owned(),
            key,
        });
        apply_settings(&mut in_force, next_settings);
    }
    entries
}

/// Minor releases such as 15.20 note versions of columns in `pg_attribute.attoptions` (`pg_attver=…`). Their own pg_dump
/// leaves these out; the pg_dump of a release that does not know them prints them, and no server takes them back.
fn without_attribute_versions<'a>(kind: &str, sql: &'a str) -> Cow<'a, str> {
    let has_columns = matches!(kind, "TABLE" | "FOREIGN TABLE" | "MATERIALIZED VIEW" | "VIEW");
    if !has_columns || !sql.contains("pg_attver=") {
        return Cow::Borrowed(sql);
    }
    // Not by lines: there may be ends of lines in names.
    sql.split_inclusive(";\n").filter_map(without_attribute_version).collect::<String>().into()
}

/// The statement as it stays; none: it sets nothing else.
fn without_attribute_version(statement: &str) -> Option<Cow<'_, str>> {
    let parts = statement.trim_end_matches('\n').strip_suffix(");").and_then(|rest| rest.rsplit_once(" SET ("));
    let Some((before, options)) = parts.filter(|_| statement.trim_start().starts_with("ALTER ")) else {
        return Some(Cow::Borrowed(statement));
    };
    if !before.contains(" ALTER COLUMN ") || !options.contains("pg_attver=") {
        return Some(Cow::Borrowed(statement));
    }
    let kept: Vec<&str> = options.split(", ").filter(|option| !option.starts_with("pg_attver=")).collect();
    (!kept.is_empty()).then(|| Cow::Owned(format!("{before} SET ({});\n", kept.join(", "))))
}

fn digest(header: &Header, sql: &str) -> String {
    let mut hash = Sha256::new();
    for part in [&header.kind, header.schema.as_deref().unwrap_or(""), &header.name, sql.trim_matches('\n')] {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part.as_bytes());
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What standard error says was written, in order.
struct Announcements {
    text: String,
    at: usize,
}

impl Announcements {
    fn new(stderr: &str) -> Self {
        // Headers have line breaks in names replaced by spaces (`sanitize_line`); standard error has not.
        Self { text: stderr.replace(['\n', '\r'], " "), at: 0 }
    }

    fn rest(&self) -> Option<&str> {
        self.text[self.at..].find(ANNOUNCEMENT).map(|found| &self.text[self.at + found + ANNOUNCEMENT.len()..])
    }

    /// Moves past the next announcement if it is this entry.
    fn accept(&mut self, kind: &str, schema: Option<&str>, name: &str) -> bool {
        let expected = match schema {
            Some(schema) => format!("{kind} \"{schema}.{name}\""),
            None => format!("{kind} \"{name}\""),
        };
        let Some(rest) = self.rest() else { return false };
        let followed = rest.strip_prefix(expected.as_str()).is_some_and(|after| {
            let after = after.trim_start_matches(' ');
            after.is_empty() || after.starts_with("pg_dump: ")
        });
        if followed {
            self.at = self.text.len() - rest.len() + expected.len();
        }
        followed
    }

    fn peek(&self) -> Option<String> {
        self.rest().map(|rest| rest.split(" pg_dump: ").next().unwrap_or(rest).trim().to_owned())
    }
}

/// A header block.
struct Header {
    dump_id: u32,
    class_oid: u32,
    oid: u32,
    dependencies: Vec<u32>,
    kind: String,
    schema: Option<String>,
    name: String,
    /// Bytes, to the end of its last line.
    length: usize,
}

impl Header {
    /// Reads the block at the start of `text` if it is the announced one.
    fn parse(text: &str, announced: &mut Announcements) -> Option<Self> {
        let mut lines = text.split_inclusive('\n');
        let mut length = 0;
        let mut next = || {
            let line = lines.next()?;
            length += line.len();
            line.strip_suffix('\n')
        };
        if next()? != "--" {
            return None;
        }
        let (dump_id, rest) = next()?.strip_prefix("-- TOC entry ")?.split_once(" (class ")?;
        let (class_oid, oid) = rest.strip_suffix(')')?.split_once(" OID ")?;
        let mut line = next()?;
        let mut dependencies = Vec::new();
        if let Some(list) = line.strip_prefix("-- Dependencies: ") {
            dependencies = list.split(' ').map(str::parse).collect::<Result<_, _>>().ok()?;
            line = next()?;
        }
        let titles = titles(line.strip_prefix("-- Name: ")?);
        if next()? != "--" {
            return None;
        }
        let (dump_id, class_oid, oid) = (dump_id.parse().ok()?, class_oid.parse().ok()?, oid.parse().ok()?);
        let title =
            titles.into_iter().find(|title| announced.accept(&title.kind, title.schema.as_deref(), &title.name))?;
        let Title { name, kind, schema } = title;
        Some(Self { dump_id, class_oid, oid, dependencies, kind, schema, name, length })
    }
}

struct Title {
    name: String,
    kind: String,
    schema: Option<String>,
}

/// Every way to read `NAME; Type: KIND; Schema: SCHEMA; Owner: OWNER`: names may hold these very words.
fn titles(line: &str) -> Vec<Title> {
    let mut titles = Vec::new();
    for (at, _) in line.match_indices("; Type: ") {
        let (name, rest) = (&line[..at], &line[at + "; Type: ".len()..]);
        let Some((kind, rest)) = rest.split_once("; Schema: ") else { continue };
        for (at, _) in rest.match_indices("; Owner: ") {
            let schema = &rest[..at];
            let title = |schema| Title { name: name.to_owned(), kind: kind.to_owned(), schema };
            titles.push(title(Some(schema.to_owned())));
            if schema == "-" {
                titles.push(title(None));
            }
        }
    }
    titles
}

/// Splits off `SET default_tablespace = …;` and its like from the end: pg_dump writes them before the header of the
/// entry that needs them, that is, at the tail of the one before.
fn split_settings(text: &str) -> (&str, Vec<String>) {
    let mut rest = text.trim_end_matches('\n');
    let mut settings = Vec::new();
    while let Some(line) = rest.rsplit('\n').next().filter(|line| is_setting(line)) {
        settings.push(line.to_owned());
        rest = rest[..rest.len() - line.len()].trim_end_matches('\n');
    }
    settings.reverse();
    (rest, settings)
}

/// Whether a line is a complete setting of the two; the text of a comment cannot end in one, since it ends in `';`.
fn is_setting(line: &str) -> bool {
    let value = ["SET default_tablespace = ", "SET default_table_access_method = "]
        .iter()
        .find_map(|prefix| line.strip_prefix(prefix))
        .and_then(|rest| rest.strip_suffix(';'));
    value.is_some_and(|value| {
        let plain = !value.is_empty()
            && value.chars().all(|c| c == '_' || c == '$' || c.is_ascii_digit() || c.is_ascii_lowercase());
        let quoted = value.len() > 2
            && value
                .strip_prefix('"')
                .and_then(|rest| rest.strip_suffix('"'))
                .is_some_and(|inner| !inner.replace("\"\"", "").contains('"'));
        value == "''" || plain || quoted
    })
}

fn apply_settings(in_force: &mut Vec<String>, settings: Vec<String>) {
    for setting in settings {
        let name = setting.split(" = ").next().unwrap_or_default().to_owned();
        in_force.retain(|old| !old.starts_with(&name));
        in_force.push(setting);
    }
}

/// The statements before the first entry are replaced by our own; only what changes the meaning of the dump is read.
fn read_preamble(preamble: &str) -> Result<bool, TocError> {
    let mut standard_strings = true;
    for line in preamble.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with("--")) {
        if line == "SET standard_conforming_strings = off;" {
            standard_strings = false;
        }
        let known = line.starts_with("SET ") || line.starts_with("SELECT pg_catalog.set_config('search_path'");
        if !known && !line.starts_with("\\restrict ") {
            return Err(TocError::Stray(line.chars().take(60).collect()));
        }
    }
    Ok(standard_strings)
}

fn strip_completed(body: &str) -> &str {
    let trimmed = body.trim_end_matches('\n');
    match trimmed.rsplit_once('\n') {
        Some((rest, last)) if last.starts_with("-- Completed on ") => rest,
        Some(_) | None => body,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(id: u32, title: &str) -> String {
        format!(
            "\n\n--\n-- TOC entry {id} (class 1255 OID 16402)\n-- Dependencies: 3 4\n-- Name: {title}; Owner: o\n--\n\n"
        )
    }

    fn dump(body: &str) -> String {
        format!(
            "--\n-- PostgreSQL database dump\n--\n\n\\restrict abc\n\nSET statement_timeout = 0;\n\
             SELECT pg_catalog.set_config('search_path', '', false);\nSET row_security = off;{body}\n\n\
             -- Completed on 2026-01-01\n\n--\n-- PostgreSQL database dump complete\n--\n\n\\unrestrict abc\n"
        )
    }

    #[test]
    fn settings_go_to_the_entry_that_follows() {
        let text = dump(&format!(
            "{}CREATE TYPE public.a;\n\n\nSET default_tablespace = '';\n\nSET default_table_access_method = heap;{}CREATE TABLE public.t ();\n{}CREATE INDEX;\n",
            header(1, "a; Type: TYPE; Schema: public"),
            header(2, "t; Type: TABLE; Schema: public"),
            header(3, "i; Type: INDEX; Schema: public"),
        ));
        let toc = parse(
            &text,
            "pg_dump: reading x\npg_dump: creating TYPE \"public.a\"\npg_dump: creating TABLE \"public.t\"\npg_dump: creating INDEX \"public.i\"\n",
        )
        .expect("well formed");
        let brief: Vec<_> = toc.entries.iter().map(|e| (e.sql.as_str(), e.settings.len(), e.kind.as_str())).collect();
        assert_eq!(
            brief,
            [
                ("CREATE TYPE public.a;", 0, "TYPE"),
                ("CREATE TABLE public.t ();", 2, "TABLE"),
                ("CREATE INDEX;", 2, "INDEX")
            ]
        );
        assert_eq!(toc.entries[0].dependencies, [3, 4]);
        assert!(toc.standard_strings);
    }

    #[test]
    fn versions_that_a_server_notes_of_columns_are_left_out() {
        let table = "CREATE TABLE public.t (\n    a integer DEFAULT 'SET (pg_attver=1);'\n);\n\
                     ALTER TABLE ONLY public.t ALTER COLUMN a SET (pg_attver=26520280);\n\
                     \nALTER TABLE ONLY public.\"two\nlines\" ALTER COLUMN a SET (pg_attver=26520280);\n\
                     ALTER TABLE ONLY public.t ALTER COLUMN b SET (n_distinct=5, pg_attver=1);\n";
        let left = "CREATE TABLE public.t (\n    a integer DEFAULT 'SET (pg_attver=1);'\n);\n\
                    ALTER TABLE ONLY public.t ALTER COLUMN b SET (n_distinct=5);\n";
        assert_eq!(without_attribute_versions("TABLE", table), left);
        assert_eq!(without_attribute_versions("FUNCTION", table), table);
    }

    #[test]
    fn a_header_inside_a_body_is_text() {
        let body = format!("CREATE FUNCTION $$ {} $$;", header(9, "b; Type: FUNCTION; Schema: public"));
        let text = dump(&format!("{}{body}\n", header(1, "a; Type: FUNCTION; Schema: public")));
        let toc = parse(&text, "pg_dump: creating FUNCTION \"public.a\"\n").expect("well formed");
        assert_eq!(toc.entries.len(), 1);
        assert_eq!(toc.entries[0].sql, body);
    }

    #[test]
    fn names_may_hold_the_words_of_a_header() {
        let name = "x; Type: TABLE; Schema: y";
        let text = dump(&format!("{}CREATE;\n", header(1, &format!("{name}; Type: VIEW; Schema: -; Owner: z"))));
        let toc = parse(&text, &format!("pg_dump: creating VIEW \"{name}\"\n")).expect("well formed");
        assert_eq!((toc.entries[0].name.as_str(), toc.entries[0].schema.as_deref()), (name, None));
        let broken = dump(&format!("{}CREATE;\n", header(1, "a b; Type: VIEW; Schema: s")));
        let toc = parse(&broken, "pg_dump: creating VIEW \"s.a\nb\"\n").expect("line breaks are spaces");
        assert_eq!(toc.entries[0].name, "a b");
    }

    #[test]
    fn two_accounts_that_differ_are_refused() {
        let text = dump(&format!("{}CREATE;\n", header(1, "a; Type: VIEW; Schema: s")));
        let two = "pg_dump: creating VIEW \"s.a\"\npg_dump: creating VIEW \"s.b\"\n";
        assert!(matches!(parse(&text, two), Err(TocError::Missing { announced, .. }) if announced == "VIEW \"s.b\""));
        assert!(matches!(parse(&text, ""), Err(TocError::Stray(_))), "an unannounced entry is not dropped");
        assert_eq!(parse("--\n", ""), Err(TocError::Truncated));
    }

    #[test]
    fn only_whole_settings_are_settings() {
        for yes in
            ["SET default_tablespace = '';", "SET default_tablespace = fast;", "SET default_tablespace = \"Fast\";"]
        {
            assert!(is_setting(yes), "{yes}");
        }
        for no in ["SET default_tablespace = ';", "SET default_tablespace = ''';", "SET search_path = '';"] {
            assert!(!is_setting(no), "{no}");
        }
    }
}
