"""The key and certificate of everything that speaks TLS: read and checked once at the start.

What is served comes from a PKCS12 key store, else from two PEM files, else it is made on the spot. It leaves this
module as one PEM text, which the supervisor hands down in memory: a decrypted key never lies on a disk.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import ssl
import stat
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import pkcs12
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from wsgi_ts.control.memory_file import memory_file
from wsgi_ts.security.tls import TOO_WEAK, default_security_level, highest_level, server_context
from wsgi_ts.settings.config import Config

log = logging.getLogger(__name__)

_JKS_MAGIC = b"\xfe\xed\xfe\xed"
_SELF_SIGNED_DAYS = 365
_WARN_BEFORE = timedelta(days=14)
#: What is wrong with a certificate for a security level, by OpenSSL's reason.
_IN_WORDS = {
    "EE_KEY_TOO_SMALL": "its key ({key}) is too small",
    "CA_KEY_TOO_SMALL": "a certificate after the first one has a key that is too small",
    "CA_MD_TOO_WEAK": "a certificate after the first one is signed with a digest that is too weak",
}


class CertificateError(Exception):
    """No certificate can be served; the message names the key and the file and says what to do, on one line."""


@dataclass(frozen=True, slots=True)
class Material:
    """A private key and the certificates that belong to it, the server's own first."""

    key: PrivateKeyTypes
    chain: tuple[x509.Certificate, ...]

    def to_pem(self) -> bytes:
        """All of it as PEM, the key unencrypted."""
        key = self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return key + b"".join(one.public_bytes(serialization.Encoding.PEM) for one in self.chain)


def load_material(config: Config) -> Material:
    """The key and certificate that the configuration names, or a self-signed pair where it names none.

    Raises:
        CertificateError: they cannot be read, do not belong together, or are too weak for the security level; or the
            authorities of clients cannot be read.
    """
    level = config.tls_security_level
    _warn_of_level(level)
    _check_client_ca(config)
    if config.keystore is not None:
        material = _from_keystore(config.keystore, config.keystore_pass, config.keystore_type)
        source = f"keystore {config.keystore}"
        _warn_if_readable("keystore", config.keystore)
    elif config.private_key_file is not None and config.certificate_file is not None:
        material = _from_pem(config.private_key_file, config.certificate_file)
        source = f"certificate_file {config.certificate_file}"
        _warn_if_readable("private_key_file", config.private_key_file)
    elif config.private_key_file is None and config.certificate_file is None:
        log.warning(
            "TLS with a self-signed certificate made at this start, which no client trusts: set certificate_file and "
            "private_key_file, or keystore"
        )
        everywhere = (*config.addresses.values(), *config.grpc_addresses.values())
        return self_signed([address.host for address in everywhere if address.is_tls], level or 0)
    else:
        given, other = ("private_key_file", "certificate_file")
        if config.private_key_file is None:
            given, other = other, given
        raise CertificateError(f"{given} is set and {other} is not: TLS takes both")
    try:
        belong_together = _public_bytes(material.key) == _public_bytes(material.chain[0])
    except (UnsupportedAlgorithm, ValueError) as error:
        raise CertificateError(f"{source}: has a key of a kind that cannot be served: {error}") from error
    if not belong_together:
        raise CertificateError(
            f"{source}: the private key does not belong to the (first) certificate; the server's own certificate comes "
            "first, then the intermediate ones"
        )
    _check_with_openssl(material, source, level)
    _warn_of_dates(source, material.chain[0])
    return material


def self_signed(hosts: list[str], level: int = 0) -> Material:
    """A new key that reaches a security level, and a certificate for it, valid for a year.

    The certificate is for these hosts and this machine's own names.
    """
    curve = {4: ec.SECP384R1, 5: ec.SECP521R1}.get(level, ec.SECP256R1)
    key = ec.generate_private_key(curve())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "wsgi-ts self-signed")])
    now = datetime.now(timezone.utc)
    names: list[x509.GeneralName] = []
    for host in dict.fromkeys(["localhost", "127.0.0.1", "::1", socket.gethostname(), *hosts]):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            if host.isascii():
                names.append(x509.DNSName(host))
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=_SELF_SIGNED_DAYS))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    )
    return Material(key, (builder.sign(key, hashes.SHA256()),))


def _from_keystore(path: Path, password: str, kind: str) -> Material:
    data = _read("keystore", path)
    if kind.upper() == "JKS" or data.startswith(_JKS_MAGIC):
        raise CertificateError(
            f"keystore {path}: Java's own format (JKS) cannot be read here; convert it with: keytool -importkeystore "
            f"-srckeystore {path} -srcstoretype JKS -destkeystore {path.with_suffix('.p12')} -deststoretype PKCS12 "
            f"and set keystore={path.with_suffix('.p12')} and keystore_type=PKCS12"
        )
    if kind.upper() != "PKCS12":
        raise CertificateError(f"keystore_type {kind}: the only type that can be read here is PKCS12")
    try:
        key, certificate, others = pkcs12.load_key_and_certificates(data, password.encode())
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise CertificateError(
            f"keystore {path}: cannot be opened: it is no PKCS12 file, or keystore_pass is not its password"
        ) from error
    if key is None or certificate is None:
        missing = "private key" if key is None else "certificate of its key"
        raise CertificateError(f"keystore {path}: there is no {missing} in it")
    return Material(key, (certificate, *others))


def _from_pem(key_path: Path, certificate_path: Path) -> Material:
    try:
        key = serialization.load_pem_private_key(_read("private_key_file", key_path), None)
    except TypeError as error:
        raise CertificateError(
            f"private_key_file {key_path}: is encrypted; decrypt it with: openssl pkey -in {key_path} -out plain.key"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise CertificateError(f"private_key_file {key_path}: is no private key in PEM form") from error
    try:
        chain = x509.load_pem_x509_certificates(_read("certificate_file", certificate_path))
    except ValueError as error:
        raise CertificateError(f"certificate_file {certificate_path}: is no certificate in PEM form") from error
    return Material(key, tuple(chain))


def _check_client_ca(config: Config) -> None:
    """Makes sure that clients can be held to the authorities that are named."""
    path = config.client_ca_file
    if path is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(path)
    except ssl.SSLError as error:
        raise CertificateError(f"client_ca_file {path}: holds no certificates as PEM ({error.reason})") from error
    except OSError as error:
        raise CertificateError(f"client_ca_file {path}: {error.strerror}") from error


def _check_with_openssl(material: Material, source: str, level: int | None) -> None:
    """Makes sure that OpenSSL serves it: what it refuses, only gunicorn would find out. See `tls.level_for`, too."""
    wanted = default_security_level() if level is None else level
    fd = memory_file("tls", material.to_pem())
    try:
        server_context(fd, level)
        return
    except ssl.SSLError as error:
        reason = str(error.reason)
        lower = highest_level(fd, wanted) if reason in TOO_WEAK else None
    finally:
        os.close(fd)
    if lower is None:
        raise CertificateError(f"{source}: OpenSSL cannot serve it ({reason}); use another key and certificate")
    fault = f"{source}: {_IN_WORDS[reason].format(key=_key_in_words(material.chain[0]))} for OpenSSL's security level"
    if level is None:
        log.warning("%s %d and is served with level %d: renew the certificate with a larger key", fault, wanted, lower)
        return
    raise CertificateError(
        f"{fault} {wanted}; renew the certificate with a larger key, or set tls_security_level={lower} until then"
    )


def _key_in_words(certificate: x509.Certificate) -> str:
    key = certificate.public_key()
    if isinstance(key, ec.EllipticCurvePublicKey):
        return f"EC, {key.curve.name}"
    name = type(key).__name__.removeprefix("_").removesuffix("PublicKey")
    return f"{name}, {key.key_size} bits" if hasattr(key, "key_size") else name


def _warn_of_level(level: int | None) -> None:
    usual = default_security_level()
    if level is not None and level < usual:
        log.warning(
            "tls_security_level=%d is below OpenSSL's own, which is %d: keys and ciphers that are too weak today are "
            "let through; renew the certificate and remove the key",
            level,
            usual,
        )


def _read(key: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CertificateError(f"{key} {path}: cannot be read: {error.strerror}") from error


def _public_bytes(holder: PrivateKeyTypes | x509.Certificate) -> bytes:
    return holder.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _warn_if_readable(key: str, path: Path) -> None:
    if os.stat(path).st_mode & stat.S_IROTH:
        log.warning("%s %s can be read by every user of this machine: chmod o= %s", key, path, path)


def _warn_of_dates(source: str, certificate: x509.Certificate) -> None:
    now = datetime.now(timezone.utc)
    end = certificate.not_valid_after_utc
    if end <= now:
        log.warning("%s: the certificate expired on %s; clients refuse it: renew it", source, end)
    elif certificate.not_valid_before_utc > now:
        log.warning("%s: the certificate is not valid before %s", source, certificate.not_valid_before_utc)
    elif end - now < _WARN_BEFORE:
        log.warning("%s: the certificate expires on %s: renew it", source, end)
