"""A certificate authority of the tests' own."""

from __future__ import annotations

import ssl
from datetime import datetime, timedelta, timezone
from ipaddress import IPv4Address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import pkcs12
from cryptography.x509.oid import NameOID


class Authority:
    """A certificate authority for the tests, and what it signs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._key = rsa.generate_private_key(65537, 2048)
        self.certificate = self._sign("the tests' authority", self._key, days=10, ca=True)
        (folder / "ca.pem").write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))

    def _sign(self, name: str, key: rsa.RSAPrivateKey, days: int, ca: bool = False) -> x509.Certificate:
        now = datetime.now(timezone.utc)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        issuer = subject if ca else self.certificate.subject
        names = [x509.DNSName("localhost"), x509.IPAddress(IPv4Address("127.0.0.1"))]
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=30))
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(self._key, hashes.SHA256())
        )

    def pair(
        self, name: str = "server", days: int = 10, bits: int = 2048
    ) -> tuple[rsa.RSAPrivateKey, x509.Certificate]:
        key = rsa.generate_private_key(65537, bits)
        return key, self._sign(name, key, days)

    def pem(self, name: str = "server", days: int = 10, traditional: bool = False, bits: int = 2048) -> dict[str, str]:
        """Writes a pair as PEM files; returns the lines of config.properties for it."""
        key, certificate = self.pair(name, days, bits)
        form = serialization.PrivateFormat.TraditionalOpenSSL if traditional else serialization.PrivateFormat.PKCS8
        key_file, certificate_file = self.folder / f"{name}.key", self.folder / f"{name}.pem"
        key_file.touch(0o600)
        key_file.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
        certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return {"private_key_file": str(key_file), "certificate_file": str(certificate_file)}

    def keystore(self, password: str) -> Path:
        key, certificate = self.pair("keystore")
        path = self.folder / "keystore.p12"
        path.touch(0o600)
        path.write_bytes(
            pkcs12.serialize_key_and_certificates(
                b"server", key, certificate, None, serialization.BestAvailableEncryption(password.encode())
            )
        )
        return path

    def client(self, shown: dict[str, str] | None = None) -> ssl.SSLContext:
        """What a client that trusts the authority checks a server by; it shows a certificate that `pem` has written."""
        context = ssl.create_default_context(cafile=str(self.folder / "ca.pem"))
        if shown is not None:
            context.load_cert_chain(shown["certificate_file"], shown["private_key_file"])
        return context
