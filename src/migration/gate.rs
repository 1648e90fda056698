//! Stops the apply of a stream exactly where the target has what a snapshot of the source sees: no more and no less.
//!
//! It stands between what reads the stream and what applies it, and lets everything pass until somebody asks it to hold.
//! Transactions come in the order of their commit records; they become visible on the source an instant later, and two
//! of them may become visible the other way round. So the set that a snapshot sees need not be a beginning of the stream:
//!
//! ```text
//! hold            the next transaction is not begun; wait until what was begun is durable on the target
//! snapshot S      of the source, with L = pg_current_wal_insert_lsn() read after it: whatever S sees commits below L
//! marker          a published row is updated, so that a transaction behind L is sure to come
//! 0/1A00 xid 741  S sees it          → passes
//! 0/1A80 xid 743  S does not see it  → kept back, and everything behind it
//! 0/1B10 xid 742  S sees it          → S and the stream do not fit: take a newer S and ask again, 743 is visible soon
//! 0/1C00 ≥ L      all has been seen  → fits: take the snapshot of the target, then let go
//! ```
//!
//! Nothing is ever reordered or dropped: what is kept back passes, in order, when the hold is let go, and with it ends.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use super::apply::applier::{Applied, Received};
use super::snapshot::TxidSnapshot;
use crate::lsn::Lsn;

/// Transactions remembered, to find one that was applied before it became visible on the source.
const RECENT: usize = 1 << 16;

/// How long they are: an xid means nothing after 2^31 others, and a transaction does not stay invisible that long.
const RECENT_AGE: Duration = Duration::from_secs(600);

/// Where those who want the apply to hold find the stream of a database. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Gate {
    stream: Arc<Mutex<Option<mpsc::Sender<Order>>>>,
    /// Items passed on.
    passed: Arc<AtomicU64>,
}

/// The stream was interrupted, or is not running; ask again when it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the stream is interrupted")]
pub struct Interrupted;

/// Whether the target has exactly what the snapshot sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// It has, until the hold is let go.
    Exact,
    /// The snapshot is between two transactions that became visible in another order than they committed: a newer one is
    /// needed.
    Disordered,
}

#[derive(Debug)]
struct Order {
    /// Answered once everything begun is durable.
    held: oneshot::Sender<()>,
    questions: mpsc::Receiver<Question>,
}

#[derive(Debug)]
struct Question {
    snapshot: TxidSnapshot,
    position: Lsn,
    answer: oneshot::Sender<Fit>,
}

/// The apply holds. Dropping it lets it go on.
#[derive(Debug)]
pub struct Hold {
    questions: mpsc::Sender<Question>,
}

impl Gate {
    /// Has the apply finish what it has begun and begin nothing more.
    pub async fn hold(&self) -> Result<Hold, Interrupted> {
        let stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner).clone().ok_or(Interrupted)?;
        let (held, answer) = oneshot::channel();
        let (questions, receiver) = mpsc::channel(1);
        stream.send(Order { held, questions: receiver }).await.map_err(|_| Interrupted)?;
        answer.await.map_err(|_| Interrupted)?;
        Ok(Hold { questions })
    }

    /// Counts up with everything that passes: tells a stream that is far behind from one that stands still.
    pub fn passed(&self) -> u64 {
        self.passed.load(Ordering::Relaxed)
    }

    /// The place of a stream that begins; it takes the place of an earlier one.
    pub(super) fn open(&self) -> Passage {
        let (sender, orders) = mpsc::channel(1);
        *self.stream.lock().unwrap_or_else(PoisonError::into_inner) = Some(sender);
        let passed = self.passed.clone();
        Passage { orders, passed, cursor: Cursor::default(), kept: VecDeque::new(), recent: VecDeque::new() }
    }
}

impl Hold {
    /// Whether the apply still waits for it. Once it does not, another stream may have begun.
    pub fn stands(&self) -> bool {
        !self.questions.is_closed()
    }

    /// Lets pass what `snapshot` sees. `position` is the source's insert position, read after the snapshot was taken;
    /// something published must be committed after that, or the answer may take until the source has something to say.
    pub async fn fit(&mut self, snapshot: &TxidSnapshot, position: Lsn) -> Result<Fit, Interrupted> {
        let (answer, receiver) = oneshot::channel();
        let question = Question { snapshot: snapshot.clone(), position, answer };
        self.questions.send(question).await.map_err(|_| Interrupted)?;
        receiver.await.map_err(|_| Interrupted)
    }
}

/// Where a message stands in the stream.
#[derive(Debug, Default)]
struct Cursor {
    /// Between Begin and Commit, or Stream Start and Stream Stop.
    inside: bool,
    xid: u32,
    /// End of the last commit record.
    end: Lsn,
}

/// What a message is to the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A transaction comes into view here whose commit record starts at the position.
    Commits { xid: u32, at: Lsn },
    /// Everything that commits before it was received.
    UpTo(Lsn),
    /// A part of a transaction.
    Other,
}

impl Cursor {
    /// Reads the tags of transactions; `protocol.sgml`, logical replication message formats.
    fn look(&self, item: &Received) -> Kind {
        let messages = match item {
            Received::UpTo(position) if !self.inside => return Kind::UpTo(*position),
            Received::UpTo(_) => return Kind::Other,
            Received::Data { messages, .. } => messages,
        };
        let Some(data) = messages.first() else { return Kind::Other };
        let commits = match data.first() {
            Some(b'B') => u32_at(data, 17).zip(u64_at(data, 1)),
            Some(b'c') => u32_at(data, 1).zip(u64_at(data, 6)),
            _ => None,
        };
        commits.map_or(Kind::Other, |(xid, at)| Kind::Commits { xid, at: Lsn(at) })
    }

    /// Steps over a message. Returns the xid of the transaction that ends with it.
    fn step(&mut self, data: &[u8]) -> Option<u32> {
        match data.first() {
            Some(b'B') => (self.inside, self.xid) = (true, u32_at(data, 17).unwrap_or_default()),
            Some(b'S') => self.inside = true,
            Some(b'E') => self.inside = false,
            Some(b'C') => {
                self.inside = false;
                self.end = u64_at(data, 10).map_or(self.end, Lsn);
                return Some(self.xid);
            }
            Some(b'c') => {
                self.end = u64_at(data, 14).map_or(self.end, Lsn);
                return u32_at(data, 1);
            }
            _ => {}
        }
        None
    }

    fn step_over(&mut self, item: &Received) {
        if let Received::Data { messages, .. } = item {
            for data in messages {
                self.step(data);
            }
        }
    }
}

/// One item for each message; the last one keeps the memory.
fn one_by_one(item: Received) -> Vec<Received> {
    let Received::Data { messages, mut memory } = item else { return vec![item] };
    let mut items: Vec<Received> = Vec::with_capacity(messages.len());
    let mut left = messages.into_iter().peekable();
    while let Some(data) = left.next() {
        let messages = vec![data];
        match memory.split(0) {
            Some(none) if left.peek().is_some() => items.push(Received::Data { messages, memory: none }),
            _ => {
                items.push(Received::Data { messages: messages.into_iter().chain(left).collect(), memory });
                break;
            }
        }
    }
    items
}

fn u64_at(data: &[u8], at: usize) -> Option<u64> {
    data.get(at..at + 8)?.try_into().ok().map(u64::from_be_bytes)
}

fn u32_at(data: &[u8], at: usize) -> Option<u32> {
    data.get(at..at + 4)?.try_into().ok().map(u32::from_be_bytes)
}

/// The gate of one stream.
#[derive(Debug)]
pub(super) struct Passage {
    orders: mpsc::Receiver<Order>,
    passed: Arc<AtomicU64>,
    cursor: Cursor,
    /// Received and not passed on, in order.
    kept: VecDeque<Received>,
    /// Xids that were passed on to the end of their transaction, with the time.
    recent: VecDeque<(Instant, u32)>,
}

/// One end of the passage is gone; its own error says why.
#[derive(Debug)]
struct Closed;

impl Passage {
    /// Passes on until one end closes, and never returns then: the error that matters is another's.
    pub(super) async fn run(
        mut self,
        mut from: mpsc::Receiver<Received>,
        to: mpsc::Sender<Received>,
        mut applied: watch::Receiver<Applied>,
    ) -> std::convert::Infallible {
        let Closed = self.pass(&mut from, &to, &mut applied).await;
        // What waits for an answer must not wait for ever.
        drop(self);
        drop(to);
        std::future::pending().await
    }

    async fn pass(
        &mut self,
        from: &mut mpsc::Receiver<Received>,
        to: &mpsc::Sender<Received>,
        applied: &mut watch::Receiver<Applied>,
    ) -> Closed {
        loop {
            // Both only receive, and lose nothing when dropped.
            tokio::select! {
                biased;
                item = from.recv() => {
                    let Some(item) = item else { return Closed };
                    let passed = match self.orders.try_recv() {
                        Ok(order) => self.hold_in(item, order, from, to, applied).await,
                        Err(_) => self.forward(item, to).await,
                    };
                    if passed.is_err() {
                        return Closed;
                    }
                }
                Some(order) = self.orders.recv(), if !self.cursor.inside => {
                    if self.hold(order, from, to, applied).await.is_err() {
                        return Closed;
                    }
                }
            }
        }
    }

    async fn forward(&mut self, item: Received, to: &mpsc::Sender<Received>) -> Result<(), Closed> {
        self.note(&item);
        to.send(item).await.map_err(|_| Closed)
    }

    /// Holds at the next end of a transaction, which may be in the middle of `item`.
    async fn hold_in(
        &mut self,
        item: Received,
        order: Order,
        from: &mut mpsc::Receiver<Received>,
        to: &mpsc::Sender<Received>,
        applied: &mut watch::Receiver<Applied>,
    ) -> Result<(), Closed> {
        self.kept.extend(one_by_one(item));
        while self.cursor.inside {
            match self.kept.pop_front() {
                Some(item) => self.forward(item, to).await?,
                None => self.kept.extend(one_by_one(from.recv().await.ok_or(Closed)?)),
            }
        }
        self.hold(order, from, to, applied).await
    }

    /// Until the hold is let go.
    async fn hold(
        &mut self,
        order: Order,
        from: &mut mpsc::Receiver<Received>,
        to: &mpsc::Sender<Received>,
        applied: &mut watch::Receiver<Applied>,
    ) -> Result<(), Closed> {
        let Order { mut held, mut questions } = order;
        let end = self.cursor.end;
        tokio::select! {
            reached = durable(applied, end) => reached?,
            // Whoever asked has gone, and nobody can be told. What came with the order is kept back all the same: it must
            // pass before anything else does.
            () = held.closed() => {}
        }
        if held.send(()).is_ok() {
            while let Some(question) = questions.recv().await {
                let Question { snapshot, position, mut answer } = question;
                let fit = tokio::select! {
                    fit = self.fit(&snapshot, position, from, to, applied) => fit?,
                    // Dropped in between, every message is either passed on or kept.
                    () = answer.closed() => continue,
                };
                // Whoever asked may have gone.
                let _ = answer.send(fit);
            }
        }
        while let Some(item) = self.kept.pop_front() {
            self.forward(item, to).await?;
        }
        Ok(())
    }

    async fn fit(
        &mut self,
        snapshot: &TxidSnapshot,
        position: Lsn,
        from: &mut mpsc::Receiver<Received>,
        to: &mpsc::Sender<Received>,
        applied: &mut watch::Receiver<Applied>,
    ) -> Result<Fit, Closed> {
        if self.recent.iter().any(|(_, xid)| !snapshot.sees(*xid)) {
            return Ok(Fit::Disordered);
        }
        let mut look = Look::new(snapshot, position);
        let mut ahead = Cursor { inside: self.cursor.inside, xid: 0, end: self.cursor.end };
        // Of what is kept, how much the snapshot is known not to see.
        let mut judged = 0;
        while !look.complete {
            let Some(item) = self.kept.get(judged) else {
                let item = from.recv().await.ok_or(Closed)?;
                self.kept.extend(one_by_one(item));
                continue;
            };
            let verdict = look.verdict(ahead.look(item));
            ahead.step_over(item);
            if verdict == Verdict::Keep {
                judged += 1;
                continue;
            }
            // Room first: what is taken out must not be lost when this is dropped.
            let room = to.reserve().await.map_err(|_| Closed)?;
            if let Some(item) = self.kept.pop_front() {
                self.note(&item);
                room.send(item);
            }
        }
        if look.disordered {
            return Ok(Fit::Disordered);
        }
        durable(applied, self.cursor.end).await?;
        Ok(Fit::Exact)
    }

    /// Notes what is passed on.
    fn note(&mut self, item: &Received) {
        self.passed.fetch_add(1, Ordering::Relaxed);
        let Received::Data { messages, .. } = item else { return };
        let now = Instant::now();
        for data in messages {
            let Some(xid) = self.cursor.step(data) else { continue };
            let old = |(passed, _): &(Instant, u32)| now.duration_since(*passed) > RECENT_AGE;
            while self.recent.len() >= RECENT || self.recent.front().is_some_and(old) {
                self.recent.pop_front();
            }
            self.recent.push_back((now, xid));
        }
    }
}

/// Until everything that ends at `end` is on the target.
async fn durable(applied: &mut watch::Receiver<Applied>, end: Lsn) -> Result<(), Closed> {
    applied.wait_for(|applied| applied.seen >= end).await.map(|_| ()).map_err(|_| Closed)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Pass,
    Keep,
}

/// Walks through the stream with a snapshot in hand. Pure.
#[derive(Debug)]
struct Look<'a> {
    snapshot: &'a TxidSnapshot,
    position: Lsn,
    /// A transaction that the snapshot does not see has been met.
    keeping: bool,
    /// One that it sees came behind it.
    disordered: bool,
    /// Whatever it sees has been met.
    complete: bool,
}

impl<'a> Look<'a> {
    fn new(snapshot: &'a TxidSnapshot, position: Lsn) -> Self {
        Self { snapshot, position, keeping: false, disordered: false, complete: false }
    }

    fn verdict(&mut self, kind: Kind) -> Verdict {
        match kind {
            Kind::Commits { at, .. } if at >= self.position => {
                self.complete = true;
                self.keeping = true;
            }
            Kind::Commits { xid, .. } => {
                let seen = self.snapshot.sees(xid);
                self.disordered |= seen && self.keeping;
                self.keeping |= !seen;
            }
            Kind::UpTo(position) => self.complete |= position >= self.position,
            Kind::Other => {}
        }
        if self.keeping { Verdict::Keep } else { Verdict::Pass }
    }
}

#[cfg(test)]
mod tests {
    use bytes::{BufMut as _, Bytes, BytesMut};
    use tokio::sync::Semaphore;

    use super::*;

    fn data(messages: Vec<Bytes>) -> Received {
        let memory = Arc::new(Semaphore::new(1)).try_acquire_owned().expect("free");
        Received::Data { messages, memory }
    }

    /// Begin and Commit of a transaction whose commit record is 8 bytes long.
    fn transaction(xid: u32, at: u64) -> [Bytes; 2] {
        let mut begin = BytesMut::from(&b"B"[..]);
        begin.put_u64(at);
        begin.put_i64(0);
        begin.put_u32(xid);
        let mut commit = BytesMut::from(&b"C\0"[..]);
        commit.put_u64(at);
        commit.put_u64(at + 8);
        commit.put_i64(0);
        [begin.freeze(), commit.freeze()]
    }

    struct Bench {
        gate: Gate,
        send: mpsc::Sender<Received>,
        seen: Arc<Mutex<Vec<u64>>>,
    }

    /// An applier that notes at which positions transactions ended.
    fn bench() -> Bench {
        let gate = Gate::default();
        let passage = gate.open();
        let (send, from) = mpsc::channel(64);
        let (to, mut out) = mpsc::channel(4);
        let applied = watch::Sender::new(Applied::default());
        let watched = applied.subscribe();
        let seen: Arc<Mutex<Vec<u64>>> = Arc::default();
        let noted = seen.clone();
        tokio::spawn(passage.run(from, to, watched));
        tokio::spawn(async move {
            while let Some(item) = out.recv().await {
                let Received::Data { messages, .. } = &item else { continue };
                for data in messages.iter().filter(|data| data[0] == b'C') {
                    let end = u64_at(data, 10).expect("an end");
                    noted.lock().expect("whole").push(end - 8);
                    applied.send_modify(|applied| applied.seen = Lsn(end));
                }
            }
        });
        Bench { gate, send, seen }
    }

    impl Bench {
        async fn commit(&self, xid: u32, at: u64) {
            for message in transaction(xid, at) {
                self.send.send(data(vec![message])).await.expect("running");
            }
        }

        /// All in one item.
        async fn commit_together(&self, transactions: &[(u32, u64)]) {
            let messages = transactions.iter().flat_map(|&(xid, at)| transaction(xid, at)).collect();
            self.send.send(data(messages)).await.expect("running");
        }

        fn passed(&self) -> Vec<u64> {
            self.seen.lock().expect("whole").clone()
        }

        async fn until(&self, wanted: &[u64]) {
            while self.passed() != wanted {
                tokio::task::yield_now().await;
            }
        }
    }

    fn snapshot(text: &str) -> TxidSnapshot {
        text.parse().expect("valid")
    }

    #[tokio::test]
    async fn exactly_what_the_snapshot_sees_passes_until_the_hold_is_let_go() {
        let bench = bench();
        bench.commit(700, 100).await;
        bench.until(&[100]).await;
        let mut hold = bench.gate.hold().await.expect("running");
        bench.commit_together(&[(741, 200), (743, 300), (750, 400)]).await;
        bench.send.send(Received::UpTo(Lsn(500))).await.expect("running");
        assert_eq!(hold.fit(&snapshot("742:745:742,743"), Lsn(350)).await, Ok(Fit::Exact));
        assert_eq!(bench.passed(), [100, 200]);
        drop(hold);
        bench.until(&[100, 200, 300, 400]).await;
    }

    #[tokio::test]
    async fn a_set_that_is_not_a_beginning_needs_a_newer_snapshot() {
        let bench = bench();
        let mut hold = bench.gate.hold().await.expect("running");
        for (xid, at) in [(743, 300), (742, 310), (760, 400)] {
            bench.commit(xid, at).await;
        }
        assert_eq!(hold.fit(&snapshot("743:745:743"), Lsn(320)).await, Ok(Fit::Disordered));
        assert_eq!(bench.passed(), Vec::<u64>::new(), "743 is kept, and with it what comes behind");
        assert_eq!(hold.fit(&snapshot("745:745:"), Lsn(330)).await, Ok(Fit::Exact));
        assert_eq!(bench.passed(), [300, 310]);
        drop(hold);
        bench.until(&[300, 310, 400]).await;
    }

    #[tokio::test]
    async fn what_was_applied_before_it_is_visible_does_not_fit() {
        let bench = bench();
        bench.commit(743, 300).await;
        bench.until(&[300]).await;
        let mut hold = bench.gate.hold().await.expect("running");
        assert_eq!(hold.fit(&snapshot("743:745:743"), Lsn(320)).await, Ok(Fit::Disordered));
        bench.send.send(Received::UpTo(Lsn(330))).await.expect("running");
        assert_eq!(hold.fit(&snapshot("744:745:744"), Lsn(330)).await, Ok(Fit::Exact));
    }

    #[tokio::test]
    async fn what_is_kept_back_passes_in_its_place_when_the_hold_is_given_up_before_it_stands() {
        let gate = Gate::default();
        let (send, from) = mpsc::channel(64);
        let (to, mut out) = mpsc::channel(64);
        // Nothing becomes durable: the target works on 700 for a long time.
        let applied = watch::Sender::new(Applied::default());
        tokio::spawn(gate.open().run(from, to, applied.subscribe()));
        send.send(data(transaction(700, 100).to_vec())).await.expect("running");
        out.recv().await.expect("passed");
        {
            let mut hold = std::pin::pin!(gate.hold());
            // 741 and the order wait for the gate together.
            send.send(data(transaction(741, 200).to_vec())).await.expect("running");
            assert!(futures_util::poll!(hold.as_mut()).is_pending());
            while send.capacity() < send.max_capacity() {
                tokio::task::yield_now().await;
            }
            assert!(futures_util::poll!(hold.as_mut()).is_pending(), "700 is not durable");
        }
        for (xid, at) in [(742, 300), (743, 400)] {
            send.send(data(transaction(xid, at).to_vec())).await.expect("running");
        }
        let mut begun = Vec::new();
        while begun.len() < 2 {
            let Some(Received::Data { messages, .. }) = out.recv().await else { panic!("the passage has ended") };
            begun.extend(messages.iter().filter(|data| data[0] == b'B').filter_map(|data| u64_at(data, 1)));
        }
        assert_eq!(begun, [200, 300]);
    }

    #[tokio::test]
    async fn whoever_waits_learns_that_the_stream_has_ended() {
        let bench = bench();
        let mut hold = bench.gate.hold().await.expect("running");
        let Bench { send, gate, .. } = bench;
        let question = tokio::spawn(async move { hold.fit(&snapshot("1:1:"), Lsn(10)).await });
        drop(send);
        assert_eq!(question.await.expect("ended"), Err(Interrupted));
        assert_eq!(gate.hold().await.err(), Some(Interrupted));
        assert_eq!(Gate::default().hold().await.err(), Some(Interrupted), "no stream has ever run");
    }
}
