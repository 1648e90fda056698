//! Every metric: name, help and labels in this one file.
//!
//! Label values are either words of an enum below or names that exist on a server (a database is counted only after a
//! client has proved who it is; a migration only after it was created), so that nobody outside can make series.
//! Hot paths resolve their label values once (`metrics.transactions.with_label_values(&[name])`) and keep the child.

use std::collections::BTreeMap;

use prometheus::core::{Collector, Desc};
use prometheus::{CounterVec, Gauge, GaugeVec, IntGauge, Registry, TextEncoder};
use prometheus::{Encoder, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGaugeVec, Opts};

/// Content type of [`Metrics::render`].
pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

const PREFIX: &str = "pgcutover_";

/// Bounds in seconds for what a client feels: from a tenth of a millisecond to the cutover's longest pauses.
const CLIENT_SECONDS: [f64; 14] =
    [0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];
/// Bounds in seconds for the phases of a cutover.
const PHASE_SECONDS: [f64; 13] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 30.0];

macro_rules! label_words {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($(#[$variant_doc])* $variant),+ }

        impl $name {
            /// Every value.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The label's value.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }
    };
}

label_words! {
    /// `state` of `client_connections`.
    ClientState {
        /// Between two transactions.
        Idle = "idle",
        /// In a transaction.
        Active = "active",
        /// Held by a fence, or for a server connection of its pool.
        Waiting = "waiting",
    }
}

label_words! {
    /// `state` of `server_connections`.
    BackendState {
        /// Waits for its session's next transaction; in a pool, for anybody's.
        Idle = "idle",
        /// In a transaction.
        Active = "active",
        /// Opened on the other server for a cutover in preparation.
        Prepared = "prepared",
    }
}

label_words! {
    /// `direction` of `bytes_total`.
    ByteDirection {
        /// What clients sent.
        FromClient = "from_client",
        /// What servers answered.
        ToClient = "to_client",
    }
}

label_words! {
    /// `reason` of `auth_failures_total`.
    AuthFailure {
        /// Wrong password or proof.
        Password = "password",
        /// No such role, or it may not log in.
        UnknownUser = "unknown_user",
        /// The client does not do what is asked for (TLS, method).
        Method = "method",
        /// No rule lets it in, or one turns it away.
        Rule = "rule",
        /// No certificate, or one of another name.
        Certificate = "certificate",
        /// Not done within `client_login_timeout`.
        Timeout = "timeout",
        /// No server could be asked.
        Unavailable = "unavailable",
    }
}

label_words! {
    /// `reason` of `clients_refused_total`: each is told with SQLSTATE 53300.
    Full {
        /// `limits.max_client_connections` is reached.
        Proxy = "proxy",
        /// The limit of its role, database or address is reached.
        Share = "share",
        /// The server has no connection left for it.
        Server = "server",
    }
}

label_words! {
    /// `state` of `copy_tables` and `index_builds`.
    WorkState {
        /// Not begun.
        Waiting = "waiting",
        /// In hand.
        Running = "running",
        /// Ended well.
        Done = "done",
        /// Ended with an error.
        Failed = "failed",
    }
}

label_words! {
    /// `direction` of replication and cutovers.
    Direction {
        /// From the source to the target.
        Forward = "forward",
        /// From the target back to the source.
        Reverse = "reverse",
    }
}

label_words! {
    /// `operation` of `apply_rows_total`.
    Operation {
        /// INSERT, by whatever means.
        Insert = "insert",
        /// UPDATE.
        Update = "update",
        /// DELETE.
        Delete = "delete",
        /// TRUNCATE, counted once a table.
        Truncate = "truncate",
    }
}

label_words! {
    /// `phase` of `cutover_phase_seconds`.
    Phase {
        /// Before anybody waits.
        Prepare = "prepare",
        /// New transactions wait.
        Pause = "pause",
        /// The last transactions end and are applied.
        Drain = "drain",
        /// The decision is made durable.
        Decide = "decide",
        /// Sessions go on.
        Switch = "switch",
    }
}

label_words! {
    /// `outcome` of `cutovers_total`.
    Outcome {
        /// The sessions run on the other server.
        Switched = "switched",
        /// Everything went on where it was.
        Aborted = "aborted",
        /// Paused and drained on request, without the switch.
        DryRun = "dry_run",
    }
}

/// The program's metrics. Passed as `Arc<Metrics>`; there is no global registry.
#[derive(Debug)]
pub struct Metrics {
    /// What `/metrics` prints.
    pub registry: Registry,
    /// `ready`: 1 while clients are served, as `/readyz` says it.
    pub ready: IntGauge,
    /// `max_client_connections`: `limits.max_client_connections`.
    pub max_client_connections: IntGauge,
    /// `clients_refused_total{reason}`, see [`Full`].
    pub clients_refused: IntCounterVec,
    /// `client_connections{database,state}`, see [`ClientState`].
    pub client_connections: IntGaugeVec,
    /// `server_connections{database,server,state}`, see [`BackendState`].
    pub server_connections: IntGaugeVec,
    /// `transactions_total{database}`.
    pub transactions: IntCounterVec,
    /// `queries_total{database}`: ReadyForQuery that were passed on.
    pub queries: IntCounterVec,
    /// `transaction_time_seconds_total{database}`: from admission to the end, summed.
    pub transaction_time: CounterVec,
    /// `client_wait_time_seconds_total{database}`: what transactions waited for their admission, summed.
    pub client_wait_time: CounterVec,
    /// `bytes_total{database,direction}`, see [`ByteDirection`].
    pub bytes: IntCounterVec,
    /// `client_wait_seconds`: from a transaction's first frame to its admission.
    pub client_wait_seconds: Histogram,
    /// `transaction_seconds`: from admission to `ReadyForQuery` idle.
    pub transaction_seconds: Histogram,
    /// `route_epoch{database}`.
    pub route_epoch: IntGaugeVec,
    /// `active_server{database,server}`: 1 for the server that is active, 0 for the other.
    pub active_server: IntGaugeVec,
    /// `held_sessions{database}`: held by a fence; who waits for a connection of a pool is not counted.
    pub held_sessions: IntGaugeVec,
    /// `write_delay_seconds{database}`
    pub write_delay_seconds: GaugeVec,
    /// `auth_failures_total{reason}`, see [`AuthFailure`].
    pub auth_failures: IntCounterVec,
    /// `tls_certificate_not_after_seconds`: end of validity of the certificate that clients are shown, in seconds since
    /// 1970; 0 where there is none, or its dates cannot be read.
    pub tls_certificate_not_after_seconds: IntGauge,
    /// `migration_state{migration,state}`: 1 for the state it is in.
    pub migration_state: IntGaugeVec,
    /// `migration_database{migration,database}`: 1 for each database that the migration moves.
    pub migration_database: IntGaugeVec,
    /// `copy_rows_total`.
    pub copy_rows: IntCounter,
    /// `copy_bytes_total`.
    pub copy_bytes: IntCounter,
    /// `copy_tables{state}`, see [`WorkState`].
    pub copy_tables: IntGaugeVec,
    /// `index_builds{state}`, see [`WorkState`].
    pub index_builds: IntGaugeVec,
    /// `replication_lag_bytes{migration,database,direction}`. A series exists only while the lag is known.
    pub replication_lag_bytes: IntGaugeVec,
    /// `replication_latency_seconds{migration,database,direction}`. A series exists only while it is known.
    pub replication_latency_seconds: GaugeVec,
    /// `apply_transactions_total`: source transactions that are durable on the target.
    pub apply_transactions: IntCounter,
    /// `apply_rows_total{operation}`, see [`Operation`].
    pub apply_rows: IntCounterVec,
    /// `slot_retained_wal_bytes{migration,database}`.
    pub slot_retained_wal_bytes: IntGaugeVec,
    /// `slot_safe_wal_bytes{migration,database}`: how much more can be written before the slot is lost.
    pub slot_safe_wal_bytes: IntGaugeVec,
    /// `slot_wal_limit_bytes{migration,database}`: `migration.max_retained_wal`; 0 where it is off.
    pub slot_wal_limit_bytes: IntGaugeVec,
    /// `fence_watched{migration,database}`: 1 while writes on the server that was left are watched for; absent while none was.
    pub fence_watched: IntGaugeVec,
    /// `fenced_writes{migration,database}`: row changes found on servers that were left; absent while none was.
    pub fenced_writes: IntGaugeVec,
    /// `cutover_phase_seconds{phase}`, see [`Phase`].
    pub cutover_phase_seconds: HistogramVec,
    /// `cutover_pause_seconds`: from the fence to the moment sessions go on.
    pub cutover_pause_seconds: Histogram,
    /// `cutover_pauses_above_budget_total`: pauses that were longer than the `max_pause` of their cutover.
    pub cutover_pauses_above_budget: IntCounter,
    /// `cutover_max_pause_seconds`: `cutover.max_pause`.
    pub cutover_max_pause_seconds: Gauge,
    /// `cutovers_total{direction,outcome}`, see [`Direction`] and [`Outcome`].
    pub cutovers: IntCounterVec,
    /// `cutover_blockers`: sessions that could not be moved now. A series exists only while a migration is active and the
    /// servers can be asked.
    pub cutover_blockers: IntGaugeVec,
    /// `shadow_reads_total{outcome}`.
    pub shadow_reads: IntCounterVec,
    /// `shadow_reads_skipped_total{reason}`.
    pub shadow_reads_skipped: IntCounterVec,
    /// `shadow_read_seconds{server}`.
    pub shadow_read_seconds: HistogramVec,
    /// `verify_rows_total`.
    pub verify_rows: IntCounter,
    /// `verify_mismatches_total`.
    pub verify_mismatches: IntCounter,
    names: Vec<String>,
    described: BTreeMap<String, Described>,
}

/// What a metric says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Described {
    /// What it counts.
    pub help: String,
    /// Its labels.
    pub labels: Vec<String>,
}

fn described(collector: &impl Collector) -> Vec<(String, Described)> {
    let of = |desc: &Desc| Described { help: desc.help.clone(), labels: desc.variable_labels.clone() };
    collector.desc().into_iter().map(|desc| (desc.fq_name.clone(), of(desc))).collect()
}

/// Registers metrics and notes their names.
struct Registrar {
    registry: Registry,
    names: Vec<String>,
    described: BTreeMap<String, Described>,
}

impl Registrar {
    fn add<C: Collector + Clone + 'static>(&mut self, collector: C) -> Result<C, prometheus::Error> {
        self.registry.register(Box::new(collector.clone()))?;
        self.names.extend(collector.desc().iter().map(|desc: &&Desc| desc.fq_name.clone()));
        self.described.extend(described(&collector));
        Ok(collector)
    }

    fn counter(&mut self, name: &str, help: &str) -> Result<IntCounter, prometheus::Error> {
        self.add(IntCounter::new(format!("{PREFIX}{name}"), help)?)
    }

    fn counters(&mut self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, prometheus::Error> {
        self.add(IntCounterVec::new(Opts::new(format!("{PREFIX}{name}"), help), labels)?)
    }

    /// Time by database.
    fn seconds(&mut self, name: &str, help: &str) -> Result<CounterVec, prometheus::Error> {
        self.add(CounterVec::new(Opts::new(format!("{PREFIX}{name}"), help), &["database"])?)
    }

    fn gauge(&mut self, name: &str, help: &str) -> Result<IntGauge, prometheus::Error> {
        self.add(IntGauge::new(format!("{PREFIX}{name}"), help)?)
    }

    fn gauges(&mut self, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec, prometheus::Error> {
        self.add(IntGaugeVec::new(Opts::new(format!("{PREFIX}{name}"), help), labels)?)
    }

    fn histogram(&mut self, name: &str, help: &str, bounds: &[f64]) -> Result<Histogram, prometheus::Error> {
        let options = HistogramOpts::new(format!("{PREFIX}{name}"), help).buckets(bounds.to_vec());
        self.add(Histogram::with_opts(options)?)
    }
}

impl Metrics {
    /// Registers every metric.
    pub fn new() -> Result<Self, prometheus::Error> {
        let mut r = Registrar { registry: Registry::new(), names: Vec::new(), described: BTreeMap::new() };
        let replication = ["migration", "database", "direction"];
        let slot = ["migration", "database"];
        let phase_options =
            HistogramOpts::new(format!("{PREFIX}cutover_phase_seconds"), "Length of each cutover phase.")
                .buckets(PHASE_SECONDS.to_vec());
        let mut metrics = Self {
            ready: r.gauge("ready", "1 while clients are served, as /readyz says it.")?,
            max_client_connections: r.gauge("max_client_connections", "Clients that are let in at most.")?,
            clients_refused: r.counters(
                "clients_refused_total",
                "Clients that were told that there are too many (53300).",
                &["reason"],
            )?,
            client_connections: r.gauges(
                "client_connections",
                "Client connections, by what they are doing.",
                &["database", "state"],
            )?,
            server_connections: r.gauges(
                "server_connections",
                "Connections to the servers: those that sessions have, and idle ones of pools.",
                &["database", "server", "state"],
            )?,
            transactions: r.counters("transactions_total", "Transactions relayed.", &["database"])?,
            queries: r.counters("queries_total", "Queries answered, or batches up to a Sync.", &["database"])?,
            transaction_time: r.seconds("transaction_time_seconds_total", "Time spent in transactions.")?,
            client_wait_time: r.seconds("client_wait_time_seconds_total", "Time that transactions were held.")?,
            bytes: r.counters("bytes_total", "Bytes relayed.", &["database", "direction"])?,
            client_wait_seconds: r.histogram(
                "client_wait_seconds",
                "Wait of a transaction from its first message to its admission.",
                &CLIENT_SECONDS,
            )?,
            transaction_seconds: r.histogram(
                "transaction_seconds",
                "Length of transactions from admission to their end.",
                &CLIENT_SECONDS,
            )?,
            route_epoch: r.gauges("route_epoch", "Number of the cutover that set the route.", &["database"])?,
            active_server: r.gauges(
                "active_server",
                "1 for the server that is active, 0 for the other.",
                &["database", "server"],
            )?,
            held_sessions: r.gauges("held_sessions", "Sessions that a cutover is holding.", &["database"])?,
            write_delay_seconds: r.add(GaugeVec::new(
                Opts::new(
                    format!("{PREFIX}write_delay_seconds"),
                    "By how much each writing transaction is slowed down while a cutover is prepared.",
                ),
                &["database"],
            )?)?,
            auth_failures: r.counters("auth_failures_total", "Clients that were not let in.", &["reason"])?,
            tls_certificate_not_after_seconds: r.gauge(
                "tls_certificate_not_after_seconds",
                "End of validity of the certificate that clients are shown, in seconds since 1970; 0 without one.",
            )?,
            migration_state: r.gauges(
                "migration_state",
                "1 for the state that the migration is in.",
                &["migration", "state"],
            )?,
            migration_database: r.gauges(
                "migration_database",
                "1 for each database that the migration moves.",
                &["migration", "database"],
            )?,
            copy_rows: r.counter("copy_rows_total", "Rows copied by full loads.")?,
            copy_bytes: r.counter("copy_bytes_total", "Bytes of COPY data sent to the target by full loads.")?,
            copy_tables: r.gauges("copy_tables", "Tables of full loads, by state.", &["state"])?,
            index_builds: r.gauges("index_builds", "Indexes and constraints of full loads, by state.", &["state"])?,
            replication_lag_bytes: r.gauges(
                "replication_lag_bytes",
                "Write-ahead log that is not yet durable on the other server; absent while unknown.",
                &replication,
            )?,
            replication_latency_seconds: r.add(GaugeVec::new(
                Opts::new(
                    format!("{PREFIX}replication_latency_seconds"),
                    "How far the other server is behind in time; absent while unknown.",
                ),
                &replication,
            )?)?,
            apply_transactions: r.counter("apply_transactions_total", "Source transactions applied durably.")?,
            apply_rows: r.counters("apply_rows_total", "Rows applied from the stream.", &["operation"])?,
            slot_retained_wal_bytes: r.gauges(
                "slot_retained_wal_bytes",
                "Write-ahead log that a replication slot keeps on the server that the changes come from.",
                &slot,
            )?,
            slot_safe_wal_bytes: r.gauges(
                "slot_safe_wal_bytes",
                "Write-ahead log that can still be written before the slot is lost; absent when unlimited.",
                &slot,
            )?,
            slot_wal_limit_bytes: r.gauges(
                "slot_wal_limit_bytes",
                "What a slot may keep before its migration is ended and it is dropped; 0 when unlimited.",
                &slot,
            )?,
            fence_watched: r.gauges(
                "fence_watched",
                "1 while writes on the server that was left are watched for, 0 while they are not.",
                &slot,
            )?,
            fenced_writes: r.gauges(
                "fenced_writes",
                "Row changes that somebody wrote past the fence on a server that was left.",
                &slot,
            )?,
            cutover_phase_seconds: r.add(HistogramVec::new(phase_options, &["phase"])?)?,
            cutover_pause_seconds: r.histogram(
                "cutover_pause_seconds",
                "From holding new transactions to letting them go on.",
                &PHASE_SECONDS,
            )?,
            cutover_pauses_above_budget: r.counter(
                "cutover_pauses_above_budget_total",
                "Pauses that were longer than the max_pause of their cutover.",
            )?,
            cutover_max_pause_seconds: r.add(Gauge::new(
                format!("{PREFIX}cutover_max_pause_seconds"),
                "How long a cutover may hold transactions, unless its order says otherwise.",
            )?)?,
            cutovers: r.counters("cutovers_total", "Cutovers that ended.", &["direction", "outcome"])?,
            cutover_blockers: r.gauges(
                "cutover_blockers",
                "Sessions that a cutover could not move now; absent while unknown or without an active migration.",
                &[],
            )?,
            shadow_reads: r.counters("shadow_reads_total", "Reads that also ran on the target.", &["outcome"])?,
            shadow_reads_skipped: r.counters(
                "shadow_reads_skipped_total",
                "Sampled transactions that were not run on the target.",
                &["reason"],
            )?,
            shadow_read_seconds: r.add(HistogramVec::new(
                HistogramOpts::new(
                    format!("{PREFIX}shadow_read_seconds"),
                    "Length of reads that both servers have answered.",
                )
                .buckets(CLIENT_SECONDS.to_vec()),
                &["server"],
            )?)?,
            verify_rows: r.counter("verify_rows_total", "Rows compared by verification.")?,
            verify_mismatches: r.counter("verify_mismatches_total", "Rows that verification found to differ.")?,
            registry: r.registry.clone(),
            names: Vec::new(),
            described: BTreeMap::new(),
        };
        let process = prometheus::process_collector::ProcessCollector::for_self();
        r.names.extend(process.desc().iter().map(|desc| desc.fq_name.clone()));
        r.described.extend(described(&process));
        r.registry.register(Box::new(process))?;
        metrics.names = r.names;
        metrics.described = r.described;
        metrics.begin_at_zero();
        Ok(metrics)
    }

    /// Makes the series whose label values are known beforehand, so that a rate over them sees the first event.
    fn begin_at_zero(&self) {
        AuthFailure::ALL.iter().for_each(|reason| self.auth_failures.with_label_values(&[reason.as_str()]).reset());
        Operation::ALL.iter().for_each(|operation| self.apply_rows.with_label_values(&[operation.as_str()]).reset());
        for state in WorkState::ALL {
            self.copy_tables.with_label_values(&[state.as_str()]).set(0);
            self.index_builds.with_label_values(&[state.as_str()]).set(0);
        }
        Full::ALL.iter().for_each(|reason| self.clients_refused.with_label_values(&[reason.as_str()]).reset());
        for (direction, outcome) in Direction::ALL.iter().flat_map(|way| Outcome::ALL.iter().map(move |end| (way, end)))
        {
            self.cutovers.with_label_values(&[direction.as_str(), outcome.as_str()]).reset();
        }
        for phase in Phase::ALL {
            let _made = self.cutover_phase_seconds.with_label_values(&[phase.as_str()]);
        }
    }

    /// Every metric's name.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Help and labels of every metric, by name.
    pub fn described(&self) -> &BTreeMap<String, Described> {
        &self.described
    }

    /// The text that Prometheus reads.
    pub fn render(&self) -> Result<String, prometheus::Error> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        String::from_utf8(text).map_err(|error| prometheus::Error::Msg(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SPEC of what dashboards and scripts rely on; a name may be added here, never taken away.
    const PROMISED: &str = "ready max_client_connections clients_refused_total migration_database \
        cutover_pauses_above_budget_total cutover_max_pause_seconds client_connections server_connections transactions_total bytes_total client_wait_seconds \
        queries_total transaction_time_seconds_total client_wait_time_seconds_total \
        transaction_seconds route_epoch active_server held_sessions write_delay_seconds auth_failures_total \
        tls_certificate_not_after_seconds migration_state \
        copy_rows_total copy_bytes_total copy_tables index_builds replication_lag_bytes replication_latency_seconds \
        apply_transactions_total apply_rows_total slot_retained_wal_bytes slot_safe_wal_bytes slot_wal_limit_bytes fence_watched fenced_writes cutover_phase_seconds \
        cutover_pause_seconds cutovers_total cutover_blockers shadow_reads_total shadow_reads_skipped_total shadow_read_seconds verify_rows_total verify_mismatches_total";

    #[test]
    fn every_promised_name_exists() {
        let metrics = Metrics::new().expect("names are distinct");
        for name in PROMISED.split_whitespace() {
            assert!(metrics.names().contains(&format!("{PREFIX}{name}")), "{name}");
        }
        for name in metrics.names() {
            let ours = name.strip_prefix(PREFIX).is_some_and(|name| PROMISED.split_whitespace().any(|own| own == name));
            assert!(ours || name.starts_with("process_"), "{name} is not in the list of promised names");
        }
    }

    #[test]
    fn the_text_form_shows_what_was_counted() {
        let metrics = Metrics::new().expect("names are distinct");
        metrics.transactions.with_label_values(&["shop"]).inc();
        metrics.replication_lag_bytes.with_label_values(&["m1", "shop", Direction::Forward.as_str()]).set(42);
        let text = metrics.render().expect("text");
        for line in [
            "# TYPE pgcutover_transactions_total counter",
            "pgcutover_transactions_total{database=\"shop\"} 1",
            "pgcutover_replication_lag_bytes{database=\"shop\",direction=\"forward\",migration=\"m1\"} 42",
            "pgcutover_cutovers_total{direction=\"forward\",outcome=\"switched\"} 0",
            "pgcutover_cutovers_total{direction=\"reverse\",outcome=\"aborted\"} 0",
            "pgcutover_clients_refused_total{reason=\"proxy\"} 0",
            "pgcutover_ready 0",
            "process_open_fds ",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
    }
}
