//! What a handler takes from a request, where what cannot be taken is told as every other error is: as a [`Problem`].

use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use axum::http::StatusCode;
use axum::http::request::Parts;

use super::problem::Problem;

/// The body as it was sent.
pub(super) struct Body(pub(super) Bytes);

impl<S: Send + Sync> FromRequest<S> for Body {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let read = Bytes::from_request(request, state).await;
        read.map(Self).map_err(|rejection| match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => {
                Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", "the request's body is larger than 2 MB")
            }
            _ => Problem::new(StatusCode::BAD_REQUEST, "invalid", "the request's body could not be read to its end"),
        })
    }
}

/// The part of the path that stands for something.
pub(super) struct Named(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for Named {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let read = Path::<String>::from_request_parts(parts, state).await;
        read.map(|Path(part)| Self(part)).map_err(|_| {
            Problem::new(
                StatusCode::BAD_REQUEST,
                "invalid",
                "a name in the address is not UTF-8 after its %xx are read",
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_body_that_is_too_large_is_told_in_our_words() {
        let sent = |bytes: usize| Request::new(axum::body::Body::from(vec![b' '; bytes]));
        assert!(Body::from_request(sent(2 << 20), &()).await.is_ok());
        let refused = Body::from_request(sent((2 << 20) + 1), &()).await.err().expect("too large");
        assert!(format!("{refused:?}").contains("too_large"), "{refused:?}");
    }
}
