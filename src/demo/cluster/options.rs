//! What a throw-away cluster is made of, how it is stopped, and what can go wrong.

use std::path::PathBuf;

use crate::demo::installations::Installation;

/// What [`Cluster::start`](super::Cluster::start) is told.
#[derive(Clone, Debug)]
pub struct ClusterOptions {
    /// Directory with `postgres` and `initdb`.
    pub bindir: PathBuf,
    /// For messages and directory names: `source`, `target`.
    pub name: String,
    /// Lines of postgresql.conf beyond the defaults (which are made for logical replication); later ones win.
    pub settings: Vec<(String, String)>,
    /// How `postgres` and everybody else log in.
    pub auth: ClusterAuth,
    /// Certificate and key; none: no TLS.
    pub tls: Option<ClusterTls>,
    /// Directory that keeps a data directory of each kind, as initdb left it, to be copied; none: initdb runs each time.
    /// Clusters that come from one directory have the same system identifier.
    pub initialised: Option<PathBuf>,
}

impl ClusterOptions {
    /// A cluster that trusts everyone on loopback, without TLS.
    pub fn new(installation: &Installation, name: &str) -> Self {
        Self {
            bindir: installation.bindir.clone(),
            name: name.to_owned(),
            settings: Vec::new(),
            auth: ClusterAuth::Trust,
            tls: None,
            initialised: None,
        }
    }

    /// The same, with data directories kept in `directory`.
    #[must_use]
    pub fn initialised_in(mut self, directory: impl Into<PathBuf>) -> Self {
        self.initialised = Some(directory.into());
        self
    }

    /// The same with one more setting of postgresql.conf.
    #[must_use]
    pub fn setting(mut self, name: &str, value: &str) -> Self {
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The same with another way to log in.
    #[must_use]
    pub fn auth(mut self, auth: ClusterAuth) -> Self {
        self.auth = auth;
        self
    }

    /// The same with TLS.
    #[must_use]
    pub fn tls(mut self, tls: ClusterTls) -> Self {
        self.tls = Some(tls);
        self
    }
}

/// What pg_hba.conf asks for, on TCP and on the socket.
#[derive(Clone, Debug)]
pub enum ClusterAuth {
    /// Nothing.
    Trust,
    /// SCRAM-SHA-256; the password is the one of `postgres`.
    Scram {
        /// Password of `postgres`.
        password: String,
    },
    /// md5; the password is the one of `postgres`.
    Md5 {
        /// Password of `postgres`.
        password: String,
    },
    /// These lines of pg_hba.conf, and this password of `postgres`.
    Hba {
        /// Password of `postgres`.
        password: String,
        /// Whole lines.
        lines: Vec<String>,
    },
}

impl ClusterAuth {
    pub(super) fn password(&self) -> Option<&str> {
        match self {
            Self::Trust => None,
            Self::Scram { password } | Self::Md5 { password } | Self::Hba { password, .. } => Some(password),
        }
    }

    pub(super) fn method(&self) -> &'static str {
        match self {
            Self::Trust => "trust",
            Self::Scram { .. } | Self::Hba { .. } => "scram-sha-256",
            Self::Md5 { .. } => "md5",
        }
    }

    pub(super) fn hba(&self) -> String {
        if let Self::Hba { lines, .. } = self {
            return lines.join("\n") + "\n";
        }
        let method = self.method();
        ["local all all", "local replication all", "host all all all", "host replication all all"]
            .map(|line| format!("{line} {method}\n"))
            .concat()
    }
}

/// What the server shows on TLS.
#[derive(Clone, Debug)]
pub struct ClusterTls {
    /// Certificate chain, PEM.
    pub certificate_pem: String,
    /// Private key, PEM.
    pub key_pem: String,
    /// Authority that client certificates must come from, PEM; none: they are not asked for.
    pub client_ca_pem: Option<String>,
}

/// How a server is asked to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Sessions are ended, everything is written (SIGINT).
    Fast,
    /// As in a crash of the server, but the postmaster reaps its children (SIGQUIT).
    Immediate,
    /// `kill -9` of the postmaster; its children notice by themselves.
    Kill,
}

impl Stop {
    pub(super) fn signal(self) -> &'static str {
        match self {
            Self::Fast => "INT",
            Self::Immediate => "QUIT",
            Self::Kill => "KILL",
        }
    }
}

/// A throw-away cluster could not be made, started or stopped.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// A file or directory of the cluster.
    #[error("cluster {name}: cannot {doing}")]
    Io {
        /// Name of the cluster.
        name: String,
        /// What was attempted, on which path.
        doing: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// initdb or postgres ended with an error.
    #[error("cluster {name}: {program} failed: {output}")]
    Program {
        /// Name of the cluster.
        name: String,
        /// The program's path.
        program: String,
        /// The end of what it printed.
        output: String,
    },
    /// The server did not become ready, or did not stop.
    #[error("cluster {name}: the server did not {what} within {seconds} s; the end of its log: {log}")]
    Timeout {
        /// Name of the cluster.
        name: String,
        /// `start` or `stop`.
        what: &'static str,
        /// How long was waited.
        seconds: u64,
        /// The end of the server's log.
        log: String,
    },
}
