//! Speaks HTTP to the daemon: one request, one connection.

use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde_json::Value;
use tokio::net::TcpStream;

use crate::config::Secret;

/// For the connection; an answer may take as long as a cutover.
const CONNECT_BOUND: Duration = Duration::from_secs(5);

/// An answer of a few hundred thousand tables; more is a mistake.
const MAX_BODY_BYTES: usize = 256 << 20;

/// What a reverse proxy answers for a daemon that it has no answer of. It may have passed the request on.
const IN_BETWEEN: [StatusCode; 3] =
    [StatusCode::BAD_GATEWAY, StatusCode::SERVICE_UNAVAILABLE, StatusCode::GATEWAY_TIMEOUT];

/// What the daemon answered when it refused (RFC 9457).
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Refusal {
    pub(super) detail: String,
    pub(super) code: String,
    pub(super) hint: Option<String>,
}

/// No answer, or a refusal.
#[derive(Debug, thiserror::Error)]
pub(super) enum ClientError {
    /// Nobody listens, or whoever does has said nothing.
    #[error("cannot reach the daemon at {address}: {reason}")]
    Unreachable {
        /// Where.
        address: String,
        /// Why.
        reason: String,
    },
    /// An order was sent, and the connection was lost before the answer, or somebody in between has answered.
    #[error(
        "the connection to the daemon at {address} was lost ({reason}): whether the order was carried out is not known"
    )]
    Lost {
        /// Where.
        address: String,
        /// Why.
        reason: String,
    },
    /// It said no.
    #[error("{}", .0.detail)]
    Refused(Refusal),
    /// Somebody else listens there.
    #[error("what listens at {address} is not pgcutover: {reason}")]
    Stranger {
        /// Where.
        address: String,
        /// Why we think so.
        reason: String,
    },
}

impl ClientError {
    /// Whether a daemon that was there a moment ago may answer again in a while.
    pub(super) fn may_pass(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Lost { .. } => true,
            Self::Refused(refusal) => refusal.code == "unavailable",
            Self::Stranger { .. } => false,
        }
    }

    pub(super) fn is_unreachable(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Stranger { .. })
    }
}

/// Where the daemon is.
#[derive(Debug)]
pub(super) struct Client {
    address: String,
    token: Option<Secret>,
}

impl Client {
    pub(super) fn new(address: String, token: Option<Secret>) -> Self {
        let address = address.trim_start_matches("http://").trim_end_matches('/').to_owned();
        Self { address, token }
    }

    pub(super) async fn get(&self, path: &str) -> Result<Value, ClientError> {
        self.send(Method::GET, path, None).await
    }

    pub(super) async fn post(&self, path: &str, body: Option<&Value>) -> Result<Value, ClientError> {
        self.send(Method::POST, path, body).await
    }

    pub(super) async fn put(&self, path: &str, body: &Value) -> Result<Value, ClientError> {
        self.send(Method::PUT, path, Some(body)).await
    }

    pub(super) async fn delete(&self, path: &str) -> Result<Value, ClientError> {
        self.send(Method::DELETE, path, None).await
    }

    async fn send(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Value, ClientError> {
        let stream = match tokio::time::timeout(CONNECT_BOUND, TcpStream::connect(&self.address)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return Err(self.unreachable(error)),
            Err(_) => return Err(self.unreachable("no answer")),
        };
        let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = handshake.map_err(|error| self.unreachable(error))?;
        let is_order = method != Method::GET;
        let mut request = Request::builder().method(method).uri(path).header(HOST, &self.address);
        if let Some(token) = &self.token {
            request = request.header(AUTHORIZATION, format!("Bearer {}", token.expose()));
        }
        let body = body.map(Value::to_string).unwrap_or_default();
        let request = request.header(CONTENT_TYPE, "application/json").body(Full::new(Bytes::from(body)));
        let request = request.map_err(|error| self.unreachable(error))?;
        let exchange = async {
            let response = sender.send_request(request).await?;
            let status = response.status();
            let body = http_body_util::Limited::new(response.into_body(), MAX_BODY_BYTES);
            Ok::<_, hyper::Error>((status, body.collect().await.map(http_body_util::Collected::to_bytes)))
        };
        tokio::pin!(exchange, connection);
        let answer = tokio::select! {
            biased;
            answer = &mut exchange => answer,
            // The connection ends first when the daemon hangs up; then the exchange has its error or its answer.
            _ = &mut connection => exchange.await,
        };
        let lost = |reason: String| match is_order {
            true => ClientError::Lost { address: self.address.clone(), reason },
            false => self.unreachable(reason),
        };
        let (status, body) = answer.map_err(|error| lost(error.to_string()))?;
        let body = body.map_err(|error| lost(error.to_string()))?;
        if status.is_success() {
            return serde_json::from_slice(&body).map_err(|error| lost(format!("the answer cannot be read: {error}")));
        }
        match serde_json::from_slice(&body) {
            Ok(refusal) => Err(ClientError::Refused(refusal)),
            Err(_) if IN_BETWEEN.contains(&status) => Err(lost(format!("somebody in between answered {status}"))),
            Err(_) => Err(self.stranger(format!("it answered {status}"))),
        }
    }

    fn unreachable(&self, reason: impl std::fmt::Display) -> ClientError {
        ClientError::Unreachable { address: self.address.clone(), reason: reason.to_string() }
    }

    fn stranger(&self, reason: impl std::fmt::Display) -> ClientError {
        ClientError::Stranger { address: self.address.clone(), reason: reason.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// Whoever has sent an order and lost the connection must not read that nothing has happened.
    #[tokio::test]
    async fn an_order_that_was_not_answered_may_have_been_carried_out() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("listens");
        let client = Client::new(listener.local_addr().expect("bound").to_string(), None);
        let daemon = tokio::spawn(async move {
            for _ in 0..2 {
                let (mut stream, _) = listener.accept().await.expect("a client");
                let _request = stream.read(&mut [0; 4096]).await.expect("a request");
            }
        });
        let order = client.post("/api/v1/migrations/m/cutover", None).await.expect_err("no answer");
        assert!(matches!(order, ClientError::Lost { .. }) && !order.is_unreachable(), "{order}");
        let question = client.get("/api/v1/status").await.expect_err("no answer");
        assert!(question.is_unreachable(), "{question}");
        daemon.await.expect("has heard both");
    }

    /// Nor must who has sent it through a reverse proxy that did not wait for the daemon.
    #[tokio::test]
    async fn what_a_reverse_proxy_says_is_not_the_daemons_word() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("listens");
        let client = Client::new(listener.local_addr().expect("bound").to_string(), None);
        let proxy = tokio::spawn(async move {
            for status in ["504 Gateway Timeout", "504 Gateway Timeout", "200 OK", "200 OK", "404 Not Found"] {
                let (mut stream, _) = listener.accept().await.expect("a client");
                let _request = stream.read(&mut [0; 4096]).await.expect("a request");
                let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 6\r\n\r\n<html>");
                stream.write_all(answer.as_bytes()).await.expect("sent");
            }
        });
        for _ in 0..2 {
            let order = client.post("/api/v1/migrations/m/cutover", None).await.expect_err("nothing of the daemon");
            assert!(matches!(order, ClientError::Lost { .. }) && !order.is_unreachable(), "{order}");
            let question = client.get("/api/v1/status").await.expect_err("nothing of the daemon");
            assert!(question.may_pass() && question.is_unreachable(), "{question}");
        }
        let question = client.get("/api/v1/status").await.expect_err("nothing of the daemon");
        assert!(matches!(question, ClientError::Stranger { .. }), "{question}");
        proxy.await.expect("has answered all");
    }
}
