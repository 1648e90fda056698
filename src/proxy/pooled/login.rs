//! The end of a pooled client's login: what it asked for in its startup packet, and what it is told.

use std::sync::Arc;

use super::steps::{Unfit, bring, code_of, with_startup};
use crate::proxy::client_error::ClientError;
use crate::proxy::handoff::{Tracked, capture};
use crate::proxy::pool::{Link, LocalPool, Profile, Reported};
use crate::sqlstate;

/// What a startup packet asks for, as settings; an error where it asks for something that no setting can give.
pub(in crate::proxy) fn settings_of(parameters: &[(String, String)]) -> Result<Vec<(String, String)>, ClientError> {
    let mut settings = Vec::new();
    for (name, value) in parameters {
        match name.as_str() {
            "replication" => {}
            "options" => options(value, &mut settings)?,
            _ => settings.push((name.clone(), value.clone())),
        }
    }
    Ok(settings)
}

/// `-c name=value` and `--name=value`, split and unescaped as PostgreSQL does (`pg_split_opts`).
fn options(text: &str, settings: &mut Vec<(String, String)>) -> Result<(), ClientError> {
    let unknown = || ClientError::Unsupported("unsupported command-line option in transaction pooling".into());
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        match character {
            '\\' => word.get_or_insert_default().extend(characters.next()),
            space if space.is_ascii_whitespace() => words.extend(word.take()),
            other => word.get_or_insert_default().push(other),
        }
    }
    words.extend(word);
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        let assignment = match word.strip_prefix("-c") {
            Some("") => words.next().ok_or_else(unknown)?,
            Some(rest) => rest.to_owned(),
            None => word.strip_prefix("--").ok_or_else(unknown)?.to_owned(),
        };
        let (name, value) = assignment.split_once('=').ok_or_else(unknown)?;
        settings.push((name.replace('-', "_"), value.to_owned()));
    }
    Ok(())
}

/// What a client that starts like this has and is told, if another one has started like it on this server.
pub(in crate::proxy) fn known(pool: &LocalPool, settings: &Vec<(String, String)>) -> Option<(Arc<Profile>, Reported)> {
    let profile = pool.central.profile_of_startup(settings)?;
    let server = pool.server_at(pool.database().epoch())?;
    let told = profile.reported(server)?;
    Some((profile, told))
}

/// Brings the settings of a client's startup packet to a connection, and learns from it what they come to. The
/// connection is as the client needs it afterwards.
pub(in crate::proxy) async fn learn(
    pool: &LocalPool,
    link: &mut Link,
    settings: Vec<(String, String)>,
) -> Result<(Arc<Profile>, Reported), ClientError> {
    let wanted = pool.central.profile(with_startup(&link.base.state, &settings));
    bring(link, &wanted).await.map_err(refused)?;
    // As the server spells them.
    let mut nobody = bytes::BytesMut::new();
    let customs = link.custom_names();
    let state = capture(link.connection(), &Tracked::new(), &customs, &mut nobody).await;
    let state = state.map_err(|error| refused(Unfit { code: code_of(&error), setting: None }))?;
    let profile = pool.central.profile(state);
    link.profile = profile.clone();
    link.note_reported();
    profile.note_reported(link.server(), &link.reported);
    pool.central.note_startup(settings, &profile);
    Ok((profile, link.reported.clone()))
}

/// What a client is told whose startup packet asks for what its server refuses: which of its parameters it was, in
/// PostgreSQL's words for the code, as the server's own are not at hand.
fn refused(Unfit { code, setting }: Unfit) -> ClientError {
    let message = match (setting, code.as_str()) {
        (Some(name), sqlstate::UNDEFINED_OBJECT) => format!("unrecognized configuration parameter \"{name}\""),
        (Some(name), sqlstate::INVALID_PARAMETER_VALUE) => format!("invalid value for parameter \"{name}\""),
        (Some(name), sqlstate::INSUFFICIENT_PRIVILEGE) => format!("permission denied to set parameter \"{name}\""),
        (Some(name), _) => format!("parameter \"{name}\" of the startup packet was refused by the server"),
        (None, _) => "what the startup packet asks for could not be brought to a server connection".to_owned(),
    };
    ClientError::ServerRefused { code, message }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_split_as_postgresql_splits_them() {
        let of = |text: &str| settings_of(&[("options".to_owned(), text.to_owned())]);
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(
            of("-c work_mem=1MB  -cgeqo=off --search-path=a\\ b,\\\\c").expect("valid"),
            [pair("work_mem", "1MB"), pair("geqo", "off"), pair("search_path", "a b,\\c")]
        );
        assert!(of("-B 100").is_err() && of("-c").is_err() && of("-c x").is_err());
        let parameters = [pair("application_name", "a"), pair("replication", "off")];
        assert_eq!(settings_of(&parameters).expect("valid"), [pair("application_name", "a")]);
    }

    #[test]
    fn a_parameter_that_is_refused_is_named() {
        for (code, setting, expected) in [
            ("42704", Some("nonsense"), "unrecognized configuration parameter \"nonsense\""),
            ("22023", Some("work_mem"), "invalid value for parameter \"work_mem\""),
            ("42501", Some("log_statement"), "permission denied to set parameter \"log_statement\""),
            ("55P02", Some("x"), "parameter \"x\" of the startup packet was refused by the server"),
            ("08006", None, "what the startup packet asks for could not be brought to a server connection"),
        ] {
            let unfit = Unfit { code: code.to_owned(), setting: setting.map(str::to_owned) };
            let told = ClientError::ServerRefused { code: code.to_owned(), message: expected.to_owned() };
            assert_eq!(refused(unfit), told);
        }
    }
}
