"""TLS as the environment wants it: the bundles that the AWS tools, requests and OpenSSL look for, and what a failure means."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from pathlib import Path

from vllmd.errors import ConfigError, SourceUnavailable

BUNDLES = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")


def context(environ: Mapping[str, str]) -> ssl.SSLContext:
    """The first variable that is set wins, as with those tools; none: the system's authorities. ConfigError for a bundle that cannot be read."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.set_alpn_protocols(["http/1.1"])
    variable = next((name for name in (*BUNDLES, "SSL_CERT_DIR") if environ.get(name)), "")
    if not variable:
        made.load_default_certs()
        return made
    path = environ[variable]
    try:
        if variable == "SSL_CERT_DIR":
            made.load_verify_locations(capath=path)
        else:
            made.load_verify_locations(cafile=path)
    except IsADirectoryError:
        made.load_verify_locations(capath=path)
    except OSError as error:
        hint = f"Point {variable} at a file of certificates in PEM, or unset it."
        raise ConfigError("ca_bundle_unusable", f"{variable}={path}: {error.strerror or error}", hint) from error
    return made


def refused(host: str, error: ssl.SSLCertVerificationError) -> SourceUnavailable:
    """Asking again at once helps nobody; a person sets the variable, or a proxy's certificate is renewed."""
    what = f"{host} is not trusted: {error.verify_message or 'its certificate could not be verified'}"
    if not _has_authorities():
        # In `what`: the status of a start that waits shows no hint, and minimal systems have no authorities.
        what += "; this host knows no certificate authority at all: is the package ca-certificates installed?"
        hint = "apt-get install ca-certificates (it fills /etc/ssl/certs), or set SSL_CERT_FILE to a file of certificates in PEM."
        return SourceUnavailable("no_certificates", what, hint)
    hint = "If a proxy or a private authority signs there, set SSL_CERT_FILE (or AWS_CA_BUNDLE, REQUESTS_CA_BUNDLE) to its certificates; else look who answers, and at this host's clock."
    return SourceUnavailable("certificate_refused", what, hint)


def _has_authorities() -> bool:
    """Whether there is anything where OpenSSL looks, or a person named a bundle."""
    if any(os.environ.get(name) for name in BUNDLES):
        return True
    paths = ssl.get_default_verify_paths()
    try:
        return paths.cafile is not None or (paths.capath is not None and any(Path(paths.capath).iterdir()))
    except OSError:
        return False
