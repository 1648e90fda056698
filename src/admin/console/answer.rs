//! From statements to rows, for the simple and the extended protocol.

use std::fmt::Debug;
use std::sync::Arc;

use async_trait::async_trait;
use futures_util::{Sink, stream};
use pgwire::api::portal::{Format, Portal};
use pgwire::api::query::{ExtendedQueryHandler, SimpleQueryHandler};
use pgwire::api::results::{DataRowEncoder, FieldFormat, FieldInfo, QueryResponse, Response, Tag};
use pgwire::api::stmt::QueryParser;
use pgwire::api::store::PortalStore;
use pgwire::api::{ClientInfo, ClientPortalStore, Type};
use pgwire::error::{ErrorInfo, PgWireError, PgWireResult};
use pgwire::messages::PgWireBackendMessage;
use pgwire::messages::data::DataRow;

use super::link::Presence;
use super::parse::{NoEffect, Statement, parse, split};
use crate::admin::error::{AdminError, ErrorKind};
use crate::admin::reply;
use crate::admin::service::Service;
use crate::admin::table::{Cell, Column, Kind};
use crate::proxy::ConsoleKey;

/// So many statements are answered in one message: all of their rows are in memory before the first is sent.
const STATEMENTS: usize = 16;

/// Answers one client.
pub(super) struct Answerer {
    service: Service,
    user: String,
    client: Presence,
    key: ConsoleKey,
    parser: Arc<Parser>,
}

impl Answerer {
    pub(super) fn new(service: Service, user: String, client: Presence, key: ConsoleKey) -> Self {
        Self { service, user, client, key, parser: Arc::new(Parser) }
    }

    async fn answer(&self, statement: Statement, format: &Format) -> PgWireResult<Response> {
        let command = match statement {
            Statement::NoEffect(NoEffect::Begin) => return Ok(Response::TransactionStart(Tag::new("BEGIN"))),
            Statement::NoEffect(what @ (NoEffect::Commit | NoEffect::Rollback)) => {
                return Ok(Response::TransactionEnd(Tag::new(what.tag())));
            }
            Statement::NoEffect(what) => return Ok(Response::Execution(Tag::new(what.tag()))),
            Statement::Command(command) => command,
        };
        let admin = &self.service.config().admin;
        let may_look = !command.changes_state() && admin.stats_users.contains(&self.user);
        if !admin.users.contains(&self.user) && !may_look {
            let error = AdminError::new(ErrorKind::Forbidden, "this role may not use the console")
                .hint("add it to [admin] users and reload");
            return Err(to_pgwire(error));
        }
        let only_waits = command.only_waits();
        let reply = tokio::select! {
            reply = self.service.execute_until(command, self.key.asked()) => reply,
            // Safe to drop, both: what it waits for is nobody else's.
            () = self.client.ended(), if only_waits => {
                Err(AdminError::new(ErrorKind::Unavailable, "the client has gone"))
            }
            () = self.key.asked(), if only_waits => Err(AdminError::cancelled()),
        };
        let reply = reply.map_err(to_pgwire)?;
        match reply.into_table() {
            Err(tag) => Ok(Response::Execution(Tag::new(tag))),
            Ok(table) => {
                let fields = Arc::new(fields(table.columns, Some(format)));
                let rows: Vec<PgWireResult<DataRow>> = table.rows.iter().map(|row| encode(&fields, row)).collect();
                let mut response = QueryResponse::new(fields, stream::iter(rows));
                response.set_command_tag("SHOW");
                Ok(Response::Query(response))
            }
        }
    }
}

#[async_trait]
impl SimpleQueryHandler for Answerer {
    async fn do_query<C>(&self, _client: &mut C, query: &str) -> PgWireResult<Vec<Response>>
    where
        C: ClientInfo + ClientPortalStore + Sink<PgWireBackendMessage> + Unpin + Send + Sync,
        C::PortalStore: PortalStore,
        C::Error: Debug,
        PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
    {
        // All is read before anything is done: a typing error in the second order must not leave the first one done.
        let statements = split(query);
        if statements.len() > STATEMENTS {
            let message = format!("more than {STATEMENTS} statements in one message");
            return Err(to_pgwire(AdminError::new(ErrorKind::Invalid, message)));
        }
        let statements: Result<Vec<_>, _> = statements.into_iter().map(parse).collect();
        let mut responses = Vec::new();
        for statement in statements.map_err(to_pgwire)? {
            responses.push(self.answer(statement, &Format::UnifiedText).await?);
        }
        Ok(responses)
    }
}

#[async_trait]
impl ExtendedQueryHandler for Answerer {
    type Statement = Statement;
    type QueryParser = Parser;

    fn query_parser(&self) -> Arc<Self::QueryParser> {
        self.parser.clone()
    }

    async fn do_query<C>(
        &self,
        _client: &mut C,
        portal: &Portal<Self::Statement>,
        _max_rows: usize,
    ) -> PgWireResult<Response>
    where
        C: ClientInfo + ClientPortalStore + Sink<PgWireBackendMessage> + Unpin + Send + Sync,
        C::PortalStore: PortalStore<Statement = Self::Statement>,
        C::Error: Debug,
        PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
    {
        self.answer(portal.statement.statement.clone(), &portal.result_column_format).await
    }
}

/// Reads the statements of the extended protocol.
pub(super) struct Parser;

#[async_trait]
impl QueryParser for Parser {
    type Statement = Statement;

    async fn parse_sql<C>(&self, _client: &C, sql: &str, _types: &[Option<Type>]) -> PgWireResult<Option<Statement>>
    where
        C: ClientInfo + Unpin + Send + Sync,
    {
        match split(sql).as_slice() {
            [] => Ok(None),
            [one] => parse(one).map(Some).map_err(to_pgwire),
            [..] => {
                let message = "cannot insert multiple commands into a prepared statement";
                Err(to_pgwire(AdminError::new(ErrorKind::Invalid, message)))
            }
        }
    }

    fn get_parameter_types(&self, _statement: &Statement) -> PgWireResult<Vec<Type>> {
        Ok(Vec::new())
    }

    fn get_result_schema(&self, statement: &Statement, format: Option<&Format>) -> PgWireResult<Vec<FieldInfo>> {
        let columns = match statement {
            Statement::NoEffect(_) => None,
            Statement::Command(command) => reply::columns(command),
        };
        Ok(columns.map(|columns| fields(columns, format)).unwrap_or_default())
    }
}

fn fields(columns: &[Column], format: Option<&Format>) -> Vec<FieldInfo> {
    let field = |(index, (name, kind)): (usize, &Column)| {
        let (datatype, size) = match kind {
            Kind::Text => (Type::TEXT, -1),
            Kind::Integer => (Type::INT8, 8),
            Kind::Float => (Type::FLOAT8, 8),
        };
        let format = format.map_or(FieldFormat::Text, |format| format.format_for(index));
        FieldInfo::new((*name).to_owned(), None, None, datatype, format).with_type_size(size)
    };
    columns.iter().enumerate().map(field).collect()
}

fn encode(fields: &Arc<Vec<FieldInfo>>, row: &[Cell]) -> PgWireResult<DataRow> {
    let mut encoder = DataRowEncoder::new(fields.clone());
    for cell in row {
        match cell {
            Cell::Null => encoder.encode_field(&None::<&str>)?,
            Cell::Text(text) => encoder.encode_field(text)?,
            Cell::Integer(number) => encoder.encode_field(number)?,
            Cell::Float(number) => encoder.encode_field(number)?,
        }
    }
    Ok(encoder.take_row())
}

fn to_pgwire(error: AdminError) -> PgWireError {
    let mut info = ErrorInfo::new("ERROR".to_owned(), error.kind.sqlstate().to_owned(), error.message);
    info.hint = error.hint;
    PgWireError::UserError(Box::new(info))
}
