//! How the kernel watches a TCP link: keepalive probes while it is silent, and a bound on data that nobody acknowledges.

use std::time::Duration;

use super::reader::Section;
use super::units::format_duration;

/// Options of one side's links, named as in postgresql.conf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tcp {
    /// Silence after which the peer is asked whether it is still there.
    pub keepalives_idle: Duration,
    /// Between two such questions.
    pub keepalives_interval: Duration,
    /// So many without an answer: the link is dead.
    pub keepalives_count: u32,
    /// Data that is not acknowledged for so long: the link is dead; zero: the kernel's own patience.
    pub user_timeout: Duration,
}

impl Tcp {
    /// Towards clients.
    pub const OF_CLIENTS: Self = Self {
        keepalives_idle: Duration::from_secs(60),
        keepalives_interval: Duration::from_secs(15),
        keepalives_count: 6,
        user_timeout: Duration::ZERO,
    };
    /// Towards servers: a link that died is noticed after about a minute and a half.
    pub const OF_SERVERS: Self = Self {
        keepalives_idle: Duration::from_secs(30),
        keepalives_interval: Duration::from_secs(10),
        keepalives_count: 6,
        user_timeout: Duration::ZERO,
    };

    pub(super) fn read(section: &mut Section<'_>, defaults: Self) -> Self {
        let count = section.number("tcp_keepalives_count", defaults.keepalives_count as usize, 1..=127);
        Self {
            keepalives_idle: seconds(section, "tcp_keepalives_idle", defaults.keepalives_idle),
            keepalives_interval: seconds(section, "tcp_keepalives_interval", defaults.keepalives_interval),
            keepalives_count: u32::try_from(count).unwrap_or(defaults.keepalives_count),
            user_timeout: section.duration("tcp_user_timeout", defaults.user_timeout),
        }
    }

    /// Key and value of each.
    pub(super) fn pairs(&self) -> [(&'static str, String); 4] {
        [
            ("tcp_keepalives_idle", format_duration(self.keepalives_idle)),
            ("tcp_keepalives_interval", format_duration(self.keepalives_interval)),
            ("tcp_keepalives_count", self.keepalives_count.to_string()),
            ("tcp_user_timeout", format_duration(self.user_timeout)),
        ]
    }
}

/// The kernel counts whole seconds, and none is not among them.
fn seconds(section: &mut Section<'_>, key: &'static str, default: Duration) -> Duration {
    let value = section.duration(key, default);
    if value.as_secs() == 0 || value.subsec_nanos() != 0 {
        let origin = section.origin(key).unwrap_or(super::Origin::Whole);
        section.bad(key, origin, "must be whole seconds, at least one");
        return default;
    }
    value
}
