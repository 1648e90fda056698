//! A change of a definition that the source has recorded, and how it is executed on the target. Pure: no sockets.
//!
//! ```text
//! set_config(…)        what its text and its result depend on, as it was on the source
//! set_config(role)     whoever ran it owns what it makes
//! the command          through the extended protocol, which takes one command and no more
//! set_config(…)        back to what applying needs, role and search_path first: until then no operator is used, because a
//!                      search_path of the source may lead to anybody's
//! ```
//!
//! Only rows of the table that [`crate::migration::ddl::carry`] makes are read as commands.

use super::plan::PlanError;
use super::plan_table::text;
use crate::ident::quote_literal;
use crate::pgoutput::{Relation, Tuple};

/// One recorded command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    /// Its number in the source's table.
    pub id: String,
    /// `CREATE TABLE`
    pub tag: String,
    sql: String,
    role: String,
    /// A JSON object of settings.
    settings: String,
}

/// Where the values of a command stand in the tuples of its table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Columns([usize; COLUMNS.len()]);

const COLUMNS: [&str; 5] = ["id", "tag", "command", "role", "settings"];

impl Columns {
    pub(super) fn of(relation: &Relation) -> Result<Self, PlanError> {
        let mut found = [0; COLUMNS.len()];
        for (place, name) in found.iter_mut().zip(COLUMNS) {
            let position = relation.columns.iter().position(|column| column.name == name);
            *place = position.ok_or(PlanError::OutOfPlace("a table of commands without its columns"))?;
        }
        Ok(Self(found))
    }

    pub(super) fn read(self, tuple: &Tuple) -> Result<Command, PlanError> {
        let read = |position: usize| {
            let value = tuple.values.get(position).and_then(text);
            let value = value.and_then(|bytes| String::from_utf8(bytes.to_vec()).ok());
            value.ok_or(PlanError::OutOfPlace("a command that is no text"))
        };
        let [id, tag, sql, role, settings] = self.0;
        Ok(Command { id: read(id)?, tag: read(tag)?, sql: read(sql)?, role: read(role)?, settings: read(settings)? })
    }
}

impl Command {
    /// What is executed, in this order, each by itself and all in one transaction.
    pub(super) fn statements(&self) -> [String; 5] {
        let settings = quote_literal(&self.settings);
        [
            // Function bodies were checked by the source, and may name what comes later here.
            format!(
                "SELECT pg_catalog.set_config(s.name, s.value, true) FROM (\
                 SELECT j.key AS name, j.value FROM pg_catalog.json_each_text({settings}) j WHERE j.value IS NOT NULL \
                 UNION ALL VALUES ('check_function_bodies', 'off')) s"
            ),
            format!("SELECT pg_catalog.set_config('role', {}, true)", quote_literal(&self.role)),
            self.sql.clone(),
            "SELECT pg_catalog.set_config('role', 'none', true), pg_catalog.set_config('search_path', 'pg_catalog', true)"
                .to_owned(),
            format!(
                "SELECT pg_catalog.set_config(g.name, g.reset_val, true) FROM pg_catalog.pg_settings g \
                 WHERE g.name = 'check_function_bodies' \
                 OR g.name IN (SELECT j.key FROM pg_catalog.json_each_text({settings}) j WHERE j.value IS NOT NULL)"
            ),
        ]
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::pgoutput::{Column, ReplicaIdentity, TupleValue};

    #[test]
    fn a_row_is_read_by_the_names_of_its_columns() {
        let column = |name: &str| Column { key: false, name: name.to_owned(), type_oid: 25, type_modifier: -1 };
        let names = ["settings", "xid", "command", "id", "role", "tag"];
        let mut relation = Relation {
            xid: None,
            oid: 1,
            schema: "pgcutover".to_owned(),
            name: "command".to_owned(),
            replica_identity: ReplicaIdentity::Default,
            columns: names.map(column).to_vec(),
        };
        let values = names.map(|name| TupleValue::Text(Bytes::copy_from_slice(name.as_bytes()))).to_vec();
        let columns = Columns::of(&relation).expect("all are there");
        let command = columns.read(&Tuple { values }).expect("read");
        assert_eq!((command.id.as_str(), command.tag.as_str(), command.sql.as_str()), ("id", "tag", "command"));
        assert_eq!(command.statements()[2], "command");
        assert!(command.statements()[1].contains("'role', 'role'"));
        assert!(columns.read(&Tuple { values: vec![TupleValue::Null; 6] }).is_err());
        relation.columns.pop();
        assert!(Columns::of(&relation).is_err());
    }
}
