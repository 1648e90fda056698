//! Ctrl-C while an order is under way: the daemon goes on with what it has begun, so whoever waits for the answer no
//! longer is told what goes on, and what ends it. Never gives an order itself: the reader decides.

use super::{Command, MigrationCommand};

/// What goes on without whoever has given the order; none: nothing does, and the process just ends.
pub(super) fn what_goes_on(command: &Command) -> Option<String> {
    match command {
        Command::Pause { database } => {
            let resume = match database {
                Some(name) => format!("pgcutover resume {name}"),
                None => "pgcutover resume".to_owned(),
            };
            Some(format!(
                "a pause that still waited is taken back: `pgcutover status` says what is held all the same, and \
                 `{resume}` lets it go on"
            ))
        }
        Command::Migration(command) => of_migration(command),
        _ => None,
    }
}

fn of_migration(command: &MigrationCommand) -> Option<String> {
    match command {
        MigrationCommand::Cutover(order) if !order.dry_run => {
            let name = &order.name;
            Some(format!(
                "the cutover goes on: `pgcutover migration cutover-report {name}` says what becomes of it; until it is \
                 decided, `pgcutover migration cancel {name}` gives it up, and the whole migration with it"
            ))
        }
        MigrationCommand::Cutover(order) | MigrationCommand::Rollback(order) => {
            let what = if order.dry_run { "rehearsal" } else { "rollback" };
            let name = &order.name;
            Some(format!("the {what} goes on: `pgcutover migration cutover-report {name}` says what becomes of it"))
        }
        MigrationCommand::Verify { name, .. } => {
            Some(format!("the comparison goes on: `pgcutover migration verification {name}` has what it finds"))
        }
        MigrationCommand::Complete { name } | MigrationCommand::Cancel { name } => {
            Some(format!("the order is carried out all the same: `pgcutover migration show {name}` says how far it is"))
        }
        MigrationCommand::Create(create) if create.wait => {
            let name = &create.name;
            Some(format!(
                "the migration goes on: `pgcutover migration show {name}` says how far it is, `pgcutover migration \
                 cancel {name}` removes it"
            ))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::super::Cli;
    use super::*;

    #[test]
    fn who_gives_up_waiting_is_told_what_ends_it() {
        for (typed, said) in [
            ("pause shop", Some("`pgcutover resume shop`")),
            ("pause", Some("`pgcutover resume`")),
            ("migration cutover move", Some("the cutover goes on")),
            ("migration cutover move --dry-run", Some("the rehearsal goes on")),
            ("migration rollback move", Some("the rollback goes on")),
            ("migration create move --wait", Some("`pgcutover migration cancel move`")),
            ("migration create move", None),
            ("migration show move --watch", None),
            ("status", None),
        ] {
            let words = std::iter::once("pgcutover").chain(typed.split(' '));
            let goes_on = what_goes_on(&Cli::try_parse_from(words).expect(typed).command);
            match said {
                Some(said) => {
                    assert!(goes_on.as_deref().is_some_and(|told| told.contains(said)), "{typed}: {goes_on:?}")
                }
                None => assert_eq!(goes_on, None, "{typed}"),
            }
        }
    }
}
