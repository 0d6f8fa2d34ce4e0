//! PEM files to rustls.

use std::path::Path;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tonic::transport::{ClientTlsConfig, Endpoint, Identity};

use super::FileFault;
use super::own::TrustsItself;
use crate::config::TlsSettings;
use crate::files;

/// The rustls side of a server, whatever is spoken behind it.
///
/// `contents` are those of the certificate, the key and, where clients must show certificates too, the authorities
/// that sign them, in the order of [`TlsSettings::files`].
///
/// # Errors
/// What cannot be used, with the name of its file.
pub fn server_config(tls: &TlsSettings, contents: &[Vec<u8>]) -> Result<ServerConfig, FileFault> {
    let [certificate, key, authorities @ ..] = contents else {
        return Err(FileFault::new(&tls.certificate, "was not read"));
    };
    let chain = certificates(&tls.certificate, certificate)?;
    let key = PrivateKeyDer::from_pem_slice(key)
        .map_err(|error| FileFault::new(&tls.key, format!("holds no private key in PEM form: {error}")))?;
    let provider = provider();
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| FileFault::new(&tls.certificate, error))?;
    let builder = match (&tls.client_ca, authorities) {
        (Some(path), [pem]) => {
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots(path, pem)?), provider);
            builder.with_client_cert_verifier(verifier.build().map_err(|error| FileFault::new(path, error))?)
        }
        _ => builder.with_no_client_auth(),
    };
    builder.with_single_cert(chain, key).map_err(|error| match error {
        rustls::Error::InconsistentKeys(_) => {
            FileFault::new(&tls.key, format!("is not the key of {}", tls.certificate.display()))
        }
        other => FileFault::new(&tls.certificate, other),
    })
}

/// The TLS side of a client.
#[derive(Debug, Clone)]
pub struct ClientTls {
    config: ClientTlsConfig,
    /// For authorities from a file.
    verifier: Option<Arc<TrustsItself>>,
}

impl ClientTls {
    /// Uses it on an endpoint.
    ///
    /// # Errors
    /// The endpoint is none of TLS.
    pub fn on(self, endpoint: Endpoint) -> Result<Endpoint, tonic::transport::Error> {
        match self.verifier {
            Some(verifier) => endpoint.tls_config_with_verifier(self.config, verifier),
            None => endpoint.tls_config(self.config.with_native_roots()),
        }
    }
}

/// The TLS side of a client: the authorities that it trusts (the system's where there is no file), and what it shows
/// to a server that asks.
///
/// # Errors
/// A file that cannot be read or used.
pub fn client_config(ca: Option<&Path>, identity: Option<(&Path, &Path)>) -> Result<ClientTls, FileFault> {
    let read = |path: &Path| files::read(path).map_err(|error| FileFault::new(path, error));
    let mut config = ClientTlsConfig::new();
    let verifier = match ca {
        Some(path) => {
            let pem = read(path)?;
            let (roots, authorities) = (Arc::new(roots(path, &pem)?), certificates(path, &pem)?);
            let chains = WebPkiServerVerifier::builder_with_provider(roots, provider()).build();
            let chains = chains.map_err(|error| FileFault::new(path, error))?;
            Some(Arc::new(TrustsItself { chains, authorities }))
        }
        None => None,
    };
    if let Some((certificate, key)) = identity {
        let (chain_pem, key_pem) = (read(certificate)?, read(key)?);
        certificates(certificate, &chain_pem)?;
        PrivateKeyDer::from_pem_slice(&key_pem)
            .map_err(|error| FileFault::new(key, format!("holds no private key in PEM form: {error}")))?;
        config = config.identity(Identity::from_pem(chain_pem, key_pem));
    }
    Ok(ClientTls { config, verifier })
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, FileFault> {
    let refuse = |error: &dyn std::fmt::Display| {
        FileFault::new(path, format!("holds no certificate in PEM form: {error}"))
    };
    let certificates: Vec<_> =
        CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(|error| refuse(&error))?;
    if certificates.is_empty() {
        return Err(refuse(&"there is none"));
    }
    Ok(certificates)
}

fn roots(path: &Path, pem: &[u8]) -> Result<RootCertStore, FileFault> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path, pem)? {
        roots.add(certificate).map_err(|error| FileFault::new(path, error))?;
    }
    Ok(roots)
}
