//! Finding and running `pg_dump`.
//!
//! The password goes through a private file, never through the command line or a message; the child sees no variable of
//! ours but those that are set here. The dump and the look-up of what its entries belong to share one snapshot.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use super::archive::{self, Archive};
use super::{PgDump, SchemaError, toc};
use crate::config::{Migration, Server, SslMode};
use crate::postgres::Connector;

/// See [`super::find_pg_dump`].
pub(super) async fn find(config: &Migration, source_major: u32, target_major: u32) -> Result<PgDump, SchemaError> {
    let mut found = Vec::new();
    for path in candidates(config) {
        if let Some(major) = version(&path).await {
            found.push(PgDump { path, major });
        }
    }
    choose(&found, source_major, target_major).cloned().ok_or_else(|| SchemaError::NoPgDump {
        needed: source_major,
        found: match found.iter().map(|one| format!("{} is {}", one.path.display(), one.major)).collect::<Vec<_>>() {
            none if none.is_empty() => "none at all".to_owned(),
            some => some.join(", "),
        },
    })
}

/// At least as new as the source; of those the target's own major, else the newest below it, else the oldest above:
/// what a newer program writes, an older server may not read. The first found wins among equals.
fn choose(found: &[PgDump], source_major: u32, target_major: u32) -> Option<&PgDump> {
    let rank = |one: &PgDump| (one.major > target_major, one.major.abs_diff(target_major));
    found.iter().filter(|one| one.major >= source_major).min_by_key(|one| rank(one))
}

fn candidates(config: &Migration) -> Vec<PathBuf> {
    if let Some(bindir) = &config.bindir {
        return vec![bindir.join("pg_dump")];
    }
    let mut paths: Vec<PathBuf> = std::env::var_os("PATH")
        .map(|path| std::env::split_paths(&path).map(|dir| dir.join("pg_dump")).collect())
        .unwrap_or_default();
    for (root, below) in [("/usr/lib/postgresql", "bin"), ("/usr", "bin"), ("/opt/homebrew/opt", "bin")] {
        let Ok(entries) = std::fs::read_dir(root) else { continue };
        let mut dirs: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        // `/usr/pgsql-17` (RPM packages) and `postgresql@17` (Homebrew) stand beside things that are not PostgreSQL.
        dirs.retain(|dir| {
            root == "/usr/lib/postgresql"
                || dir.to_string_lossy().contains("pgsql-")
                || dir.to_string_lossy().contains("postgresql@")
        });
        dirs.sort();
        paths.extend(dirs.into_iter().rev().map(|dir| dir.join(below).join("pg_dump")));
    }
    // Debian's `/usr/bin/pg_dump` picks a version by the local cluster it takes us to mean; the versions themselves
    // stand in `/usr/lib/postgresql`.
    paths.retain(|path| std::fs::canonicalize(path).is_ok_and(|real| real.is_file() && !real.ends_with("pg_wrapper")));
    paths.dedup();
    paths
}

/// The major of `path --version` (`pg_dump (PostgreSQL) 15.18 (Debian …)`); none: not a program that runs.
async fn version(path: &Path) -> Option<u32> {
    let mut command = Command::new(path);
    command.arg("--version").env("LC_ALL", "C").stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(Duration::from_secs(10), command.output()).await.ok()?.ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let number = text.split(") ").nth(1)?;
    number.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// Attempts at a dump while somebody holds a table exclusively.
const LOCK_ATTEMPTS: u32 = 30;

/// Attempts at a dump while pg_dump gets no session where we get one.
const CONNECT_ATTEMPTS: u32 = 5;

/// Of one complaint so much is told: PostgreSQL 16 and later lock all tables by one query, and pg_dump quotes it.
const COMPLAINT_CHARS: usize = 400;

/// See [`dump`](super::dump()).
pub(super) async fn dump(
    pg_dump: &PgDump,
    source: &Connector,
    database: &str,
    lock_timeout: Duration,
) -> Result<Archive, SchemaError> {
    let (mut locked, mut refused) = (1, 1);
    loop {
        match attempt(pg_dump, source, database, lock_timeout).await {
            Err(SchemaError::Dump { why, .. }) if locked < LOCK_ATTEMPTS && is_about_locks(&why) => locked += 1,
            Err(SchemaError::Dump { why, .. }) if refused < CONNECT_ATTEMPTS && is_about_connecting(&why) => {
                refused += 1;
            }
            other => return other,
        }
        // What queued behind pg_dump gets its turn.
        tokio::time::sleep(lock_timeout.min(Duration::from_secs(1))).await;
    }
}

/// Whether pg_dump failed because of what somebody else had locked: it waited for too long (it bounds its LOCK TABLE by
/// statement_timeout, and nothing else), or, since it locks table by table and a TRUNCATE of several does so in another
/// order, each waited for the other. The server says so in a language of its own, which only a superuser may choose; the
/// name of the query that failed is pg_dump's, and in English.
fn is_about_locks(why: &str) -> bool {
    let is_a_lock = why.contains(" was: LOCK TABLE ") && !why.contains("permission denied");
    is_a_lock || why.contains("statement timeout") || why.contains("deadlock detected")
}

/// Whether pg_dump got no session: in the words of libpq from 14 on, or of pg_dump before that.
fn is_about_connecting(why: &str) -> bool {
    let words = ["connection to server ", "connection to database ", "could not translate host name "];
    let complaint = why.split_once("pg_dump: ").map_or("", |(_, complaint)| complaint);
    let complaint = ["error: ", "[archiver (db)] "].iter().find_map(|of| complaint.strip_prefix(of));
    complaint.is_some_and(|complaint| words.iter().any(|word| complaint.starts_with(word)))
}

async fn attempt(
    pg_dump: &PgDump,
    source: &Connector,
    database: &str,
    lock_timeout: Duration,
) -> Result<Archive, SchemaError> {
    let mut control = source.control(database, "dump").await?;
    let read = |error| SchemaError::Read { database: database.to_owned(), source: error };
    let source_version = control.version_num();
    let transaction = control
        .build_transaction()
        .isolation_level(tokio_postgres::IsolationLevel::RepeatableRead)
        .read_only(true)
        .start()
        .await
        .map_err(read)?;
    let snapshot: String =
        transaction.query_one("SELECT pg_catalog.pg_export_snapshot()", &[]).await.map_err(read)?.get(0);
    let share = Share { snapshot, quoting: Quoting::of(pg_dump, source_version) };
    let text = match run(pg_dump, source, database, Some(&share), lock_timeout).await {
        // Whatever pg_dump says when its server goes down: the session that holds the snapshot is gone then, too.
        Err(SchemaError::Dump { database, program, why }) if transaction.query_one("SELECT 1", &[]).await.is_err() => {
            return Err(SchemaError::DumpLost { database, program, why });
        }
        Err(error) => {
            if let SchemaError::Dump { why, .. } = &error
                && is_about_connecting(why)
            {
                // It was told why in the server's language. We are told by a SQLSTATE, where another session is still refused
                // beside this one.
                source.control(database, "dump").await?.close().await;
            }
            return Err(error);
        }
        Ok(text) => text,
    };
    let toc = toc::parse(&text.stdout, &text.stderr)
        .map_err(|error| SchemaError::Split { database: database.to_owned(), source: error })?;
    let archive = archive::build(&transaction, toc).await.map_err(read)?;
    transaction.commit().await.map_err(read)?;
    control.close().await;
    Ok(archive)
}

/// See [`super::definitions`].
pub(super) async fn definitions(
    pg_dump: &PgDump,
    server: &Connector,
    database: &str,
    lock_timeout: Duration,
) -> Result<String, SchemaError> {
    let text = run(pg_dump, server, database, None, lock_timeout).await?;
    let toc = toc::parse(&text.stdout, &text.stderr)
        .map_err(|error| SchemaError::Split { database: database.to_owned(), source: error })?;
    // Numbers and OIDs differ; kinds, names, owners and statements must not.
    let entries = toc.entries.iter().map(|entry| {
        // Access methods came with PostgreSQL 12: of an older server nothing is said, which means the same.
        let defaults = ["SET default_tablespace = '';", "SET default_table_access_method = heap;"];
        let settings = entry.settings.iter().filter(|setting| !defaults.contains(&setting.as_str()));
        let settings: String = settings.map(|setting| format!("{setting}\n")).collect();
        let sql = match entry.kind.as_str() {
            // PostgreSQL 10 and 11 print the older of two words for the same.
            "TRIGGER" => entry.sql.replacen(" EXECUTE PROCEDURE ", " EXECUTE FUNCTION ", 1),
            _ => entry.sql.clone(),
        };
        format!("-- {} {}\n{settings}{sql}\n\n", entry.kind, entry.object())
    });
    Ok(entries.collect())
}

/// How a dump that will be restored is made.
struct Share {
    /// What an open transaction has exported.
    snapshot: String,
    quoting: Quoting,
}

/// Which names the server writes in double quotes in what it puts together itself: expressions, indexes, views.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Quoting {
    /// Those that it could not read otherwise.
    Needed,
    /// All of them.
    All,
}

impl Quoting {
    /// A server quotes what is a word of SQL to itself, and a newer one may know more: what PostgreSQL 15 writes as
    /// `(system_user = 'x')` is a column there, and from 16 on whoever has logged in. What pg_dump writes itself, it
    /// quotes by its own major.
    fn of(pg_dump: &PgDump, source_version: u32) -> Self {
        if pg_dump.major > source_version / 10_000 { Self::All } else { Self::Needed }
    }
}

struct Output {
    stdout: String,
    stderr: String,
}

async fn run(
    pg_dump: &PgDump,
    server: &Connector,
    database: &str,
    share: Option<&Share>,
    lock_timeout: Duration,
) -> Result<Output, SchemaError> {
    let failed = |why: String| SchemaError::Dump { database: database.to_owned(), program: pg_dump.path.clone(), why };
    let home = tempfile::tempdir().map_err(|error| failed(format!("no temporary directory: {error}")))?;
    let mut command = Command::new(&pg_dump.path);
    command
        .args(["--schema-only", "--verbose", "--encoding=UTF8", "--no-password"])
        .args(["--exclude-schema=pgcutover", "--no-publications", "--no-subscriptions"])
        .arg(format!("--lock-wait-timeout={}", lock_timeout.as_millis().max(1)))
        .stdin(Stdio::null())
        .kill_on_drop(true);
    if let Some(Share { snapshot, .. }) = share {
        command.arg(format!("--snapshot={snapshot}"));
    }
    // Two servers are compared as each writes its own.
    let quoting = share.map_or(Quoting::Needed, |share| share.quoting);
    environment(&mut command, server, database, home.path(), quoting).map_err(|error| failed(error.to_string()))?;
    let output = command.output().await.map_err(|error| failed(error.to_string()))?;
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    if !output.status.success() {
        let why = format!("{}: {}", output.status, complaints(&stderr));
        // What libpq says in the language of no locale when only this connection is cut.
        let is_lost =
            stderr.contains("server closed the connection unexpectedly") || stderr.contains("SSL SYSCALL error");
        return Err(match failed(why) {
            SchemaError::Dump { database, program, why } if is_lost => SchemaError::DumpLost { database, program, why },
            other => other,
        });
    }
    let stdout = String::from_utf8(output.stdout).map_err(|_| failed("the dump is not UTF-8".to_owned()))?;
    Ok(Output { stdout, stderr })
}

/// The lines of standard error that are not the account of progress, bounded.
fn complaints(stderr: &str) -> String {
    let lines: Vec<String> = stderr
        .lines()
        .filter(|line| {
            ![
                "pg_dump: reading ",
                "pg_dump: creating ",
                "pg_dump: identifying ",
                "pg_dump: finding ",
                "pg_dump: flagging ",
                "pg_dump: saving ",
                "pg_dump: last built-in ",
            ]
            .iter()
            .any(|progress| line.starts_with(progress))
        })
        .take(10)
        .map(|line| line.chars().take(COMPLAINT_CHARS).collect())
        .collect();
    lines.join("; ")
}

/// libpq reads everything from the environment, where no `ps` shows it and no database name is taken for a connection
/// string; the password stands in a file that only we can read.
fn environment(
    command: &mut Command,
    connector: &Connector,
    database: &str,
    home: &Path,
    quoting: Quoting,
) -> std::io::Result<()> {
    let server: &Server = connector.server();
    let quote_all = match quoting {
        Quoting::Needed => "",
        Quoting::All => " -c quote_all_identifiers=on",
    };
    let options = "-c idle_in_transaction_session_timeout=0 -c default_transaction_read_only=off";
    command.env_clear();
    for kept in ["PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR", "TMPDIR"] {
        if let Some(value) = std::env::var_os(kept) {
            command.env(kept, value);
        }
    }
    let sslmode = match server.sslmode {
        SslMode::Disable => "disable",
        SslMode::Prefer => "prefer",
        SslMode::Require => "require",
        SslMode::VerifyCa => "verify-ca",
        SslMode::VerifyFull => "verify-full",
    };
    let passfile = home.join("pgpass");
    command
        .env("LC_ALL", "C")
        // libpq looks for certificates of the user there; only those of the configuration count.
        .env("HOME", home)
        .env("PGHOST", &server.host)
        .env("PGPORT", server.port.to_string())
        .env("PGUSER", &server.user)
        .env("PGDATABASE", database)
        .env("PGSSLMODE", sslmode)
        .env("PGCONNECT_TIMEOUT", server.connect_timeout.as_secs().max(2).to_string())
        .env("PGAPPNAME", connector.instance().application_name("pg_dump"))
        .env("PGOPTIONS", format!("{options}{quote_all}"))
        .env("PGPASSFILE", &passfile);
    if let Some(root) = &server.sslrootcert {
        command.env("PGSSLROOTCERT", root);
    }
    if let Some((certificate, key)) = &server.client_certificate {
        command.env("PGSSLCERT", certificate).env("PGSSLKEY", key);
    }
    if let Some(password) = &server.password {
        let mut options = std::fs::OpenOptions::new();
        std::os::unix::fs::OpenOptionsExt::mode(options.write(true).create_new(true), 0o600);
        let mut file = options.open(&passfile)?;
        let escaped = zeroize::Zeroizing::new(password.expose().replace('\\', "\\\\").replace(':', "\\:"));
        file.write_all(b"*:*:*:*:")?;
        file.write_all(escaped.as_bytes())?;
        file.write_all(b"\n")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_targets_own_major_is_preferred() {
        let found: Vec<PgDump> =
            [18, 15, 12, 16].map(|major| PgDump { path: PathBuf::from(format!("/{major}")), major }).into();
        let chosen = |source, target| choose(&found, source, target).map(|one| one.major);
        assert_eq!(chosen(10, 15), Some(15));
        assert_eq!(chosen(13, 17), Some(16), "the newest below the target");
        assert_eq!(chosen(13, 14), Some(15), "the oldest above, when none fits");
        assert_eq!(chosen(17, 17), Some(18));
        assert_eq!(chosen(19, 19), None);
    }

    #[test]
    fn names_are_quoted_for_a_newer_server() {
        let quoting = |major, source| Quoting::of(&PgDump { path: PathBuf::from("/pg_dump"), major }, source);
        assert_eq!(quoting(18, 150_018), Quoting::All);
        assert_eq!(quoting(15, 150_018), Quoting::Needed);
    }

    #[test]
    fn what_was_locked_is_tried_again() {
        let error = |text: &str| {
            complaints(&format!("pg_dump: reading schemas\npg_dump: error: query failed: ERROR:  {text}\n"))
        };
        assert!(is_about_locks(&error(
            "canceling statement due to statement timeout\npg_dump: detail: Query was: LOCK TABLE public.t IN ACCESS SHARE MODE"
        )));
        assert!(is_about_locks(&error(
            "deadlock detected\nDETAIL:  Process 2 waits for AccessShareLock on relation 7"
        )));
        assert!(!is_about_locks(&error("permission denied for table t")));
        // What the server says in a language of its own; the words of pg_dump 15 and later, and of the older ones.
        for query in ["pg_dump: detail: Query was", "pg_dump: error: query was", "pg_dump: [archiver (db)] query was"] {
            let lock = format!("{query}: LOCK TABLE public.t, public.u IN ACCESS SHARE MODE");
            let waited = format!("storniere Anfrage wegen Zeitüberschreitung der Anfrage\n{lock}");
            assert!(is_about_locks(&error(&waited)), "{waited}");
            assert!(!is_about_locks(&error(&format!("permission denied for table t\n{lock}"))), "{lock}");
        }
        assert!(!is_about_locks(&error("Spalte fehlt\npg_dump: detail: Query was: SELECT x")));
    }

    #[test]
    fn who_gets_no_session_is_recognised() {
        for text in [
            "pg_dump: error: connection to server at \"10.0.0.5\", port 5432 failed: FATAL:  tut mir leid",
            "pg_dump: error: connection to server on socket \"/tmp/.s.PGSQL.5432\" failed: No such file or directory",
            "pg_dump: error: connection to database \"shop\" failed: could not connect to server: Connection refused",
            "pg_dump: [archiver (db)] connection to database \"shop\" failed: timeout expired",
            "pg_dump: error: could not translate host name \"db\" to address: Temporary failure in name resolution",
        ] {
            assert!(is_about_connecting(&format!("exit status: 1: {}", complaints(text))), "{text}");
        }
        let other = "pg_dump: error: query failed: ERROR:  connection to server at that place failed";
        assert!(!is_about_connecting(&format!("exit status: 1: {}", complaints(other))));
    }

    #[test]
    fn complaints_are_bounded() {
        let long = format!("pg_dump: detail: Query was: LOCK TABLE {} IN ACCESS SHARE MODE\n", "ünd, ".repeat(5000));
        assert!(complaints(&long.repeat(50)).len() < 10_000);
    }

    #[test]
    fn complaints_leave_progress_out() {
        let text = "pg_dump: reading schemas\npg_dump: error: query failed: x\npg_dump: creating TABLE \"a\"\n";
        assert_eq!(complaints(text), "pg_dump: error: query failed: x");
    }
}
