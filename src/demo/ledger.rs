//! Which writes the application was told are done, and what the servers know of them.
//!
//! A write number names its client: `client * CLIENT_SPAN + n`, n counting from 1. A client has one connection and one
//! write under way at a time, so what one server has of a client's writes is a prefix of them.

use std::collections::{BTreeMap, HashMap};

use tokio_postgres::{Client, Error};

/// More writes than one client can make in any demo.
pub const CLIENT_SPAN: i64 = 1_000_000_000;

/// The writes of one client.
#[derive(Clone, Debug, Default)]
pub struct ClientLedger {
    client: i64,
    last: i64,
    acknowledged: Vec<i64>,
    in_doubt: Vec<i64>,
    refused: Vec<i64>,
}

impl ClientLedger {
    /// `client` counts from 1.
    pub fn new(client: i64) -> Self {
        Self { client, ..Self::default() }
    }

    /// The number for the next write.
    pub fn next_number(&mut self) -> i64 {
        self.last += 1;
        self.client * CLIENT_SPAN + self.last
    }

    /// The server has said that this write is done.
    pub fn acknowledge(&mut self, number: i64) {
        self.acknowledged.push(number);
    }

    /// The connection broke before the server said anything: the write may be there or not, but not twice.
    pub fn doubt(&mut self, number: i64) {
        self.in_doubt.push(number);
    }

    /// The write was rolled back, or the server refused it: it must not be there.
    pub fn refuse(&mut self, number: i64) {
        self.refused.push(number);
    }

    /// Acknowledged so far.
    pub fn acknowledged(&self) -> &[i64] {
        &self.acknowledged
    }
}

/// What [`reconcile`] found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reconciliation {
    /// Writes the application was told are done.
    pub acknowledged: u64,
    /// Writes whose answer was lost.
    pub in_doubt: u64,
    /// Acknowledged, and not on the target.
    pub missing: u64,
    /// Rows on the target beyond the first for one write.
    pub duplicates: u64,
    /// Writes on the source that the target does not have: accepted after the drain.
    pub late_on_source: u64,
    /// Writes that were rolled back or refused, and are on the target nevertheless.
    pub phantoms: u64,
}

/// How often each write number is in `shop.write_log` of one server.
pub async fn recorded(client: &Client) -> Result<HashMap<i64, i64>, Error> {
    let sql = "SELECT write_no, count(*) FROM shop.write_log WHERE write_no > 0 GROUP BY 1";
    Ok(client.query(sql, &[]).await?.iter().map(|row| (row.get(0), row.get(1))).collect())
}

/// Compares what was acknowledged with what both servers have.
pub fn reconcile(ledgers: &[ClientLedger], source: &HashMap<i64, i64>, target: &HashMap<i64, i64>) -> Reconciliation {
    let acknowledged = || ledgers.iter().flat_map(|ledger| &ledger.acknowledged);
    let count = |numbers: usize| u64::try_from(numbers).unwrap_or(u64::MAX);
    let extra: i64 = target.values().map(|rows| rows - 1).sum();
    Reconciliation {
        acknowledged: count(acknowledged().count()),
        in_doubt: count(ledgers.iter().map(|ledger| ledger.in_doubt.len()).sum()),
        missing: count(acknowledged().filter(|number| !target.contains_key(number)).count()),
        duplicates: u64::try_from(extra).unwrap_or(0),
        late_on_source: count(source.keys().filter(|number| !target.contains_key(number)).count()),
        phantoms: count(
            ledgers.iter().flat_map(|ledger| &ledger.refused).filter(|number| target.contains_key(number)).count(),
        ),
    }
}

/// The last write of each client that a server has: index 0 is client 1. Clients without writes have 0.
pub fn boundary(recorded: &HashMap<i64, i64>, clients: usize) -> Vec<i64> {
    let mut last: BTreeMap<i64, i64> = BTreeMap::new();
    for number in recorded.keys() {
        let client = last.entry(number / CLIENT_SPAN).or_default();
        *client = (*client).max(*number);
    }
    (1..=clients)
        .map(|client| i64::try_from(client).ok().and_then(|client| last.get(&client).copied()).unwrap_or(0))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_loss_is_counted() {
        let mut first = ClientLedger::new(1);
        let mut second = ClientLedger::new(2);
        let a = first.next_number();
        let b = first.next_number();
        let c = second.next_number();
        let d = second.next_number();
        first.acknowledge(a);
        first.acknowledge(b);
        second.acknowledge(c);
        second.doubt(d);
        let e = second.next_number();
        second.refuse(e);
        let source = HashMap::from([(a, 1), (d, 1)]);
        let target = HashMap::from([(a, 1), (c, 3), (e, 1)]);
        assert_eq!(
            reconcile(&[first, second], &source, &target),
            Reconciliation { acknowledged: 3, in_doubt: 1, missing: 1, duplicates: 2, late_on_source: 1, phantoms: 1 }
        );
        assert_eq!(boundary(&target, 3), vec![a, e, 0]);
    }
}
