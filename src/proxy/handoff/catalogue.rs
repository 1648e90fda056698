//! Names of custom settings that a database's own objects use: those are the ones that matter most, because row-level
//! security hangs on them.

use std::collections::BTreeSet;

use super::scan::settings_used;

/// Every expression and body that may call `current_setting` or `set_config`. A function with a body in standard SQL
/// has no source text. Of views and rules only those are written out that call one of the two (`pg_proc.dat` has their
/// numbers): the server locks the tables of each for it, and behind `pg_views` it would write out all of its own.
const TEXTS: &str = "
    SELECT pg_catalog.pg_get_expr(polqual, polrelid) FROM pg_catalog.pg_policy
    UNION ALL SELECT pg_catalog.pg_get_expr(polwithcheck, polrelid) FROM pg_catalog.pg_policy
    UNION ALL SELECT pg_catalog.pg_get_expr(adbin, adrelid) FROM pg_catalog.pg_attrdef
    UNION ALL SELECT pg_catalog.pg_get_constraintdef(oid) FROM pg_catalog.pg_constraint WHERE contype = 'c'
    UNION ALL SELECT pg_catalog.pg_get_ruledef(oid) FROM pg_catalog.pg_rewrite
        WHERE ev_class >= 16384 AND ev_action::text ~ ':funcid (2077|2078|3294) '
    UNION ALL SELECT prosrc FROM pg_catalog.pg_proc
        WHERE oid >= 16384 AND (prosrc ILIKE '%current_setting%' OR prosrc ILIKE '%set_config%' OR prosrc ~* '\\mset\\M')
    UNION ALL SELECT pg_catalog.pg_get_functiondef(oid) FROM pg_catalog.pg_proc WHERE oid >= 16384 AND prosrc = ''
    UNION ALL SELECT 'SET ' || pg_catalog.split_part(setting, '=', 1) || ' = x'
        FROM pg_catalog.pg_db_role_setting, LATERAL pg_catalog.unnest(setconfig) AS setting";

/// Reads them; to be asked once for each database, and passed to every [`capture`](super::capture()) there.
pub async fn catalogue_settings(client: &tokio_postgres::Client) -> Result<Vec<String>, tokio_postgres::Error> {
    let mut names = BTreeSet::new();
    for row in client.query(TEXTS, &[]).await? {
        if let Some(text) = row.try_get::<_, Option<String>>(0)? {
            settings_used(&text, |name| {
                names.insert(name.to_ascii_lowercase());
            });
        }
    }
    Ok(names.into_iter().collect())
}
