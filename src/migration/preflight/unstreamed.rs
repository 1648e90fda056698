//! Rules about what no stream carries: it is carried with the copy and once more inside the pause, if it is small enough.

use super::database::{Database, Finding};
use super::definition::{Apply, Definition};
use super::{Mode, Outcome, RuleResult};
use crate::migration::unstreamed;

const UNSTREAMED: Definition = Definition {
    why: "no stream carries them: they are carried with the copy, and inside the pause of the cutover once more where they \
          differ, which makes it longer; a cutover refuses more than max_unstreamed of them in a database, unless it is \
          ordered with --force",
    fix: "raise [cutover] max_unstreamed and max_pause, or make them smaller: ALTER TABLE … SET LOGGED, lo_unlink and \
          VACUUM FULL pg_largeobject",
    ..Finding::DEFINITION
};

const UNLOGGED_TABLES: Definition = Definition {
    code: "unlogged_tables",
    evidence: "the tables and their sizes",
    apply: Apply::Refused("it rewrites the table, which is locked meanwhile"),
    ..UNSTREAMED
};

const LARGE_OBJECTS: Definition = Definition {
    code: "large_objects",
    evidence: "how many there are, and their size",
    apply: Apply::Refused("what they hold would be lost"),
    ..UNSTREAMED
};

pub(super) const DEFINITIONS: [&Definition; 2] = [&UNLOGGED_TABLES, &LARGE_OBJECTS];

impl Database<'_> {
    pub(super) async fn unstreamed(&self) -> Vec<RuleResult> {
        let preflight = self.servers.preflight;
        let (tables, objects) = (self.rule(&UNLOGGED_TABLES), self.rule(&LARGE_OBJECTS));
        let weight = match unstreamed::weigh(&self.session).await {
            Ok(weight) => weight,
            Err(error) => return vec![tables.unknown(&error), objects.unknown(&error)],
        };
        // Both together have to fit; the operator sees both sizes.
        let fits =
            preflight.mode == Mode::Offline || weight.must_fit(preflight.config.cutover.max_unstreamed_bytes).is_ok();
        let outcome = if fits { Outcome::Warning } else { Outcome::Failed };
        let kilobytes = |bytes: u64| format!("{} kB", bytes.div_ceil(1024));
        let found = weight.tables.iter().map(|(table, bytes)| format!("{table}, {}", kilobytes(*bytes))).collect();
        let logged = weight.tables.iter().map(|(table, _)| self.statement(format!("ALTER TABLE {table} SET LOGGED")));
        let tables = tables.mended_by(logged.collect()).unless_any(outcome, found);
        let count = weight.large_objects;
        let large_objects = format!("{count} large objects, {}", kilobytes(weight.large_object_bytes));
        let large_objects = (count > 0).then_some(large_objects);
        let unlink = self.statement("SELECT pg_catalog.lo_unlink(oid) FROM pg_catalog.pg_largeobject_metadata");
        vec![tables, objects.mended_by(vec![unlink]).unless_any(outcome, large_objects.into_iter().collect())]
    }
}
