//! Random changes of definitions, for a source whose changes are carried over. Many fail, because what they name is not
//! there at the moment.

use rand::Rng as _;
use rand::rngs::StdRng;

use crate::schema::Table;

/// Columns and tables that come and go have these numbers.
const NUMBERS: i32 = 3;

/// A type, and a constant of it.
const COLUMNS: [(&str, &str); 6] = [
    ("int", "7"),
    ("text", "'it''s; new'"),
    ("\"Types\".mood", "'sad'"),
    ("numeric(20, 2)", "1.5"),
    ("jsonb", "'{\"a\": 1}'"),
    ("\"Types\".pairs", "NULL"),
];

/// A statement, or several that belong together.
pub fn statement(tables: &[Table], dice: &mut StdRng) -> String {
    let name = &tables[dice.random_range(0..tables.len())].name;
    let (number, key) = (dice.random_range(0..NUMBERS), dice.random_range(0..60));
    let (kind, value) = COLUMNS[dice.random_range(0..COLUMNS.len())];
    match dice.random_range(0..17) {
        0 => format!("ALTER TABLE {name} ADD COLUMN x{number} {kind}"),
        1 => format!("ALTER TABLE {name} ADD COLUMN x{number} {kind} DEFAULT {value}"),
        2 => format!("ALTER TABLE {name} DROP COLUMN x{number}"),
        3 => format!("ALTER TABLE {name} RENAME COLUMN x{number} TO x{}", (number + 1) % NUMBERS),
        4 => format!("ALTER TABLE {name} ALTER COLUMN x{number} TYPE text"),
        5 => format!("UPDATE {name} SET x{number} = {value} WHERE k % 5 = {}", key % 5),
        6 => format!("CREATE TABLE made_{number} (k int PRIMARY KEY, v {kind})"),
        7 => format!(
            "INSERT INTO made_{number} SELECT g FROM generate_series({key}, {key} + 3) g ON CONFLICT DO NOTHING"
        ),
        8 => format!(
            "CREATE TABLE made_{number} (k int, v {kind}); INSERT INTO made_{number} VALUES (1, {value}), (1, {value})"
        ),
        9 => format!("UPDATE made_{number} SET v = NULL WHERE k = {key}; DELETE FROM made_{number} WHERE k % 4 = 1"),
        10 => format!("DROP TABLE made_{number}"),
        11 => format!("CREATE INDEX made_index_{number} ON {name} (k)"),
        12 => format!("DROP INDEX made_index_{number}"),
        13 => format!("ALTER TABLE {name} ADD CONSTRAINT made_check_{number} CHECK (k > -2000000)"),
        14 => format!("ALTER TABLE {name} DROP CONSTRAINT made_check_{number}"),
        15 => "CREATE TABLE parts_3 PARTITION OF parts (PRIMARY KEY (k)) FOR VALUES IN (3)".to_owned(),
        _ => format!("INSERT INTO parts VALUES ({key}, 3, 'new'); UPDATE parts SET region = 0 WHERE k = {key}"),
    }
}
