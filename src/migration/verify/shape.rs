//! What a value is made of, where floating point numbers are inside of it, as SQL that shows every one of them exactly. Pure.
//!
//! Up to PostgreSQL 11 a number is shown with as many digits as it is told, from 12 on with the fewest that read back the same,
//! and no setting makes the two agree but one that leaves the last digits out. The binary form is the same everywhere, but
//! that of composite types and arrays holds numbers of types, which differ. So such a value is taken apart, and each number in
//! it is written in binary form by itself.

use crate::ident::quote_ident;

/// How a value of a type is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shape {
    /// A number, or a type that is made of a fixed number of them: its name in `pg_catalog`.
    Number(String),
    /// Of any number of dimensions; its elements.
    Array(Box<Shape>),
    /// Its columns in their order.
    Composite(Vec<(String, Shape)>),
    /// Its bounds.
    Range(Box<Shape>),
    /// Quoted name of the type under a domain, and what that is.
    Domain(String, Box<Shape>),
    /// Holds none: its output function, quoted and with its schema.
    Other(String),
}

impl Shape {
    /// Whether there can be a floating point number in it.
    pub fn holds_numbers(&self) -> bool {
        match self {
            Self::Number(_) => true,
            Self::Array(of) | Self::Range(of) | Self::Domain(_, of) => of.holds_numbers(),
            Self::Composite(columns) => columns.iter().any(|(_, shape)| shape.holds_numbers()),
            Self::Other(_) => false,
        }
    }

    /// An expression of type `text` for `value`, which is NULL where that is. A composite value of NULLs is no NULL.
    pub fn text(&self, value: &str) -> String {
        match self {
            Self::Number(name) => format!("encode({}, 'hex')", send(name, value)),
            Self::Array(of) => {
                let each = format!(
                    "CASE WHEN {value} IS NOT NULL THEN concat(array_dims({value}), \
                     (SELECT array_agg({})::text FROM (SELECT unnest({value}) AS v) AS e)) END",
                    of.text("e.v")
                );
                match &**of {
                    // The number of its type is the same everywhere.
                    Self::Number(name) if name.starts_with("float") => format!(
                        "CASE WHEN 'NaN'::{name} = ANY ({value}) THEN {each} ELSE encode(array_send({value}), 'hex') END"
                    ),
                    _ => each,
                }
            }
            Self::Composite(columns) => {
                let columns: Vec<String> = columns
                    .iter()
                    .map(|(name, shape)| shape.text(&format!("({value}).{}", quote_ident(name))))
                    .collect();
                format!("CASE WHEN textin(record_out({value})) IS NOT NULL THEN ROW({})::text END", columns.join(", "))
            }
            Self::Range(of) => format!(
                "CASE WHEN {value} IS NOT NULL THEN ROW(isempty({value}), lower_inc({value}), upper_inc({value}), \
                 {}, {})::text END",
                of.text(&format!("lower({value})")),
                of.text(&format!("upper({value})"))
            ),
            Self::Domain(base, of) => of.text(&format!("({value}::{base})")),
            Self::Other(output) => format!("textin({output}({value}))"),
        }
    }
}

/// The binary form of numbers. One that is not a number has a sign, which no text shows and no stream carries.
fn send(name: &str, value: &str) -> String {
    match name {
        "float4" | "float8" => {
            format!("{name}send(CASE WHEN {value} = 'NaN' THEN 'NaN'::{name} ELSE {value}::{name} END)")
        }
        "polygon" => format!("poly_send({value})"),
        geometric => format!("{geometric}_send({value})"),
    }
}

/// Whether a type of `pg_catalog` is a number, or a fixed number of them.
pub fn is_number(name: &str) -> bool {
    ["float4", "float8", "point", "lseg", "path", "box", "polygon", "line", "circle"].contains(&name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_taken_apart_down_to_its_numbers() {
        let number = || Shape::Number("float8".to_owned());
        let columns = vec![
            ("a\"b".to_owned(), Shape::Domain("\"s\".\"d\"".to_owned(), Box::new(number()))),
            ("t".to_owned(), Shape::Other("\"pg_catalog\".\"textout\"".to_owned())),
        ];
        let shape = Shape::Array(Box::new(Shape::Composite(columns)));
        assert!(shape.holds_numbers() && !Shape::Array(Box::new(Shape::Other(String::new()))).holds_numbers());
        assert_eq!(
            shape.text("\"c\""),
            "CASE WHEN \"c\" IS NOT NULL THEN concat(array_dims(\"c\"), (SELECT array_agg(\
             CASE WHEN textin(record_out(e.v)) IS NOT NULL THEN ROW(\
             encode(float8send(CASE WHEN ((e.v).\"a\"\"b\"::\"s\".\"d\") = 'NaN' THEN 'NaN'::float8 \
             ELSE ((e.v).\"a\"\"b\"::\"s\".\"d\")::float8 END), 'hex'), \
             textin(\"pg_catalog\".\"textout\"((e.v).\"t\")))::text END\
             )::text FROM (SELECT unnest(\"c\") AS v) AS e)) END"
        );
        assert_eq!(
            Shape::Range(Box::new(Shape::Number("point".to_owned()))).text("r"),
            "CASE WHEN r IS NOT NULL THEN ROW(isempty(r), lower_inc(r), upper_inc(r), \
             encode(point_send(lower(r)), 'hex'), encode(point_send(upper(r)), 'hex'))::text END"
        );
        // The one that is not called as its type is.
        assert_eq!(Shape::Number("polygon".to_owned()).text("p"), "encode(poly_send(p), 'hex')");
    }
}
