//! A process of a server that is held, as by `kill -STOP`, and goes on when this is dropped.

use tokio_postgres::Client;

/// Held.
pub struct Stopped(String);

impl Stopped {
    /// The process of `client`'s server with this `backend_type`, such as `walwriter`.
    pub async fn process(client: &Client, backend_type: &str) -> Self {
        let sql = "SELECT pid::text FROM pg_stat_activity WHERE backend_type = $1";
        let stopped = Self(client.query_one(sql, &[&backend_type]).await.expect("there is one").get(0));
        assert!(stopped.signal("-STOP"), "the {backend_type} got -STOP");
        stopped
    }

    fn signal(&self, signal: &str) -> bool {
        std::process::Command::new("kill").args([signal, &self.0]).status().expect("kill can be run").success()
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // It may have gone down with its server.
        self.signal("-CONT");
    }
}
