//! Which PostgreSQL installations this machine has.
//!
//! The demo and the tests run on whatever is there: Debian's packages, the ones that `make servers` fetched, or
//! directories named by hand. Nothing here starts a server or changes anything.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// One directory with `postgres` and `initdb`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installation {
    /// Directory of the programs, without symbolic links.
    pub bindir: PathBuf,
    /// Major version, for example 15.
    pub major: u16,
    /// What the server says of itself, for example `15.18`.
    pub version: String,
}

impl Installation {
    /// The installation in `bindir`, if `postgres` and `initdb` are there and `postgres` runs.
    pub fn in_dir(bindir: &Path) -> Option<Self> {
        let bindir = bindir.canonicalize().ok()?;
        // A link to one program (/usr/local/bin/postgres) leads to the directory that has them all.
        let bindir = bindir.join("postgres").canonicalize().ok()?.parent()?.to_owned();
        if !bindir.join("initdb").is_file() {
            return None;
        }
        let output = Command::new(bindir.join("postgres")).arg("--version").output().ok()?;
        let version = parse_version(&String::from_utf8_lossy(&output.stdout))?;
        let major = version.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()?;
        Some(Self { bindir, major, version })
    }

    /// Path of `name` in this installation, if it is there.
    pub fn program(&self, name: &str) -> Option<PathBuf> {
        let path = self.bindir.join(name);
        path.is_file().then_some(path)
    }

    /// Whether the client tools that a migration needs are here too.
    pub fn has_client_tools(&self) -> bool {
        self.program("pg_dump").is_some() && self.program("psql").is_some()
    }
}

/// Every installation found, oldest major first, one for each major (with client tools where there is a choice).
#[derive(Clone, Debug, Default)]
pub struct Installations {
    found: Vec<Installation>,
}

impl Installations {
    /// Looks in `PGCUTOVER_PG_BINDIRS` (a list with colons), Debian's and Red Hat's places, `PATH`, what
    /// `pg_config --bindir` says, and `target/servers/*/`.
    pub fn find() -> Self {
        Self::among(candidate_dirs())
    }

    /// The installations among `dirs`.
    pub fn among(dirs: impl IntoIterator<Item = PathBuf>) -> Self {
        let mut seen = HashSet::new();
        let mut found: Vec<Installation> = dirs
            .into_iter()
            .filter_map(|dir| Installation::in_dir(&dir))
            .filter(|installation| seen.insert(installation.bindir.clone()))
            .collect();
        found.sort_by_key(|installation| (installation.major, !installation.has_client_tools()));
        found.dedup_by_key(|installation| installation.major);
        Self { found }
    }

    /// All, oldest first.
    pub fn all(&self) -> &[Installation] {
        &self.found
    }

    /// The one with this major version.
    pub fn major(&self, major: u16) -> Option<&Installation> {
        self.found.iter().find(|installation| installation.major == major)
    }

    /// The newest `pg_dump` on the machine decides which sources can be migrated: it refuses servers newer than itself.
    pub fn newest_with_client_tools(&self) -> Option<&Installation> {
        self.found.iter().rev().find(|installation| installation.has_client_tools())
    }

    /// An older source and a newer target: the widest pair that the newest `pg_dump` can serve; the same installation
    /// twice where there is only one. None: nothing is installed, or no `pg_dump` is there.
    pub fn pair(&self) -> Option<(&Installation, &Installation)> {
        let tools = self.newest_with_client_tools()?;
        let source = self.found.iter().find(|installation| installation.major <= tools.major)?;
        Some((source, self.found.last()?))
    }
}

fn candidate_dirs() -> Vec<PathBuf> {
    let mut dirs = Vec::new();
    if let Some(list) = std::env::var_os("PGCUTOVER_PG_BINDIRS") {
        dirs.extend(std::env::split_paths(&list));
    }
    for root in ["/usr/lib/postgresql", "/usr/local/lib/postgresql"] {
        dirs.extend(children(Path::new(root)).into_iter().map(|child| child.join("bin")));
    }
    dirs.extend(children(Path::new("/usr")).into_iter().filter(|dir| is_pgsql(dir)).map(|dir| dir.join("bin")));
    if let Some(path) = std::env::var_os("PATH") {
        dirs.extend(std::env::split_paths(&path));
    }
    if let Ok(output) = Command::new("pg_config").arg("--bindir").output() {
        dirs.push(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()));
    }
    for servers in fetched_servers() {
        for child in children(&servers) {
            dirs.push(child.join("bin"));
        }
    }
    dirs
}

/// `target/servers` below the working directory, and beside the program that runs (`target/debug/…`).
fn fetched_servers() -> Vec<PathBuf> {
    let mut places = Vec::new();
    if let Ok(here) = std::env::current_dir() {
        places.push(here.join("target/servers"));
    }
    if let Ok(program) = std::env::current_exe() {
        places.extend(program.ancestors().skip(1).take(4).map(|dir| dir.join("servers")));
    }
    places
}

/// `/usr/pgsql-17` and the like.
fn is_pgsql(dir: &Path) -> bool {
    dir.file_name().is_some_and(|name| name.to_string_lossy().starts_with("pgsql-"))
}

fn children(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    entries.flatten().map(|entry| entry.path()).collect()
}

/// `15.18` from `postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)`.
fn parse_version(text: &str) -> Option<String> {
    let rest = text.split_once("(PostgreSQL)")?.1;
    let version = rest.split_whitespace().next()?;
    version.starts_with(|c: char| c.is_ascii_digit()).then(|| version.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fake(major: u16, dir: &Path, client_tools: bool) -> Installation {
        let bindir = dir.join(major.to_string());
        std::fs::create_dir_all(&bindir).expect("temporary directory is writable");
        if client_tools {
            for name in ["pg_dump", "psql"] {
                std::fs::write(bindir.join(name), "").expect("temporary directory is writable");
            }
        }
        Installation { bindir, major, version: format!("{major}.1") }
    }

    #[test]
    fn versions_are_read_from_what_servers_print() {
        for (text, version) in [
            ("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n", Some("15.18")),
            ("postgres (PostgreSQL) 18beta2", Some("18beta2")),
            ("postgres (EnterpriseDB) 15", None),
            ("", None),
        ] {
            assert_eq!(parse_version(text).as_deref(), version, "{text:?}");
        }
    }

    #[test]
    fn the_pair_is_as_wide_as_the_newest_pg_dump_allows() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let majors = |source: &[(u16, bool)]| {
            let found = source.iter().map(|(major, tools)| fake(*major, &dir.path().join("x"), *tools)).collect();
            let installations = Installations { found };
            installations.pair().map(|(source, target)| (source.major, target.major))
        };
        assert_eq!(majors(&[(10, false), (18, false)]), None, "no pg_dump at all");
        assert_eq!(majors(&[(12, false), (15, true), (18, false)]), Some((12, 18)));
        assert_eq!(majors(&[(16, true)]), Some((16, 16)));
        assert_eq!(majors(&[]), None);
    }
}
