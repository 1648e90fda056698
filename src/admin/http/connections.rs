//! The connections of HTTP: how many there are at a time, because their descriptors are those that the proxy needs for
//! its clients, and how long one may keep its place without asking for anything.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::ConnectInfo;
use axum::serve::Listener;
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::shutdown::Tasks;

/// Where a caller comes from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peer(pub(super) SocketAddr);

/// What connections may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// So many at a time. Who comes when all are taken waits in the queue of the socket.
    connections: usize,
    /// For the whole head of a request, and between two.
    patience: Duration,
}

impl Default for Bounds {
    /// A few dashboards, scrapers and orders that wait for a cutover. A scraper that asks every minute keeps its connection.
    fn default() -> Self {
        Self { connections: 256, patience: Duration::from_secs(75) }
    }
}

/// Serves whoever connects until `tasks` are told to stop; what is under way then is answered.
pub(super) async fn serve(mut listener: TcpListener, routes: Router, bounds: Bounds, tasks: Tasks) {
    let room = Arc::new(Semaphore::new(bounds.connections));
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(bounds.patience);
    loop {
        // A listener of this kind waits where the process has no descriptors left.
        let next = async { (room.clone().acquire_owned().await, Listener::accept(&mut listener).await) };
        let (place, (stream, peer)) = tokio::select! {
            () = tasks.stopping() => return,
            next = next => next,
        };
        let routes = TowerToHyperService::new(routes.clone());
        let service = service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(ConnectInfo(Peer(peer)));
            routes.call(request)
        });
        let connection = http.serve_connection(TokioIo::new(stream), service);
        let stopping = tasks.clone();
        tasks.spawn(async move {
            let _place = place;
            let mut connection = pin!(connection);
            let served = tokio::select! {
                served = connection.as_mut() => served,
                () = stopping.stopping() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = served {
                tracing::debug!(%error, %peer, "an HTTP connection ended");
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;

    use super::*;

    const HEAD: &[u8] = b"GET / HTTP/1.1\r\nhost: localhost\r\n";

    #[tokio::test]
    async fn who_never_finishes_asking_makes_room_for_others() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let bounds = Bounds { connections: 2, patience: Duration::from_millis(100) };
        let tasks = Tasks::new();
        let answer = |ConnectInfo(Peer(peer)): ConnectInfo<Peer>| async move { peer.to_string() };
        tasks.spawn(serve(listener, Router::new().route("/", get(answer)), bounds, tasks.clone()));
        let silent = TcpStream::connect(address).await.expect("it listens");
        let mut slow = TcpStream::connect(address).await.expect("it listens");
        slow.write_all(HEAD).await.expect("sent");
        let mut third = TcpStream::connect(address).await.expect("it listens");
        third.write_all(&[HEAD, b"connection: close\r\n\r\n"].concat()).await.expect("sent");
        let mut answer = String::new();
        third.read_to_string(&mut answer).await.expect("answered in the end");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(answer.ends_with(&third.local_addr().expect("connected").to_string()), "{answer}");
        drop((silent, slow));
        assert_eq!(tasks.join(Duration::from_secs(30)).await, 0);
    }
}
