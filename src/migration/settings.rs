//! Settings of databases and roles as `pg_db_role_setting` holds them, back into SQL. Pure.
//!
//! A list of quoted names (`search_path`) is stored as it is printed; given back as one literal it would become one
//! strange name. `makeAlterConfigCommand` in PostgreSQL's `dumputils.c` has the same list of such parameters.

use crate::ident::{quote_ident, quote_literal};

/// Parameters whose value is a list of quoted names (`GUC_LIST_QUOTE`).
const QUOTED_LISTS: &[&str] = &[
    "local_preload_libraries",
    "search_path",
    "session_preload_libraries",
    "shared_preload_libraries",
    "temp_tablespaces",
    "unix_socket_directories",
];

/// One `name=value` of `setconfig`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Setting {
    pub(super) name: String,
    value: String,
}

impl Setting {
    /// Reads `name=value`.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (name, value) = text.split_once('=')?;
        Some(Self { name: name.to_owned(), value: value.to_owned() })
    }

    /// `SET "name" TO value`, to stand behind `ALTER DATABASE x` or `ALTER ROLE x`.
    pub(super) fn clause(&self) -> String {
        let name = quote_ident(&self.name);
        if !QUOTED_LISTS.contains(&self.name.to_lowercase().as_str()) {
            return format!("SET {name} TO {}", quote_literal(&self.value));
        }
        let names: Vec<String> = split_names(&self.value).iter().map(|name| quote_literal(name)).collect();
        // An empty list is an empty name in SQL.
        let list = if names.is_empty() { "''".to_owned() } else { names.join(", ") };
        format!("SET {name} TO {list}")
    }

    /// Whether the parameter belongs to an extension or to the application, and so need not be known to the server.
    pub(super) fn is_custom(&self) -> bool {
        self.name.contains('.')
    }
}

/// `"$user", public` as its names.
fn split_names(list: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut name = String::new();
    let mut quoted = false;
    let mut any = false;
    let mut chars = list.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '"' if quoted && chars.peek() == Some(&'"') => {
                chars.next();
                name.push('"');
            }
            '"' => {
                quoted = !quoted;
                any = true;
            }
            ',' if !quoted => names.push(std::mem::take(&mut name)),
            c if !quoted && c.is_whitespace() => {}
            c => {
                any = true;
                name.push(c);
            }
        }
    }
    if any || !names.is_empty() {
        names.push(name);
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clause(text: &str) -> String {
        Setting::parse(text).expect("name=value").clause()
    }

    #[test]
    fn lists_of_names_stay_lists() {
        assert_eq!(clause("search_path=\"$user\", public"), "SET \"search_path\" TO '$user', 'public'");
        assert_eq!(clause("search_path=\"a, \"\"b\"\"\",c"), "SET \"search_path\" TO 'a, \"b\"', 'c'");
        assert_eq!(clause("search_path=\"\""), "SET \"search_path\" TO ''");
        assert_eq!(clause("search_path="), "SET \"search_path\" TO ''");
    }

    #[test]
    fn other_values_are_one_literal() {
        assert_eq!(clause("app.tenant=a=b, 'c'"), "SET \"app.tenant\" TO 'a=b, ''c'''");
        assert_eq!(clause("DateStyle=ISO, DMY"), "SET \"DateStyle\" TO 'ISO, DMY'");
        assert!(Setting::parse("app.tenant=1").expect("valid").is_custom());
    }
}
