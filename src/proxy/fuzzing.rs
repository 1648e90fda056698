//! What must hold for whatever a client says before it is logged in. Built for tests and fuzzing only.

use tokio::io::AsyncReadExt;
use tokio::runtime::Runtime;

use super::auth::hba::{Client, Rules};
use super::auth::user_maps::UserMaps;
use super::auth::users_file;
use super::certificate::{self, ClientCertificate};
use super::handshake::{ClientChannel, Entrance, Peer, Request, negotiate};
pub use super::pooled::fuzzing::{expected, startup_options};
pub use super::takeover::fuzzing::takeover_messages;
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
        let Ok((mut channel, request)) = negotiate(ClientChannel::new(connection.stream), &entrance, &mut peer).await
        else {
            return;
        };
        // Some of it may still be in the socket.
        channel.stream.read_to_end(&mut channel.input).await.expect("its other end is shut");
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

/// The files that say who may come in: pg_hba.conf, pg_ident.conf and the list of users, each read or refused line by
/// line. A role and a certificate's name, which are the client's, stand in the first two lines.
pub fn access_files(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let mut lines = text.splitn(3, '\n');
    let (Some(role), Some(system), Some(file)) = (lines.next(), lines.next(), lines.next()) else { return };
    match Rules::parse(file) {
        Ok(rules) => {
            for (address, tls) in
                [(None, false), (Some([127, 0, 0, 1].into()), false), (Some([10, 0, 0, 9].into()), true)]
            {
                let client = Client {
                    address,
                    same_host: false,
                    tls,
                    user: role,
                    database: system,
                    physical_replication: false,
                };
                let _verdict = rules.decide(&client);
            }
        }
        Err(problems) => assert!(!problems.is_empty()),
    }
    match UserMaps::parse(file) {
        Ok(maps) => {
            assert_eq!(maps.lets(None, system, role), system == role);
            let named = file.split_whitespace().next().filter(|name| maps.has(name));
            let _lets = maps.lets(named, system, role);
        }
        Err(problems) => assert!(!problems.is_empty()),
    }
    let (users, bad) = users_file::parse(file);
    assert!(users.len() + bad.len() <= file.lines().count());
}
