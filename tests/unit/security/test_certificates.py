"""Reading and checking keys and certificates: what is accepted, and what the refusals say."""

from __future__ import annotations

import os
import re
import shutil
import ssl
import subprocess
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import pkcs12
from cryptography.x509.oid import NameOID

from wsgi_ts.checks.start import StartError
from wsgi_ts.control.memory_file import memory_file
from wsgi_ts.security.certificates import CertificateError, Material, load_material, self_signed
from wsgi_ts.security.tls import level_for, listener_context, server_context
from wsgi_ts.settings.address import Address
from wsgi_ts.settings.config import Config
from wsgi_ts.supervisor.start import open_certificates

PLAIN = serialization.NoEncryption()


def write(folder: Path, material: Material, password: bytes | None = None, traditional: bool = False) -> Config:
    """The material as PEM files, and the configuration that names them."""
    key, chain = folder / "server.key", folder / "server.pem"
    form = serialization.PrivateFormat.TraditionalOpenSSL if traditional else serialization.PrivateFormat.PKCS8
    encryption = PLAIN if password is None else serialization.BestAvailableEncryption(password)
    key.write_bytes(material.key.private_bytes(serialization.Encoding.PEM, form, encryption))
    key.chmod(0o600)
    chain.write_bytes(b"".join(one.public_bytes(serialization.Encoding.PEM) for one in material.chain))
    return Config(private_key_file=key, certificate_file=chain)


def keystore(folder: Path, material: Material, password: bytes) -> Path:
    path = folder / "store.p12"
    encryption = serialization.BestAvailableEncryption(password)
    path.write_bytes(
        pkcs12.serialize_key_and_certificates(b"x", material.key, material.chain[0], None, encryption)  # type: ignore[arg-type]
    )
    path.chmod(0o600)
    return path


def serves(material: Material) -> bool:
    """Whether OpenSSL takes it."""
    fd = memory_file("tls", material.to_pem())
    try:
        return isinstance(server_context(fd), ssl.SSLContext)
    finally:
        os.close(fd)


@pytest.mark.parametrize("traditional", [False, True])
def test_pem_files(tmp_path: Path, traditional: bool) -> None:
    made = self_signed(["example.org"])
    loaded = load_material(write(tmp_path, made, traditional=traditional))
    assert loaded.chain == made.chain
    assert serves(loaded)


def test_a_key_store(tmp_path: Path) -> None:
    made = self_signed([])
    loaded = load_material(Config(keystore=keystore(tmp_path, made, b"secret"), keystore_pass="secret"))
    assert loaded.chain == made.chain
    assert serves(loaded)


def test_a_key_store_goes_before_pem_files(tmp_path: Path) -> None:
    made = self_signed([])
    path = keystore(tmp_path, made, b"changeit")
    config = Config(keystore=path, private_key_file=Path("/x"), certificate_file=Path("/y"))
    assert load_material(config).chain == made.chain


def test_nothing_configured_makes_a_new_certificate_each_time(caplog: pytest.LogCaptureFixture) -> None:
    first, second = load_material(Config()), load_material(Config())
    assert first.chain[0].public_bytes(serialization.Encoding.PEM) != second.chain[0].public_bytes(
        serialization.Encoding.PEM
    )
    assert serves(first)
    assert "no client trusts" in caplog.text


def test_refusals_say_what_to_do(tmp_path: Path) -> None:
    made = self_signed([])
    pem = write(tmp_path, made)
    key, chain = pem.private_key_file, pem.certificate_file
    junk = tmp_path / "junk"
    junk.write_text("junk")
    store = keystore(tmp_path, made, b"secret")
    missing = tmp_path / "missing"
    cases = [
        (Config(private_key_file=key), "private_key_file is set and certificate_file is not"),
        (Config(certificate_file=chain), "certificate_file is set and private_key_file is not"),
        (Config(private_key_file=missing, certificate_file=chain), f"private_key_file {missing}: cannot be read"),
        (Config(private_key_file=junk, certificate_file=chain), f"private_key_file {junk}: is no private key"),
        (Config(private_key_file=key, certificate_file=junk), f"certificate_file {junk}: is no certificate"),
        (Config(keystore=missing), f"keystore {missing}: cannot be read"),
        (Config(keystore=junk), f"keystore {junk}: cannot be opened"),
        (Config(keystore=store, keystore_pass="wrong"), f"keystore {store}: cannot be opened"),
        (Config(keystore=store, keystore_type="BKS"), "keystore_type BKS: the only type"),
    ]
    for config, text in cases:
        with pytest.raises(CertificateError, match=re.escape(text)):
            load_material(config)


def test_an_encrypted_key_and_one_of_another_certificate_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match="openssl pkey -in"):
        load_material(write(tmp_path, self_signed([]), password=b"x"))
    mixed = Material(self_signed([]).key, self_signed([]).chain)
    with pytest.raises(CertificateError, match="does not belong to"):
        load_material(write(tmp_path, mixed))


def signed(key: Any) -> Material:
    """A key with a certificate that it has signed itself."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.now(timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=30))
        .sign(key, hashes.SHA256())
    )
    return Material(key, (certificate,))


@pytest.mark.parametrize(
    "served",
    [
        {"inference_address": Address("https", "127.0.0.1", 1)},
        {"management_address": Address("https", "127.0.0.1", 1)},
        {"metrics_address": Address("https", "127.0.0.1", 1)},
        {"enable_grpc_ssl": True},
    ],
)
def test_a_small_key_is_served_with_a_warning_and_refused_for_a_level(
    tmp_path: Path, served: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Of 1024 bits, as in the key store that TorchServe's checks come with."""
    small = signed(rsa.generate_private_key(65537, 1024))
    pem = replace(write(tmp_path, small), **served)
    store = replace(Config(keystore=keystore(tmp_path, small, b"changeit")), **served)
    for config, source in ((pem, f"certificate_file {pem.certificate_file}"), (store, f"keystore {store.keystore}")):
        fault = f"{source}: its key (RSA, 1024 bits) is too small for OpenSSL's security level 2"
        caplog.clear()
        with ExitStack() as stack:
            fd = open_certificates(config, stack)
            assert level_for(fd) == 1
            assert listener_context(fd, config).security_level == 1
        assert f"{fault} and is served with level 1: renew the certificate" in caplog.text
        with ExitStack() as stack, pytest.raises(StartError) as caught:
            open_certificates(replace(config, tls_security_level=2), stack)
        assert str(caught.value) == (
            f"{fault}; renew the certificate with a larger key, or set tls_security_level=1 until then"
        )
        for level in (0, 1):
            with ExitStack() as stack:
                assert open_certificates(replace(config, tls_security_level=level), stack) >= 0


def test_security_levels_above_the_default(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = replace(write(tmp_path, signed(rsa.generate_private_key(65537, 2048))), tls_security_level=3)
    with pytest.raises(CertificateError, match=r"\(RSA, 2048 bits\) .* level 3; .* or set tls_security_level=2 until"):
        load_material(config)
    assert "is below" not in caplog.text
    for level in range(6):
        made = load_material(Config(tls_security_level=level))
        fd = memory_file("tls", made.to_pem())
        try:
            assert server_context(fd, level).security_level == level
        finally:
            os.close(fd)
    assert caplog.text.count("is below OpenSSL's own") == 2


def test_the_security_level_changes_no_cipher_below_3() -> None:
    """Only the strength is another: the list of ciphers stays Python's."""
    fd = memory_file("tls", self_signed([]).to_pem())
    try:
        usual, same = server_context(fd), server_context(fd, 2)
        assert same.get_ciphers() == usual.get_ciphers()
        assert (same.security_level, same.minimum_version) == (2, ssl.TLSVersion.TLSv1_2)
        assert len(server_context(fd, 1).get_ciphers()) == len(usual.get_ciphers())
    finally:
        os.close(fd)


def test_authorities_of_clients_that_cannot_be_read(tmp_path: Path) -> None:
    config = write(tmp_path, signed(ec.generate_private_key(ec.SECP256R1())))
    wrong = tmp_path / "ca.pem"
    with pytest.raises(CertificateError, match=r"client_ca_file .*ca\.pem: No such file or directory"):
        load_material(replace(config, client_ca_file=wrong))
    wrong.write_text("no certificate")
    with pytest.raises(CertificateError, match=r"client_ca_file .*ca\.pem: holds no certificates as PEM"):
        load_material(replace(config, client_ca_file=wrong))
    assert config.certificate_file is not None
    assert load_material(replace(config, client_ca_file=config.certificate_file)).chain


@pytest.mark.skipif(shutil.which("keytool") is None, reason="needs Java's keytool")
def test_the_command_that_converts_a_java_key_store_works(tmp_path: Path) -> None:
    jks = tmp_path / "store.jks"
    passwords = ["-storepass", "changeit", "-keypass", "changeit"]
    subprocess.run(
        [
            *["keytool", "-genkeypair", "-alias", "x", "-keyalg", "RSA", "-dname", "CN=x", "-storetype", "JKS"],
            *["-keystore", str(jks), *passwords],
        ],
        check=True,
        capture_output=True,
    )
    with pytest.raises(CertificateError) as caught:
        load_material(Config(keystore=jks))
    command = re.search(r"keytool -importkeystore .*? -deststoretype PKCS12", str(caught.value))
    assert command is not None
    passwords = ["-srcstorepass", "changeit", "-deststorepass", "changeit"]
    subprocess.run([*command[0].split(), *passwords], check=True, capture_output=True)
    assert serves(load_material(Config(keystore=jks.with_suffix(".p12"))))
