//! Maps from names in certificates to roles, in the form of pg_ident.conf (PostgreSQL documentation, "User Name Maps").
//!
//! ```text
//! # MAPNAME   SYSTEM-USERNAME             PG-USERNAME
//! people      "Ann Smith"                 ann
//! services    /^(.*)\.svc\.example\.org$  \1
//! ```
//!
//! A name that begins with `/` is a regular expression, and `\1` in the role's name is what its first group matched.

use std::collections::HashMap;

use regex_lite::Regex;

use super::hba::{Token, read_lines};

/// Every map, by name.
#[derive(Debug, Default)]
pub(in crate::proxy) struct UserMaps(HashMap<String, Vec<Entry>>);

#[derive(Debug)]
struct Entry {
    system: SystemName,
    role: RoleName,
}

#[derive(Debug)]
enum SystemName {
    Exact(String),
    Pattern(Regex),
}

#[derive(Debug)]
enum RoleName {
    All,
    Exact(String),
}

impl UserMaps {
    /// Reads a file. Every line that cannot be used is named with its number.
    pub(in crate::proxy) fn parse(text: &str) -> Result<Self, Vec<(usize, String)>> {
        let (mut maps, mut problems) = (Self::default(), Vec::new());
        for line in read_lines(text) {
            match line.fields.and_then(|fields| entry(&fields)) {
                Ok((map, entry)) => maps.0.entry(map).or_default().push(entry),
                Err(message) => problems.push((line.number, message)),
            }
        }
        if problems.is_empty() { Ok(maps) } else { Err(problems) }
    }

    /// Whether there is a map of this name.
    pub(in crate::proxy) fn has(&self, map: &str) -> bool {
        self.0.contains_key(map)
    }

    /// Whether somebody who is called `system` elsewhere may be `role` here.
    pub(in crate::proxy) fn lets(&self, map: Option<&str>, system: &str, role: &str) -> bool {
        match map {
            None => system == role,
            Some(map) => self.0.get(map).is_some_and(|entries| entries.iter().any(|entry| entry.lets(system, role))),
        }
    }
}

impl Entry {
    fn lets(&self, system: &str, role: &str) -> bool {
        let group = match &self.system {
            SystemName::Exact(name) if name == system => None,
            SystemName::Pattern(pattern) => match pattern.captures(system) {
                Some(found) => found.get(1).map(|group| group.as_str().to_owned()),
                None => return false,
            },
            SystemName::Exact(_) => return false,
        };
        match (&self.role, group) {
            (RoleName::All, _) => true,
            (RoleName::Exact(name), Some(group)) => name.replacen("\\1", &group, 1) == role,
            (RoleName::Exact(name), None) => name == role,
        }
    }
}

fn entry(fields: &[Vec<Token>]) -> Result<(String, Entry), String> {
    let single = |index: usize, what: &str| match fields.get(index).map(Vec::as_slice) {
        Some([token]) => Ok(token),
        Some(_) => Err(format!("multiple values in the {what}")),
        None => Err(format!("missing entry at end of line: the {what}")),
    };
    let (map, system, role) = (single(0, "map's name")?, single(1, "system user name")?, single(2, "role")?);
    if map.text.starts_with("include") {
        return Err("included files are not read: write the lines here".to_owned());
    }
    if fields.len() > 3 {
        return Err(format!("more than three entries, beginning with {:?}", fields[3][0].text));
    }
    if role.after('+').is_some() {
        return Err("groups of roles are not known here: list the roles".to_owned());
    }
    let system = match system.text.strip_prefix('/') {
        Some(pattern) => SystemName::Pattern(
            Regex::new(pattern).map_err(|error| format!("invalid regular expression {pattern:?}: {error}"))?,
        ),
        None => SystemName::Exact(system.text.clone()),
    };
    if let (SystemName::Pattern(pattern), true) = (&system, role.text.contains("\\1"))
        && pattern.captures_len() < 2
    {
        return Err(format!(
            "regular expression {:?} has no subexpressions as requested by backreference in {:?}",
            pattern.as_str(),
            role.text
        ));
    }
    let role = if role.is_keyword("all") { RoleName::All } else { RoleName::Exact(role.text.clone()) };
    Ok((map.text.clone(), Entry { system, role }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = r#"
people    "Ann Smith"                    ann
people    "Ann Smith"                    reader   # two roles
people    carl                           "Carl"
services  /^(.*)\.svc\.example\.org$     \1
services  /^cn=root                      postgres
open      "x y"                          all
open      quoted                         "all"
"#;

    #[test]
    fn a_name_may_be_the_roles_that_its_map_lists() {
        let maps = UserMaps::parse(FILE).expect("valid");
        for (map, system, role, expected) in [
            (None, "ann", "ann", true),
            (None, "Ann", "ann", false),
            (Some("people"), "Ann Smith", "ann", true),
            (Some("people"), "Ann Smith", "reader", true),
            (Some("people"), "Ann Smith", "Carl", false),
            (Some("people"), "ann", "ann", false),
            (Some("people"), "carl", "Carl", true),
            (Some("people"), "carl", "carl", false),
            (Some("services"), "shop.svc.example.org", "shop", true),
            (Some("services"), "shop.svc.example.org", "till", false),
            (Some("services"), "shop.svc.example.org.evil", "shop", false),
            (Some("services"), "cn=root,o=x", "postgres", true),
            (Some("open"), "x y", "anybody", true),
            (Some("open"), "quoted", "anybody", false),
            (Some("open"), "quoted", "all", true),
            (Some("nowhere"), "ann", "ann", false),
        ] {
            assert_eq!(maps.lets(map, system, role), expected, "{map:?} {system} as {role}");
        }
    }

    #[test]
    fn what_cannot_be_used_is_named_with_its_line() {
        for (line, expected) in [
            ("m a", "missing entry at end of line: the role"),
            ("m a,b c", "multiple values in the system user name"),
            ("m a b c", "more than three entries, beginning with \"c\""),
            ("m /( b", "invalid regular expression \"(\""),
            ("m /^x$ \\1", "regular expression \"^x$\" has no subexpressions"),
            ("m a +b", "groups of roles"),
            ("include x y", "included files"),
        ] {
            let problems = UserMaps::parse(&format!("ok a b\n{line}")).expect_err(line);
            assert_eq!(problems[0].0, 2, "{line}");
            assert!(problems[0].1.starts_with(expected), "{line}: {problems:?}");
        }
    }
}
