//! What must hold for whatever a client says before it is logged in. Built for tests and fuzzing only.

use tokio::runtime::Runtime;

use super::certificate::{self, ClientCertificate};
use super::handshake::{ClientChannel, Entrance, Peer, Request, negotiate};
use crate::config::Network;
use crate::postgres::fuzzing::scripted;

/// All that a client sends up to its startup packet; the first byte says whether it comes by a balancer. It ends in a
/// request or in a refusal, and what follows the request is kept for whoever reads on.
pub fn handshake(runtime: &Runtime, data: &[u8]) {
    let Some((&kind, said)) = data.split_first() else { return };
    let anybody = [Network::parse("0.0.0.0/0").expect("valid")];
    let balancers = if kind % 2 == 0 { &[][..] } else { &anybody };
    runtime.block_on(async {
        let (connection, _client) = scripted(said);
        let mut peer = Peer::new(Some(([127, 0, 0, 1], 5432).into()));
        let entrance = Entrance { tls: None, balancers };
        let Ok((channel, request)) = negotiate(ClientChannel::new(connection.stream), &entrance, &mut peer).await
        else {
            return;
        };
        assert!(said.ends_with(&channel.input), "what follows is untouched");
        assert!(channel.out.is_empty(), "every answer has been written");
        match request {
            Request::Session(session) => assert!(!session.user.is_empty()),
            Request::Cancel { key, .. } => assert!((1..=256).contains(&key.len())),
        }
    });
}

/// A client's certificate, of which the TLS handshake has checked the signature and not the names.
pub fn certificate(data: &[u8]) {
    let read = ClientCertificate::read(data);
    let names = read.alternative_names.iter().chain(&read.common_name).chain([&read.distinguished_name]);
    assert!(names.into_iter().all(|name| !name.contains('\0')));
    if let Some(digest) = certificate::end_point(data) {
        assert!(matches!(digest.len(), 32 | 48 | 64));
    }
    let _until = certificate::not_after(data);
}
