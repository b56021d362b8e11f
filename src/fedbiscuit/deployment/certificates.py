"""A certificate authority of one's own, and a server certificate that it signs.

The key of the authority lies beside that of the server, so a shorter life of the server's certificate would protect nothing:
both last ten years.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedbiscuit.rundir import atomic_write
from fedbiscuit.types import EnvironmentFault, IntegrityError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

__all__ = ["days_left", "write_certificates"]

DAYS = 3650


def write_certificates(folder: Path, hosts: Sequence[str]) -> None:
    """``ca.crt``, ``ca.key``, ``server.crt`` and ``server.key`` (EC P-256, PEM; keys 0600) for host names and IP addresses."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID
    except ImportError:
        raise EnvironmentFault("certificates need Flower's packages: pip install 'fedbiscuit[flower]'") from None
    authority, server = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = _name(f"fedbiscuit {x509.random_serial_number():x}"[:24])
    ca = (
        _builder(ca_name, ca_name, authority, authority)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage("key_cert_sign", "crl_sign"), critical=True)
    )
    names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
    own = (
        _builder(_name(hosts[0][:64]), ca_name, server, authority)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage("digital_signature"), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(names, critical=False)
    )
    _write(folder / "ca", ca, authority, authority)
    _write(folder / "server", own, server, authority)


def days_left(certificate: Path) -> int:
    """Whole days until a certificate ends, negative after it; ``IntegrityError`` where the file is none."""
    from cryptography import x509

    try:
        ends = x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc
    except (OSError, ValueError) as error:
        raise IntegrityError(
            f"{certificate}: not a certificate ({error}); restore it, or make another deploy folder"
        ) from None
    return int((ends - datetime.datetime.now(datetime.UTC)).days)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, signer: EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    """What all certificates have; valid since an hour ago, for clocks that run behind."""
    from cryptography import x509

    start = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=DAYS))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )


def _write(
    path: Path, certificate: x509.CertificateBuilder, key: EllipticCurvePrivateKey, signer: EllipticCurvePrivateKey
) -> None:
    """``path``.key and the signed ``path``.crt. The folder lets in nobody else, so the key is private before it is 0600."""
    from cryptography.hazmat.primitives import hashes, serialization

    pem = serialization.Encoding.PEM
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    atomic_write(path.with_suffix(".key"), key.private_bytes(pem, *plain))
    path.with_suffix(".key").chmod(0o600)
    atomic_write(path.with_suffix(".crt"), certificate.sign(signer, hashes.SHA256()).public_bytes(pem))


def _name(text: str) -> x509.Name:
    from cryptography import x509

    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def _general_name(host: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(*allowed: str) -> x509.KeyUsage:
    from cryptography import x509

    kinds = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign crl_sign "
        "encipher_only decipher_only"
    )
    return x509.KeyUsage(**{kind: kind in allowed for kind in kinds.split()})
