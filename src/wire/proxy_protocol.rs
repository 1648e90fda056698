//! The PROXY protocol, version 2: what a load balancer says of the client before the client's own first byte.
//!
//! ```text
//! 12 bytes signature │ version and command │ family and transport │ length (2) │ addresses, then what else it says
//!                      0x20 LOCAL            0x11 TCP over IPv4      12 or more
//!                      0x21 PROXY            0x21 TCP over IPv6      36 or more
//!                                            0x31 Unix socket       216 or more
//!                                            0x00 not told
//! ```
//!
//! Format: "The PROXY protocol", HAProxy, section 2.2. The header is believed, so only from addresses that are trusted
//! may it be read at all; that is decided by the caller. Version 1, the text form, is not read.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// What every header begins with; no startup packet and no TLS record does.
pub const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";

/// Bytes of the part that says how long the rest is.
pub const FIXED_BYTES: usize = 16;

/// Longest rest that is read. Addresses take at most 216 bytes; what balancers add is a few hundred.
pub const REST_MAX: usize = 4096;

/// Who the header says is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The balancer itself (a health check), or it does not know or say: the socket's own addresses count.
    Itself,
    /// A client of a Unix socket on the balancer's machine, which has no address.
    Unix,
    /// A client at this address.
    Client(SocketAddr),
}

/// The header cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProxyHeaderError {
    /// Something else than a header.
    #[error("no PROXY protocol header of version 2")]
    Signature,
    /// Neither LOCAL nor PROXY, or another version.
    #[error("unknown version or command of the PROXY protocol")]
    Command,
    /// Neither TCP nor a Unix stream.
    #[error("unknown address family or transport in the PROXY protocol header")]
    Transport,
    /// Too short for its addresses, or longer than any that is read.
    #[error("invalid length of the PROXY protocol header")]
    Length,
}

/// How many bytes follow the fixed part.
pub fn rest_bytes(fixed: &[u8; FIXED_BYTES]) -> Result<usize, ProxyHeaderError> {
    if !fixed.starts_with(&SIGNATURE) {
        return Err(ProxyHeaderError::Signature);
    }
    let length = usize::from(u16::from_be_bytes([fixed[14], fixed[15]]));
    if length > REST_MAX { Err(ProxyHeaderError::Length) } else { Ok(length) }
}

/// Reads a header whose rest has come.
pub fn parse(fixed: &[u8; FIXED_BYTES], rest: &[u8]) -> Result<Origin, ProxyHeaderError> {
    if rest.len() != rest_bytes(fixed)? {
        return Err(ProxyHeaderError::Length);
    }
    match fixed[12] {
        // Addresses of a LOCAL connection are to be skipped, whatever they are.
        0x20 => return Ok(Origin::Itself),
        0x21 => {}
        _ => return Err(ProxyHeaderError::Command),
    }
    match fixed[13] {
        0x00 => Ok(Origin::Itself),
        0x11 => {
            let (addresses, _) = rest.split_first_chunk::<12>().ok_or(ProxyHeaderError::Length)?;
            let ip = Ipv4Addr::from([addresses[0], addresses[1], addresses[2], addresses[3]]);
            Ok(client(ip.into(), [addresses[8], addresses[9]]))
        }
        0x21 => {
            let (addresses, _) = rest.split_first_chunk::<36>().ok_or(ProxyHeaderError::Length)?;
            let (ip, _) = addresses.split_first_chunk::<16>().ok_or(ProxyHeaderError::Length)?;
            // A balancer with one socket for both families writes IPv4 clients as mapped addresses.
            Ok(client(Ipv6Addr::from(*ip).to_canonical(), [addresses[32], addresses[33]]))
        }
        0x31 if rest.len() >= 216 => Ok(Origin::Unix),
        0x31 => Err(ProxyHeaderError::Length),
        _ => Err(ProxyHeaderError::Transport),
    }
}

fn client(ip: IpAddr, port: [u8; 2]) -> Origin {
    Origin::Client(SocketAddr::new(ip, u16::from_be_bytes(port)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(command: u8, transport: u8, rest: &[u8]) -> Result<Origin, ProxyHeaderError> {
        let mut fixed = [0; FIXED_BYTES];
        fixed[..12].copy_from_slice(&SIGNATURE);
        fixed[12..14].copy_from_slice(&[command, transport]);
        fixed[14..].copy_from_slice(&(rest.len() as u16).to_be_bytes());
        parse(&fixed, rest)
    }

    #[test]
    fn clients_are_found_in_every_family() {
        let v4 = [10, 1, 2, 3, 10, 0, 0, 1, 0x12, 0x34, 0x15, 0x38];
        let expected = Origin::Client("10.1.2.3:4660".parse().expect("valid"));
        assert_eq!(read(0x21, 0x11, &v4), Ok(expected));
        assert_eq!(read(0x21, 0x11, &[&v4[..], &[3, 0, 4, 1, 2, 3, 4]].concat()), Ok(expected), "with a checksum");
        let mut v6 = [0; 36];
        v6[..16].copy_from_slice(&"2001:db8::7".parse::<Ipv6Addr>().expect("valid").octets());
        v6[32..34].copy_from_slice(&[0, 9]);
        assert_eq!(read(0x21, 0x21, &v6), Ok(Origin::Client("[2001:db8::7]:9".parse().expect("valid"))));
        v6[..16].copy_from_slice(&"::ffff:10.1.2.3".parse::<Ipv6Addr>().expect("valid").octets());
        assert_eq!(read(0x21, 0x21, &v6), Ok(Origin::Client("10.1.2.3:9".parse().expect("valid"))));
        assert_eq!(read(0x21, 0x31, &[0; 216]), Ok(Origin::Unix));
        assert_eq!(read(0x21, 0x00, &[1, 2, 3]), Ok(Origin::Itself));
        assert_eq!(read(0x20, 0x11, &[]), Ok(Origin::Itself));
    }

    #[test]
    fn what_is_not_a_header_is_refused() {
        assert_eq!(read(0x21, 0x11, &[0; 11]), Err(ProxyHeaderError::Length));
        assert_eq!(read(0x21, 0x21, &[0; 35]), Err(ProxyHeaderError::Length));
        assert_eq!(read(0x21, 0x31, &[0; 215]), Err(ProxyHeaderError::Length));
        assert_eq!(read(0x21, 0x12, &[0; 12]), Err(ProxyHeaderError::Transport));
        assert_eq!(read(0x22, 0x11, &[0; 12]), Err(ProxyHeaderError::Command));
        assert_eq!(read(0x11, 0x11, &[0; 12]), Err(ProxyHeaderError::Command));
        assert_eq!(read(0x21, 0x11, &[0; REST_MAX + 1]), Err(ProxyHeaderError::Length));
        assert_eq!(rest_bytes(b"PROXY TCP4 10.1."), Err(ProxyHeaderError::Signature));
        let mut tls = [0; FIXED_BYTES];
        tls[..3].copy_from_slice(&[0x16, 3, 1]);
        assert_eq!(rest_bytes(&tls), Err(ProxyHeaderError::Signature));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(command: u8, transport: u8, rest: Vec<u8>) {
            let _ = read(command, transport, &rest);
            let _ = read(0x21, transport, &rest);
        }

        #[test]
        fn every_address_comes_back(ip: u32, port: u16, more: Vec<u8>) {
            let mut rest = ip.to_be_bytes().to_vec();
            rest.extend([0; 4]);
            rest.extend(port.to_be_bytes());
            rest.extend([0; 2]);
            rest.extend(more);
            let expected = SocketAddr::new(Ipv4Addr::from(ip).into(), port);
            prop_assert_eq!(read(0x21, 0x11, &rest), Ok(Origin::Client(expected)));
        }
    }
}
