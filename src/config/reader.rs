//! Reads typed values out of a TOML document and its environment overrides.
//!
//! Every key that is asked for becomes known by that; what is left over at the end is an error that names the nearest
//! known key. So the list of keys is written down once: where they are read. All problems are collected, so that an
//! operator mends a file in one go.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::de::{DeTable, DeValue};

use super::error::{Origin, Problem};
use super::units::{parse_duration, parse_size};
use super::{Environment, Network, Secret};

/// Prefix of every environment override.
const PREFIX: &str = "PGCUTOVER_";

/// One value before it is given its type.
#[derive(Clone)]
enum Raw {
    Text(String),
    Integer(String),
    Flag(bool),
    List(Vec<String>),
    /// Something no key takes: a float, a date, a table, a mixed list.
    Other(&'static str),
}

impl Raw {
    fn kind(&self) -> &'static str {
        match self {
            Self::Text(_) => "text",
            Self::Integer(_) => "a number",
            Self::Flag(_) => "true or false",
            Self::List(_) => "a list",
            Self::Other(kind) => kind,
        }
    }
}

/// A value and where it came from.
#[derive(Clone)]
struct Found {
    raw: Raw,
    origin: Origin,
}

/// The document under reading.
pub struct Reader {
    values: BTreeMap<(String, String), Found>,
    /// Keys of the tables below a section, by the table's full name: `limits.user.ann`.
    entries: BTreeMap<String, BTreeMap<String, Found>>,
    section_lines: BTreeMap<String, Origin>,
    known: BTreeMap<&'static str, BTreeSet<&'static str>>,
    problems: Vec<Problem>,
    environment: Environment,
    /// Relative paths are taken from here: the directory of the configuration file.
    base: PathBuf,
}

impl Reader {
    /// Parses `text`. Only its syntax can fail here.
    pub fn new(text: &str, base: &Path, environment: &Environment) -> Self {
        let mut reader = Self {
            values: BTreeMap::new(),
            entries: BTreeMap::new(),
            section_lines: BTreeMap::new(),
            known: BTreeMap::new(),
            problems: Vec::new(),
            environment: environment.clone(),
            base: base.to_owned(),
        };
        match DeTable::parse(text) {
            Ok(document) => reader.take_document(text, document.get_ref()),
            Err(error) => {
                let origin = error.span().map_or(Origin::Whole, |span| Origin::Line(line_of(text, span.start)));
                // Never Error's Display: it quotes the line, and the line may hold a password.
                reader.problem(origin, format!("not valid TOML: {}", error.message()));
            }
        }
        reader
    }

    /// Whether the document could be parsed at all.
    pub fn is_readable(&self) -> bool {
        self.problems.is_empty()
    }

    fn take_document(&mut self, text: &str, document: &DeTable<'_>) {
        for (section, content) in document {
            let line = Origin::Line(line_of(text, section.span().start));
            let name = section.get_ref().to_string();
            let Some(table) = content.get_ref().as_table() else {
                self.problem(line, format!("`{name}` stands outside of every section; put it under [section]"));
                continue;
            };
            self.section_lines.insert(name.clone(), line);
            for (key, value) in table {
                let found =
                    Found { raw: raw_of(value.get_ref()), origin: Origin::Line(line_of(text, key.span().start)) };
                self.values.insert((name.clone(), key.get_ref().to_string()), found);
                if let Some(below) = value.get_ref().as_table() {
                    self.take_entries(text, &format!("{name}.{}", key.get_ref()), below);
                }
            }
        }
    }

    fn take_entries(&mut self, text: &str, parent: &str, tables: &DeTable<'_>) {
        for (name, content) in tables {
            let Some(table) = content.get_ref().as_table() else {
                let line = Origin::Line(line_of(text, name.span().start));
                self.problem(line, format!("`{}` must be a table: [{parent}.{}]", name.get_ref(), name.get_ref()));
                continue;
            };
            let found = table.iter().map(|(key, value)| {
                let origin = Origin::Line(line_of(text, key.span().start));
                (key.get_ref().to_string(), Found { raw: raw_of(value.get_ref()), origin })
            });
            let found = found.collect();
            self.entries.insert(format!("{parent}.{}", name.get_ref()), found);
        }
    }

    /// Notes a problem.
    pub fn problem(&mut self, origin: Origin, message: impl Into<String>) {
        self.problems.push(Problem { origin, message: message.into() });
    }

    /// The section `name`, which is known from now on.
    pub fn section(&mut self, name: &'static str) -> Section<'_> {
        self.known.entry(name).or_default();
        Section { reader: self, name, entry: None }
    }

    /// The table `[section.key.name]`; its keys are known by being asked for, like those of a section. They cannot be
    /// overridden by the environment: names of roles are not names of variables.
    pub fn entry(&mut self, section: &'static str, key: &str, name: String) -> Section<'_> {
        let table = format!("{section}.{key}.{name}");
        Section { reader: self, name: section, entry: Some(Entry { table, asked: BTreeSet::new() }) }
    }

    /// Every problem so far; for a reader of some sections only.
    pub fn into_problems(self) -> Vec<Problem> {
        self.problems
    }

    /// Reports what nobody asked for, and returns every problem.
    pub fn finish(mut self) -> (Vec<Problem>, KnownKeys) {
        let sections: Vec<&str> = self.known.keys().copied().collect();
        let mut unknown = Vec::new();
        for (section, origin) in &self.section_lines {
            if !self.known.contains_key(section.as_str()) {
                let message = format!("unknown section [{section}]{}", suggestion(section, &sections));
                unknown.push((origin.clone(), message));
            }
        }
        for ((section, key), found) in &self.values {
            if let Some(keys) = self.known.get(section.as_str())
                && !keys.contains(key.as_str())
            {
                let keys: Vec<&str> = keys.iter().copied().collect();
                unknown.push((
                    found.origin.clone(),
                    format!("unknown key `{key}` in [{section}]{}", suggestion(key, &keys)),
                ));
            }
        }
        for name in self.environment.keys() {
            if let Some(message) = self.unknown_variable(name) {
                unknown.push((Origin::Environment(name.clone()), message));
            }
        }
        self.problems.extend(unknown.into_iter().map(|(origin, message)| Problem { origin, message }));
        (self.problems, KnownKeys(self.known))
    }

    /// A variable that names a section but none of its keys. Variables of other sections are not ours to judge: an
    /// orchestrator makes `PGCUTOVER_PORT` and the like for a service of our name.
    fn unknown_variable(&self, name: &str) -> Option<String> {
        let rest = name.strip_prefix(PREFIX)?;
        let (section, keys) = self.known.iter().find(|(section, _)| {
            rest.strip_prefix(&section.to_ascii_uppercase()).is_some_and(|rest| rest.starts_with('_'))
        })?;
        let key = rest[section.len() + 1..].to_ascii_lowercase();
        let value = self.environment.get(name).map_or("", String::as_str);
        if keys.contains(key.as_str()) || is_about_a_service(&key, value) {
            return None;
        }
        let variables: Vec<String> = keys.iter().map(|key| variable(section, key)).collect();
        let variables: Vec<&str> = variables.iter().map(String::as_str).collect();
        Some(format!("no such key in [{section}]{}", suggestion(name, &variables)))
    }
}

/// Whether an orchestrator has made a variable that ends so, for a service whose name begins like a section of ours.
fn is_about_a_service(key: &str, value: &str) -> bool {
    key == "service_host"
        || key.starts_with("service_port")
        || key.starts_with("port") && (key.ends_with("_proto") || key.ends_with("_addr") || key.ends_with("_port"))
        || key.starts_with("port") && ["tcp://", "udp://"].iter().any(|scheme| value.starts_with(scheme))
}

/// Every key that is read, by section.
#[cfg_attr(not(test), expect(dead_code, reason = "tests compare it with the example file and with SHOW CONFIG"))]
pub struct KnownKeys(pub BTreeMap<&'static str, BTreeSet<&'static str>>);

/// One section under reading.
pub struct Section<'a> {
    reader: &'a mut Reader,
    name: &'static str,
    /// Set for a table below the section.
    entry: Option<Entry>,
}

/// A table below a section.
struct Entry {
    /// Its full name.
    table: String,
    asked: BTreeSet<&'static str>,
}

impl Drop for Section<'_> {
    /// What nobody asked for in a table below a section is reported when its reading ends.
    fn drop(&mut self) {
        let Some(entry) = &self.entry else { return };
        let known: Vec<&str> = entry.asked.iter().copied().collect();
        let found = self.reader.entries.get(&entry.table).into_iter().flatten();
        let unknown = found.filter(|(key, _)| !entry.asked.contains(key.as_str()));
        let problems = unknown.map(|(key, found)| Problem {
            origin: found.origin.clone(),
            message: format!("unknown key `{key}` in [{}]{}", entry.table, suggestion(key, &known)),
        });
        let problems: Vec<Problem> = problems.collect();
        self.reader.problems.extend(problems);
    }
}

impl Section<'_> {
    /// Text, or `None` when the key is absent.
    pub fn text(&mut self, key: &'static str) -> Option<String> {
        let found = self.find(key)?;
        match found.raw {
            Raw::Text(text) => Some(text),
            other => self.wrong_kind(key, found.origin, "text in quotes", &other),
        }
    }

    /// Text that must be there; reports and returns empty text otherwise.
    pub fn required_text(&mut self, key: &'static str, why: &str) -> String {
        match self.text(key) {
            Some(text) if !text.is_empty() => text,
            Some(_) | None => {
                let message = format!("[{}] {key} is missing: {why}", self.name);
                let origin = self.reader.section_lines.get(self.name).cloned().unwrap_or(Origin::Whole);
                self.reader.problem(origin, message);
                String::new()
            }
        }
    }

    /// A duration with a unit.
    pub fn duration(&mut self, key: &'static str, default: Duration) -> Duration {
        self.parsed(key, "a duration in quotes, such as \"5s\"", parse_duration).unwrap_or(default)
    }

    /// A key that stands in another section now.
    pub fn moved(&mut self, key: &'static str, to: &str) {
        if let Some(found) = self.reader.values.remove(&(self.name.to_owned(), key.to_owned())) {
            let message = format!("`{key}` does not stand in [{}]; it is a key of [{to}]", self.name);
            self.reader.problem(found.origin, message);
        }
    }

    /// A size with a unit, in bytes, within `range`.
    pub fn size(&mut self, key: &'static str, default: u64, range: RangeInclusive<u64>) -> u64 {
        let limits = range.clone();
        let parse = move |text: &str| {
            let bytes = parse_size(text)?;
            let (low, high) = (super::units::format_size(*limits.start()), super::units::format_size(*limits.end()));
            if limits.contains(&bytes) { Ok(bytes) } else { Err(format!("{text:?} is not between {low} and {high}")) }
        };
        self.parsed(key, "a size in quotes, such as \"64MB\"", parse).unwrap_or(default)
    }

    /// A whole number within `range`.
    pub fn number(&mut self, key: &'static str, default: usize, range: RangeInclusive<usize>) -> usize {
        let Some(found) = self.find(key) else { return default };
        let (Raw::Integer(text) | Raw::Text(text)) = &found.raw else {
            return self.wrong_kind(key, found.origin, "a whole number", &found.raw).unwrap_or(default);
        };
        match text.replace('_', "").parse::<usize>() {
            Ok(number) if range.contains(&number) => number,
            Ok(_) | Err(_) => {
                let message = format!("{text} is not a whole number between {} and {}", range.start(), range.end());
                self.bad(key, found.origin, &message);
                default
            }
        }
    }

    /// `true` or `false`.
    pub fn flag(&mut self, key: &'static str, default: bool) -> bool {
        let Some(found) = self.find(key) else { return default };
        match &found.raw {
            Raw::Flag(flag) => *flag,
            Raw::Text(text) if matches!(found.origin, Origin::Environment(_)) => match text.as_str() {
                "true" | "on" | "yes" | "1" => true,
                "false" | "off" | "no" | "0" => false,
                _ => self.wrong_kind(key, found.origin, "true or false", &found.raw).unwrap_or(default),
            },
            other => self.wrong_kind(key, found.origin, "true or false", other).unwrap_or(default),
        }
    }

    /// One of `choices`, by its word.
    pub fn choice<T: Copy>(&mut self, key: &'static str, default: T, choices: &[(&'static str, T)]) -> T {
        let Some(found) = self.find(key) else { return default };
        let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
        let Raw::Text(text) = &found.raw else {
            let expected = format!("one of {}", quoted(&words));
            return self.wrong_kind(key, found.origin, &expected, &found.raw).unwrap_or(default);
        };
        match choices.iter().find(|(word, _)| word == text) {
            Some((_, value)) => *value,
            None => {
                let nearest = nearest(text, &words).map(|word| format!("; did you mean {word:?}?")).unwrap_or_default();
                self.bad(key, found.origin, &format!("{text:?} is not one of {}{nearest}", quoted(&words)));
                default
            }
        }
    }

    /// A list of texts; in the environment separated by commas.
    pub fn list(&mut self, key: &'static str) -> Option<Vec<String>> {
        let found = self.find(key)?;
        match found.raw {
            Raw::List(list) => Some(list),
            Raw::Text(text) if matches!(found.origin, Origin::Environment(_)) => {
                Some(text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(str::to_owned).collect())
            }
            other => self.wrong_kind(key, found.origin, "a list of texts, such as [\"postgres\"]", &other),
        }
    }

    /// A list of ranges of addresses; an empty one when the key is absent.
    pub fn networks(&mut self, key: &'static str) -> Vec<Network> {
        let origin = self.origin(key).unwrap_or(Origin::Whole);
        let mut networks = Vec::new();
        for text in self.list(key).unwrap_or_default() {
            match Network::parse(&text) {
                Ok(network) => networks.push(network),
                Err(message) => self.bad(key, origin.clone(), &message),
            }
        }
        networks
    }

    /// `address:port`.
    pub fn socket_address(&mut self, key: &'static str) -> Option<SocketAddr> {
        self.parsed(key, "an address in quotes, such as \"127.0.0.1:6432\"", |text| {
            let text = text.strip_prefix("localhost:").map_or_else(|| text.to_owned(), |p| format!("127.0.0.1:{p}"));
            text.parse().map_err(|_| format!("{text:?} is not an IP address with a port, such as \"127.0.0.1:6432\""))
        })
    }

    /// A path; a relative one is taken from the directory of the configuration file.
    pub fn path(&mut self, key: &'static str) -> Option<PathBuf> {
        let text = self.text(key)?;
        Some(self.reader.base.join(text))
    }

    /// A secret from exactly one of `key`, `key_file` and `key_env`; none of them is `None`.
    pub fn secret(&mut self, [key, file_key, env_key]: [&'static str; 3]) -> Option<Secret> {
        let plain = self.text(key);
        let (file_origin, file) = (self.origin(file_key), self.path(file_key));
        let (env_origin, env) = (self.origin(env_key), self.text(env_key));
        let given = usize::from(plain.is_some()) + usize::from(file.is_some()) + usize::from(env.is_some());
        if given > 1 {
            let origin = self.origin(key).or(file_origin).or(env_origin).unwrap_or(Origin::Whole);
            self.bad(key, origin, &format!("set only one of {key}, {file_key} and {env_key}"));
            return None;
        }
        if let Some(path) = file {
            let origin = file_origin.unwrap_or(Origin::Whole);
            return self.secret_file(file_key, origin, &path);
        }
        if let Some(name) = env {
            let value = self.reader.environment.get(&name).filter(|value| !value.is_empty()).cloned();
            if value.is_none() {
                let message = format!("the environment variable {name} is not set");
                self.bad(env_key, env_origin.unwrap_or(Origin::Whole), &message);
            }
            return value.map(Secret::new);
        }
        plain.map(Secret::new)
    }

    fn secret_file(&mut self, key: &'static str, origin: Origin, path: &Path) -> Option<Secret> {
        match std::fs::read_to_string(path) {
            Ok(text) => {
                let text = text.strip_suffix('\n').unwrap_or(&text);
                let text = text.strip_suffix('\r').unwrap_or(text);
                if text.is_empty() {
                    self.bad(key, origin, &format!("the file {} is empty", path.display()));
                    return None;
                }
                Some(Secret::new(text))
            }
            Err(error) => {
                self.bad(key, origin, &format!("cannot read {}: {error}", path.display()));
                None
            }
        }
    }

    /// The names of the tables `[section.key.NAME]`; anything else under `key` is a problem.
    pub fn names(&mut self, key: &'static str) -> Vec<String> {
        let Some(found) = self.find(key) else { return Vec::new() };
        if !matches!(found.raw, Raw::Other("a table")) {
            let expected = format!("tables, such as [{}.{key}.name]", self.name);
            return self.wrong_kind(key, found.origin, &expected, &found.raw).unwrap_or_default();
        }
        let parent = format!("{}.{key}.", self.name);
        self.reader.entries.keys().filter_map(|table| table.strip_prefix(&parent)).map(str::to_owned).collect()
    }

    /// Where `key` was set, for problems that several keys make together.
    pub fn origin(&self, key: &'static str) -> Option<Origin> {
        let set = self.reader.environment.contains_key(&variable(self.name, key));
        let found = self.reader.values.get(&(self.name.to_owned(), key.to_owned()));
        if set { Some(Origin::Environment(variable(self.name, key))) } else { found.map(|found| found.origin.clone()) }
    }

    /// Notes a problem with `key`.
    pub fn bad(&mut self, key: &str, origin: Origin, message: &str) {
        let table = self.entry.as_ref().map_or(self.name, |entry| &entry.table);
        let message = format!("[{table}] {key}: {message}");
        self.reader.problem(origin, message);
    }

    fn parsed<T>(
        &mut self,
        key: &'static str,
        expected: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        let found = self.find(key)?;
        let Raw::Text(text) = &found.raw else { return self.wrong_kind(key, found.origin, expected, &found.raw) };
        match parse(text) {
            Ok(value) => Some(value),
            Err(message) => {
                self.bad(key, found.origin, &message);
                None
            }
        }
    }

    /// The value, the environment before the file.
    fn find(&mut self, key: &'static str) -> Option<Found> {
        if let Some(entry) = &mut self.entry {
            entry.asked.insert(key);
            return self.reader.entries.get(&entry.table)?.get(key).cloned();
        }
        self.reader.known.entry(self.name).or_default().insert(key);
        let name = variable(self.name, key);
        if let Some(text) = self.reader.environment.get(&name) {
            return Some(Found { raw: Raw::Text(text.clone()), origin: Origin::Environment(name) });
        }
        self.reader.values.get(&(self.name.to_owned(), key.to_owned())).cloned()
    }

    /// The value itself is not shown: it may be a password that lacks its quotes.
    fn wrong_kind<T>(&mut self, key: &str, origin: Origin, expected: &str, raw: &Raw) -> Option<T> {
        let message = format!("expected {expected}, found {}", raw.kind());
        self.bad(key, origin, &message);
        None
    }
}

fn variable(section: &str, key: &str) -> String {
    format!("{PREFIX}{}_{}", section.to_ascii_uppercase(), key.to_ascii_uppercase())
}

fn raw_of(value: &DeValue<'_>) -> Raw {
    match value {
        DeValue::String(text) => Raw::Text(text.to_string()),
        DeValue::Integer(number) => Raw::Integer(number.as_str().to_owned()),
        DeValue::Boolean(flag) => Raw::Flag(*flag),
        DeValue::Array(items) => {
            let texts: Option<Vec<String>> =
                items.iter().map(|item| item.get_ref().as_str().map(str::to_owned)).collect();
            texts.map_or(Raw::Other("a list with something else than texts"), Raw::List)
        }
        DeValue::Float(_) => Raw::Other("a number with a fraction"),
        DeValue::Datetime(_) => Raw::Other("a date"),
        DeValue::Table(_) => Raw::Other("a table"),
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    text.as_bytes().iter().take(offset).filter(|byte| **byte == b'\n').count() + 1
}

fn quoted(words: &[&str]) -> String {
    words.iter().map(|word| format!("{word:?}")).collect::<Vec<_>>().join(", ")
}

/// `; did you mean …?`, or the whole list when nothing is near.
fn suggestion(word: &str, known: &[&str]) -> String {
    match nearest(word, known) {
        Some(near) => format!("; did you mean `{near}`?"),
        None => format!("; known are {}", known.join(", ")),
    }
}

/// Longer words are nobody's slip of the pen, and comparing them would take long.
const NEAREST_MAX_BYTES: usize = 64;

/// The known word that is nearest to `word`, if one is near at all: fewer edits than half its letters, or one of the
/// two is a part of the other.
pub fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    if word.len() > NEAREST_MAX_BYTES {
        return None;
    }
    let best = known.iter().map(|candidate| (edits(word, candidate), *candidate)).min()?;
    if best.0 <= word.len().max(best.1.len()) / 3 {
        return Some(best.1);
    }
    known.iter().copied().find(|candidate| word.len() > 2 && (candidate.contains(word) || word.contains(*candidate)))
}

/// Levenshtein distance in bytes.
fn edits(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, byte) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, other) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(byte != other);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_word_is_near() {
        let known = ["sslmode", "sslrootcert", "password", "password_file"];
        assert_eq!(nearest("sslmod", &known), Some("sslmode"));
        assert_eq!(nearest("pasword", &known), Some("password"));
        assert_eq!(nearest("file", &known), Some("password_file"));
        assert_eq!(nearest("colour", &known), None);
        assert_eq!(nearest(&"sslmode".repeat(20), &known), None);
    }
}
