//! File descriptors of this process: each client needs two, and a third while its session moves.
//!
//! What a service manager or a shell allows by default is meant for programs that use `select`; the hard limit is what an
//! administrator has decided.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the limit that counts to the one that an administrator has set.
pub fn raise_limit() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current == maximum {
        return;
    }
    match setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        Ok(()) => tracing::debug!(?current, ?maximum, "more files may be open"),
        Err(error) => tracing::warn!(%error, ?current, ?maximum, "the limit of open files could not be raised"),
    }
}

/// How many more files this process may open; none: nobody can tell, or as many as it likes.
pub fn free() -> Option<u64> {
    let limit = getrlimit(Resource::Nofile).current?;
    let open = std::fs::read_dir("/proc/self/fd").ok()?.count();
    Some(limit.saturating_sub(open as u64))
}

#[cfg(test)]
mod tests {
    #[test]
    fn an_open_file_is_one_less_that_is_free() {
        super::raise_limit();
        // Tests beside this one open files, too.
        let taken: Vec<_> = (0..64).map(|_| std::fs::File::open("/dev/null").expect("readable")).collect();
        let fewer = super::free();
        drop(taken);
        assert!(fewer.is_none() || fewer < super::free(), "{fewer:?}");
    }
}
