//! The manual: one page for the program, and behind it one for each command, in the order of `--help`.

/// All of it, in the language of `man`.
pub(super) fn text(program: clap::Command) -> std::io::Result<Vec<u8>> {
    let mut text = Vec::new();
    add(&mut text, program.disable_help_subcommand(true), "")?;
    Ok(text)
}

/// Adds the page of a command of `parent`, and those of its own commands.
fn add(text: &mut Vec<u8>, command: clap::Command, parent: &str) -> std::io::Result<()> {
    let typed = format!("{parent}{}", command.get_name());
    let command = command.bin_name(&typed).display_name(typed.replace(' ', "-"));
    let inner: Vec<clap::Command> = command.get_subcommands().cloned().collect();
    clap_mangen::Man::new(command).render(text)?;
    let parent = format!("{typed} ");
    inner.into_iter().try_for_each(|inner| add(text, inner.disable_help_subcommand(true), &parent))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn every_command_has_a_page_that_says_how_it_is_typed() {
        let text = super::text(crate::cli::Cli::command()).expect("written");
        let text = String::from_utf8(text).expect("text").replace("\\-", "-");
        let place = |part: &str| text.find(part).unwrap_or_else(|| panic!("{part}: {text}"));
        assert!(place(".TH pgcutover 1") < place(".TH pgcutover-run 1"));
        assert!(place(".TH pgcutover-run 1") < place(".TH pgcutover-migration-cutover 1"));
        assert!(place(".TH pgcutover-migration-cutover 1") < place(".TH pgcutover-shutdown 1"));
        place("\\fBpgcutover migration cutover\\fR");
        place("\\fBpgcutover kill-client\\fR");
        assert!(!text.contains("pgcutover-help"), "a page that is not there");
    }
}
