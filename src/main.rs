//! `pgcutover`: see the library's documentation.

use std::process::ExitCode;

fn main() -> ExitCode {
    pgcutover::cli::main()
}
