//! A client of a pool does not log in to the server, so the server does not look at its role either. With `auth_query` the
//! proxy has; where the proof was another one, that is done here.

use std::time::{Duration, SystemTime};

use super::LoginInProgress;
use crate::config::AuthMethod;
use crate::proxy::auth::hba::Demand;
use crate::proxy::client_error::ClientError;
use crate::switch::ServerRole;
use crate::telemetry::metrics::AuthFailure;

/// How long the server may take to say it.
const PATIENCE: Duration = Duration::from_secs(3);

/// What a client was let in by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Proof {
    /// By what the server has stored for its role: all else that is stored there was looked at too.
    #[default]
    Server,
    /// By a password of the users file.
    File,
    /// By its certificate, or by its word.
    Believed,
}

impl Proof {
    /// What a client has shown of whom this was demanded.
    pub(super) fn of(demand: &Demand, is_in_file: bool) -> Self {
        match demand.method {
            AuthMethod::Trust | AuthMethod::Cert => Self::Believed,
            AuthMethod::Auto | AuthMethod::ScramSha256 | AuthMethod::Md5 | AuthMethod::Password if is_in_file => {
                Self::File
            }
            AuthMethod::Auto | AuthMethod::ScramSha256 | AuthMethod::Md5 | AuthMethod::Password => Self::Server,
        }
    }
}

impl LoginInProgress<'_> {
    /// Refuses a role that `active` would refuse at its login, in PostgreSQL's words. Where that cannot be found out now,
    /// nobody is refused for it: who cannot reach the server is told so soon enough.
    pub(super) async fn may_log_in(&self, active: ServerRole) -> Result<(), ClientError> {
        if self.proof == Proof::Server {
            return Ok(());
        }
        let (verifiers, user) = (&self.shared().verifiers, &self.startup.user);
        let asked = tokio::time::timeout(PATIENCE, verifiers.standing(&self.access.lookup, active, user)).await;
        let account = match asked {
            Ok(Ok(account)) => account,
            Ok(Err(error)) => {
                if let Some(others) = self.complain("standing") {
                    tracing::warn!(%error, others, "it is not known whether a role may log in");
                }
                return Ok(());
            }
            Err(_) => return Ok(()),
        };
        let by_password = self.proof == Proof::File;
        let refused = match account {
            Some(account) if by_password && account.has_expired(SystemTime::now()) => {
                ClientError::password_failed(user)
            }
            Some(account) if account.can_login => return Ok(()),
            Some(_) => ClientError::not_permitted(user),
            None if by_password => ClientError::password_failed(user),
            None => ClientError::no_role(user),
        };
        self.count_failure(if by_password { AuthFailure::Password } else { AuthFailure::UnknownUser });
        Err(refused)
    }
}
