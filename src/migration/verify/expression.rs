//! SQL that turns a row into 64 bits which are the same on two servers exactly when the row is. Pure.
//!
//! Every column goes through its type's *output function*, under the settings that our sessions pin: what a server shows
//! of a value is all there is to it, trailing zeros and the sign of a zero included. No comparison operator of a type and
//! no collation takes part: `1.0 = 1.00`, and two servers sort text each in its own way.
//!
//! | | majors 11 and later | where one server is 10, or the two disagree |
//! | --- | --- | --- |
//! | hash | `hashtextextended`, each column seeded by the last; whole numbers go into the seed as they are | the first 64 bits of `md5` of the row's text in UTF-8 |
//! | NULL | a word of 128 random bits, chosen for the run; in the seed a number of 64 | as a row's text has it |
//!
//! `hashint8extended` and what is built on it (time stamps) are no use: they fold 64 bits into 32 first. A seed is mixed in with
//! all its 64 bits (`hash_bytes_uint32_extended`), so a number that is made one loses none; that saves writing it as text.
//!
//! PostgreSQL 12 began to show floating point numbers by their shortest form that reads back the same. Between servers
//! before and after that, values that hold any are taken apart, and the numbers are compared in binary form ([`super::shape`]).

use super::shape::Shape;
use crate::ident::quote_ident;

/// Columns that seed each other; further ones begin anew, because a server's parser goes only so deep.
const CHAIN: usize = 64;

/// A column of one of the two servers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    /// Its name.
    pub name: String,
    /// `format_type`, to see whether the two servers agree.
    pub type_name: String,
    /// Name of the type under any domains, with `pg_catalog` left out: `int8`, `_float8`; of other types with schema.
    /// Unquoted: what is a keyword, and would be quoted, differs between majors.
    pub base: String,
    /// The base type's output function, quoted and with its schema.
    pub output: String,
    /// What the base type is made of, where that holds floating point numbers and the servers write them differently.
    pub shape: Option<Shape>,
    /// The base type, quoted and with its schema, where the column is of a domain over it: functions for any enum, any range
    /// or any record do not take a domain.
    pub domain_over: Option<String>,
}

impl Column {
    /// Its value in rows of `alias`, as the type whose output function this has.
    pub fn value(&self, alias: Option<&str>) -> String {
        let name = quote_ident(&self.name);
        let name = alias.map_or(name.clone(), |alias| format!("{alias}.{name}"));
        match &self.domain_over {
            Some(base) => format!("({name}::{base})"),
            None => name,
        }
    }

    /// Its value as text, NULL included.
    pub fn shown(&self, alias: Option<&str>) -> String {
        format!("textin({}({}))", self.output, self.value(alias))
    }

    /// Of a type that is there on every server.
    pub fn is_built_in(&self) -> bool {
        !self.base.is_empty() && !self.base.contains('.')
    }
}

/// How both servers hash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Method {
    /// `hashtextextended`; the word stands for NULL.
    Extended {
        /// Not to be met in any data.
        null_word: String,
        /// The same among whole numbers; none that fits into 32 bits.
        null_number: i64,
    },
    /// `md5`
    Md5,
}

/// How floating point numbers are written on the two servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Floats {
    /// In the same way.
    Alike,
    /// One is older than PostgreSQL 12.
    Apart,
}

/// Builds expressions for one pair of servers.
#[derive(Clone, Debug)]
pub struct Hasher {
    /// How both hash.
    pub method: Method,
    /// How they write numbers.
    pub floats: Floats,
}

impl Hasher {
    /// An expression of type `bigint` over these columns, in this order.
    pub fn hash<'a>(&self, columns: impl IntoIterator<Item = &'a Column>) -> String {
        let columns: Vec<&Column> = columns.into_iter().collect();
        match &self.method {
            Method::Md5 => {
                let row: Vec<String> = columns.iter().map(|column| self.text(column)).collect();
                let row = row.join(", ");
                format!("('x' || substr(md5(convert_to(ROW({row})::text, 'UTF8')), 1, 16))::bit(64)::bigint")
            }
            Method::Extended { null_word, null_number } => {
                let step = |seed: String, column: &&Column| match whole_number(column) {
                    Some(number) => {
                        format!("hashint4extended(0, coalesce({number}, '{null_number}'::bigint) # {seed})")
                    }
                    None => {
                        let text = self.text(column);
                        format!("hashtextextended(coalesce({text}, '{null_word}') COLLATE \"C\", {seed})")
                    }
                };
                let chain =
                    |(index, columns): (usize, &[&Column])| columns.iter().fold(format!("{}::bigint", index + 1), step);
                let chains: Vec<String> = columns.chunks(CHAIN).enumerate().map(chain).collect();
                match chains.as_slice() {
                    [] => "0::bigint".to_owned(),
                    [one] => one.clone(),
                    many => format!("hashtextextended(ROW({})::text COLLATE \"C\", 0)", many.join(", ")),
                }
            }
        }
    }

    /// An expression of type `text` that is NULL where the column is.
    pub fn text(&self, column: &Column) -> String {
        let name = column.value(None);
        if let (Floats::Apart, Some(shape)) = (self.floats, &column.shape) {
            return shape.text(&name);
        }
        match column.base.as_str() {
            // No copy of the value is made.
            "text" | "varchar" => format!("{name}::text"),
            // A hash of 128 bits instead of two characters for each byte.
            "bytea" => format!("md5({name}::bytea)"),
            // These are shorter to write in their binary form than in text, and it has not changed since version 10.
            "timestamp" => format!("encode(timestamp_send({name}), 'hex')"),
            "timestamptz" => format!("encode(timestamptz_send({name}), 'hex')"),
            _ => column.shown(None),
        }
    }

    /// A column of a key as an operator reads it, and as a repair finds the row by it. A type that is not built in is looked up
    /// by this text on both servers, which show it alike only with the last digits left out.
    pub fn key_text(&self, column: &Column) -> String {
        if column.is_built_in() { self.exact(column, None) } else { column.shown(None) }
    }

    /// A column as text that reads back the same. Where the servers write numbers differently, sessions are set to leave the
    /// last digits out, so that what is not taken apart can be compared: they are shown for this value, and left out again
    /// behind it. Elements of an array are evaluated in their order.
    pub fn exact(&self, column: &Column, alias: Option<&str>) -> String {
        let shown = column.shown(alias);
        if self.floats == Floats::Alike || (column.is_built_in() && column.shape.is_none()) {
            return shown;
        }
        let set = |digits: u8| format!("set_config('extra_float_digits', '{digits}', true)");
        format!("(ARRAY[{}, {shown}, {}])[2]", set(3), set(0))
    }
}

/// A column that holds whole numbers, as `bigint`. What its text says is the number and nothing else.
fn whole_number(column: &Column) -> Option<String> {
    let name = quote_ident(&column.name);
    match column.base.as_str() {
        "int2" | "int4" | "int8" | "oid" => Some(format!("{name}::bigint")),
        "bool" => Some(format!("{name}::int::bigint")),
        _ => None,
    }
}

/// Makes the columns that both have alike to those of the target: where the types are not the same, both go by their
/// text alone.
pub fn reconcile(source: &[Column], target: &[Column]) -> (Vec<Column>, Vec<Column>) {
    let plain = |column: &Column| Column { base: String::new(), shape: None, ..column.clone() };
    source
        .iter()
        .filter_map(|from| {
            let to = target.iter().find(|to| to.name == from.name)?;
            Some(if from.base == to.base { (from.clone(), to.clone()) } else { (plain(from), plain(to)) })
        })
        .unzip()
}

#[cfg(test)]
mod tests {
    use super::super::shape::is_number;
    use super::*;

    fn column(name: &str, base: &str) -> Column {
        Column {
            name: name.to_owned(),
            type_name: base.to_owned(),
            base: base.to_owned(),
            output: format!("\"pg_catalog\".\"{base}out\""),
            shape: is_number(base).then(|| Shape::Number(base.to_owned())),
            domain_over: None,
        }
    }

    #[test]
    fn a_column_of_a_domain_is_read_as_what_is_under_it() {
        let over = |base: &str| Column { domain_over: Some(base.to_owned()), ..column("m", "s.mood") };
        let hasher = Hasher { method: Method::Md5, floats: Floats::Alike };
        let mood = Column { output: "\"pg_catalog\".\"enum_out\"".to_owned(), ..over("\"s\".\"mood\"") };
        let text = "textin(\"pg_catalog\".\"enum_out\"((\"m\"::\"s\".\"mood\")))";
        assert_eq!((hasher.text(&mood), hasher.key_text(&mood)), (text.to_owned(), text.to_owned()));
        assert!(mood.shown(Some("t")).contains("((t.\"m\"::\"s\".\"mood\"))"));
    }

    #[test]
    fn what_is_written_back_has_all_of_its_digits() {
        let apart = Hasher { method: Method::Md5, floats: Floats::Apart };
        let exact = "(ARRAY[set_config('extra_float_digits', '3', true), textin(\"pg_catalog\".\"float8out\"(t.\"f\")), \
                     set_config('extra_float_digits', '0', true)])[2]";
        assert_eq!(apart.exact(&column("f", "float8"), Some("t")), exact);
        let cube = column("c", "s.cube");
        assert!(apart.exact(&cube, None).contains("set_config"), "nobody knows what is in it");
        assert!(!apart.key_text(&cube).contains("set_config"), "compared as text on both servers");
        assert!(!apart.exact(&column("i", "int4"), None).contains("set_config"));
        let alike = Hasher { floats: Floats::Alike, ..apart };
        assert_eq!(alike.exact(&column("f", "float8"), None), "textin(\"pg_catalog\".\"float8out\"(\"f\"))");
    }

    #[test]
    fn columns_seed_each_other_and_null_is_a_word() {
        let method = Method::Extended { null_word: "W".to_owned(), null_number: -1 };
        let hasher = Hasher { method, floats: Floats::Alike };
        assert_eq!(
            hasher.hash(&[column("a", "int4"), column("b\"c", "text"), column("d", "numeric")]),
            "hashtextextended(coalesce(textin(\"pg_catalog\".\"numericout\"(\"d\")), 'W') COLLATE \"C\", \
             hashtextextended(coalesce(\"b\"\"c\"::text, 'W') COLLATE \"C\", \
             hashint4extended(0, coalesce(\"a\"::bigint, '-1'::bigint) # 1::bigint)))"
        );
        assert_eq!(hasher.hash(&[]), "0::bigint");
        let many: Vec<Column> = (0..65).map(|number| column(&format!("c{number}"), "text")).collect();
        assert!(hasher.hash(&many).starts_with("hashtextextended(ROW(hashtextextended("));
        let plain = Column { base: String::new(), ..column("a", "int4") };
        assert!(hasher.hash(&[plain]).starts_with("hashtextextended("), "where the types differ, the text counts");
    }

    #[test]
    fn numbers_go_in_binary_form_where_the_servers_write_them_differently() {
        let hasher = Hasher { method: Method::Md5, floats: Floats::Apart };
        let sql = hasher.hash(&[column("f", "float8"), column("p", "point"), column("i", "int4")]);
        assert!(sql.contains("encode(float8send(CASE WHEN \"f\" = 'NaN'"), "{sql}");
        assert!(sql.contains("encode(point_send(\"p\"), 'hex'), textin("), "{sql}");
        let alike = Hasher { floats: Floats::Alike, ..hasher };
        assert!(!alike.hash(&[column("f", "float8")]).contains("send"));
    }

    #[test]
    fn different_types_are_compared_as_text_and_missing_columns_not_at_all() {
        let (from, to) = reconcile(
            &[column("a", "timestamp"), column("b", "text"), column("gone", "int4")],
            &[column("b", "text"), column("a", "timestamptz")],
        );
        let names = |columns: &[Column]| columns.iter().map(|column| column.name.clone()).collect::<Vec<_>>();
        assert_eq!((names(&from), names(&to)), (vec!["a".to_owned(), "b".to_owned()], names(&from)));
        assert_eq!((from[0].base.as_str(), to[0].base.as_str(), from[1].base.as_str()), ("", "", "text"));
    }
}
