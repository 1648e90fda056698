//! What must hold for whatever `pg_dump` writes. Built for tests and fuzzing only.

use super::toc;
use crate::migration::snapshot::TxidSnapshot;

/// A dump and what was said on standard error, cut apart at the first zero byte: read whole or refused.
pub fn dump(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (said, dump) = text.split_once('\0').unwrap_or((text, ""));
    // The last line cannot be guessed, so it is there.
    let dump = format!("{dump}\n--\n-- PostgreSQL database dump complete\n--\n");
    let Ok(toc) = toc::parse(&dump, said) else { return };
    // A line break in a name is a space in the dump, so it is one here.
    let announced = said.replace(['\n', '\r'], " ").matches("pg_dump: creating ").count();
    assert_eq!(toc.entries.len(), announced, "each entry was announced");
    assert!(toc.entries.iter().all(|entry| entry.sql.len() <= dump.len() && !entry.key.is_empty()));
}

/// The text of a snapshot.
pub fn snapshot(data: &[u8]) {
    let Some(snapshot) = std::str::from_utf8(data).ok().and_then(|text| text.parse::<TxidSnapshot>().ok()) else {
        return;
    };
    assert_eq!(snapshot.to_string().parse::<TxidSnapshot>().ok().as_ref(), Some(&snapshot));
    let _seen = snapshot.sees(7);
}
