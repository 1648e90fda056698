//! What a rule is, apart from how it is evaluated: its stable code, its words, and how far its fix may be automated.
//!
//! `docs/validation.md` is written from these, and the tests know from them which rules there are.

use super::{Outcome, Statement};
use crate::catalog::journal::Side;
use crate::config::ServerKind;

/// What a rule looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject {
    /// The servers, once.
    Instance,
    /// Each database.
    Database,
}

/// When a rule is evaluated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Before the migration begins.
    Before,
    /// The same, but only where a cutover will follow.
    BeforeOnline,
    /// Before it begins, an offline one too, which streams what changes during its copy; and where a cutover will follow,
    /// again and again while it streams, and once more before that.
    Repeatedly,
    /// The same, but only where a cutover will follow.
    RepeatedlyOnline,
}

/// How a managed service's users mend it, where that is another way.
#[derive(Clone, Copy, Debug)]
pub enum Hosted {
    /// In the same way.
    Same,
    /// By the service's own means to set this parameter of PostgreSQL; the server restarts if the parameter needs it.
    Parameter(&'static str),
    /// In these words.
    Words {
        /// Amazon RDS and Aurora.
        amazon: &'static str,
        /// Azure Database for PostgreSQL.
        azure: &'static str,
        /// Google Cloud SQL and AlloyDB.
        google: &'static str,
    },
}

/// Whether `--fix` runs the statements of the fix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Apply {
    /// It does, where the server to be mended is of this version or newer: they change nothing for the application and
    /// hold no lock for long. 0: always.
    Since(u32),
    /// It shows them and says why it does not.
    Refused(&'static str),
    /// No statement mends it.
    ByHand,
}

/// One rule.
#[derive(Clone, Copy, Debug)]
pub struct Definition {
    /// Stable name, such as `wal_level`.
    pub code: &'static str,
    /// What it looks at.
    pub subject: Subject,
    /// When it is evaluated.
    pub when: When,
    /// How it comes out at worst.
    pub worst: Outcome,
    /// Why it matters.
    pub why: &'static str,
    /// What is shown.
    pub evidence: &'static str,
    /// What mends it.
    pub fix: &'static str,
    /// The server that is mended.
    pub on: Side,
    /// What its managed services say instead.
    pub hosted: Hosted,
    /// Whether `--fix` runs the statements.
    pub apply: Apply,
}

impl Definition {
    /// What most rules are: about the source as a whole, asked before a migration begins, mended by hand.
    pub(super) const USUAL: Self = Self {
        code: "",
        subject: Subject::Instance,
        when: When::Before,
        worst: Outcome::Failed,
        why: "",
        evidence: "",
        fix: "",
        on: Side::Source,
        hosted: Hosted::Same,
        apply: Apply::ByHand,
    };
}

impl Definition {
    /// The fix in the words of this kind of server.
    pub fn fix_on(&self, kind: ServerKind) -> String {
        let parameter = |name: &str| match kind {
            ServerKind::AwsRds | ServerKind::AwsAurora => {
                format!("set {name} in the parameter group of the instance, and reboot it if the parameter is static")
            }
            ServerKind::Azure => format!(
                "set the server parameter {name} (az postgres flexible-server parameter set), and restart the server if it \
                 says so"
            ),
            ServerKind::GcpCloudSql | ServerKind::GcpAlloyDb => {
                format!(
                    "set the database flag {name} (gcloud … --database-flags), which restarts the instance if it has to"
                )
            }
            ServerKind::Postgres | ServerKind::Other => self.fix.to_owned(),
        };
        match self.hosted {
            Hosted::Same => self.fix.to_owned(),
            Hosted::Parameter(name) => parameter(name),
            Hosted::Words { amazon, azure, google } => match kind {
                ServerKind::AwsRds | ServerKind::AwsAurora => amazon,
                ServerKind::Azure => azure,
                ServerKind::GcpCloudSql | ServerKind::GcpAlloyDb => google,
                ServerKind::Postgres | ServerKind::Other => self.fix,
            }
            .to_owned(),
        }
    }

    /// Whether a server of this kind lets anybody run the statement. No service lets its users become superusers, set
    /// parameters or read verifiers; only Amazon keeps BYPASSRLS to itself.
    pub(super) fn allows(kind: ServerKind, statement: &Statement) -> bool {
        let sql = statement.sql.as_str();
        let reserved = sql.starts_with("ALTER SYSTEM")
            || sql.starts_with("ALTER ROLE ALL ")
            || sql.contains("pg_reload_conf()")
            || sql.contains("ON pg_catalog.pg_authid")
            || (sql.starts_with("ALTER ROLE") && sql.ends_with(" SUPERUSER"));
        match kind {
            ServerKind::Postgres => true,
            ServerKind::AwsRds | ServerKind::AwsAurora => {
                !(reserved || sql.starts_with("ALTER ROLE") && sql.ends_with(" BYPASSRLS"))
            }
            ServerKind::Azure | ServerKind::GcpCloudSql | ServerKind::GcpAlloyDb | ServerKind::Other => !reserved,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_server_has_its_words() {
        let definition = Definition {
            code: "x",
            subject: Subject::Instance,
            when: When::Before,
            worst: Outcome::Failed,
            why: "",
            evidence: "",
            fix: "do it",
            on: Side::Source,
            hosted: Hosted::Parameter("max_wal_senders"),
            apply: Apply::ByHand,
        };
        assert_eq!(definition.fix_on(ServerKind::Postgres), "do it");
        assert!(definition.fix_on(ServerKind::AwsRds).contains("set max_wal_senders in the parameter group"));
        assert!(definition.fix_on(ServerKind::Azure).contains("az postgres"));
        let words = Hosted::Words { amazon: "a", azure: "b", google: "c" };
        let definition = Definition { hosted: words, ..definition };
        let said = [ServerKind::AwsAurora, ServerKind::Azure, ServerKind::GcpAlloyDb, ServerKind::Other]
            .map(|kind| definition.fix_on(kind));
        assert_eq!(said, ["a", "b", "c", "do it"]);
    }
}
