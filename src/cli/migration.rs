//! `pgcutover migration …`

use serde_json::{Value, json};

use super::client::Client;
use super::output::{Output, typed};
use super::{CliError, Create, Cutover, MigrationCommand, Verdict, properties, watch};
use crate::admin::command::{CutoverRequest, Filter, FixRequest, ShadowRequest, VerifyRequest};
use crate::admin::view::CutoverView;
use crate::migration::preflight::{Level, Outcome, RuleResult};
use crate::migration::view::{FixReport, MigrationName, MigrationOption, MigrationSpec, Mode, VerifyReport};

pub(super) async fn run(command: MigrationCommand, client: &Client, output: &Output) -> Result<Verdict, CliError> {
    match command {
        MigrationCommand::Create(create) => self::create(create, client, output).await,
        MigrationCommand::List { filter } => {
            let filter = if filter == Filter::Active { "active" } else { "all" };
            output.migrations(&client.get(&format!("/api/v1/migrations?filter={filter}")).await?)?;
            Ok(Verdict::Good)
        }
        MigrationCommand::Show { name, watch: true } => watch::watch(&name, client, output).await,
        MigrationCommand::Show { name, watch: false } => {
            output.migration(&client.get(&path(&name, "")).await?)?;
            Ok(Verdict::Good)
        }
        MigrationCommand::Tables { name } => {
            output.tables(&client.get(&path(&name, "/tables")).await?)?;
            Ok(Verdict::Good)
        }
        MigrationCommand::Validation { name, fix: Some(rule), yes } => {
            let body = to_json(&FixRequest { rule, apply: yes })?;
            let answer = client.post(&path(&name, "/fix"), Some(&body)).await?;
            output.fixed(&answer)?;
            let report: FixReport = typed(&answer)?;
            let mended = report.found.iter().all(|rule| rule.outcome == Outcome::Succeeded);
            Ok(if mended { Verdict::Good } else { Verdict::Bad })
        }
        MigrationCommand::Validation { name, fix: None, .. } => {
            validation(&client.get(&path(&name, "/validation")).await?, output)
        }
        MigrationCommand::Verification { name } => {
            output.verification(&client.get(&path(&name, "/verification")).await?)?;
            Ok(Verdict::Good)
        }
        MigrationCommand::CutoverReport { name } => {
            output.cutover_of(&client.get(&path(&name, "/cutover")).await?)?;
            Ok(Verdict::Good)
        }
        MigrationCommand::History { name } => {
            output.dated(&client.get(&path(&name, "/history")).await?)?;
            Ok(Verdict::Good)
        }
        MigrationCommand::Cutover(cutover) => self::cutover(cutover, "/cutover", client, output).await,
        MigrationCommand::Rollback(rollback) => self::cutover(rollback, "/rollback", client, output).await,
        MigrationCommand::Complete { name } => {
            let order = path(&name, "/complete");
            output.cancelled(&watch::beside(&name, client, output, client.post(&order, None)).await?)?;
            Ok(Verdict::Good)
        }
        MigrationCommand::Cancel { name } => {
            let order = path(&name, "/cancel");
            output.cancelled(&watch::beside(&name, client, output, client.post(&order, None)).await?)?;
            Ok(Verdict::Good)
        }
        MigrationCommand::Verify { name, repair } => {
            let body = to_json(&VerifyRequest { repair })?;
            let order = path(&name, "/verify");
            let answer = watch::beside(&name, client, output, client.post(&order, Some(&body))).await?;
            output.verified(&answer)?;
            let report: VerifyReport = typed(&answer)?;
            Ok(if report.differences == 0 { Verdict::Good } else { Verdict::Bad })
        }
        MigrationCommand::Shadow { name, share: None, lasts: None, stop: false } => {
            output.shadow(&client.get(&path(&name, "/shadow")).await?)?;
            Ok(Verdict::Good)
        }
        MigrationCommand::Shadow { name, share, lasts, stop } => {
            let usual = ShadowRequest::default();
            let body = to_json(&ShadowRequest { share: share.unwrap_or(usual.share), lasts, stop })?;
            output.shadow(&client.post(&path(&name, "/shadow"), Some(&body)).await?)?;
            Ok(Verdict::Good)
        }
        MigrationCommand::Retry { name } => {
            output.done(&client.post(&path(&name, "/retry"), None).await?, "going on")?;
            Ok(Verdict::Good)
        }
    }
}

pub(super) fn path(name: &MigrationName, rest: &str) -> String {
    format!("/api/v1/migrations/{name}{rest}")
}

async fn create(create: Create, client: &Client, output: &Output) -> Result<Verdict, CliError> {
    let mut spec = MigrationSpec {
        name: create.name,
        databases: create.databases,
        mode: create.mode.unwrap_or(Mode::Online),
        option: create.option.unwrap_or(MigrationOption::ValidateAndMigrate),
        overwrite_target: create.overwrite_target,
        cutover_when_ready: create.cutover_when_ready,
    };
    if let Some(path) = create.properties {
        let properties = properties::read(&path)?;
        properties.compare(&client.get("/api/v1/config").await?)?;
        properties.notes().iter().for_each(|note| output.note(note));
        // What is typed goes before what the file says.
        if spec.databases.is_empty() {
            spec.databases = properties.databases;
        }
        spec.mode = create.mode.or(properties.mode).unwrap_or(spec.mode);
        spec.option = create.option.or(properties.option).unwrap_or(spec.option);
        spec.overwrite_target |= properties.overwrite_target;
    }
    let body = to_json(&spec)?;
    let accepted = client.post("/api/v1/migrations", Some(&body)).await?;
    if create.wait {
        return watch::until_settled(&spec.name, client, output).await;
    }
    output.migration(&accepted)?;
    Ok(Verdict::Good)
}

/// Bad when a rule failed.
fn validation(answer: &Value, output: &Output) -> Result<Verdict, CliError> {
    let rules: Vec<RuleResult> = typed(answer)?;
    let failed = rules.iter().any(|rule| rule.outcome == Outcome::Failed);
    if output.is_json() {
        output.json(answer);
    } else {
        rules.iter().for_each(|rule| show(rule, output));
    }
    Ok(if failed { Verdict::Bad } else { Verdict::Good })
}

pub(super) fn show(rule: &RuleResult, output: &Output) {
    let place = match &rule.level {
        Level::Instance => "instance",
        Level::Database(name) => name,
    };
    output.line(&format!("{:?}: {place}: {}", rule.outcome, rule.code));
    rule.evidence.iter().for_each(|item| output.line(&format!("    {item}")));
    let more = rule.evidence_total.saturating_sub(rule.evidence.len());
    if more > 0 {
        output.line(&format!("    and {more} more"));
    }
    if rule.outcome != Outcome::Succeeded {
        output.line(&format!("    why: {}", rule.why));
        output.line(&format!("    fix: {}", rule.fix));
        rule.statements.iter().for_each(|statement| output.line(&format!("    {statement}")));
    }
}

/// Good only when switched, or when a dry run would have.
async fn cutover(cutover: Cutover, order: &str, client: &Client, output: &Output) -> Result<Verdict, CliError> {
    let request = CutoverRequest {
        dry_run: cutover.dry_run,
        max_pause: cutover.max_pause,
        drain_timeout: cutover.drain_timeout,
        stragglers: cutover.stragglers,
        force: cutover.force,
    };
    let body = to_json(&request)?;
    let order = path(&cutover.name, order);
    let answer = watch::beside(&cutover.name, client, output, client.post(&order, Some(&body))).await?;
    output.cutover(&answer)?;
    let report: CutoverView = typed(&answer)?;
    let expected = if cutover.dry_run { "dry-run" } else { "switched" };
    Ok(if report.outcome == expected { Verdict::Good } else { Verdict::Bad })
}

fn to_json(value: &impl serde::Serialize) -> Result<Value, CliError> {
    serde_json::to_value(value).or(Ok(json!(null)))
}
