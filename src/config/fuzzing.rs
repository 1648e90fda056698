//! What must hold for any configuration file. Built for tests and fuzzing only.

use std::path::Path;

use super::{Environment, Network, load, units};

/// The file's text: read as far as it can be, every problem a sentence; what units say comes back as it was.
pub fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    // A path in there must not lead the reader to real files.
    if !text.contains("_file") {
        let (config, problems, _keys) = load::read(text, Path::new("/nowhere"), &Environment::default());
        assert!(problems.iter().all(|problem| !problem.message.is_empty()));
        if problems.is_empty() {
            assert!(!config.settings().is_empty());
        }
    }
    if let Ok(size) = units::parse_size(text) {
        assert_eq!(units::parse_size(&units::format_size(size)), Ok(size));
    }
    if let Ok(network) = Network::parse(text) {
        assert_eq!(Network::parse(&network.to_string()), Ok(network));
    }
    if let Ok(duration) = units::parse_duration(text) {
        assert_eq!(units::parse_duration(&units::format_duration(duration)), Ok(duration));
    }
}
