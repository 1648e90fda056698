//! Data directories as initdb left them, kept to be copied: initdb takes a second of processor time, a copy a tenth.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::ClusterOptions;

/// Where the data directory for these options is kept, or will be; none: nothing is to be kept. Everything that initdb is
/// told is in the name.
pub(super) fn place(options: &ClusterOptions, major: u16) -> Option<PathBuf> {
    let mut hasher = DefaultHasher::new();
    (&options.bindir, options.auth.method(), options.auth.password()).hash(&mut hasher);
    Some(options.initialised.as_ref()?.join(format!("{major}-{:016x}", hasher.finish())))
}

/// Copies what is kept; false: nothing is.
pub(super) fn copy(kept: &Path, data: &Path) -> io::Result<bool> {
    if !kept.is_dir() {
        return Ok(false);
    }
    copy_all(kept, data).map(|()| true)
}

/// Keeps a copy for the next time. Whoever is first keeps it, and nobody sees half of one.
pub(super) fn keep(data: &Path, kept: &Path) -> io::Result<()> {
    let directory = kept.parent().ok_or(io::ErrorKind::InvalidInput)?;
    std::fs::create_dir_all(directory)?;
    let unfinished = tempfile::Builder::new().prefix(".unfinished-").tempdir_in(directory)?;
    let copy = unfinished.path().join("data");
    copy_all(data, &copy)?;
    match std::fs::rename(&copy, kept) {
        Err(_) if kept.is_dir() => Ok(()),
        renamed => renamed,
    }
}

/// With owners and permissions, on which the server insists.
fn copy_all(from: &Path, to: &Path) -> io::Result<()> {
    let done = Command::new("cp").arg("-a").arg(from).arg(to).output()?;
    if done.status.success() {
        Ok(())
    } else {
        Err(io::Error::other(String::from_utf8_lossy(&done.stderr).into_owned()))
    }
}
