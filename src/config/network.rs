//! A range of addresses, as operators write it: `10.0.0.0/8`, `::1/128`, or one address.

use std::net::IpAddr;

/// Every address that begins with the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    /// As it was written; bits beyond the prefix do not count.
    address: IpAddr,
    prefix: u8,
}

impl Network {
    /// Reads `address/bits`, or an address alone. The error says which form is expected.
    pub fn parse(text: &str) -> Result<Self, String> {
        let expected = || format!("{text:?} is not an address or a range of addresses, such as \"10.0.0.0/8\"");
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| expected())?;
        let whole = bits(address);
        let prefix = match prefix {
            Some(digits) if digits.bytes().all(|byte| byte.is_ascii_digit()) => {
                digits.parse().ok().filter(|&prefix| prefix <= whole).ok_or_else(expected)?
            }
            Some(_) => return Err(expected()),
            None => whole,
        };
        Ok(Self { address, prefix })
    }

    /// The range that `mask`, in the old notation (`255.255.0.0`), makes of `address`. `None`: not of one family, or the
    /// mask has a hole.
    pub fn with_mask(address: IpAddr, mask: IpAddr) -> Option<Self> {
        if address.is_ipv4() != mask.is_ipv4() {
            return None;
        }
        let mask = leading(mask);
        let prefix = mask.leading_ones();
        (mask.checked_shl(prefix).unwrap_or(0) == 0)
            .then(|| Self { address, prefix: u8::try_from(prefix).unwrap_or(128) })
    }

    /// Whether `address` is of this range. A mapped address (`::ffff:10.0.0.1`) is the IPv4 address it stands for.
    pub fn contains(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        if address.is_ipv4() != self.address.is_ipv4() {
            return false;
        }
        let differing = leading(address) ^ leading(self.address);
        u32::from(self.prefix) <= differing.leading_zeros()
    }
}

impl std::fmt::Display for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

fn bits(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// The address as a number, its first bit highest.
fn leading(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(address.to_bits()) << 96,
        IpAddr::V6(address) => address.to_bits(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contains(network: &str, address: &str) -> bool {
        Network::parse(network).expect("valid").contains(address.parse().expect("valid"))
    }

    #[test]
    fn a_range_holds_what_begins_with_its_bits() {
        for (network, inside, outside) in [
            ("10.0.0.0/8", "10.255.0.1", "11.0.0.0"),
            ("10.1.2.3/16", "10.1.0.0", "10.2.2.3"),
            ("10.1.2.3", "10.1.2.3", "10.1.2.2"),
            ("2001:db8::/32", "2001:db8:1::", "2001:db9::"),
            ("::1/128", "::1", "::2"),
            ("0.0.0.0/0", "255.1.1.1", "::1"),
            ("::/0", "fe80::1", "10.0.0.1"),
            ("10.0.0.0/8", "::ffff:10.0.0.1", "::ffff:11.0.0.1"),
        ] {
            assert!(contains(network, inside), "{inside} in {network}");
            assert!(!contains(network, outside), "{outside} not in {network}");
        }
    }

    #[test]
    fn masks_of_the_old_notation_are_prefixes() {
        let with = |address: &str, mask: &str| {
            let network = Network::with_mask(address.parse().expect("valid"), mask.parse().expect("valid"));
            network.map(|network| network.to_string())
        };
        assert_eq!(with("10.1.0.0", "255.255.0.0").as_deref(), Some("10.1.0.0/16"));
        assert_eq!(with("10.1.0.0", "0.0.0.0").as_deref(), Some("10.1.0.0/0"));
        assert_eq!(with("10.1.2.3", "255.255.255.255").as_deref(), Some("10.1.2.3/32"));
        assert_eq!(with("::1", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff").as_deref(), Some("::1/128"));
        assert_eq!(with("10.1.0.0", "255.0.255.0"), None);
        assert_eq!(with("10.1.0.0", "ffff::"), None);
    }

    #[test]
    fn what_is_no_range_is_refused() {
        for bad in ["", "10.0.0", "10.0.0.0/33", "10.0.0.0/", "10.0.0.0/+8", "::/129", "localhost", "10.0.0.0/8/8"] {
            assert!(Network::parse(bad).is_err(), "{bad}");
        }
    }
}
