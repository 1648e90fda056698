//! SQL names: quoting, and pairs of schema and name.
//!
//! Every name is quoted always: a name that looks harmless (`user`, `order`) may be a reserved word in one of the two
//! majors and not in the other.

use std::fmt;

use serde::{Deserialize, Serialize};

/// `name` as a quoted SQL identifier.
pub fn quote_ident(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// `text` as a SQL string literal that means the same whatever `standard_conforming_strings` says.
pub fn quote_literal(text: &str) -> String {
    let quoted = text.replace('\'', "''");
    if quoted.contains('\\') { format!(" E'{}'", quoted.replace('\\', "\\\\")) } else { format!("'{quoted}'") }
}

/// A schema-qualified name; displays quoted, ready for SQL.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct QualifiedName {
    /// Schema, unquoted.
    pub schema: String,
    /// Name within the schema, unquoted.
    pub name: String,
}

impl QualifiedName {
    /// Both parts unquoted, as the catalogues hold them.
    pub fn new(schema: impl Into<String>, name: impl Into<String>) -> Self {
        Self { schema: schema.into(), name: name.into() }
    }
}

impl fmt::Display for QualifiedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", quote_ident(&self.schema), quote_ident(&self.name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_literals_survive_quotes_and_backslashes() {
        assert_eq!(quote_ident("Größe \"x\""), "\"Größe \"\"x\"\"\"");
        assert_eq!(quote_literal("it's"), "'it''s'");
        assert_eq!(quote_literal("a\\b'c"), " E'a\\\\b''c'");
        assert_eq!(QualifiedName::new("s", "T").to_string(), "\"s\".\"T\"");
    }
}
