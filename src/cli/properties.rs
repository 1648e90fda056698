//! Reads the JSON file that users of the Azure migration service already have.
//!
//! Its servers must be those of the configuration. Its passwords are not read: secrets come from the configuration and
//! are never stored with a migration.

use std::path::Path;

use serde_json::{Map, Value};

use super::CliError;
use crate::config::nearest;
use crate::migration::view::{MigrationOption, Mode};

/// Keys that are understood, in the spelling of that service's documentation; case does not matter.
const KEYS: [&str; 11] = [
    "SourceDBServerResourceId",
    "SecretParameters",
    "SourceServerUserName",
    "TargetServerUserName",
    "DBsToMigrate",
    "OverwriteDBsInTarget",
    "MigrationMode",
    "MigrationOption",
    "SourceType",
    "SslMode",
    "MigrationRuntimeResourceId",
];

/// What the file says.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Properties {
    pub(super) databases: Vec<String>,
    pub(super) mode: Option<Mode>,
    pub(super) option: Option<MigrationOption>,
    pub(super) overwrite_target: bool,
    /// `host:port@user`
    source: Option<String>,
    source_user: Option<String>,
    target_user: Option<String>,
    sslmode: Option<String>,
    notes: Vec<String>,
}

pub(super) fn read(path: &Path) -> Result<Properties, CliError> {
    let wrong = |reason: String| CliError::Usage(format!("--properties {}: {reason}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
    parse(&text).map_err(wrong)
}

pub(super) fn parse(text: &str) -> Result<Properties, String> {
    let document: Map<String, Value> = serde_json::from_str(text).map_err(|error| error.to_string())?;
    // The service's own tools take the file with or without this wrapper.
    let inner = match document.get("properties") {
        Some(Value::Object(inner)) => inner,
        Some(_) | None => &document,
    };
    let mut properties = Properties::default();
    for (key, value) in inner {
        let Some(known) = KEYS.iter().find(|known| known.eq_ignore_ascii_case(key)) else {
            let near = nearest(key, &KEYS).map(|near| format!("; did you mean {near}?")).unwrap_or_default();
            return Err(format!("unknown key {key:?}{near}"));
        };
        properties.take(known, value).map_err(|reason| format!("{key}: {reason}"))?;
    }
    Ok(properties)
}

impl Properties {
    fn take(&mut self, key: &str, value: &Value) -> Result<(), String> {
        match key {
            "SourceDBServerResourceId" => self.source = Some(text(value)?),
            "SourceServerUserName" => self.source_user = Some(text(value)?),
            "TargetServerUserName" => self.target_user = Some(text(value)?),
            "SslMode" => {
                // The service writes VerifyFull.
                let said = text(value)?.to_ascii_lowercase();
                self.sslmode = Some(
                    said.strip_prefix("verify")
                        .map_or(said.clone(), |what| format!("verify-{}", what.trim_start_matches('-'))),
                );
            }
            "SecretParameters" => self.take_secrets(value)?,
            "DBsToMigrate" => {
                let list = value.as_array().ok_or("expected a list of databases")?;
                self.databases = list.iter().map(text).collect::<Result<_, _>>()?;
            }
            "OverwriteDBsInTarget" => self.overwrite_target = flag(value)?,
            "MigrationMode" => {
                self.mode = Some(choice(value, &[("online", Mode::Online), ("offline", Mode::Offline)])?);
            }
            "MigrationOption" => {
                let choices = [
                    ("validate", MigrationOption::Validate),
                    ("migrate", MigrationOption::Migrate),
                    ("validateandmigrate", MigrationOption::ValidateAndMigrate),
                ];
                self.option = Some(choice(value, &choices)?);
            }
            other => self.notes.push(format!("properties: {other} has no effect here")),
        }
        Ok(())
    }

    /// User names may stand beside the passwords.
    fn take_secrets(&mut self, value: &Value) -> Result<(), String> {
        let secrets = value.as_object().ok_or("expected an object")?;
        for (key, value) in secrets {
            match key.to_ascii_lowercase().as_str() {
                "admincredentials" => self.notes.push(
                    "properties: the passwords in AdminCredentials are not read; those of the configuration are used"
                        .to_owned(),
                ),
                "sourceserverusername" => self.source_user = Some(text(value)?),
                "targetserverusername" => self.target_user = Some(text(value)?),
                _ => return Err(format!("unknown key {key:?}")),
            }
        }
        Ok(())
    }

    /// What the operator should know. Nothing of it is secret.
    pub(super) fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Compares the servers with the daemon's, given as `SHOW CONFIG` lists them.
    pub(super) fn compare(&self, config: &Value) -> Result<(), CliError> {
        let setting = |key: &str| {
            let rows = config.as_array().into_iter().flatten();
            let row = rows.filter(|row| row["key"] == *key).find_map(|row| row["value"].as_str());
            row.unwrap_or_default().to_owned()
        };
        let mut differences = Vec::new();
        let mut expect = |what: &str, key: &str, said: Option<&str>| {
            let configured = setting(key);
            if let Some(said) = said.filter(|said| !said.eq_ignore_ascii_case(&configured)) {
                differences.push(format!("{what} is {said:?} there, but {key} is {configured:?} in the configuration"));
            }
        };
        if let Some(source) = &self.source {
            let (address, user) = source.split_once('@').map_or((source.as_str(), None), |(a, user)| (a, Some(user)));
            let (host, port) = address.rsplit_once(':').unwrap_or((address, "5432"));
            expect("SourceDBServerResourceId's host", "source.host", Some(host));
            expect("SourceDBServerResourceId's port", "source.port", Some(port));
            expect("SourceDBServerResourceId's user", "source.user", user);
        }
        expect("sourceServerUserName", "source.user", self.source_user.as_deref());
        expect("targetServerUserName", "target.user", self.target_user.as_deref());
        expect("sslMode", "source.sslmode", self.sslmode.as_deref());
        if differences.is_empty() {
            return Ok(());
        }
        let list = differences.join("; ");
        Err(CliError::Usage(format!("the properties file is about other servers than the configuration: {list}")))
    }
}

fn text(value: &Value) -> Result<String, String> {
    value.as_str().map(str::to_owned).ok_or_else(|| "expected text".to_owned())
}

/// That service writes booleans as text.
fn flag(value: &Value) -> Result<bool, String> {
    match value {
        Value::Bool(flag) => Ok(*flag),
        Value::String(text) if text.eq_ignore_ascii_case("true") => Ok(true),
        Value::String(text) if text.eq_ignore_ascii_case("false") => Ok(false),
        _ => Err("expected true or false".to_owned()),
    }
}

fn choice<T: Copy>(value: &Value, choices: &[(&str, T)]) -> Result<T, String> {
    let text = text(value)?;
    let found = choices.iter().find(|(word, _)| text.eq_ignore_ascii_case(word));
    let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
    found.map(|(_, value)| *value).ok_or_else(|| format!("{text:?} is not one of {}", words.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = r#"{"properties": {
        "SourceDBServerResourceId": "10.0.0.5:5432@postgres",
        "SecretParameters": {"AdminCredentials": {"SourceServerPassword": "hunter2", "TargetServerPassword": "hunter3"}},
        "targetServerUserName": "postgres", "DBsToMigrate": ["shop", "crm"], "OverwriteDBsInTarget": "true",
        "MigrationMode": "Online", "MigrationOption": "ValidateAndMigrate", "sourceType": "OnPremises", "sslMode": "Prefer"
    }}"#;

    fn config(host: &str) -> Value {
        serde_json::json!([
            {"key": "source.host", "value": host}, {"key": "source.port", "value": "5432"},
            {"key": "source.user", "value": "postgres"}, {"key": "target.user", "value": "postgres"},
            {"key": "source.sslmode", "value": "prefer"},
        ])
    }

    #[test]
    fn the_services_file_is_understood_and_its_passwords_are_left_alone() {
        let properties = parse(FILE).expect("valid");
        assert_eq!(properties.databases, ["shop", "crm"]);
        assert_eq!((properties.mode, properties.overwrite_target), (Some(Mode::Online), true));
        assert_eq!(properties.option, Some(MigrationOption::ValidateAndMigrate));
        assert!(!format!("{properties:?}").contains("hunter"));
        properties.compare(&config("10.0.0.5")).expect("the same servers");
        let verified = parse(&FILE.replace("\"Prefer\"", "\"VerifyFull\"")).expect("valid");
        assert_eq!(verified.sslmode.as_deref(), Some("verify-full"));
        let error = properties.compare(&config("10.0.0.9")).expect_err("another source").to_string();
        assert!(error.contains("\"10.0.0.5\" there, but source.host is \"10.0.0.9\""), "{error}");
        assert!(!error.contains("hunter"));
    }

    #[test]
    fn mistakes_are_named() {
        for (text, expected) in [
            ("{\"DBsToMigrat\": []}", "unknown key \"DBsToMigrat\"; did you mean DBsToMigrate?"),
            ("{\"MigrationMode\": \"live\"}", "MigrationMode: \"live\" is not one of online, offline"),
            ("{\"OverwriteDBsInTarget\": 1}", "OverwriteDBsInTarget: expected true or false"),
        ] {
            assert_eq!(parse(text).expect_err(text), expected);
        }
        // The same file without its wrapper.
        assert!(parse("{\"DBsToMigrate\": [\"shop\"]}").is_ok());
    }
}
