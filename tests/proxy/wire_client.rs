//! A client that sends and sees single frames.

use std::time::Duration;

use pgcutover::wire::error::field;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// Longer than anything should take.
const PATIENCE: Duration = Duration::from_secs(90);

pub struct WireClient<S = TcpStream> {
    pub stream: S,
    /// From BackendKeyData.
    pub key: Option<(i32, [u8; 4])>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub tag: char,
    pub body: Vec<u8>,
}

impl Message {
    /// SQLSTATE of an error.
    pub fn code(&self) -> String {
        String::from_utf8_lossy(field(&self.body, b'C').unwrap_or_default()).into_owned()
    }

    /// The primary message of an error.
    pub fn words(&self) -> String {
        String::from_utf8_lossy(field(&self.body, b'M').unwrap_or_default()).into_owned()
    }
}

/// A frame.
pub fn frame(tag: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![tag];
    bytes.extend((body.len() as u32 + 4).to_be_bytes());
    bytes.extend(body);
    bytes
}

pub fn query(sql: &str) -> Vec<u8> {
    frame(b'Q', format!("{sql}\0").as_bytes())
}

pub fn parse(name: &str, sql: &str) -> Vec<u8> {
    frame(b'P', format!("{name}\0{sql}\0\0\0").as_bytes())
}

/// Bind without parameters of the statement `name` to the unnamed portal.
pub fn bind(name: &str) -> Vec<u8> {
    frame(b'B', format!("\0{name}\0\0\0\0\0\0\0").as_bytes())
}

/// Execute of the unnamed portal.
pub fn execute(max_rows: u32) -> Vec<u8> {
    frame(b'E', &[&[0], &max_rows.to_be_bytes()[..]].concat())
}

pub fn sync() -> Vec<u8> {
    frame(b'S', &[])
}

/// Parse, Bind and Execute of `sql`, unnamed, without a Sync.
pub fn extended(sql: &str) -> Vec<u8> {
    [parse("", sql), bind(""), execute(0)].concat()
}

impl WireClient {
    pub async fn connect(port: u16) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).await.expect("accepts");
        stream.set_nodelay(true).expect("set");
        Self { stream, key: None }
    }

    /// Whether nothing comes for a while.
    pub async fn is_silent(&mut self, time: Duration) -> bool {
        let mut byte = [0; 1];
        tokio::time::timeout(time, self.stream.peek(&mut byte)).await.is_err()
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> WireClient<S> {
    /// Sends a startup packet of protocol 3.0.
    pub async fn start(&mut self, parameters: &[(&str, &str)]) {
        self.start_version(3 << 16, parameters).await;
    }

    pub async fn start_version(&mut self, version: u32, parameters: &[(&str, &str)]) {
        let mut body = version.to_be_bytes().to_vec();
        for (name, value) in parameters {
            body.extend(format!("{name}\0{value}\0").as_bytes());
        }
        body.push(0);
        self.send(&[&(body.len() as u32 + 4).to_be_bytes()[..], &body].concat()).await;
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.expect("sent");
    }

    /// The next message; none at the end of the stream.
    pub async fn next(&mut self) -> Option<Message> {
        let read = async {
            let mut header = [0; 5];
            self.stream.read_exact(&mut header).await.ok()?;
            let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
            let mut body = vec![0; length - 4];
            self.stream.read_exact(&mut body).await.ok()?;
            Some(Message { tag: char::from(header[0]), body })
        };
        let message = tokio::time::timeout(PATIENCE, read).await.expect("an answer in time")?;
        if message.tag == 'K' {
            let (pid, key) = message.body.split_at(4);
            let pid = i32::from_be_bytes(pid.try_into().expect("four bytes"));
            self.key = Some((pid, key.try_into().expect("four bytes")));
        }
        Some(message)
    }

    /// Messages up to and including the next ReadyForQuery, or the end of the stream.
    pub async fn until_ready(&mut self) -> Vec<Message> {
        let mut messages = Vec::new();
        while let Some(message) = self.next().await {
            let ready = message.tag == 'Z';
            messages.push(message);
            if ready {
                break;
            }
        }
        messages
    }

    /// Their tags; a ReadyForQuery is followed by its status.
    pub async fn tags_until_ready(&mut self) -> String {
        tags(&self.until_ready().await)
    }

    /// Sends a CancelRequest for this session and waits until it was dealt with.
    pub async fn cancel(&self, port: u16) {
        let (pid, key) = self.key.expect("logged in");
        let mut other = WireClient::connect(port).await;
        let mut packet = 16u32.to_be_bytes().to_vec();
        packet.extend((1234u32 << 16 | 5678).to_be_bytes());
        packet.extend(pid.to_be_bytes());
        packet.extend(key);
        other.send(&packet).await;
        assert_eq!(other.next().await, None);
    }
}

pub fn tags(messages: &[Message]) -> String {
    let mut tags = String::new();
    for message in messages {
        tags.push(message.tag);
        if message.tag == 'Z' {
            tags.push(char::from(message.body[0]));
        }
    }
    tags
}

/// The first column of the DataRows.
pub fn rows(messages: &[Message]) -> Vec<String> {
    let rows = messages.iter().filter(|message| message.tag == 'D');
    rows.map(|row| {
        let length = i32::from_be_bytes(row.body[2..6].try_into().expect("four bytes"));
        String::from_utf8_lossy(&row.body[6..6 + length.max(0) as usize]).into_owned()
    })
    .collect()
}
