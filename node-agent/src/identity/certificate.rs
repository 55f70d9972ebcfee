//! A certificate with its chain: life, fingerprint, names.

use std::time::Duration;

use jiff::Timestamp;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use sha2::{Digest as _, Sha256};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::Error;

/// A certificate as it is shown to peers.
#[derive(Clone, Debug)]
pub struct Certificate {
    chain: Vec<CertificateDer<'static>>,
    not_before: i64,
    not_after: i64,
}

impl Certificate {
    /// Reads PEM: the certificate first, then those that signed it, where there are any.
    ///
    /// # Errors
    /// [`Error::Invalid`].
    pub fn parse(pem: &[u8]) -> Result<Self, Error> {
        let invalid = |why: String| Error::Invalid("the certificate", why);
        let chain = CertificateDer::pem_slice_iter(pem)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| invalid(e.to_string()))?;
        let first = chain.first().ok_or_else(|| invalid("it is empty".to_owned()))?;
        let (_, parsed) = X509Certificate::from_der(first).map_err(|e| invalid(e.to_string()))?;
        let (not_before, not_after) = (
            parsed.validity().not_before.timestamp(),
            parsed.validity().not_after.timestamp(),
        );
        Ok(Self {
            not_before,
            not_after,
            chain,
        })
    }

    /// The chain, own certificate first.
    #[must_use]
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// SHA-256 of the certificate itself, hexadecimal.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        let own = self.chain.first().map(AsRef::as_ref).unwrap_or_default();
        protocol::sealed::hex(&Sha256::digest(own))
    }

    /// Time until two thirds of its life are over; None when they are.
    #[must_use]
    pub fn until_renewal(&self, now: Timestamp) -> Option<Duration> {
        let life = self.not_after.checked_sub(self.not_before)?;
        let due = self.not_before.checked_add(life / 3 * 2)?;
        let left = due.checked_sub(now.as_second())?;
        u64::try_from(left)
            .ok()
            .filter(|left| *left > 0)
            .map(Duration::from_secs)
    }
}

/// The DNS names of a certificate that a peer has shown; empty where it cannot be read. The TLS library has verified the
/// chain before; which node the peer may speak for is for the caller to compare (`crds::names::agent_dns_name`).
#[must_use]
pub fn names_of(certificate: &CertificateDer<'_>) -> Vec<String> {
    let Ok((_, parsed)) = X509Certificate::from_der(certificate) else {
        return Vec::new();
    };
    let Ok(Some(names)) = parsed.subject_alternative_name() else {
        return Vec::new();
    };
    names
        .value
        .general_names
        .iter()
        .filter_map(|name| match name {
            GeneralName::DNSName(name) => Some((*name).to_owned()),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewal_is_due_after_two_thirds() {
        let certificate = Certificate {
            chain: Vec::new(),
            not_before: 1000,
            not_after: 1000 + 90,
        };
        let at = |second| certificate.until_renewal(Timestamp::from_second(second).unwrap());
        assert_eq!(at(1000), Some(Duration::from_secs(60)));
        assert_eq!(at(1059), Some(Duration::from_secs(1)));
        assert_eq!(at(1060), None);
        assert_eq!(at(5000), None);
        // A clock that is behind: valid, and due later.
        assert_eq!(at(900), Some(Duration::from_secs(160)));
    }

    #[test]
    fn what_is_no_certificate_is_refused() {
        assert!(Certificate::parse(b"").is_err());
        assert!(Certificate::parse(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").is_err());
        assert!(names_of(&CertificateDer::from(vec![1, 2, 3])).is_empty());
    }
}
