"""TLS on the HTTP port: a certificate and its key, which a reload replaces while connections are open.

TlsError   the files cannot be used; the message says why
"""

import ssl
from pathlib import Path


class TlsError(Exception):
    """Certificate or key cannot be used."""


def load_tls(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """Return what serves with ``certificate`` (PEM, with the chain), None where there is none.

    Args:
        key: PEM, without a password; None: it is in the file of the certificate.

    Raises:
        TlsError
    """
    if certificate is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except ssl.SSLError as error:
        raise TlsError(f"{certificate}: no certificate with its key: {error.reason or 'not PEM'}") from None
    except OSError as error:
        missing = next((file for file in (certificate, key) if file is not None and not file.is_file()), certificate)
        raise TlsError(f"{missing}: {error.strerror}") from None
    except _PasswordAsked:
        raise TlsError(f"{key or certificate}: the key has a password, which the daemon cannot ask for") from None
    return context


class _PasswordAsked(Exception):
    pass


def _no_password() -> str:
    raise _PasswordAsked


class LiveTls:
    """What the port's sockets are given once; each handshake uses what is ``current`` then."""

    def __init__(self, current: ssl.SSLContext) -> None:
        self.current = current
        self.front = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.front.minimum_version = ssl.TLSVersion.TLSv1_2
        self.front.sni_callback = self._choose

    def _choose(self, handshake: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _front: ssl.SSLContext) -> None:
        handshake.context = self.current
