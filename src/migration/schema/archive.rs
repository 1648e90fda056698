//! A dump's entries, sorted by when they are restored.
//!
//! pg_dump's own order is kept within every group. Its text does not say which table an index belongs to, nor whether a
//! constraint was validated: that is looked up by OID under the dump's own snapshot.

use std::collections::{HashMap, HashSet};

use tokio_postgres::{Error, Transaction};

use super::toc::{Entry, Toc};
use crate::ident::{QualifiedName, quote_ident};
use crate::migration::{ddl, late};

/// A dump, cut into entries and sorted.
#[derive(Clone, Debug)]
pub struct Archive {
    pub(super) standard_strings: bool,
    /// Schema public is owned by who made the cluster, as it is by default up to PostgreSQL 14.
    pub(super) public_is_the_makers: bool,
    /// Everything before the rows.
    pub(super) pre_data: Vec<Entry>,
    /// Indexes and constraints of ordinary tables, by the table's OID on the source.
    pub(super) by_table: HashMap<u32, Vec<Entry>>,
    /// What needs them or the rows, and does not hinder applying.
    pub(super) after_copy: Vec<Entry>,
    /// Foreign keys.
    pub(super) foreign_keys: Vec<ForeignKey>,
    /// What fires, filters or rewrites: triggers, rules, policies, event triggers.
    pub(super) last: Vec<Entry>,
}

/// A foreign key.
#[derive(Clone, Debug)]
pub(super) struct ForeignKey {
    pub(super) entry: Entry,
    /// How it may be added.
    pub(super) adding: Adding,
}

/// How a foreign key is added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Adding {
    /// As the dump says: it is not validated on the source, or nothing is known of it.
    AsDumped,
    /// NOT VALID, then validated under a weaker lock.
    ThenValidate {
        /// `ALTER TABLE … VALIDATE CONSTRAINT …`.
        validate: String,
        /// One of the two tables is partitioned: PostgreSQL 18 is the first that can, and that marks the constraints
        /// of every partition as validated.
        partitioned: bool,
    },
}

impl ForeignKey {
    /// The statements that add it to a server of this version without looking at rows, and then validate it; none: it is
    /// added as it was dumped.
    pub(super) fn in_two_steps(&self, version_num: u32) -> Option<(String, &str)> {
        match &self.adding {
            Adding::ThenValidate { partitioned: true, .. } if version_num < 180_000 => None,
            Adding::ThenValidate { validate, .. } => {
                let add = self.entry.sql.trim_end().strip_suffix(';')?;
                Some((format!("{add} NOT VALID;"), validate))
            }
            Adding::AsDumped => None,
        }
    }
}

impl Archive {
    /// What acts on rows that are written, for a server of this version on which it must not act before a cutover. It begins
    /// with the settings that dumps are written for, and is empty where there is nothing of the kind.
    pub(in crate::migration) fn late(&self, version_num: u32) -> Vec<late::Definition> {
        let definition = |entry: &Entry, sql: &str, validate: Option<&str>| {
            let settings = entry.settings.iter().map(|setting| setting.replacen("SET ", "SET LOCAL ", 1));
            late::Definition {
                kind: entry.kind.clone(),
                object: entry.object(),
                sql: settings.chain([sql.to_owned()]).collect::<Vec<_>>().join("\n"),
                validate: validate.map(str::to_owned),
            }
        };
        let foreign_keys = self.foreign_keys.iter().map(|key| match key.in_two_steps(version_num) {
            Some((add, validate)) => definition(&key.entry, &add, Some(validate)),
            None => definition(&key.entry, &key.entry.sql, None),
        });
        let mut late: Vec<_> =
            foreign_keys.chain(self.last.iter().map(|entry| definition(entry, &entry.sql, None))).collect();
        if !late.is_empty() {
            let settings = late::Definition {
                kind: "SETTINGS".to_owned(),
                object: "of the dump".to_owned(),
                sql: super::restore::settings(self, "LOCAL "),
                validate: None,
            };
            late.insert(0, settings);
        }
        late
    }

    /// Indexes and constraints that belong to the table with this OID on the source.
    pub(in crate::migration) fn table_entries(&self, oid: u32) -> &[Entry] {
        self.by_table.get(&oid).map_or(&[], Vec::as_slice)
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        let by_table: usize = self.by_table.values().map(Vec::len).sum();
        self.pre_data.len() + by_table + self.after_copy.len() + self.foreign_keys.len() + self.last.len()
    }

    /// Whether there is nothing to restore.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Kinds that pg_dump writes after its post-data boundary only (`SECTION_POST_DATA` in `pg_dump.c`).
const POST_DATA: &[&str] = &[
    "CHECK CONSTRAINT",
    "CONSTRAINT",
    "EVENT TRIGGER",
    "FK CONSTRAINT",
    "INDEX",
    "INDEX ATTACH",
    "POLICY",
    "ROW SECURITY",
    "RULE",
    "STATISTICS",
    "TRIGGER",
];

/// Kinds that would act on what the stream applies.
const LAST: &[&str] = &["EVENT TRIGGER", "POLICY", "ROW SECURITY", "RULE", "TRIGGER"];

/// What the catalogues say about the object of an entry.
struct Owner {
    table_oid: u32,
    table: QualifiedName,
    relkind: String,
    /// Constraint's name and whether it is validated.
    constraint: Option<(String, bool)>,
    /// Either table of a foreign key is partitioned.
    partitioned: bool,
}

/// Schema public, if it belongs to the role that initdb has made.
const MAKERS_PUBLIC: &str =
    "SELECT FROM pg_catalog.pg_namespace WHERE nspname = 'public' AND nspowner = '10'::pg_catalog.oid";

/// Sorts the entries; `source` is the transaction that the dump shared its snapshot with.
pub(super) async fn build(source: &Transaction<'_>, toc: Toc) -> Result<Archive, Error> {
    let owners = owners(source, &toc.entries).await?;
    let held_up = held_up(source, &toc.entries).await?;
    let mut archive = sort(toc, &owners, &held_up);
    archive.public_is_the_makers = !source.query(MAKERS_PUBLIC, &[]).await?.is_empty();
    Ok(archive)
}

/// Where what comes behind the rows begins.
fn boundary(entries: &[Entry]) -> usize {
    entries.iter().position(|entry| POST_DATA.contains(&entry.kind.as_str())).unwrap_or(entries.len())
}

/// Indexes and constraints that use a function which itself needs a primary key, and so comes behind the keys. A dump in
/// plain text does not say so.
async fn held_up(source: &Transaction<'_>, entries: &[Entry]) -> Result<HashSet<(u32, u32)>, Error> {
    let postponed = entries[boundary(entries)..].iter().filter(|entry| entry.class_oid == PG_PROC);
    let postponed: Vec<u32> = postponed.map(|entry| entry.oid).collect();
    if postponed.is_empty() {
        return Ok(HashSet::new());
    }
    let dependents = "SELECT d.classid, d.objid FROM pg_catalog.pg_depend d \
        WHERE d.refclassid = 'pg_catalog.pg_proc'::pg_catalog.regclass AND d.refobjid = ANY($1)";
    let rows = source.query(dependents, &[&postponed]).await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

fn sort(toc: Toc, owners: &HashMap<(u32, u32), Owner>, held_up: &HashSet<(u32, u32)>) -> Archive {
    let mut archive = Archive {
        standard_strings: toc.standard_strings,
        public_is_the_makers: false,
        pre_data: Vec::new(),
        by_table: HashMap::new(),
        after_copy: Vec::new(),
        foreign_keys: Vec::new(),
        last: Vec::new(),
    };
    let boundary = boundary(&toc.entries);
    let mut late: HashSet<u32> = HashSet::new();
    for (at, entry) in toc.entries.into_iter().enumerate() {
        // Refuses changes of the source's definitions, and only there.
        if entry.kind == "EVENT TRIGGER" && ddl::is_own_trigger(&entry.name) {
            continue;
        }
        let owner = owners.get(&(entry.class_oid, entry.oid));
        if at < boundary {
            archive.pre_data.push(entry);
        } else if entry.kind == "FK CONSTRAINT" {
            late.insert(entry.dump_id);
            archive.foreign_keys.push(ForeignKey { adding: adding(owner), entry });
        } else if is_last(&entry) || entry.dependencies.iter().any(|id| late.contains(id)) {
            late.insert(entry.dump_id);
            archive.last.push(entry);
        } else if let Some(owner) = owner.filter(|owner| owner.relkind == "r" && entry.kind != "STATISTICS")
            && !held_up.contains(&(entry.class_oid, entry.oid))
        {
            archive.by_table.entry(owner.table_oid).or_default().push(entry);
        } else {
            archive.after_copy.push(entry);
        }
    }
    archive
}

/// A view's own query is a rule too (`_RETURN`), written apart where views depend on each other in a circle.
fn is_last(entry: &Entry) -> bool {
    LAST.contains(&entry.kind.as_str()) && !(entry.kind == "RULE" && entry.name.ends_with(" _RETURN"))
}

fn adding(owner: Option<&Owner>) -> Adding {
    match owner {
        Some(Owner { table, partitioned, constraint: Some((name, true)), .. }) => Adding::ThenValidate {
            validate: format!("ALTER TABLE {table} VALIDATE CONSTRAINT {}", quote_ident(name)),
            partitioned: *partitioned,
        },
        Some(_) | None => Adding::AsDumped,
    }
}

const PG_CLASS: u32 = 1259;
const PG_CONSTRAINT: u32 = 2606;
const PG_PROC: u32 = 1255;

async fn owners(source: &Transaction<'_>, entries: &[Entry]) -> Result<HashMap<(u32, u32), Owner>, Error> {
    let oids = |class: u32| -> Vec<u32> {
        entries.iter().filter(|entry| entry.class_oid == class && entry.oid != 0).map(|entry| entry.oid).collect()
    };
    let indexes = "SELECT i.indexrelid, c.oid, n.nspname::text, c.relname::text, c.relkind::text, NULL::text, NULL::bool, false \
                   FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
                   WHERE i.indexrelid = ANY ($1)";
    let constraints = "SELECT o.oid, c.oid, n.nspname::text, c.relname::text, c.relkind::text, o.conname::text, o.convalidated, \
         c.relkind = 'p' OR coalesce(f.relkind = 'p', false) \
         FROM pg_constraint o JOIN pg_class c ON c.oid = o.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
         LEFT JOIN pg_class f ON f.oid = o.confrelid \
         WHERE o.oid = ANY ($1)";
    let mut owners = HashMap::new();
    for (class, query) in [(PG_CLASS, indexes), (PG_CONSTRAINT, constraints)] {
        for row in source.query(query, &[&oids(class)]).await? {
            let constraint = row.get::<_, Option<String>>(5).zip(row.get::<_, Option<bool>>(6));
            let table = QualifiedName::new(row.get::<_, String>(2), row.get::<_, String>(3));
            let owner =
                Owner { table_oid: row.get(1), table, relkind: row.get(4), constraint, partitioned: row.get(7) };
            owners.insert((class, row.get(0)), owner);
        }
    }
    Ok(owners)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(dump_id: u32, kind: &str, class_oid: u32, oid: u32, dependencies: &[u32]) -> Entry {
        Entry {
            dump_id,
            class_oid,
            oid,
            dependencies: dependencies.to_vec(),
            kind: kind.to_owned(),
            schema: Some("s".to_owned()),
            name: format!("{kind} {dump_id}"),
            settings: Vec::new(),
            sql: String::new(),
            key: dump_id.to_string(),
        }
    }

    fn owner(table_oid: u32, relkind: &str, constraint: Option<(&str, bool)>) -> Owner {
        let constraint = constraint.map(|(name, valid)| (name.to_owned(), valid));
        Owner {
            table_oid,
            table: QualifiedName::new("s", "t"),
            relkind: relkind.to_owned(),
            constraint,
            partitioned: relkind == "p",
        }
    }

    fn ids(entries: &[Entry]) -> Vec<u32> {
        entries.iter().map(|entry| entry.dump_id).collect()
    }

    #[test]
    fn entries_are_restored_when_they_can_be() {
        let entries = vec![
            entry(1, "TABLE", 1259, 10, &[]),
            entry(2, "COMMENT", 0, 0, &[1]),
            entry(3, "INDEX", 1259, 20, &[]),
            entry(4, "INDEX", 1259, 21, &[]),
            entry(5, "CONSTRAINT", 2606, 22, &[]),
            entry(6, "INDEX ATTACH", 0, 0, &[]),
            entry(7, "TRIGGER", 2620, 30, &[]),
            entry(8, "COMMENT", 0, 0, &[7]),
            entry(9, "FK CONSTRAINT", 2606, 23, &[]),
            entry(10, "COMMENT", 0, 0, &[9]),
            entry(11, "FK CONSTRAINT", 2606, 24, &[]),
            entry(12, "COMMENT", 0, 0, &[3]),
            entry(13, "ACL", 0, 0, &[1]),
            entry(14, "FUNCTION", 1255, 40, &[]),
            entry(15, "INDEX", 1259, 25, &[]),
        ];
        let owners = HashMap::from([
            ((1259, 20), owner(10, "r", None)),
            ((1259, 21), owner(11, "p", None)),
            ((1259, 25), owner(10, "r", None)),
            ((2606, 22), owner(10, "r", Some(("pk", true)))),
            ((2606, 23), owner(10, "r", Some(("fk", true)))),
            ((2606, 24), owner(10, "r", Some(("old", false)))),
        ]);
        let archive = sort(Toc { standard_strings: true, entries }, &owners, &HashSet::from([(1259, 25)]));
        assert_eq!(ids(&archive.pre_data), [1, 2]);
        assert_eq!(ids(archive.table_entries(10)), [3, 5]);
        assert_eq!(ids(&archive.after_copy), [4, 6, 12, 13, 14, 15]);
        assert_eq!(ids(&archive.last), [7, 8, 10]);
        let validate = "ALTER TABLE \"s\".\"t\" VALIDATE CONSTRAINT \"fk\"".to_owned();
        assert_eq!(archive.foreign_keys[0].adding, Adding::ThenValidate { validate, partitioned: false });
        assert_eq!(archive.foreign_keys[1].adding, Adding::AsDumped, "what is not validated stays so");
        assert_eq!(archive.len(), 15);
    }
}
