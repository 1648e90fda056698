//! A certificate's subject in the words of `clientname=DN`.
//!
//! PostgreSQL lets OpenSSL print it (`X509_NAME_print_ex` with XN_FLAG_RFC2253, in `be-secure-openssl.c`) and compares
//! texts, so lines of a pg_ident.conf fit only what is printed byte for byte like that: the last part first, also of
//! those that are joined by `+`; OpenSSL's short names; what is not ASCII as `\XX` for each byte of UTF-8. Two subjects
//! must never be printed alike: whoever has one could be taken for the other.

use std::fmt::Write as _;

use x509_cert::attr::{AttributeTypeAndValue, AttributeValue};
use x509_cert::der::{Encode as _, Tag, Tagged as _};
use x509_cert::name::Name;

/// Short names of OpenSSL 3.0 (`objects.txt`) for parts of names, by what their object identifiers begin with. It knows
/// a thousand more, of things that are in no subject: those are shown by number here.
const SHORT_NAMES: [(&str, &str); 4] = [
    (
        "2.5.4.",
        "3:CN 4:SN 5:serialNumber 6:C 7:L 8:ST 9:street 10:O 11:OU 12:title 13:description 14:searchGuide \
         15:businessCategory 16:postalAddress 17:postalCode 18:postOfficeBox 19:physicalDeliveryOfficeName \
         20:telephoneNumber 21:telexNumber 22:teletexTerminalIdentifier 23:facsimileTelephoneNumber \
         24:x121Address 25:internationaliSDNNumber 26:registeredAddress 27:destinationIndicator \
         28:preferredDeliveryMethod 29:presentationAddress 30:supportedApplicationContext 31:member 32:owner \
         33:roleOccupant 34:seeAlso 35:userPassword 36:userCertificate 37:cACertificate \
         38:authorityRevocationList 39:certificateRevocationList 40:crossCertificatePair 41:name 42:GN \
         43:initials 44:generationQualifier 45:x500UniqueIdentifier 46:dnQualifier 47:enhancedSearchGuide \
         48:protocolInformation 49:distinguishedName 50:uniqueMember 51:houseIdentifier 52:supportedAlgorithms \
         53:deltaRevocationList 54:dmdName 65:pseudonym 72:role 97:organizationIdentifier 98:c3 99:n3 100:dnsName",
    ),
    (
        "0.9.2342.19200300.100.1.",
        "1:UID 2:textEncodedORAddress 3:mail 4:info 5:favouriteDrink 6:roomNumber 7:photo 8:userClass 9:host \
         10:manager 11:documentIdentifier 12:documentTitle 13:documentVersion 14:documentAuthor \
         15:documentLocation 20:homeTelephoneNumber 21:secretary 22:otherMailbox 23:lastModifiedTime \
         24:lastModifiedBy 25:DC 26:aRecord 27:pilotAttributeType27 28:mXRecord 29:nSRecord 30:sOARecord \
         31:cNAMERecord 37:associatedDomain 38:associatedName 39:homePostalAddress 40:personalTitle \
         41:mobileTelephoneNumber 42:pagerTelephoneNumber 43:friendlyCountryName 44:uid 45:organizationalStatus \
         46:janetMailbox 47:mailPreferenceOption 48:buildingName 49:dSAQuality 50:singleLevelQuality \
         51:subtreeMinimumQuality 52:subtreeMaximumQuality 53:personalSignature 54:dITRedirect 55:audio \
         56:documentPublisher",
    ),
    ("1.2.840.113549.1.9.", "1:emailAddress 2:unstructuredName 7:challengePassword 8:unstructuredAddress"),
    ("1.3.6.1.4.1.311.60.2.1.", "1:jurisdictionL 2:jurisdictionST 3:jurisdictionC"),
];

/// The subject as OpenSSL prints it. None: it has a zero byte, which is an attempt to be taken for somebody else, or
/// text that is none.
pub(super) fn rfc2253(subject: &Name) -> Option<String> {
    let mut text = String::new();
    let parts: Vec<_> = subject.iter_rdn().collect();
    for part in parts.into_iter().rev() {
        let values: Vec<_> = part.iter().collect();
        for (place, AttributeTypeAndValue { oid, value }) in values.into_iter().rev().enumerate() {
            if !text.is_empty() {
                text.push(if place == 0 { ',' } else { '+' });
            }
            let number = oid.to_string();
            let name = short_name(&number);
            text.push_str(name.unwrap_or(&number));
            text.push('=');
            match bytes(value)?.filter(|_| name.is_some()) {
                Some(bytes) => escape(&bytes, &mut text)?,
                None => dump(value, &mut text)?,
            }
        }
    }
    Some(text)
}

fn short_name(number: &str) -> Option<&'static str> {
    SHORT_NAMES.iter().find_map(|&(arc, names)| {
        let last = number.strip_prefix(arc)?;
        names.split_whitespace().find_map(|name| name.strip_prefix(last)?.strip_prefix(':'))
    })
}

/// The value in UTF-8, or what claims to be that; within, none: it is of a kind that OpenSSL shows by its encoding.
fn bytes(value: &AttributeValue) -> Option<Option<Vec<u8>>> {
    let raw = value.value();
    let text: String = match value.tag() {
        Tag::Utf8String => return Some(Some(raw.to_vec())),
        Tag::NumericString
        | Tag::PrintableString
        | Tag::TeletexString
        | Tag::Ia5String
        | Tag::UtcTime
        | Tag::GeneralizedTime
        | Tag::VisibleString => raw.iter().copied().map(char::from).collect(),
        Tag::BmpString if raw.len().is_multiple_of(2) => {
            let units = raw.chunks_exact(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
            units.map(char::from_u32).collect::<Option<_>>()?
        }
        Tag::BmpString => return None,
        _ => return Some(None),
    };
    Some(Some(text.into_bytes()))
}

/// As `do_esc_char` of OpenSSL does it (`a_strex.c`), which takes a single `#` for the last byte and not for the first.
fn escape(bytes: &[u8], text: &mut String) -> Option<()> {
    for (place, &byte) in bytes.iter().enumerate() {
        let (is_first, is_last) = (place == 0, place + 1 == bytes.len());
        match byte {
            0 => return None,
            b',' | b'+' | b'"' | b'\\' | b'<' | b'>' | b';' => text.push('\\'),
            b' ' if is_first || is_last => text.push('\\'),
            b'#' if is_first && !is_last => text.push('\\'),
            0x01..=0x1f | 0x7f..=0xff => {
                let _infallible = write!(text, "\\{byte:02X}");
                continue;
            }
            _ => {}
        }
        text.push(char::from(byte));
    }
    Some(())
}

fn dump(value: &AttributeValue, text: &mut String) -> Option<()> {
    text.push('#');
    value.to_der().ok()?.iter().try_for_each(|byte| write!(text, "{byte:02X}")).ok()
}

#[cfg(test)]
mod tests {
    use std::str::FromStr as _;

    use rcgen::string::BmpString;
    use rcgen::{CertificateParams, DistinguishedName, DnType, DnValue, KeyPair};
    use x509_cert::Certificate;
    use x509_cert::der::Decode as _;

    use super::*;

    /// What is printed of a certificate with these parts.
    fn printed(parts: Vec<(DnType, DnValue)>) -> Option<String> {
        let mut parameters = CertificateParams::new(Vec::new()).expect("valid");
        parameters.distinguished_name = DistinguishedName::new();
        parts.into_iter().for_each(|(kind, value)| parameters.distinguished_name.push(kind, value));
        let signed = parameters.self_signed(&KeyPair::generate().expect("made")).expect("signed");
        rfc2253(Certificate::from_der(signed.der()).expect("valid").tbs_certificate().subject())
    }

    /// Each as `openssl x509 -subject -nameopt RFC2253` of OpenSSL 3.0 was seen to print it.
    #[test]
    fn subjects_are_printed_as_openssl_prints_them() {
        let custom = |numbers: &[u64]| DnType::CustomDnType(numbers.to_vec());
        for (name, expected) in [
            ("ann", "CN=ann"),
            ("Größe", "CN=Gr\\C3\\B6\\C3\\9Fe"),
            ("#", "CN=#"),
            ("#a#", "CN=\\#a#"),
            (" ", "CN=\\ "),
            ("  a ", "CN=\\  a\\ "),
            ("a\tb", "CN=a\\09b"),
            ("a=b<c>;\"+\\,d", "CN=a=b\\<c\\>\\;\\\"\\+\\\\\\,d"),
        ] {
            assert_eq!(printed(vec![(DnType::CommonName, name.into())]).as_deref(), Some(expected), "{name}");
        }
        assert_eq!(printed(vec![(DnType::CommonName, "a\0b".into())]), None);
        let several = vec![
            (DnType::CountryName, "DE".into()),
            (custom(&[1, 2, 840, 113549, 1, 9, 1]), "ann@example.org".into()),
            (custom(&[2, 5, 4, 5]), "77".into()),
            (custom(&[2, 5, 4, 9]), "Main 5".into()),
            (custom(&[2, 5, 4, 12]), "Dr".into()),
            (DnType::CommonName, DnValue::BmpString(BmpString::try_from("Zoë").expect("in its plane"))),
        ];
        let expected = "CN=Zo\\C3\\AB,title=Dr,street=Main 5,serialNumber=77,emailAddress=ann@example.org,C=DE";
        assert_eq!(printed(several).as_deref(), Some(expected));
        assert_eq!(printed(vec![(custom(&[1, 2, 3, 4]), "abc".into())]).as_deref(), Some("1.2.3.4=#0C03616263"));
        assert_eq!(printed(Vec::new()).as_deref(), Some(""));
    }

    #[test]
    fn values_of_one_part_are_turned_round_as_well() {
        let name = Name::from_str("CN=ann+UID=77,O=x").expect("valid");
        assert_eq!(rfc2253(&name).as_deref(), Some("UID=77+CN=ann,O=x"));
    }

    #[test]
    fn short_names_are_those_of_whole_numbers() {
        assert_eq!(
            [short_name("2.5.4.3"), short_name("2.5.4.4"), short_name("2.5.4.42")],
            [Some("CN"), Some("SN"), Some("GN")]
        );
        assert_eq!([short_name("2.5.4."), short_name("2.5.4.3.1"), short_name("2.5.4.1234")], [None; 3]);
    }
}
