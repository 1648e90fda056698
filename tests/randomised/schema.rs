//! A random schema: tables with columns of every type, every kind of identity, constraints, partitions, inheritance.

use rand::Rng as _;
use rand::rngs::StdRng;

/// A type, and how a literal of it is made.
pub type Type = (&'static str, fn(&mut StdRng) -> String);

/// What both servers can do.
#[derive(Clone, Debug)]
pub struct Servers {
    /// The source's; the target is no older.
    pub source_major: u16,
    /// Extensions that both have at hand.
    pub extensions: Vec<String>,
    /// Both are built with libxml.
    pub xml: bool,
}

/// A table that statements are made for.
#[derive(Clone, Debug)]
pub struct Table {
    pub name: String,
    pub key: Key,
    /// Columns besides the key, with what makes values for them; never generated ones.
    pub columns: Vec<(String, Type)>,
    /// A further column that has to be unique, `u int`.
    pub unique: Unique,
    /// `parent`, a foreign key to `base`.
    pub parent: bool,
    /// May be emptied.
    pub truncates: bool,
}

/// How the column `u` is unique.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unique {
    /// There is none.
    Not,
    /// By a constraint.
    Plain,
    /// By a constraint that is checked at the end of the transaction.
    Deferred,
    /// By one that is checked at the end of the statement, or of the transaction where that says so.
    Deferrable,
    /// Where it is positive.
    Partial,
    /// But for its sign.
    Expression,
    /// By an exclusion constraint.
    Exclusion,
    /// NULL too may be there once only.
    Nulls,
}

const UNIQUES: [Unique; 7] = [
    Unique::Plain,
    Unique::Deferred,
    Unique::Deferrable,
    Unique::Partial,
    Unique::Expression,
    Unique::Exclusion,
    Unique::Nulls,
];

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
    /// A primary key that is checked at the end, which is no replica identity.
    Deferred,
    /// Nothing at all before the migration sees to it.
    Nothing,
}

const KEYS: [Key; 9] =
    [Key::Int, Key::Always, Key::Pair, Key::Numeric, Key::Index, Key::WholeRow, Key::Full, Key::Deferred, Key::Nothing];

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
CREATE TYPE "Types".nested AS (p "Types".pair, ps "Types".pairs, m "Types".mood, at timestamptz);
CREATE TYPE "Types".vacant AS ();
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
    ("\"Types\".nested", |dice| {
        one_of(
            dice,
            &[
                "ROW(ROW(1, '\\\"'), ARRAY[ROW(2, 'x')::\"Types\".pair], 'sad', '2024-01-01+00')",
                "ROW(NULL, NULL, NULL, NULL)",
            ],
        )
    }),
    ("\"Types\".nested[]", |_| "ARRAY[ROW(ROW(1, 'é'), NULL, 'sad', 'infinity')::\"Types\".nested]".to_owned()),
    ("\"Types\".vacant", |_| "ROW()::\"Types\".vacant".to_owned()),
    // Equal, or not comparable at all, where the values differ.
    ("box", |dice| one_of(dice, &["'(1,1),(0,0)'", "'(3,3),(2,2)'"])),
    ("circle", |dice| one_of(dice, &["'<(0,0),1>'", "'<(5,5),1>'"])),
    ("path", |dice| one_of(dice, &["'[(0,0),(1,1)]'", "'((2,2),(3,3))'"])),
    ("polygon", |dice| one_of(dice, &["'(0,0),(1,1),(1,0)'", "'(2,2),(3,3),(3,2)'"])),
    ("lseg", |_| "'[(0,0),(1,1)]'".to_owned()),
    ("line", |_| "'{1,2,3}'".to_owned()),
    ("cidr", |dice| one_of(dice, &["'10.0.0.0/8'", "'::/0'"])),
    ("macaddr8", |_| "'08:00:2b:01:02:03:04:05'".to_owned()),
    ("tsquery", |_| "'fat & (cat | !''x y'')'".to_owned()),
    ("timestamp(0)", |_| "'2024-02-29 23:59:59.6'".to_owned()),
    ("interval day to second(3)", |_| "'1 day 00:00:01.2345'".to_owned()),
    ("numrange", |dice| one_of(dice, &["'[1.0,2.00]'", "'(,)'"])),
    ("daterange", |dice| one_of(dice, &["'[2024-01-01,infinity]'", "'(0044-03-15 BC,2024-01-01)'"])),
    ("oid", |_| "4294967295".to_owned()),
    ("xid", |_| "'4294967295'".to_owned()),
    ("tid", |_| "'(1,2)'".to_owned()),
    ("int2vector", |_| "'1 2 3'".to_owned()),
    ("txid_snapshot", |_| "'10:20:10,14,15'".to_owned()),
    ("aclitem", |_| "'postgres=r/postgres'".to_owned()),
    // Numbers inside, which differ between servers.
    ("regtype", |dice| one_of(dice, &["'\"Types\".mood'", "'int'"])),
    ("regclass", |dice| one_of(dice, &["'base'", "'pg_class'"])),
    ("numeric[]", |_| "'{1.0,1.00,NaN}'".to_owned()),
    ("bytea[]", |_| "'{NULL,\"\\\\x00\"}'".to_owned()),
    ("json[]", |_| "ARRAY['{\"a\": [1, \"\\\\\"]}', 'null']::json[]".to_owned()),
    ("timestamptz[]", |_| "'{infinity,\"0001-01-01 00:00:00+00 BC\"}'".to_owned()),
];

/// Types of later servers, from which major on.
const LATER_TYPES: &[(u16, Type)] = &[
    (11, ("\"Types\".positive[]", |_| "'{1,NULL,3}'".to_owned())),
    (12, ("jsonpath", |_| "'$.a[*] ? (@ > 1)'".to_owned())),
    (13, ("xid8", |_| "'18446744073709551615'".to_owned())),
    (14, ("nummultirange", |dice| one_of(dice, &["'{[1.0,2),[3,4.00)}'", "'{}'"]))),
    (14, ("numeric", |dice| one_of(dice, &["'Infinity'", "'-Infinity'", "'NaN'"]))),
];

/// Types of extensions, in a schema that is in nobody's search path.
const EXTENSION_TYPES: &[(&str, Type)] = &[
    ("hstore", ("\"Types\".hstore", |dice| one_of(dice, &["'a=>1, \"b c\"=>NULL'", "''", "'x=>\"\\\"\"'"]))),
    ("citext", ("\"Types\".citext", |dice| one_of(dice, &["'Abc'", "'aBC'", "'É'"]))),
    ("ltree", ("\"Types\".ltree", |dice| one_of(dice, &["'Top.Science'", "'Top'", "''"]))),
    ("cube", ("\"Types\".cube", |_| "'(0.1,2),(3,4)'".to_owned())),
];

const XML: Type = ("xml", |dice| one_of(dice, &["'<a b=\"1\">é&amp;</a>'", "'text <b/>'"]));

/// What columns of a seed are made of.
fn types(servers: &Servers) -> Vec<Type> {
    let later = LATER_TYPES.iter().filter(|(major, _)| servers.source_major >= *major).map(|(_, column)| *column);
    let extended = EXTENSION_TYPES.iter().filter(|(name, _)| servers.has(name)).map(|(_, column)| *column);
    TYPES.iter().copied().chain(later).chain(extended).chain(servers.xml.then_some(XML)).collect()
}

impl Servers {
    fn has(&self, extension: &str) -> bool {
        self.extensions.iter().any(|name| name == extension)
    }
}

/// Large values, stored out of line: updates that leave them alone do not send them.
const LARGE: Type = ("text", |dice| {
    let letter = char::from(dice.random_range(b'a'..=b'z'));
    format!("repeat('{letter}', {})", dice.random_range(2_100..9_000))
});

/// A megabyte now and then, which nothing compresses.
const HUGE: Type = ("bytea", |dice| {
    let seed = dice.random_range(0..1000);
    let pieces = if dice.random_ratio(1, 8) { 66_000 } else { 10 };
    format!("(SELECT string_agg(decode(md5(({seed} + n)::text), 'hex'), '') FROM generate_series(1, {pieces}) n)")
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
pub fn tables(dice: &mut StdRng, servers: &Servers) -> (Vec<Table>, String) {
    let mut sql = TYPES_SQL.to_owned();
    for (name, _) in EXTENSION_TYPES.iter().filter(|(name, _)| servers.has(name)) {
        sql.push_str(&format!("CREATE EXTENSION {name} SCHEMA \"Types\";\n"));
    }
    // One that has nothing at all, one that is inherited from, two with partitions, and one that triggers write to.
    sql.push_str("CREATE TABLE nothing ();\n");
    sql.push_str("CREATE TABLE base (k int PRIMARY KEY, v text); CREATE TABLE derived (extra int, PRIMARY KEY (k)) INHERITS (base);\n");
    sql.push_str(
        "CREATE TABLE parts (k int, region int, v text) PARTITION BY LIST (region);
         CREATE TABLE parts_0 PARTITION OF parts (PRIMARY KEY (k)) FOR VALUES IN (0);
         CREATE TABLE parts_1 PARTITION OF parts (PRIMARY KEY (k)) FOR VALUES IN (1);
         CREATE TABLE parts_2 PARTITION OF parts (PRIMARY KEY (k)) FOR VALUES IN (2);\n",
    );
    sql.push_str(if servers.source_major >= 11 {
        RANGED_SQL
    } else {
        "CREATE TABLE ranged (k int, kt int, v text, PRIMARY KEY (k, kt));\n"
    });
    sql.push_str(AUDIT_SQL);
    let types = types(servers);
    let count = dice.random_range(3..7);
    let tables = (0..count).map(|number| table(dice, number, &types, servers, &mut sql)).collect::<Vec<_>>();
    (tables, sql)
}

/// Partitions within partitions, one of which came with its columns in another order and a dropped one between them.
const RANGED_SQL: &str = "
CREATE TABLE ranged (k int, kt int, v text, PRIMARY KEY (k, kt)) PARTITION BY RANGE (k);
CREATE TABLE ranged_low PARTITION OF ranged FOR VALUES FROM (MINVALUE) TO (20);
CREATE TABLE ranged_mid (v text, kt int NOT NULL, gone int, k int NOT NULL);
ALTER TABLE ranged_mid DROP COLUMN gone;
ALTER TABLE ranged ATTACH PARTITION ranged_mid FOR VALUES FROM (20) TO (40);
CREATE TABLE ranged_high PARTITION OF ranged DEFAULT PARTITION BY HASH (kt);
CREATE TABLE ranged_high_0 PARTITION OF ranged_high FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE ranged_high_1 PARTITION OF ranged_high FOR VALUES WITH (MODULUS 2, REMAINDER 1);
";

/// What has come with the stream must not come again by its trigger.
const AUDIT_SQL: &str = "
CREATE TABLE audit (n bigserial PRIMARY KEY, what text);
CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN INSERT INTO public.audit (what) VALUES (TG_OP || ' of ' || TG_TABLE_NAME); RETURN NULL; END $$;
";

fn table(dice: &mut StdRng, number: usize, types: &[Type], servers: &Servers, sql: &mut String) -> Table {
    let major = servers.source_major;
    let key = KEYS[dice.random_range(0..KEYS.len())];
    let name = if dice.random_ratio(1, 3) { format!("\"Table {number}\"") } else { format!("t{number}") };
    let pair = if servers.has("citext") && dice.random_ratio(1, 3) { "\"Types\".citext" } else { "text" };
    let mut lines = vec![match key {
        Key::Int | Key::WholeRow => "k int PRIMARY KEY".to_owned(),
        Key::Always => "k int GENERATED ALWAYS AS IDENTITY PRIMARY KEY".to_owned(),
        Key::Pair => format!("k int, kt {pair}, PRIMARY KEY (kt, k)"),
        Key::Numeric => "k numeric PRIMARY KEY".to_owned(),
        Key::Index => format!("k int NOT NULL CONSTRAINT identity_{number} UNIQUE"),
        Key::Full | Key::Nothing => "k int".to_owned(),
        Key::Deferred => "k int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED".to_owned(),
    }];
    let mut columns = Vec::new();
    let old = dice.random_ratio(1, 3);
    for index in 0..dice.random_range(1..8) {
        let column = match dice.random_range(0..24) {
            0..3 => LARGE,
            3 => HUGE,
            _ => types[dice.random_range(0..types.len())],
        };
        let column_name = if dice.random_ratio(1, 4) { format!("\"C {index}\"") } else { format!("c{index}") };
        if old && index == 1 {
            lines.push("gone text DEFAULT 'gone'".to_owned());
        }
        lines.push(format!("{column_name} {}", column.0));
        columns.push((column_name, column));
    }
    let unique = if dice.random_ratio(1, 3) { UNIQUES[dice.random_range(0..UNIQUES.len())] } else { Unique::Not };
    lines.extend(
        match unique {
            Unique::Not => None,
            Unique::Plain => Some("u int UNIQUE"),
            Unique::Deferred => Some("u int UNIQUE DEFERRABLE INITIALLY DEFERRED"),
            Unique::Deferrable => Some("u int UNIQUE DEFERRABLE"),
            Unique::Partial | Unique::Expression => Some("u int"),
            Unique::Exclusion => Some("u int, EXCLUDE (u WITH =)"),
            Unique::Nulls if major >= 15 => Some("u int UNIQUE NULLS NOT DISTINCT"),
            Unique::Nulls => Some("u int UNIQUE"),
        }
        .map(str::to_owned),
    );
    if major >= 12 && dice.random_ratio(1, 4) && key != Key::Numeric {
        lines.push("g int GENERATED ALWAYS AS (k * 2) STORED".to_owned());
    }
    if dice.random_ratio(1, 4) {
        lines.push("CHECK (k > -1000000)".to_owned());
    }
    let parent = matches!(key, Key::Int | Key::Pair | Key::Full) && dice.random_ratio(1, 3);
    if parent {
        let what = one_of(dice, &["", " DEFERRABLE", " ON DELETE CASCADE", " ON DELETE SET NULL ON UPDATE CASCADE"]);
        lines.push(format!("parent int REFERENCES base{what}"));
    }
    let truncates = dice.random();
    sql.push_str(&format!("CREATE TABLE {name} ({});\n", lines.join(", ")));
    match unique {
        Unique::Partial => sql.push_str(&format!("CREATE UNIQUE INDEX unique_{number} ON {name} (u) WHERE u > 0;\n")),
        Unique::Expression => sql.push_str(&format!("CREATE UNIQUE INDEX unique_{number} ON {name} (abs(u));\n")),
        Unique::Not | Unique::Plain | Unique::Deferred | Unique::Deferrable | Unique::Exclusion | Unique::Nulls => {}
    }
    match key {
        Key::Index => sql.push_str(&format!("ALTER TABLE {name} REPLICA IDENTITY USING INDEX identity_{number};\n")),
        Key::WholeRow | Key::Full => sql.push_str(&format!("ALTER TABLE {name} REPLICA IDENTITY FULL;\n")),
        Key::Int | Key::Always | Key::Pair | Key::Numeric | Key::Deferred | Key::Nothing => {}
    }
    if old {
        // Rows that were there before a column was dropped, and before another was added without being written.
        let also = if key == Key::Pair { ("k, kt", "g, 'old'") } else { ("k", "g") };
        sql.push_str(&format!(
            "INSERT INTO {name} ({}) OVERRIDING SYSTEM VALUE SELECT {} FROM generate_series(1, {}) g;
             ALTER TABLE {name} DROP COLUMN IF EXISTS gone; ALTER TABLE {name} ADD COLUMN late text DEFAULT 'late';\n",
            also.0,
            also.1,
            if unique == Unique::Nulls { 1 } else { 9 }
        ));
        columns.push(("late".to_owned(), ("text", text)));
    }
    for (column, (kind, _)) in &columns {
        if matches!(*kind, "text" | "bytea") {
            sql.push_str(&format!("ALTER TABLE {name} ALTER {column} SET STORAGE EXTERNAL;\n"));
        }
    }
    if !matches!(key, Key::Full | Key::Nothing) && dice.random_ratio(1, 4) {
        sql.push_str(&format!("CREATE INDEX ON {name} (k DESC) WHERE k > 5;\n"));
    }
    if dice.random_ratio(1, 4) {
        sql.push_str(&format!(
            "CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON {name} FOR EACH ROW EXECUTE PROCEDURE audit();
             CREATE TRIGGER emptied AFTER TRUNCATE ON {name} EXECUTE PROCEDURE audit();\n"
        ));
    }
    Table { name, key, columns, unique, parent, truncates }
}
