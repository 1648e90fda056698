//! Rules about what text means and how it sorts: encoding, collation, ctype, provider and the versions of their libraries.

use super::database::{Database, Finding};
use super::definition::{Apply, Definition, Hosted};
use super::{Outcome, RuleResult};
use crate::catalog::journal::Side;
use crate::migration::schema::is_same_icu_locale;
use crate::postgres::Control;

const ENCODING: Definition = Definition {
    code: "encoding",
    why: "text must mean, and sort, the same on both servers",
    evidence: "encoding, collation, ctype and provider of both databases",
    fix: "DROP DATABASE … on the target: it is then made like the source's",
    on: Side::Target,
    apply: Apply::Refused("what is in it would be lost"),
    ..Finding::DEFINITION
};

const CREATE_DATABASE: Definition = Definition {
    code: "create_database",
    why: "the database is made on the target with the source's locale",
    evidence: "the right that is missing, or the locales that the target seems not to have",
    fix: "ALTER ROLE … CREATEDB for the target's login role; install the locale on the target's host",
    on: Side::Target,
    hosted: Hosted::Words {
        amazon: "ALTER ROLE … CREATEDB for the target's login role; the service has the locales of its operating system only",
        azure: "ALTER ROLE … CREATEDB for the target's login role; the service has the locales of its operating system only",
        google: "ALTER ROLE … CREATEDB for the target's login role; the service has the locales of its operating system only",
    },
    apply: Apply::Refused("a role cannot give itself rights: another one has to"),
    ..Finding::DEFINITION
};

const COLLATIONS: Definition = Definition {
    code: "collations",
    worst: Outcome::Warning,
    why: "indexes are built anew on the target and are sound; but where its library sorts text in another order, so do \
          ORDER BY, ranges of partitions and constraints that compare text",
    evidence: "collations whose library has another version on the target, or whose locale is not known there",
    fix: "install the locale on the target's host; look at queries and partitions that depend on the order of text, or use \
          the collation \"C\" for them",
    on: Side::Target,
    hosted: Hosted::Same,
    ..Finding::DEFINITION
};

pub(super) const DEFINITIONS: [&Definition; 3] = [&ENCODING, &CREATE_DATABASE, &COLLATIONS];

/// Collations that somebody made or that a column uses, with provider, locale and the version that the library had.
const USED: &str = "
SELECT DISTINCT format('%I.%I', n.nspname, c.collname), c.collprovider::text,
       coalesce(c.collcollate::text, to_jsonb(c) ->> 'colllocale', to_jsonb(c) ->> 'colliculocale', ''), c.collversion::text
  FROM pg_collation c JOIN pg_namespace n ON n.oid = c.collnamespace
 WHERE c.collprovider <> 'd' AND c.collname NOT IN ('C', 'POSIX') AND (c.oid >= 16384
       OR EXISTS (SELECT FROM pg_attribute a JOIN pg_class r ON r.oid = a.attrelid WHERE a.attcollation = c.oid
                     AND a.attrelid >= 16384 AND r.relkind IN ('r', 'p', 'i')))
 ORDER BY 1";

/// Every collation of the target by provider and locale, with the version that its library has now.
const THERE: &str = "
SELECT c.collprovider::text,
       coalesce(c.collcollate::text, to_jsonb(c) ->> 'colllocale', to_jsonb(c) ->> 'colliculocale', ''),
       max(pg_collation_actual_version(c.oid))::text
  FROM pg_collation c WHERE c.collprovider <> 'd' GROUP BY 1, 2";

/// What `pg_database` says of one database.
#[derive(Clone, Debug, Default)]
struct Locale {
    /// In words, but for what follows.
    shown: String,
    /// The name of its locale, where ICU is its provider.
    icu: Option<String>,
}

impl Locale {
    fn is_same(&self, other: &Self) -> bool {
        let is_same = match (&self.icu, &other.icu) {
            (Some(one), Some(other)) => is_same_icu_locale(one, other),
            (one, other) => one == other,
        };
        self.shown == other.shown && is_same
    }
}

impl std::fmt::Display for Locale {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{}", self.shown, self.icu.as_deref().unwrap_or_default())
    }
}

impl Database<'_> {
    /// The target's database, whether it is there or will be made.
    pub(super) async fn target(&self) -> Vec<RuleResult> {
        let (source, target) = (self.servers.source, self.servers.target);
        let same = self.rule(&ENCODING).mended_by(self.drop_database());
        let both = async { Ok::<_, tokio_postgres::Error>((self.locale(source).await?, self.locale(target).await?)) };
        let (wanted, found) = match both.await {
            Ok((wanted, found)) => (wanted.unwrap_or_default(), found),
            Err(error) => return vec![same.unknown(&error)],
        };
        let found = found.filter(|_| !self.servers.preflight.overwrite_target);
        match found {
            None => {
                let exists = self.servers.preflight.overwrite_target && self.is_there(target).await;
                vec![self.will_be_empty(exists), same.succeeded(), self.new_database().await]
            }
            Some(found) => {
                let evidence = format!("source: {wanted}; target: {found}");
                let same = same.expect(found.is_same(&wanted), Outcome::Failed, evidence);
                vec![self.is_empty().await, same, self.rule(&CREATE_DATABASE).succeeded()]
            }
        }
    }

    async fn is_there(&self, target: &Control) -> bool {
        // What cannot be asked is answered by the rules that follow.
        target
            .query_opt("SELECT FROM pg_database WHERE datname::text = $1", &[&self.name])
            .await
            .is_ok_and(|row| row.is_some())
    }

    /// What `pg_database` says of this database.
    async fn locale(&self, control: &Control) -> Result<Option<Locale>, tokio_postgres::Error> {
        // The locale of ICU and of the built-in provider had another name in 15 and 16.
        let query = "SELECT format('encoding %s, collation %s, ctype %s%s', pg_encoding_to_char(encoding), datcollate, datctype, \
                     CASE to_jsonb(d) ->> 'datlocprovider' WHEN 'i' THEN ', ICU ' \
                     WHEN 'b' THEN ', builtin ' || coalesce(to_jsonb(d) ->> 'datlocale', '') END), \
                     CASE to_jsonb(d) ->> 'datlocprovider' WHEN 'i' \
                     THEN coalesce(to_jsonb(d) ->> 'datlocale', to_jsonb(d) ->> 'daticulocale', '') END \
                     FROM pg_database d WHERE datname::text = $1";
        let row = control.query_opt(query, &[&self.name]).await?;
        Ok(row.map(|row| Locale { shown: row.get(0), icu: row.get(1) }))
    }

    /// The database will be made: may it be, and does the target know the locale?
    async fn new_database(&self) -> RuleResult {
        let grant = format!("ALTER ROLE {} CREATEDB", self.servers.login(Side::Target));
        let rule = self.rule(&CREATE_DATABASE);
        let wanted = "SELECT datcollate::text, datctype::text FROM pg_database WHERE datname::text = $1";
        // initdb imports the locales of its host; `C.UTF-8` and `C.utf8` are the same one.
        let known = "SELECT EXISTS (SELECT FROM pg_collation WHERE lower(replace(collcollate, '-', '')) = \
                     lower(replace($1, '-', ''))) OR $1 IN ('C', 'POSIX') OR EXISTS (SELECT FROM pg_database \
                     WHERE lower(replace(datcollate, '-', '')) = lower(replace($1, '-', '')))";
        let target = self.servers.target;
        let read = async {
            let may: bool = target
                .query_one("SELECT rolcreatedb OR rolsuper FROM pg_roles WHERE rolname = current_user", &[])
                .await?
                .get(0);
            let row = self.servers.source.query_one(wanted, &[&self.name]).await?;
            let mut unknown = Vec::new();
            for locale in [row.get::<_, String>(0), row.get(1)] {
                if !target.query_one(known, &[&locale]).await?.get::<_, bool>(0) {
                    unknown.push(format!("the target seems not to have the locale {locale}"));
                }
            }
            Ok::<(bool, Vec<String>), tokio_postgres::Error>((may, unknown))
        };
        match read.await {
            Ok((false, _)) => rule
                .mended_by(self.servers.on_target(grant))
                .failed(vec!["the target's login role may not create databases".to_owned()]),
            Ok((true, unknown)) => rule.unless_any(Outcome::Warning, unknown),
            Err(error) => rule.unknown(&error),
        }
    }

    /// Collations that are used, against the target's libraries; and the default one, where versions are recorded.
    pub(super) async fn collations(&self) -> RuleResult {
        let rule = self.rule(&COLLATIONS);
        let target = self.servers.target;
        let read = async {
            let there = target.query(THERE, &[]).await?;
            let version = |provider: &str, locale: &str| {
                // `en_US.UTF-8` and `en_US.utf8` are the same one.
                let plain = |name: &str| name.replace('-', "").to_lowercase();
                let is_it = |row: &&tokio_postgres::Row| {
                    row.get::<_, &str>(0) == provider && plain(row.get(1)) == plain(locale)
                };
                let row = there.iter().find(is_it)?;
                Some(row.get::<_, Option<String>>(2))
            };
            let mut used: Vec<(String, String, String, Option<String>)> = Vec::new();
            for row in self.session.query(USED, &[]).await? {
                used.push((row.get(0), row.get(1), row.get(2), row.get(3)));
            }
            if self.session.version_num() < 150_000 {
                // What is not recorded is what the library of its locale is now; before 13 that of the C library is not told.
                let row = self
                    .session
                    .query_one(
                        "SELECT datcollate::text, (SELECT max(pg_collation_actual_version(c.oid)) FROM pg_collation c
                                 WHERE c.collprovider = 'c' AND lower(replace(c.collcollate, '-', '')) = lower(replace(d.datcollate, '-', '')))
                           FROM pg_database d WHERE datname = current_database()",
                        &[],
                    )
                    .await?;
                used.push(("the database's own".to_owned(), "c".to_owned(), row.get(0), row.get(1)));
            } else {
                let row = self
                    .session
                    .query_one(
                        "SELECT datlocprovider::text, CASE datlocprovider WHEN 'c' THEN datcollate::text ELSE
                                coalesce(to_jsonb(d) ->> 'datlocale', to_jsonb(d) ->> 'daticulocale', '') END, datcollversion::text
                           FROM pg_database d WHERE datname = current_database()",
                        &[],
                    )
                    .await?;
                used.push(("the database's own".to_owned(), row.get(0), row.get(1), row.get(2)));
            }
            let mut found = Vec::new();
            for (name, provider, locale, recorded) in used {
                let library = if provider == "i" { "ICU" } else { "the C library" };
                match (version(&provider, &locale), recorded) {
                    // What `create_database` asks of the default; ICU makes do with any name.
                    (None, _) if provider != "c" || name.starts_with("the ") => {}
                    (None, _) => found.push(format!("{name}: the target has no locale {locale}")),
                    (Some(Some(there)), Some(here)) if there != here => {
                        found.push(format!("{name}: {library} is {here} on the source, {there} on the target"));
                    }
                    (Some(Some(there)), None) if self.session.version_num() < 130_000 && provider == "c" => {
                        found.push(format!(
                            "{name}: the C library is {there} on the target; the source does not tell its own"
                        ));
                    }
                    (Some(_), _) => {}
                }
            }
            Ok::<Vec<String>, tokio_postgres::Error>(found)
        };
        match read.await {
            Ok(found) => rule.unless_any(Outcome::Warning, found),
            Err(error) => rule.unknown(&error),
        }
    }
}
