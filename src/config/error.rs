//! What is wrong with a configuration: every problem at once, each with its place and its mend.

use std::fmt;
use std::path::PathBuf;

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A line of the configuration file, counted from 1.
    Line(usize),
    /// An environment variable.
    Environment(String),
    /// Nowhere: it is missing, or it is about several values together.
    Whole,
}

/// One thing that is wrong. Holds no secret value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where.
    pub origin: Origin,
    /// What is wrong and what mends it.
    pub message: String,
}

/// The configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read the configuration file {}: {source}", path.display())]
    Read {
        /// The file that was named.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file was read, or there is none, and what it says cannot be used.
    #[error("{}", Listing { path: path.as_ref(), problems })]
    Invalid {
        /// The file; none: everything came from the environment.
        path: Option<PathBuf>,
        /// Everything that was found, in the order of the sections.
        problems: Vec<Problem>,
    },
}

struct Listing<'a> {
    path: Option<&'a PathBuf>,
    problems: &'a [Problem],
}

impl fmt::Display for Listing<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = self.path.map_or_else(|| "configuration".to_owned(), |path| path.display().to_string());
        for (index, problem) in self.problems.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            match &problem.origin {
                Origin::Line(line) => write!(f, "{file}:{line}: {}", problem.message)?,
                Origin::Environment(name) => write!(f, "environment variable {name}: {}", problem.message)?,
                Origin::Whole => write!(f, "{file}: {}", problem.message)?,
            }
        }
        Ok(())
    }
}
