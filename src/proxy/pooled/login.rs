//! The end of a pooled client's login: what it asked for in its startup packet, and what it is told.

use std::sync::Arc;

use super::steps::{bring, code_of, with_startup};
use crate::proxy::client_error::ClientError;
use crate::proxy::handoff::{Tracked, capture};
use crate::proxy::pool::{Link, LocalPool, Profile, Reported};

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
    let refused = |code: String| ClientError::ServerRefused {
        code,
        message: "a parameter of the startup packet was refused by the server".to_owned(),
    };
    let wanted = pool.central.profile(with_startup(&link.base.state, &settings));
    bring(link, &wanted).await.map_err(refused)?;
    // As the server spells them.
    let mut nobody = bytes::BytesMut::new();
    let customs = link.custom_names();
    let state = capture(link.connection(), &Tracked::new(), &customs, &mut nobody).await;
    let profile = pool.central.profile(state.map_err(|error| refused(code_of(&error)))?);
    link.profile = profile.clone();
    link.note_reported();
    profile.note_reported(link.server(), &link.reported);
    pool.central.note_startup(settings, &profile);
    Ok((profile, link.reported.clone()))
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
}
