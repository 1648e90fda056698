//! What a real cutover would do, for the report of a dry run: read from the same places as the steps read it, at the time
//! when they would. Must never change anything.

use super::CutoverError;
use super::hard_fence::{self, Looking};
use super::soft_fence::{self, Before};
use super::work::{LineSessions, Work};
use crate::catalog::fence::{SavedDatabase, SavedRole};
use crate::config::FencePolicy;
use crate::proxy::SessionView;

/// At most so many sequences of a database are named.
const NAMED: usize = 5;

/// A kind of thing that a cutover does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// Sessions go on on the other server.
    MoveSessions,
    /// A session that bypasses the proxy is ended, or a replication connection through it.
    EndSession,
    /// Sequences are set on the other server.
    SetSequences,
    /// What no stream carries is brought over once more, in the pause.
    CarryUnstreamed,
    /// A setting of the server that is left is changed; an abort restores it.
    ChangeSetting,
    /// The server that is left lets nobody into a database any more; an abort restores it.
    ShutDatabase,
    /// Tables of the server that is left are locked until the decision.
    LockTables,
    /// A publication and a slot are made for the stream back.
    MakeWayBack,
    /// There would be no way back.
    LoseWayBack,
}

/// One thing that a cutover would do.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Intention {
    /// What kind of thing.
    pub action: Action,
    /// Where; none: on the whole server.
    pub database: Option<String>,
    /// To what, for operators.
    pub detail: String,
}

impl Work {
    /// Everything that a real cutover would do beyond what this dry run has done.
    pub(super) async fn foresee(&self) -> Result<Vec<Intention>, CutoverError> {
        let (from, to) = (self.from.role, self.to.role);
        let mut would = Vec::new();
        let mut note = |action, database: Option<&String>, detail| {
            would.push(Intention { action, database: database.cloned(), detail });
        };
        note(Action::MoveSessions, None, format!("{} sessions from the {from} to the {to}", self.sessions_moved));
        match self.lease.foresee_return().await.map_err(CutoverError::Engine)? {
            None => {
                let detail = format!("a publication and a replication slot in each database of the {to}");
                note(Action::MakeWayBack, None, detail);
            }
            Some(why_not) => note(Action::LoseWayBack, None, why_not),
        }
        let control = &self.from.control;
        for Before { saved, .. } in soft_fence::read_before(&**control, &self.case.databases, self.case.epoch).await? {
            let SavedDatabase { name, read_only, roles, allow_connections, connection_limit } = &saved;
            let now = |value: &Option<String>| value.clone().unwrap_or_else(|| "not set".to_owned());
            let statement = soft_fence::of_database(name);
            note(Action::ChangeSetting, Some(name), format!("{statement} (now {})", now(read_only)));
            for SavedRole { name: role, read_only } in roles {
                let statement = soft_fence::of_role(role, name);
                note(Action::ChangeSetting, Some(name), format!("{statement} (now {})", now(read_only)));
            }
            if self.options.fence == FencePolicy::Hard {
                let statement = self.shutting.statement(name);
                let statement = statement.trim_end_matches(';');
                let detail = format!(
                    "{statement} (now ALLOW_CONNECTIONS {allow_connections} CONNECTION LIMIT {connection_limit})"
                );
                note(Action::ShutDatabase, Some(name), detail);
            }
        }
        if self.options.fence == FencePolicy::Hard {
            let looking = Looking::Strangers;
            let strangers = hard_fence::backends(control, &self.case.databases, &self.known(), looking).await?;
            strangers.iter().for_each(|one| note(Action::EndSession, Some(&one.database), one.to_string()));
        }
        for SessionView { database, application_name, client_pid, .. } in self.replicating() {
            let detail = format!("the replication connection of session {client_pid} ({application_name:?})");
            note(Action::EndSession, Some(&database), detail);
        }
        for line in &self.lines {
            let Some(LineSessions { sequences, unstreamed, tables, .. }) = &line.sessions else { continue };
            let names: Vec<String> = sequences.names().iter().map(ToString::to_string).collect();
            if !names.is_empty() {
                let more = if names.len() > NAMED { ", …" } else { "" };
                let named = names.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
                note(Action::SetSequences, Some(&line.name), format!("{} on the {to}: {named}{more}", names.len()));
            }
            if unstreamed.is_some() {
                let detail = format!("unlogged tables and large objects, once more to the {to}");
                note(Action::CarryUnstreamed, Some(&line.name), detail);
            }
            if !tables.is_empty() {
                note(
                    Action::LockTables,
                    Some(&line.name),
                    format!("{} on the {from}, until the decision", tables.len()),
                );
            }
        }
        Ok(would)
    }
}
