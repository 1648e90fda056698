//! A random schema: tables with columns of every type, every kind of identity, constraints, partitions, inheritance.

use rand::Rng as _;
use rand::rngs::StdRng;

/// A type, and how a literal of it is made.
pub type Type = (&'static str, fn(&mut StdRng) -> String);

/// A table that statements are made for.
#[derive(Clone, Debug)]
pub struct Table {
    pub name: String,
    pub key: Key,
    /// Columns besides the key, with what makes values for them; never generated ones.
    pub columns: Vec<(String, Type)>,
    /// An integer column with a unique constraint of its own.
    pub unique: bool,
    /// May be emptied: nothing refers to it.
    pub truncates: bool,
}

/// What identifies a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// `k int` primary key.
    Int,
    /// `k int GENERATED ALWAYS AS IDENTITY` primary key.
    Always,
    /// `(k int, kt text)` primary key.
    Pair,
    /// `k numeric` primary key, in which 1.0 and 1.00 are one value with two texts.
    Numeric,
    /// `k int NOT NULL` with a unique index that is the replica identity.
    Index,
    /// REPLICA IDENTITY FULL with a primary key.
    WholeRow,
    /// Nothing but FULL: rows may be alike.
    Full,
}

const KEYS: [Key; 7] = [Key::Int, Key::Always, Key::Pair, Key::Numeric, Key::Index, Key::WholeRow, Key::Full];

fn text(dice: &mut StdRng) -> String {
    const PARTS: [&str; 12] = ["a", "Z", "\\", "\t", "\n", "\r", "''", "\"", "é", "漢", "{,}", "\\N"];
    let parts: String = (0..dice.random_range(0..8)).map(|_| PARTS[dice.random_range(0..PARTS.len())]).collect();
    format!("'{parts}'")
}

fn one_of(dice: &mut StdRng, values: &[&str]) -> String {
    values[dice.random_range(0..values.len())].to_owned()
}

fn int(dice: &mut StdRng) -> String {
    dice.random_range(-1000..1000).to_string()
}

/// Every type is made in every database, in the schema of its own.
pub const TYPES_SQL: &str = r#"
CREATE SCHEMA "Types";
CREATE TYPE "Types".mood AS ENUM ('sad', 'o''k', 'very "happy"');
CREATE TYPE "Types".pair AS (a int, b text);
CREATE DOMAIN "Types".positive AS int CHECK (VALUE > 0);
CREATE DOMAIN "Types".pairs AS "Types".pair[] CHECK (array_length(VALUE, 1) < 5);
CREATE DOMAIN "Types".short AS varchar(9);
CREATE TYPE "Types".floats AS RANGE (subtype = float8);
"#;

const TYPES: &[Type] = &[
    ("int", int),
    ("smallint", int),
    ("bigint", |dice| dice.random::<i64>().saturating_add(1).to_string()),
    ("numeric", |dice| one_of(dice, &["1.0", "1.00", "-0.000", "'NaN'", "1e300", "123456789012345678901234567890.5"])),
    ("numeric(12,3)", |dice| format!("{}.5", dice.random_range(-9999..9999))),
    ("float8", |dice| {
        one_of(dice, &["'NaN'", "'Infinity'", "'-Infinity'", "'-0'", "0.1", "1e-300", "1.7976931348623157e308"])
    }),
    ("real", |dice| one_of(dice, &["'NaN'", "'-Infinity'", "0.1", "3.4e38", "1e-45"])),
    ("text", text),
    ("varchar(60)", text),
    ("char(50)", text),
    ("name", |dice| one_of(dice, &["'x'", "'Größe'", "''"])),
    ("\"char\"", |dice| one_of(dice, &["'x'", "'\\'", "''"])),
    ("bytea", |dice| one_of(dice, &["''", "'\\x00ff5c27'", "'\\x5c'"])),
    ("boolean", |dice| one_of(dice, &["true", "false"])),
    ("date", |dice| one_of(dice, &["'2024-02-29'", "'0044-03-15 BC'", "'infinity'", "'-infinity'"])),
    ("timestamp", |dice| one_of(dice, &["'2024-02-29 23:59:59.999999'", "'4713-01-01 00:00:00 BC'", "'infinity'"])),
    ("timestamptz", |dice| {
        one_of(dice, &["'2024-02-29 12:00:00+05:45'", "'0001-01-01 00:00:00+00 BC'", "'-infinity'"])
    }),
    ("time", |dice| one_of(dice, &["'24:00:00'", "'12:34:56.789'"])),
    ("timetz", |dice| one_of(dice, &["'12:34:56.789-11:30'", "'00:00:00+00'"])),
    ("interval", |dice| one_of(dice, &["'1 year -2 days 03:00:00.5'", "'-1 mon'", "'178000000 years'"])),
    ("json", |dice| one_of(dice, &["'{\"b\": 1,  \"a\": \"\\\\u00e9\\n\"}'", "'[]'", "'null'"])),
    ("jsonb", |dice| one_of(dice, &["'{\"b\": 1.10, \"a\": [null, \"\\\\t\"]}'", "'\"x\"'"])),
    ("uuid", |dice| format!("'{:032x}'", dice.random::<u128>())),
    ("inet", |dice| one_of(dice, &["'10.0.0.1/8'", "'::1'"])),
    ("macaddr", |_| "'08:00:2b:01:02:03'".to_owned()),
    ("money", |dice| one_of(dice, &["12.34", "-5"])),
    ("point", |_| "'(1.5,-2)'".to_owned()),
    ("bit(8)", |_| "B'10100101'".to_owned()),
    ("varbit", |dice| one_of(dice, &["B''", "B'101'"])),
    ("tsvector", |_| "'fat:2 cat:3A ''x y'':1'".to_owned()),
    ("pg_lsn", |_| "'16/B374D848'".to_owned()),
    ("int[]", |dice| one_of(dice, &["'{}'", "'{1,NULL,3}'", "'{{1,2},{3,4}}'", "'[5:6]={1,2}'"])),
    ("text[]", |dice| one_of(dice, &["'{\"a\\\\\\\\b\",\"\",NULL,\"c,d\"}'", "ARRAY['x''y', E'\\t']"])),
    ("int4range", |dice| one_of(dice, &["'[1,5)'", "'empty'", "'(,3]'"])),
    ("tstzrange", |_| "'[2024-01-01 00:00:00+00,)'".to_owned()),
    ("\"Types\".mood", |dice| one_of(dice, &["'sad'", "'o''k'", "'very \"happy\"'"])),
    ("\"Types\".mood[]", |_| "'{sad,\"very \\\"happy\\\"\"}'".to_owned()),
    ("\"Types\".pair", |dice| one_of(dice, &["ROW(1, E'a\\tb\\\\')", "ROW(NULL, '')"])),
    ("\"Types\".positive", |dice| dice.random_range(1..99).to_string()),
    ("\"Types\".pairs", |_| "ARRAY[ROW(1, 'a,b')::\"Types\".pair, NULL]".to_owned()),
    ("\"Types\".short", |dice| one_of(dice, &["'x'", "'Größe'"])),
    ("\"Types\".floats", |_| "'[0.1,Infinity)'".to_owned()),
];

/// Large values, stored out of line: updates that leave them alone do not send them.
const LARGE: Type = ("text", |dice| {
    let letter = char::from(dice.random_range(b'a'..=b'z'));
    format!("repeat('{letter}', {})", dice.random_range(2_100..9_000))
});

impl Table {
    /// A random literal for every column, or NULL.
    pub fn values(&self, dice: &mut StdRng) -> Vec<String> {
        self.columns.iter().map(|(_, column)| literal(*column, dice)).collect()
    }
}

pub fn literal((_, make): Type, dice: &mut StdRng) -> String {
    if dice.random_ratio(1, 6) { "NULL".to_owned() } else { make(dice) }
}

/// Tables, and the statements that make them.
pub fn tables(dice: &mut StdRng, major: u16) -> (Vec<Table>, String) {
    let mut sql = TYPES_SQL.to_owned();
    // One that has nothing at all, one that is inherited from, and one with partitions.
    sql.push_str("CREATE TABLE nothing ();\n");
    sql.push_str("CREATE TABLE base (k int PRIMARY KEY, v text); CREATE TABLE derived (extra int, PRIMARY KEY (k)) INHERITS (base);\n");
    sql.push_str(
        "CREATE TABLE parts (k int, region int, v text) PARTITION BY LIST (region);
         CREATE TABLE parts_0 PARTITION OF parts (PRIMARY KEY (k)) FOR VALUES IN (0);
         CREATE TABLE parts_1 PARTITION OF parts (PRIMARY KEY (k)) FOR VALUES IN (1);
         CREATE TABLE parts_2 PARTITION OF parts (PRIMARY KEY (k)) FOR VALUES IN (2);\n",
    );
    let count = dice.random_range(3..7);
    let tables = (0..count).map(|number| table(dice, number, major, &mut sql)).collect::<Vec<_>>();
    (tables, sql)
}

fn table(dice: &mut StdRng, number: usize, major: u16, sql: &mut String) -> Table {
    let key = KEYS[dice.random_range(0..KEYS.len())];
    let name = if dice.random_ratio(1, 3) { format!("\"Table {number}\"") } else { format!("t{number}") };
    let mut lines = vec![match key {
        Key::Int | Key::WholeRow => "k int PRIMARY KEY".to_owned(),
        Key::Always => "k int GENERATED ALWAYS AS IDENTITY PRIMARY KEY".to_owned(),
        Key::Pair => "k int, kt text, PRIMARY KEY (kt, k)".to_owned(),
        Key::Numeric => "k numeric PRIMARY KEY".to_owned(),
        Key::Index => format!("k int NOT NULL CONSTRAINT identity_{number} UNIQUE"),
        Key::Full => "k int".to_owned(),
    }];
    let mut columns = Vec::new();
    for index in 0..dice.random_range(1..8) {
        let column = if dice.random_ratio(1, 8) { LARGE } else { TYPES[dice.random_range(0..TYPES.len())] };
        let column_name = if dice.random_ratio(1, 4) { format!("\"C {index}\"") } else { format!("c{index}") };
        lines.push(format!("{column_name} {}", column.0));
        columns.push((column_name, column));
    }
    let unique = dice.random_ratio(1, 3);
    if unique {
        let deferrable = if dice.random() { " DEFERRABLE INITIALLY DEFERRED" } else { "" };
        lines.push(format!("u int UNIQUE{deferrable}"));
    }
    if major >= 12 && dice.random_ratio(1, 4) && key != Key::Numeric {
        lines.push("g int GENERATED ALWAYS AS (k * 2) STORED".to_owned());
    }
    let mut truncates = true;
    if key == Key::Int && dice.random_ratio(1, 3) {
        lines.push("parent int REFERENCES base DEFERRABLE".to_owned());
        truncates = dice.random();
    }
    sql.push_str(&format!("CREATE TABLE {name} ({});\n", lines.join(", ")));
    match key {
        Key::Index => sql.push_str(&format!("ALTER TABLE {name} REPLICA IDENTITY USING INDEX identity_{number};\n")),
        Key::WholeRow => sql.push_str(&format!("ALTER TABLE {name} REPLICA IDENTITY FULL;\n")),
        Key::Int | Key::Always | Key::Pair | Key::Numeric | Key::Full => {}
    }
    for (column, (kind, _)) in &columns {
        if *kind == "text" {
            sql.push_str(&format!("ALTER TABLE {name} ALTER {column} SET STORAGE EXTERNAL;\n"));
        }
    }
    if key != Key::Full && dice.random_ratio(1, 4) {
        sql.push_str(&format!("CREATE INDEX ON {name} (k DESC) WHERE k > 5;\n"));
    }
    Table { name, key, columns, unique, truncates }
}
