//! Rules about what a database uses and the target does not know: because of its version, or because of what it was built
//! with. Locales have rules of their own.

use std::collections::HashSet;

use tokio_postgres::error::SqlState;

use super::database::{Database, Finding};
use super::definition::{Apply, Definition};
use super::{Outcome, RuleResult, column};
use crate::postgres::Control;

/// Definitions with user collations of ICU.
const ICU: &str = "\
SELECT format('collation %I.%I is of ICU', n.nspname, l.collname) FROM pg_collation l JOIN pg_namespace n ON n.oid = l.collnamespace
 WHERE l.collprovider = 'i' AND l.oid >= 16384 ORDER BY 1";

const LZ4: &str = "\
SELECT format('%I.%I.%I is compressed by lz4', n.nspname, c.relname, a.attname) FROM pg_attribute a
  JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE a.attcompression = 'l' AND NOT a.attisdropped AND c.relkind IN ('r', 'p', 'm')
   AND n.nspname NOT IN ('information_schema', 'pgcutover') AND n.nspname !~ '^pg_' ORDER BY 1";

/// A catalogue does not tell which functions of the system a view calls: its text does.
const XML: &str = "\
SELECT format('%I.%I uses xml', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND n.nspname NOT IN ('information_schema', 'pgcutover') AND n.nspname !~ '^pg_'
   AND (EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND a.atttypid IN ('xml'::regtype, 'xml[]'::regtype)
                   AND NOT a.attisdropped)
        OR c.relkind IN ('v', 'm')
           AND pg_get_viewdef(c.oid) ~* '\\mxml(table|element|forest|concat|agg|parse|serialize|exists|root|pi|comment)? *\\(')
 ORDER BY 1";

/// Columns that are computed in a child and not in its parent, or the other way round.
const GENERATED: &str = "\
SELECT format('%I.%I.%I', n.nspname, c.relname, a.attname) FROM pg_inherits i
  JOIN pg_class c ON c.oid = i.inhrelid JOIN pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_attribute a ON a.attrelid = c.oid AND NOT a.attisdropped
  JOIN pg_attribute p ON p.attrelid = i.inhparent AND p.attname = a.attname AND NOT p.attisdropped
 WHERE a.attgenerated <> p.attgenerated AND c.relkind IN ('r', 'p') ORDER BY 1";

/// Partitions that number their rows themselves. From 17 on the partitioned table has the identity, and its partitions with it.
const IDENTITIES: &str = "\
SELECT format('%I.%I.%I', n.nspname, c.relname, a.attname),
       format('ALTER TABLE %I.%I ALTER COLUMN %I DROP IDENTITY', n.nspname, c.relname, a.attname) FROM pg_class c
  JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a ON a.attrelid = c.oid AND NOT a.attisdropped
 WHERE a.attidentity <> '' AND c.relispartition ORDER BY 1";

/// Words that cannot be the name of a column without double quotes.
const RESERVED: &str = "SELECT word::text FROM pg_get_keywords() WHERE catcode IN ('R', 'T')";

/// What has one of the names $1, and is written without its schema.
const NAMED: &str = "\
SELECT format('%I.%I.%I', n.nspname, c.relname, a.attname) FROM pg_attribute a
  JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE a.attname::text = ANY ($1) AND a.attnum > 0 AND NOT a.attisdropped
   AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'c') AND n.nspname NOT IN ('information_schema', 'pgcutover') AND n.nspname !~ '^pg_'
 UNION ALL
SELECT DISTINCT format('argument %I of %s', u.name, p.oid::regprocedure) FROM pg_proc p
  JOIN pg_namespace n ON n.oid = p.pronamespace CROSS JOIN unnest(p.proargnames) AS u (name)
 WHERE u.name = ANY ($1) AND n.nspname NOT IN ('information_schema', 'pgcutover') AND n.nspname !~ '^pg_' ORDER BY 1";

const BUILD_FEATURES: Definition = Definition {
    code: "build_features",
    why: "these definitions need something that the target was not built with",
    evidence: "collations of ICU, columns that are compressed by lz4, and relations that use xml, where the target has none of it",
    fix: "use programs on the target that were built with it, or do without: ALTER TABLE … ALTER COLUMN … SET COMPRESSION \
          pglz, DROP COLLATION",
    ..Finding::DEFINITION
};

const GENERATED_CHILDREN: Definition = Definition {
    code: "generated_children",
    why: "PostgreSQL 16 and newer refuse a column that is generated in a child table and not in its parent",
    evidence: "the columns, where the target is so new",
    fix: "ALTER TABLE … NO INHERIT, or drop the child's column or its expression",
    ..Finding::DEFINITION
};

const IDENTITY_COLUMNS: Definition = Definition {
    code: "identity_columns",
    why: "PostgreSQL 17 and newer refuse to attach a partition with an identity column of its own",
    evidence: "the columns, where the target is so new and the source is older",
    fix: "ALTER TABLE … ALTER COLUMN … DROP IDENTITY; where rows are inserted into the partition itself, SET DEFAULT nextval(…) of a \
          sequence",
    apply: Apply::Refused("what inserts into the partition without a number would fail"),
    ..Finding::DEFINITION
};

const RESERVED_WORDS: Definition = Definition {
    code: "reserved_words",
    worst: Outcome::Warning,
    why: "the target takes these names for words of SQL where they stand without double quotes (system_user, from \
          PostgreSQL 16 on): definitions keep their meaning, but statements of the application and bodies of \
          functions fail there, or come to something else without an error",
    evidence: "columns and arguments whose name the target reserves and the source does not",
    fix: "write the names in double quotes wherever statements and functions use them, or ALTER TABLE … RENAME COLUMN",
    ..Finding::DEFINITION
};

pub(super) const DEFINITIONS: [&Definition; 4] =
    [&BUILD_FEATURES, &GENERATED_CHILDREN, &IDENTITY_COLUMNS, &RESERVED_WORDS];

impl Database<'_> {
    /// All of them.
    pub(super) async fn unknown(&self) -> Vec<RuleResult> {
        let (features, generated) = (self.rule(&BUILD_FEATURES), self.rule(&GENERATED_CHILDREN));
        let reserved = self.rule(&RESERVED_WORDS);
        let target = self.servers.target;
        vec![
            match missing_features(&self.session, target).await {
                Ok(found) => features.unless_any(Outcome::Failed, found),
                Err(error) => features.unknown(&error),
            },
            match generated_children(&self.session, target).await {
                Ok(found) => generated.unless_any(Outcome::Failed, found),
                Err(error) => generated.unknown(&error),
            },
            self.identity_columns().await,
            match reserved_words(&self.session, target).await {
                Ok(found) => reserved.unless_any(Outcome::Warning, found),
                Err(error) => reserved.unknown(&error),
            },
        ]
    }
}

impl Database<'_> {
    async fn identity_columns(&self) -> RuleResult {
        let rule = self.rule(&IDENTITY_COLUMNS);
        if self.session.version_num() >= 170_000 || self.servers.target.version_num() < 170_000 {
            return rule.succeeded();
        }
        match self.session.query(IDENTITIES, &[]).await {
            Ok(rows) => {
                let statements = rows.iter().map(|row| self.statement(row.get::<_, String>(1))).collect();
                let found = rows.iter().map(|row| row.get(0)).collect();
                rule.mended_by(statements).unless_any(Outcome::Failed, found)
            }
            Err(error) => rule.unknown(&error),
        }
    }
}

/// What a server was built with.
#[derive(Clone, Copy, Debug)]
struct Features {
    icu: bool,
    lz4: bool,
    xml: bool,
}

impl Features {
    async fn of(target: &Control) -> Result<Self, tokio_postgres::Error> {
        // initdb makes it where the programs were built with ICU; `unicode` is there in any case.
        let icu = target.query_opt("SELECT FROM pg_collation WHERE collname = 'und-x-icu'", &[]).await?.is_some();
        let compressions = "SELECT enumvals::text[] FROM pg_settings WHERE name = 'default_toast_compression'";
        let compressions: Vec<String> =
            target.query_opt(compressions, &[]).await?.map(|row| row.get(0)).unwrap_or_default();
        let xml = match target.batch_execute("SELECT pg_catalog.xmlcomment('')").await {
            Err(error) if error.code() == Some(&SqlState::FEATURE_NOT_SUPPORTED) => false,
            tried => tried.map(|()| true)?,
        };
        Ok(Self { icu, lz4: compressions.iter().any(|name| name == "lz4"), xml })
    }

    /// What finds definitions on a source of this version that need what is not there.
    fn queries(self, source_version: u32) -> Vec<&'static str> {
        let lz4 = self.lz4 || source_version < 140_000;
        let needed = [(self.icu, ICU), (lz4, LZ4), (self.xml, XML)];
        needed.into_iter().filter(|(there, _)| !there).map(|(_, query)| query).collect()
    }
}

async fn missing_features(session: &Control, target: &Control) -> Result<Vec<String>, tokio_postgres::Error> {
    let mut missing = Vec::new();
    for query in Features::of(target).await?.queries(session.version_num()) {
        missing.extend(column(session, query, &[]).await?);
    }
    Ok(missing)
}

async fn generated_children(session: &Control, target: &Control) -> Result<Vec<String>, tokio_postgres::Error> {
    if session.version_num() < 120_000 || target.version_num() < 160_000 {
        return Ok(Vec::new());
    }
    column(session, GENERATED, &[]).await
}

async fn reserved_words(session: &Control, target: &Control) -> Result<Vec<String>, tokio_postgres::Error> {
    let here: HashSet<String> = column(session, RESERVED, &[]).await?.into_iter().collect();
    let there = column(target, RESERVED, &[]).await?;
    let added: Vec<String> = there.into_iter().filter(|word| !here.contains(word)).collect();
    column(session, NAMED, &[&added]).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_there_is_looked_for() {
        let all = Features { icu: true, lz4: true, xml: true };
        assert_eq!(all.queries(180_000), [""; 0]);
        assert_eq!(Features { icu: false, ..all }.queries(180_000), [ICU]);
        assert_eq!(Features { lz4: false, ..all }.queries(140_000), [LZ4]);
        assert_eq!(Features { lz4: false, ..all }.queries(130_000), [""; 0], "no column can be compressed by it yet");
        assert_eq!(Features { xml: false, ..all }.queries(100_000), [XML]);
    }
}
