//! Who makes a call. Decides nothing: that is the guard's.

use std::net::SocketAddr;

use axum::extract::ConnectInfo;
use axum::http::{HeaderMap, StatusCode};

use super::connections::Peer;
use super::problem::Problem;

/// Who asks: where from, and with which headers.
pub(super) struct Caller {
    pub(super) peer: SocketAddr,
    pub(super) headers: HeaderMap,
}

impl<S: Send + Sync> axum::extract::FromRequestParts<S> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut axum::http::request::Parts, _state: &S) -> Result<Self, Self::Rejection> {
        let peer = parts.extensions.get::<ConnectInfo<Peer>>().map(|ConnectInfo(Peer(peer))| *peer);
        let peer = peer.ok_or_else(|| {
            Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "failed", "the caller's address is not known")
        })?;
        Ok(Self { peer, headers: parts.headers.clone() })
    }
}
