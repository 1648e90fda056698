//! The client that says LISTEN once and then only waits: the hardest kind to move, because it never asks for anything.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::atomic::Ordering;

use tokio::sync::mpsc;
use tokio_postgres::AsyncMessage;

use crate::demo::workload::client::describe;
use crate::demo::workload::{Orders, Outcome};

/// Listens until told to stop.
pub(super) async fn run(orders: Orders) -> Outcome {
    let mut outcome = Outcome::new(orders.client);
    let mut connections = 0_u64;
    while !orders.stop.is_cancelled() {
        connections += 1;
        outcome.reconnects = connections - 1;
        if let Err(text) = listen(&orders, &mut outcome).await {
            orders.tally.errors.fetch_add(1, Ordering::Relaxed);
            outcome.error(format!("listener: {text}"));
            tokio::time::sleep(orders.think_time).await;
        }
    }
    outcome
}

/// Returns when told to stop; an error when the connection ends before.
async fn listen(orders: &Orders, outcome: &mut Outcome) -> Result<(), String> {
    let (client, mut connection) =
        orders.config.connect(tokio_postgres::NoTls).await.map_err(|error| describe(&error))?;
    let (sender, mut notifications) = mpsc::channel(10_000);
    let driver = async move {
        loop {
            match poll_fn(|context| connection.poll_message(context)).await {
                Some(Ok(AsyncMessage::Notification(notification))) => {
                    // Bounded by the demo's writes; the receiver never stops before this task.
                    if sender.send(notification.payload().to_owned()).await.is_err() {
                        return Ok(());
                    }
                }
                // Notices, and kinds that may come later.
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(describe(&error)),
                None => return Err("the connection was closed".to_owned()),
            }
        }
    };
    let mut driver = pin!(driver);
    {
        // LISTEN is answered through the driver. Dropping it with LISTEN unanswered ends the connection, and the demo.
        let setup = client.batch_execute("LISTEN shop_events");
        tokio::select! {
            result = setup => result.map_err(|error| describe(&error))?,
            result = &mut driver => return result,
        }
    }
    orders.listening.cancel();
    loop {
        // Each arm may be dropped: the channel keeps what was received, and the driver is polled again by reference.
        tokio::select! {
            payload = notifications.recv() => {
                let Some(payload) = payload else { return Err("the connection was closed".to_owned()) };
                match payload.parse() {
                    Ok(number) => outcome.heard.push(number),
                    Err(_) => return Err("a notification that nobody sent".to_owned()),
                }
                orders.tally.heard.fetch_add(1, Ordering::Relaxed);
            }
            result = &mut driver => return result,
            () = orders.stop.cancelled() => return Ok(()),
        }
    }
}
