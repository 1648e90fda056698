//! A server that misbehaves for some databases, in front of a real one that serves all the others.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pgcutover::config;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use crate::wire_client::frame;

/// A process id that no server has.
const NOBODY: i32 = i32::MAX - 5;

/// When it begins to misbehave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// In place of its first answer.
    Login,
    /// In answer to the first statement.
    Statement,
}

/// What it does when it has said its piece.
#[derive(Clone, Copy)]
pub enum Then {
    /// Closes.
    Close,
    /// Says nothing more.
    Silence,
    /// Goes on like this for ever; the number counts up.
    Endless(fn(u64) -> Vec<u8>),
}

#[derive(Clone)]
pub struct Misdeed {
    /// Name of the database that it is done to.
    pub database: &'static str,
    pub stage: Stage,
    pub says: Vec<u8>,
    pub then: Then,
}

pub struct EvilServer {
    pub port: u16,
    /// Bytes that it could send in an endless answer.
    pub sent: Arc<AtomicU64>,
    enough: Arc<Mutex<CancellationToken>>,
}

impl EvilServer {
    /// Misbehaves as `misdeeds` say, and passes everything else to `real`.
    pub async fn start(real: &config::Server, misdeeds: Vec<Misdeed>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        let sent = Arc::new(AtomicU64::new(0));
        let (count, behind) = (sent.clone(), (real.host.clone(), real.port));
        let enough = Arc::new(Mutex::new(CancellationToken::new()));
        let until = enough.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (misdeeds, count, behind) = (misdeeds.clone(), count.clone(), behind.clone());
                let until = until.lock().expect("no panic").clone();
                tokio::spawn(async move {
                    // The proxy may close at any moment.
                    let _ended = serve(stream, &misdeeds, &behind, &count, &until).await;
                });
            }
        });
        Self { port, sent, enough }
    }

    /// Closes every connection that it misbehaves on now.
    pub fn end_misdeeds(&self) {
        std::mem::take(&mut *self.enough.lock().expect("no panic")).cancel();
    }

    /// How the proxy reaches it, and how long it tries to.
    pub fn config(&self, real: &config::Server, connect_timeout: Duration) -> config::Server {
        let mut server = config::Server::new("127.0.0.1", self.port, real.user.clone());
        server.password = real.password.clone();
        server.sslmode = config::SslMode::Disable;
        server.connect_timeout = connect_timeout;
        server
    }
}

async fn serve(
    mut stream: TcpStream,
    misdeeds: &[Misdeed],
    behind: &(String, u16),
    sent: &AtomicU64,
    enough: &CancellationToken,
) -> std::io::Result<()> {
    let length = stream.read_u32().await?;
    let mut packet = vec![0; length as usize - 4];
    stream.read_exact(&mut packet).await?;
    let texts: Vec<&[u8]> = packet[4.min(packet.len())..].split(|byte| *byte == 0).collect();
    let database = texts.chunks(2).find(|pair| pair[0] == b"database").map(|pair| pair[1]);
    let Some(misdeed) = misdeeds.iter().find(|misdeed| database == Some(misdeed.database.as_bytes())) else {
        let mut real = TcpStream::connect((behind.0.as_str(), behind.1)).await?;
        real.write_u32(length).await?;
        real.write_all(&packet).await?;
        copy_bidirectional(&mut stream, &mut real).await?;
        return Ok(());
    };
    tokio::select! {
        done = misbehave(stream, misdeed, sent) => done,
        () = enough.cancelled() => Ok(()),
    }
}

async fn misbehave(mut stream: TcpStream, misdeed: &Misdeed, sent: &AtomicU64) -> std::io::Result<()> {
    if misdeed.stage == Stage::Statement {
        let key = [&NOBODY.to_be_bytes()[..], b"abcd"].concat();
        let version = frame(b'S', b"server_version\x0015.1\0");
        stream.write_all(&[frame(b'R', &[0; 4]), version, frame(b'K', &key), frame(b'Z', b"I")].concat()).await?;
        stream.read_u8().await?;
    }
    stream.write_all(&misdeed.says).await?;
    match misdeed.then {
        Then::Close => return Ok(()),
        Then::Silence => {}
        Then::Endless(make) => {
            for number in 0.. {
                let piece = make(number);
                stream.write_all(&piece).await?;
                sent.fetch_add(piece.len() as u64, Ordering::Relaxed);
            }
        }
    }
    // Until the proxy has had enough.
    while stream.read_u8().await.is_ok() {}
    Ok(())
}
