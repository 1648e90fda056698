//! A TCP link to a server that a test can watch, cut at a chosen message or at any moment, and stall.
//!
//! Stands between the code under test and a real server. Bytes pass unchanged until the client sends the trigger text;
//! then the connection that carried it is cut, before or after the server has received it.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};

/// When a connection is cut.
#[derive(Clone, Debug)]
pub enum Cut {
    /// The server never sees the message that contains this text.
    Before(&'static str),
    /// The server receives it and carries it out; its answer is lost.
    After(&'static str),
}

/// An order to cut one connection.
#[derive(Clone, Debug)]
struct Order {
    /// It has carried this text before.
    behind: Option<&'static str>,
    cut: Cut,
}

/// A running link. Ends with the runtime.
#[derive(Clone)]
pub struct Link {
    /// Where to connect instead of the server.
    pub address: SocketAddr,
    cut: Arc<Mutex<Option<Order>>>,
    cuts: Arc<AtomicU64>,
    /// Cut the next connection that has carried so much in answers, or in requests.
    answers_left: Arc<AtomicI64>,
    requests_left: Arc<AtomicI64>,
    /// Counts up with every order to cut what is there.
    cut_all: watch::Sender<u64>,
    /// Connections with a lower number carry nothing.
    stalled_below: watch::Sender<u64>,
    connections: Arc<AtomicU64>,
}

impl Link {
    /// A link to `server`.
    pub async fn to(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let link = Self {
            address,
            cut: Arc::default(),
            cuts: Arc::default(),
            answers_left: Arc::new(AtomicI64::new(i64::MAX)),
            requests_left: Arc::new(AtomicI64::new(i64::MAX)),
            cut_all: watch::Sender::new(0),
            stalled_below: watch::Sender::new(0),
            connections: Arc::default(),
        };
        let inner = link.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let link = inner.clone();
                tokio::spawn(async move {
                    if let Ok(server) = TcpStream::connect(server).await {
                        link.carry(client, server).await;
                    }
                });
            }
        });
        link
    }

    /// Cuts the next connection that carries the text, once.
    pub fn cut_once(&self, cut: Cut) {
        *self.cut.lock().expect("not poisoned") = Some(Order { behind: None, cut });
    }

    /// The same of a connection that has carried another text in an earlier message.
    pub fn cut_once_behind(&self, behind: &'static str, cut: Cut) {
        *self.cut.lock().expect("not poisoned") = Some(Order { behind: Some(behind), cut });
    }

    /// Cuts, once, the connection on which the server's answers come to so many bytes from now on, all connections together:
    /// what was beyond never arrives.
    pub fn cut_after_answers(&self, bytes: u64) {
        self.answers_left.store(bytes.cast_signed(), Ordering::SeqCst);
    }

    /// The same of what clients send.
    pub fn cut_after_requests(&self, bytes: u64) {
        self.requests_left.store(bytes.cast_signed(), Ordering::SeqCst);
    }

    /// How much of `read` bytes may pass; less than all: the connection is cut behind it, and the bound is gone.
    fn passing(&self, left: &AtomicI64, read: usize) -> usize {
        let length = i64::try_from(read).expect("a buffer");
        let before = left.fetch_sub(length, Ordering::SeqCst);
        if before >= length {
            return read;
        }
        if before < 0 {
            // Another connection has reached the bound at this moment.
            return read;
        }
        left.store(i64::MAX, Ordering::SeqCst);
        self.cuts.fetch_add(1, Ordering::SeqCst);
        usize::try_from(before).expect("not negative")
    }

    /// Cuts every connection that is there now.
    pub fn cut_all(&self) {
        self.cut_all.send_modify(|count| *count += 1);
    }

    /// From now on nothing passes, in either direction, or everything does again. No connection is lost by it.
    pub fn stall(&self, stalled: bool) {
        self.stalled_below.send_replace(if stalled { u64::MAX } else { 0 });
    }

    /// Nothing ever passes again on the connections that are there, and neither end learns of it; new ones are well.
    pub fn stall_those_there(&self) {
        self.stalled_below.send_replace(self.connections.load(Ordering::SeqCst));
    }

    /// How many connections have been cut.
    pub fn cuts(&self) -> u64 {
        self.cuts.load(Ordering::SeqCst)
    }

    /// Whether these bytes are to be cut at; `passed` is what the connection has carried of the order's first text.
    fn triggered(&self, bytes: &[u8], passed: &mut Option<&'static str>) -> Option<Cut> {
        let mut order = self.cut.lock().expect("not poisoned");
        let Order { behind, cut: Cut::Before(text) | Cut::After(text) } = order.as_ref()?;
        let has = |text: &str| bytes.windows(text.len()).any(|window| window == text.as_bytes());
        if *behind == *passed && has(text) {
            return order.take().map(|order| order.cut);
        }
        if behind.is_some_and(has) {
            *passed = *behind;
        }
        None
    }

    async fn carry(&self, client: TcpStream, server: TcpStream) {
        let (mut from_client, mut to_client) = client.into_split();
        let (mut from_server, mut to_server) = server.into_split();
        let number = self.connections.fetch_add(1, Ordering::SeqCst);
        let mut passing = self.stalled_below.subscribe();
        let mut cut_all = self.cut_all.subscribe();
        cut_all.mark_unchanged();
        let link = self.clone();
        let broken = Arc::new(Notify::new());
        let break_off = broken.clone();
        let answers = tokio::spawn(async move {
            let mut buffer = vec![0; 64 * 1024];
            while let Ok(read) = from_server.read(&mut buffer).await
                && read > 0
                && passing.wait_for(|below| number >= *below).await.is_ok()
            {
                let passes = link.passing(&link.answers_left, read);
                let written = to_client.write_all(&buffer[..passes]).await;
                if passes < read {
                    broken.notify_one();
                    return;
                }
                if written.is_err() {
                    return;
                }
            }
        });
        let mut passing = self.stalled_below.subscribe();
        let mut buffer = vec![0; 64 * 1024];
        let mut passed = None;
        loop {
            // Both are ends of the connection, so nothing is lost that was not to be.
            let read = tokio::select! {
                read = from_client.read(&mut buffer) => read.unwrap_or(0),
                _ = cut_all.changed() => 0,
                () = break_off.notified() => 0,
            };
            if read == 0 || passing.wait_for(|below| number >= *below).await.is_err() {
                break;
            }
            let passes = self.passing(&self.requests_left, read);
            if passes < read {
                let _ = to_server.write_all(&buffer[..passes]).await;
                break;
            }
            match self.triggered(&buffer[..read], &mut passed) {
                Some(Cut::Before(_)) => {
                    self.cuts.fetch_add(1, Ordering::SeqCst);
                    break;
                }
                Some(Cut::After(_)) => {
                    // The answer is lost: the way back is cut before the request goes on its way.
                    answers.abort();
                    self.cuts.fetch_add(1, Ordering::SeqCst);
                    let _ = to_server.write_all(&buffer[..read]).await;
                    // The server ends an idle connection at once, one at work when it has finished.
                    break;
                }
                None => {
                    if to_server.write_all(&buffer[..read]).await.is_err() {
                        break;
                    }
                }
            }
        }
        answers.abort();
    }
}
