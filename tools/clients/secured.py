"""A real cluster with TLS and keys at its front door, for clients that are run against it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import yaml
from clusters import DEFAULT_MODEL, DISAGGREGATED, Cluster, running, spec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from crossdock.deploy.home import crossdock_home
from crossdock.model.gguf_tokenizer import read_gguf_tokenizer
from crossdock.model.store import resolve

KEYS = {  # variable -> the limits of its key
    "OPENAI_API_KEY": (),
    "CROSSDOCK_KEY_ONE": ("--max-concurrent", "1"),
    "CROSSDOCK_KEY_FEW": ("--requests-per-minute", "1"),
}


@contextlib.contextmanager
def secured_cluster() -> Iterator[dict[str, str]]:
    """The variables under which clients find the cluster, while it runs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_certificates(folder)
        keys = {variable: new_key(folder, *limits) for variable, limits in KEYS.items()}
        model = write_tokenizer(folder / DEFAULT_MODEL)
        cluster = yaml.safe_load(spec("clients", DISAGGREGATED))
        cluster["gateway"]["tls"] = {
            "cert": str(folder / "door.pem"),
            "key": str(folder / "door.key"),
        }
        cluster["auth"] = {"keys": str(folder / "keys.yaml")}
        with running(yaml.safe_dump(cluster), ready_s=300) as found:
            yield variables(found, folder / "ca.pem") | keys | model


def variables(cluster: Cluster, ca: Path) -> dict[str, str]:
    """What clients read by themselves, and what the scripts here hand to the others."""
    grpc, http = (one.replace("127.0.0.1", "localhost") for one in (cluster.grpc, cluster.http))
    trusted = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NODE_EXTRA_CA_CERTS")
    return {
        "OPENAI_BASE_URL": f"https://{http}/v1",
        "CROSSDOCK_GRPC": grpc,
        "CROSSDOCK_MODEL": DEFAULT_MODEL,
        **dict.fromkeys(trusted, str(ca)),
    }


def new_key(folder: Path, *limits: str) -> str:
    """A key of tenant `clients` with these limits."""
    words = ["keys", "new", "--tenant", "clients", "--file", str(folder / "keys.yaml"), *limits]
    made = subprocess.run(
        [sys.executable, "-m", "crossdock.cli", *words], capture_output=True, text=True, check=True
    )
    return next(word for word in made.stdout.split() if word.startswith("xd-"))


def write_certificates(folder: Path) -> None:
    """`ca.pem`, and `door.pem` with `door.key` for localhost that it has signed."""
    authority, door = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    names = [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
    ca = _builder("clients' authority", "clients' authority", authority).add_extension(
        x509.BasicConstraints(ca=True, path_length=0), critical=True
    )
    leaf = _builder("localhost", "clients' authority", door)
    leaf = leaf.add_extension(x509.SubjectAlternativeName(names), critical=False).add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False
    )
    for file, made in (("ca.pem", ca), ("door.pem", leaf)):
        signed = made.sign(authority, SHA256())
        (folder / file).write_bytes(signed.public_bytes(Encoding.PEM))
    key = door.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "door.key").write_bytes(key)


def _builder(subject: str, issuer: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def write_tokenizer(folder: Path) -> dict[str, str]:
    """The model's tokenizer as the Hugging Face folder that benchmarks want to count tokens with,
    and the checkpoint itself for what computes the same elsewhere."""
    files = resolve(DEFAULT_MODEL, crossdock_home())
    parts = read_gguf_tokenizer(files.path)
    folder.mkdir()
    parts.tokenizer.save(str(folder / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": parts.template.get("default"),
        **parts.special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return {"CROSSDOCK_TOKENIZER": str(folder), "CROSSDOCK_CHECKPOINT": os.fspath(files.path)}
