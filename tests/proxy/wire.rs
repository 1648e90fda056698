//! A stretch of wire between the proxy and a server, which a test can break.

use std::sync::{Arc, Mutex};

use pgcutover::config;
use pgcutover::demo::cluster::Cluster;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// What becomes of the connections that pass here.
#[derive(Clone, Copy, PartialEq)]
pub enum Order {
    Pass,
    /// The server does not see it yet.
    Wait,
    /// Of what the server says next only the first half goes on, and nothing more until it may pass again.
    Tear,
    /// Closed towards the proxy, kept open towards the server, which notices nothing.
    Cut,
    /// Closed on both sides.
    Drop,
}

/// See the module.
pub struct Wire {
    port: u16,
    /// What becomes of the next connection at first.
    next: Arc<Mutex<Order>>,
    /// One for each connection, oldest first.
    connections: Arc<Mutex<Vec<watch::Sender<Order>>>>,
}

impl Wire {
    pub async fn to(cluster: &Cluster) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let port = listener.local_addr().expect("bound").port();
        let connections: Arc<Mutex<Vec<watch::Sender<Order>>>> = Arc::default();
        let (all, server_port) = (connections.clone(), cluster.port());
        let next = Arc::new(Mutex::new(Order::Pass));
        let first = next.clone();
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let at_first = std::mem::replace(&mut *first.lock().expect("lives"), Order::Pass);
                let (order, mut told) = watch::channel(at_first);
                all.lock().expect("lives").push(order);
                tokio::spawn(async move {
                    told.wait_for(|order| *order != Order::Wait).await.expect("the wire lives");
                    let far = TcpStream::connect(("127.0.0.1", server_port)).await.expect("connects");
                    pass(near, far, told).await;
                });
            }
        });
        Self { port, next, connections }
    }

    pub fn server(&self) -> config::Server {
        config::Server::new("127.0.0.1", self.port, "postgres")
    }

    pub fn order(&self, connection: usize, order: Order) {
        self.connections.lock().expect("lives")[connection].send_replace(order);
    }

    /// What becomes of the next connection at first.
    pub fn order_next(&self, order: Order) {
        *self.next.lock().expect("lives") = order;
    }

    pub fn count(&self) -> usize {
        self.connections.lock().expect("lives").len()
    }
}

async fn pass(mut near: TcpStream, mut far: TcpStream, mut told: watch::Receiver<Order>) {
    let (mut up, mut down) = (vec![0; 4096], vec![0; 4096]);
    let mut torn_off = Vec::new();
    loop {
        tokio::select! {
            read = near.read(&mut up) => match read {
                Ok(count @ 1..) if far.write_all(&up[..count]).await.is_ok() => {}
                _ => return,
            },
            read = far.read(&mut down), if torn_off.is_empty() => {
                let Ok(count @ 1..) = read else { return };
                let is_torn = *told.borrow() == Order::Tear;
                let (now, later) = down[..count].split_at(if is_torn { count / 2 } else { count });
                torn_off.extend_from_slice(later);
                if near.write_all(now).await.is_err() {
                    return;
                }
            },
            _ = told.changed() => {
                let order = *told.borrow_and_update();
                match order {
                    Order::Tear | Order::Wait => {}
                    Order::Pass if near.write_all(&std::mem::take(&mut torn_off)).await.is_ok() => {}
                    Order::Pass => return,
                    Order::Cut | Order::Drop => break,
                }
            },
        }
    }
    drop(near);
    let _dropped = told.wait_for(|order| *order == Order::Drop).await;
}
