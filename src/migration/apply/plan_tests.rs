//! The planner against hand-made messages, and the net effect of changes against the changes themselves.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;

use super::plan::{Committed, PlanError, Planned, Planner, Truncation};
use super::plan_net::{Net, Sets};
use super::plan_table::{Key, RowChange, Table};
use super::shape::{ColumnKind, KeyPart, TableShape, TargetColumn};
use crate::ident::QualifiedName;
use crate::lsn::Lsn;
use crate::migration::snapshot::HandOver;
use crate::pgoutput::{
    Begin, Column, Commit, Delete, Insert, Message, OldTuple, Relation, ReplicaIdentity, Timestamp, Truncate, Tuple,
    TupleValue, Update,
};

fn text(value: &'static str) -> TupleValue {
    TupleValue::Text(Bytes::from_static(value.as_bytes()))
}

fn tuple(values: &[TupleValue]) -> Tuple {
    Tuple { values: values.to_vec() }
}

fn sent(values: &[Option<&'static str>]) -> Vec<Option<Bytes>> {
    values.iter().map(|value| value.map(|text| Bytes::from_static(text.as_bytes()))).collect()
}

fn relation(oid: u32, name: &str, identity: ReplicaIdentity, columns: &[(&str, bool)]) -> Relation {
    let columns = columns
        .iter()
        .map(|(name, key)| Column { key: *key, name: (*name).to_owned(), type_oid: 23, type_modifier: -1 })
        .collect();
    Relation { xid: None, oid, schema: "s".to_owned(), name: name.to_owned(), replica_identity: identity, columns }
}

fn column(kind: ColumnKind, key: bool) -> TargetColumn {
    let equality = key.then(|| "pg_catalog.=".to_owned());
    let primary_key = if key { KeyPart::Unique } else { KeyPart::None };
    TargetColumn {
        type_sql: "integer".to_owned(),
        kind,
        equality,
        primary_key,
        cast_from_text: false,
        cast_to_text: false,
    }
}

fn shape(columns: &[(&str, ColumnKind, bool)]) -> TableShape {
    TableShape::new(columns.iter().map(|(name, kind, key)| ((*name).to_owned(), column(*kind, *key))))
}

/// A planner inside a transaction that knows table `s.t (id key, a, b)`.
fn planner() -> Planner {
    let mut planner = Planner::new(HashMap::new());
    let columns = [("id", true), ("a", false), ("b", false)];
    let plain = ColumnKind::Plain;
    let known = shape(&[("id", plain, true), ("a", plain, false), ("b", plain, false)]);
    planner.relation(relation(7, "t", ReplicaIdentity::Default, &columns), Some(known)).expect("mapped");
    begin(&mut planner, 0x100, 740);
    planner
}

fn begin(planner: &mut Planner, final_lsn: u64, xid: u32) {
    let begin = Begin { final_lsn: Lsn(final_lsn), timestamp: Timestamp(0), xid };
    assert!(matches!(planner.plan(Message::Begin(begin)), Ok(Planned::Begin)));
}

fn commit(planner: &mut Planner, lsn: u64) -> Committed {
    let commit = Commit { commit_lsn: Lsn(lsn), end_lsn: Lsn(lsn + 0x30), timestamp: Timestamp(9) };
    match planner.plan(Message::Commit(commit)) {
        Ok(Planned::Commit(committed)) => committed,
        other => panic!("not a commit: {other:?}"),
    }
}

/// A change as the statement that makes it alone.
struct Single {
    table: Arc<Table>,
    sql: String,
    parameters: Vec<Option<Bytes>>,
}

fn change(planner: &mut Planner, message: Message) -> Single {
    match planner.plan(message) {
        Ok(Planned::Change(change)) => {
            let (shape, parameters) = change.table.row(&change.row);
            Single { sql: change.table.row_sql(&shape), parameters, table: change.table }
        }
        other => panic!("not a change: {other:?}"),
    }
}

fn truncated(planner: &mut Planner, truncate: Truncate) -> Truncation {
    match planner.plan(Message::Truncate(truncate)) {
        Ok(Planned::Truncate(truncation)) => truncation,
        other => panic!("not a truncation: {other:?}"),
    }
}

fn insert(relation: u32, values: &[TupleValue]) -> Message {
    Message::Insert(Insert { xid: None, relation, new: tuple(values) })
}

fn update(relation: u32, old: Option<OldTuple>, values: &[TupleValue]) -> Message {
    Message::Update(Update { xid: None, relation, old, new: tuple(values) })
}

#[test]
fn inserts_share_a_statement() {
    let mut planner = planner();
    let first = change(&mut planner, insert(7, &[text("1"), TupleValue::Null, text("x")]));
    let second = change(&mut planner, insert(7, &[text("2"), text("3"), text("4")]));
    assert_eq!(first.sql, r#"INSERT INTO "s"."t" ("id", "a", "b") OVERRIDING SYSTEM VALUE VALUES ($1, $2, $3)"#);
    assert_eq!(first.parameters, sent(&[Some("1"), None, Some("x")]));
    assert_eq!(first.sql, second.sql);
    assert_eq!(commit(&mut planner, 0x100).changes, 2);
}

#[test]
fn updates_set_what_was_sent_and_find_the_row_by_its_old_key() {
    let mut planner = planner();
    let toast = change(&mut planner, update(7, None, &[text("1"), TupleValue::UnchangedToast, text("x")]));
    assert_eq!(
        toast.sql,
        r#"UPDATE ONLY "s"."t" SET "id" = $1, "b" = $2 WHERE "id" OPERATOR(pg_catalog.=) $3::integer"#
    );
    assert_eq!(toast.parameters, sent(&[Some("1"), Some("x"), Some("1")]));

    // Nulls of a key tuple stand in columns outside the key and are no values.
    let old = OldTuple::Key(tuple(&[text("1"), TupleValue::Null, TupleValue::Null]));
    let moved = change(&mut planner, update(7, Some(old), &[text("2"), text("3"), text("4")]));
    assert_eq!(moved.parameters, sent(&[Some("2"), Some("3"), Some("4"), Some("1")]));
}

#[test]
fn full_identity_matches_one_row_by_all_values_or_by_the_primary_key() {
    let mut planner = planner();
    let full = [("a", true), ("b", true)];
    let plain = ColumnKind::Plain;
    let without = shape(&[("a", plain, false), ("b", plain, false)]);
    planner.relation(relation(8, "f", ReplicaIdentity::Full, &full), Some(without)).expect("mapped");
    let old = || OldTuple::Full(tuple(&[text("1"), TupleValue::Null]));
    let delete = Message::Delete(Delete { xid: None, relation: 8, old: old() });
    let delete = change(&mut planner, delete);
    assert_eq!(
        delete.sql,
        r#"DELETE FROM ONLY "s"."f" WHERE ctid = (SELECT ctid FROM ONLY "s"."f" WHERE "#.to_owned()
            + r#""a"::text COLLATE "C" IS NOT DISTINCT FROM ($1::integer)::text COLLATE "C" AND "#
            + r#""b"::text COLLATE "C" IS NOT DISTINCT FROM ($2::integer)::text COLLATE "C" LIMIT 1)"#
    );
    assert_eq!(delete.parameters, sent(&[Some("1"), None]));

    let with = shape(&[("a", plain, true), ("b", plain, false)]);
    planner.relation(relation(8, "f", ReplicaIdentity::Full, &full), Some(with)).expect("mapped");
    assert_eq!(planner.take_retired(), [delete.table.id], "a changed relation gives its statements up");
    let changed = change(&mut planner, update(8, Some(old()), &[text("1"), text("2")]));
    assert!(changed.sql.ends_with(r#"WHERE "a" OPERATOR(pg_catalog.=) $3::integer"#), "{}", changed.sql);

    // Two rows may share a deferrable key for a while: it finds them, and does not tell them apart.
    let mut deferrable = shape(&[("a", plain, true), ("b", plain, false)]);
    deferrable.columns.values_mut().filter(|column| column.primary_key == KeyPart::Unique).for_each(|column| {
        column.primary_key = KeyPart::Deferrable;
    });
    planner
        .relation(relation(8, "f", ReplicaIdentity::Full, &full), Some(TableShape::new(deferrable.columns)))
        .expect("mapped");
    let changed = change(&mut planner, update(8, Some(old()), &[text("1"), text("2")]));
    let found = r#"WHERE "a" OPERATOR(pg_catalog.=) $3::integer AND "#.to_owned()
        + r#""a"::text COLLATE "C" IS NOT DISTINCT FROM ($3::integer)::text COLLATE "C" AND "#;
    assert!(changed.sql.contains(&found) && changed.sql.ends_with("LIMIT 1)"), "{}", changed.sql);
}

#[test]
fn generated_columns_are_not_written_and_identities_are_replaced_when_they_change() {
    let mut planner = planner();
    let columns = [("id", true), ("g", false), ("a", false)];
    let known = shape(&[
        ("id", ColumnKind::IdentityAlways, true),
        ("g", ColumnKind::Generated, false),
        ("a", ColumnKind::Plain, false),
    ]);
    planner.relation(relation(9, "i", ReplicaIdentity::Default, &columns), Some(known)).expect("mapped");
    let inserted = change(&mut planner, insert(9, &[text("1"), text("2"), text("3")]));
    assert!(inserted.sql.contains(r#"("id", "a") OVERRIDING"#), "{}", inserted.sql);

    let same = change(&mut planner, update(9, None, &[text("1"), text("2"), text("3")]));
    assert!(same.sql.starts_with(r#"UPDATE ONLY "s"."i" SET "a" = $1 WHERE"#), "{}", same.sql);

    let old = OldTuple::Key(tuple(&[text("1"), TupleValue::Null, TupleValue::Null]));
    let new = change(&mut planner, update(9, Some(old), &[text("5"), text("2"), TupleValue::UnchangedToast]));
    assert_eq!(
        new.sql,
        r#"WITH old AS (DELETE FROM ONLY "s"."i" WHERE "id" OPERATOR(pg_catalog.=) $2::integer RETURNING *) "#
            .to_owned()
            + r#"INSERT INTO "s"."i" ("id", "a") OVERRIDING SYSTEM VALUE SELECT $1::integer, old."a" FROM old"#
    );
}

#[test]
fn what_the_copy_has_is_skipped_table_by_table() {
    let hand_over = HandOver { snapshot: "740:745:741".parse().expect("valid"), position: Lsn(0x200) };
    let mut planner = Planner::new(HashMap::from([(QualifiedName::new("s", "t"), hand_over)]));
    let plain = ColumnKind::Plain;
    for (oid, name) in [(7, "t"), (8, "later")] {
        let relation = relation(oid, name, ReplicaIdentity::Default, &[("id", true)]);
        planner.relation(relation, Some(shape(&[("id", plain, true)]))).expect("mapped");
    }
    begin(&mut planner, 0x1A0, 739);
    assert!(matches!(planner.plan(insert(7, &[text("1")])), Ok(Planned::Nothing)));
    assert_eq!(change(&mut planner, insert(8, &[text("1")])).table.name.name, "later");
    let truncate = Truncate { xid: None, cascade: true, restart_identity: true, relations: vec![7, 8] };
    let truncate = truncated(&mut planner, truncate);
    assert!(truncate.sql.contains(r#"BEGIN TRUNCATE ONLY "s"."later" CONTINUE IDENTITY;"#), "{}", truncate.sql);
    assert_eq!(commit(&mut planner, 0x1A0).changes, 2);
    begin(&mut planner, 0x1F0, 741);
    assert_eq!(change(&mut planner, insert(7, &[text("2")])).table.name.name, "t");
    let _ = commit(&mut planner, 0x1F0);
}

#[test]
fn a_marker_is_recognised_and_not_applied() {
    let mut planner = planner();
    let mut marker = relation(1, "marker", ReplicaIdentity::Default, &[("id", true), ("nonce", false)]);
    marker.schema = "pgcutover".to_owned();
    assert!(!Planner::needs_shape(&marker));
    planner.relation(marker, None).expect("mapped");
    assert!(matches!(planner.plan(update(1, None, &[text("1"), text("n-1")])), Ok(Planned::Nothing)));
    let committed = commit(&mut planner, 0x100);
    assert_eq!((committed.marker.as_deref(), committed.changes), (Some("n-1"), 0));
}

#[test]
fn nothing_is_guessed() {
    let mut planner = planner();
    let missing = relation(9, "gone", ReplicaIdentity::Default, &[("id", true)]);
    assert!(matches!(planner.relation(missing, None), Err(PlanError::NoTable(_))));
    let wider = relation(9, "t", ReplicaIdentity::Default, &[("id", true), ("new", false)]);
    let narrow = shape(&[("id", ColumnKind::Plain, true)]);
    assert!(matches!(planner.relation(wider, Some(narrow)), Err(PlanError::NoColumn { .. })));
    assert!(matches!(planner.plan(insert(9, &[text("1")])), Err(PlanError::OutOfPlace(_))));
    assert!(matches!(planner.plan(insert(7, &[text("1")])), Err(PlanError::OutOfPlace(_))), "width");

    let keyless = relation(5, "k", ReplicaIdentity::Nothing, &[("id", false)]);
    planner.relation(keyless, Some(shape(&[("id", ColumnKind::Plain, false)]))).expect("inserts are possible");
    assert!(matches!(planner.plan(update(5, None, &[text("1")])), Err(PlanError::NoIdentity { .. })));
    let wrong = Commit { commit_lsn: Lsn(0x999), end_lsn: Lsn(0x1000), timestamp: Timestamp(0) };
    assert!(matches!(planner.plan(Message::Commit(wrong)), Err(PlanError::OutOfPlace(_))));
}

#[test]
fn part_of_a_key_is_not_taken_for_the_whole() {
    let mut planner = planner();
    let mut learn = |identity, columns: &[(&str, bool)]| {
        let (plain, generated) = (ColumnKind::Plain, ColumnKind::Generated);
        let known = shape(&[("tenant", plain, true), ("n", plain, false), ("code", generated, true)]);
        planner.relation(relation(9, "o", identity, columns), Some(known))
    };
    let missing = PlanError::PartOfKey { table: QualifiedName::new("s", "o"), column: "code".to_owned() };
    assert_eq!(learn(ReplicaIdentity::Default, &[("tenant", true), ("n", false)]), Err(missing));
    // PostgreSQL 18 sends what is stored; and there are other ways to tell rows apart, or none.
    assert_eq!(learn(ReplicaIdentity::Default, &[("tenant", true), ("n", false), ("code", true)]), Ok(()));
    assert_eq!(learn(ReplicaIdentity::Index, &[("tenant", false), ("n", true)]), Ok(()));
    assert_eq!(learn(ReplicaIdentity::Full, &[("tenant", true), ("n", true)]), Ok(()));
    assert_eq!(learn(ReplicaIdentity::Nothing, &[("tenant", false), ("n", false)]), Ok(()));
}

#[test]
fn a_table_that_took_the_name_of_another_is_not_taken_for_it() {
    let names = r#"{"7": {"schema": "s", "name": "t"}, "8": {"schema": "s", "name": "u"}}"#;
    let mut planner = planner().of_tables(serde_json::from_str(names).expect("names"));
    let columns = [("id", true)];
    let mut learn = |oid, name| {
        let shape = shape(&[("id", ColumnKind::Plain, true)]);
        planner.relation(relation(oid, name, ReplicaIdentity::Default, &columns), Some(shape))
    };
    assert_eq!(learn(7, "t"), Ok(()));
    assert_eq!(learn(7, "renamed_on_both_servers"), Ok(()));
    assert_eq!(learn(9, "made_since"), Ok(()));
    let (is, was) = (QualifiedName::new("s", "u"), QualifiedName::new("s", "t"));
    assert_eq!(learn(7, "u"), Err(PlanError::Renamed { is, was }));
}

/// A table of the target, as the net effect and the changes themselves act on it.
#[derive(Clone, Debug, Default, PartialEq)]
struct Rows(BTreeMap<u8, (Option<u8>, u8)>);

impl Rows {
    /// Executes sets as the executor does; each row must be there, or not be there.
    fn execute(&mut self, sets: Sets) {
        let number = |value: &TupleValue| match value {
            TupleValue::Text(bytes) => Some(std::str::from_utf8(bytes).expect("text").parse().expect("a number")),
            _ => None,
        };
        let key_of = |key: &Key| number(&TupleValue::Text(key.values()[0].clone())).expect("a key");
        for key in &sets.deletes {
            assert!(self.0.remove(&key_of(key)).is_some(), "deletes what is not there");
        }
        for (key, new) in &sets.updates {
            let row = self.0.get_mut(&key_of(key)).expect("updates what is not there");
            if new.values[1] != TupleValue::UnchangedToast {
                row.0 = number(&new.values[1]);
            }
            row.1 = number(&new.values[2]).expect("sent");
        }
        for new in &sets.inserts {
            assert!(!new.values.contains(&TupleValue::UnchangedToast), "inserts what is not known");
            let row = (number(&new.values[1]), number(&new.values[2]).expect("sent"));
            assert!(self.0.insert(number(&new.values[0]).expect("a key"), row).is_none(), "inserts twice");
        }
    }
}

fn digits(value: u8) -> TupleValue {
    TupleValue::Text(Bytes::from(value.to_string().into_bytes()))
}

proptest! {
    /// Steps that a server could have sent, folded, leave the same rows as the steps themselves.
    #[test]
    fn the_net_effect_is_what_the_changes_come_to(
        steps in proptest::collection::vec((0u8..4, 0u8..6, 0u8..6, any::<bool>(), 0u8..9), 1..60),
        cuts in proptest::collection::vec(0usize..60, 0..4),
    ) {
        let columns = [("id", true), ("big", false), ("small", false)];
        let plain = ColumnKind::Plain;
        let known = shape(&[("id", plain, true), ("big", plain, false), ("small", plain, false)]);
        let relation = relation(7, "t", ReplicaIdentity::Default, &columns);
        let table = Table::map(0, relation, known, |_| None).expect("mapped");
        let (mut wanted, mut found) = (Rows::default(), Rows::default());
        let mut net = Net::default();
        for (number, (what, key, other, unsent, value)) in steps.into_iter().enumerate() {
            let big = if unsent { TupleValue::UnchangedToast } else { digits(value + 10) };
            let there = wanted.0.get(&key).copied();
            let change = match (what, there) {
                (0, None) => {
                    wanted.0.insert(key, (Some(value + 10), value));
                    RowChange::Insert(tuple(&[digits(key), digits(value + 10), digits(value)]))
                }
                (1, Some(before)) => {
                    wanted.0.insert(key, (if unsent { before.0 } else { Some(value + 10) }, value));
                    RowChange::Update { old: None, new: tuple(&[digits(key), big, digits(value)]) }
                }
                (2, Some(_)) => {
                    wanted.0.remove(&key);
                    RowChange::Delete(OldTuple::Key(tuple(&[digits(key), TupleValue::Null, TupleValue::Null])))
                }
                (3, Some(before)) if !wanted.0.contains_key(&other) => {
                    wanted.0.remove(&key);
                    wanted.0.insert(other, (if unsent { before.0 } else { Some(value + 10) }, value));
                    let old = OldTuple::Key(tuple(&[digits(key), TupleValue::Null, TupleValue::Null]));
                    RowChange::Update { old: Some(old), new: tuple(&[digits(other), big, digits(value)]) }
                }
                _ => continue,
            };
            if let Err(change) = net.add(&table, change) {
                // Only a new key for a row whose large value is not known has to be executed by itself.
                let RowChange::Update { old: Some(_), new } = &change else { panic!("given back: {change:?}") };
                prop_assert!(new.values.contains(&TupleValue::UnchangedToast));
                found.execute(std::mem::take(&mut net).into_sets());
                found = wanted.clone();
            }
            if cuts.contains(&number) {
                found.execute(std::mem::take(&mut net).into_sets());
                prop_assert_eq!(&found, &wanted);
            }
        }
        found.execute(net.into_sets());
        prop_assert_eq!(found, wanted);
    }
}
