//! The live state as server-sent events (HTML standard, section 9.2).
//!
//! Each event is the whole state, so a follower that was away misses nothing: there is nothing to resume.

use std::convert::Infallible;
use std::sync::Arc;

use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::problem::Problem;
use super::{Answer, Shared};
use crate::admin::view::LiveView;
use crate::shutdown::Tasks;

/// Streams at once. Each holds a connection open, and reading needs no token.
const STREAMS: usize = 64;

/// Bounds the streams.
pub(super) struct Streams(Arc<Semaphore>);

impl Default for Streams {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(STREAMS)))
    }
}

/// One follower.
struct Follower {
    views: watch::Receiver<Option<Arc<LiveView>>>,
    tasks: Tasks,
    _place: OwnedSemaphorePermit,
}

pub(super) async fn live(State(site): Shared) -> Answer {
    let place = site.streams.0.clone().try_acquire_owned().map_err(|_| {
        Problem::new(StatusCode::SERVICE_UNAVAILABLE, "too_many_streams", "too many live streams are open")
            .hint("close some, or ask for /api/v1/migrations instead")
    })?;
    let follower = Follower { views: site.service.follow(), tasks: site.tasks.clone(), _place: place };
    let events = stream::unfold(follower, |mut follower| async {
        follower.next().await.map(|event| (Ok::<_, Infallible>(event), follower))
    });
    let mut response: Response = Sse::new(events).keep_alive(KeepAlive::default()).into_response();
    // A proxy in between must not collect events before it passes them on.
    response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

impl Follower {
    /// The next change; `None` ends the stream, because a shutdown waits for open connections.
    async fn next(&mut self) -> Option<Event> {
        loop {
            tokio::select! {
                // Safe to drop: a change that was not taken is still marked.
                changed = self.views.changed() => changed.ok()?,
                () = self.tasks.stopping() => return None,
            }
            let view = self.views.borrow_and_update().clone();
            if let Some(view) = view
                && let Ok(event) = Event::default().event("live").json_data(&*view)
            {
                return Some(event);
            }
        }
    }
}
