//! `pgcutover migration …`, as it is typed.

use std::path::PathBuf;
use std::process::Command;

use pgcutover::demo::shop::SHOP;

use crate::Face;
use crate::support::daemon::Daemon;
use crate::support::world::NAME;

/// A terminal.
pub struct CommandLine {
    config: PathBuf,
}

impl CommandLine {
    pub fn of(daemon: &Daemon) -> Self {
        Self { config: daemon.config_path() }
    }

    /// Runs a command that must succeed and print `part`.
    fn type_in(&self, arguments: &[&str], part: &str) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pgcutover"));
        let output = command.arg("migration").args(arguments).arg("-c").arg(&self.config).output().unwrap();
        let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success() && text.contains(part), "{arguments:?}: {}\n{text}{errors}", output.status);
    }
}

impl Face for CommandLine {
    async fn create(&mut self) {
        self.type_in(&["create", NAME, "--database", SHOP, "--wait"], "WaitingForCutoverTrigger");
    }

    async fn verify(&mut self) {
        self.type_in(&["verify", NAME], "0 differences");
    }

    async fn dry_run(&mut self) {
        self.type_in(&["cutover", NAME, "--dry-run"], "dry run: it would have switched");
    }

    async fn cut_over(&mut self) {
        self.type_in(&["cutover", NAME], "switched");
    }

    async fn roll_back(&mut self) {
        self.type_in(&["rollback", NAME], "switched");
    }

    async fn complete(&mut self) {
        self.type_in(&["complete", NAME], "removed slot");
    }
}
