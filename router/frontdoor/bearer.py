"""Bearer tokens (JWT) that an identity provider signs; its public keys are in a file (JWK set)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jwt

from crossdock.proto.errors import ConfigError, Unauthenticated
from crossdock.router.config import JwtSettings
from crossdock.router.frontdoor.principal import MOST_TENANT, Principal

# What each kind of key signs with. Never "none", and never HMAC: its key would be the public one.
ALGORITHMS: dict[tuple[Any, Any], str] = {
    ("RSA", None): "RS256",
    ("EC", "P-256"): "ES256",
    ("OKP", "Ed25519"): "EdDSA",
}
LEAST_RSA_BITS = 2048
MAX_TOKEN_CHARACTERS = 16_384
MAX_QUOTED_CHARACTERS = 200


@dataclass(frozen=True)
class Signer:
    """One public key, and the only algorithm that it is used with."""

    kid: str
    algorithm: str
    key: Any


def parse_jwks(data: bytes) -> tuple[Signer, ...]:
    """The signers of a JWK set; keys for encryption are left out. Raises ConfigError."""
    try:
        found = json.loads(data)["keys"]
        if not isinstance(found, list):
            raise TypeError("keys must be a list")
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError("jwks", f"is no JWK set: {error}") from None
    signers = [_signer(f"jwks.keys[{i}]", key) for i, key in enumerate(found)]
    made = tuple(signer for signer in signers if signer is not None)
    if not made:
        raise ConfigError("jwks", "has no public key that signs with RS256, ES256 or EdDSA")
    return made


def _signer(place: str, key: Any) -> Signer | None:
    if not isinstance(key, dict):
        raise ConfigError(place, "must be an object")
    algorithm = ALGORITHMS.get((key.get("kty"), key.get("crv")))
    if (
        algorithm is None
        or key.get("use", "sig") != "sig"
        or key.get("alg", algorithm) != algorithm
    ):
        return None
    if "d" in key:
        raise ConfigError(place, "is a private key; this file is for public ones")
    try:
        made = jwt.PyJWK(key, algorithm=algorithm).key
    except (jwt.PyJWTError, ValueError, TypeError) as error:
        raise ConfigError(place, f"cannot be read: {error}") from None
    bits = getattr(made, "key_size", LEAST_RSA_BITS)
    if algorithm == "RS256" and bits < LEAST_RSA_BITS:
        raise ConfigError(place, f"has {bits} bits; at least {LEAST_RSA_BITS}")
    return Signer(str(key.get("kid", "")), algorithm, made)


def verify(token: str, signers: tuple[Signer, ...], settings: JwtSettings) -> Principal:
    """Whom a token names, until it expires. Raises Unauthenticated, which says why."""
    if len(token) > MAX_TOKEN_CHARACTERS:
        raise Unauthenticated("the bearer token is too long")
    if not token.isascii():
        raise Unauthenticated("the bearer token is not valid: it is not ASCII")
    try:
        kid = jwt.get_unverified_header(token).get("kid")
        fitting = [signer for signer in signers if kid is None or signer.kid == kid]
        if not fitting:
            raise Unauthenticated("the bearer token is signed with a key that is not known")
        claims = _claims(token, fitting, settings)
    except jwt.PyJWTError as error:
        raise Unauthenticated(f"the bearer token is not valid: {_quoted(error)}") from None
    return _principal(claims, settings)


def _quoted(error: jwt.PyJWTError) -> str:
    """An error that may quote anybody's token: what every answer can hold of it."""
    return str(error).encode("ascii", "backslashreplace").decode()[:MAX_QUOTED_CHARACTERS]


def _claims(token: str, signers: list[Signer], settings: JwtSettings) -> Mapping[str, Any]:
    """Of the first signer under whose key the token holds. Raises PyJWTError."""
    for signer in signers:
        try:
            return jwt.decode(
                token,
                key=signer.key,
                algorithms=[signer.algorithm],
                issuer=settings.issuer,
                audience=settings.audience,
                leeway=settings.leeway_s,
                options={"require": ["exp", "iss", "aud"]},
            )
        except (jwt.InvalidSignatureError, jwt.InvalidAlgorithmError):
            if signer is signers[-1]:
                raise
    raise jwt.InvalidSignatureError("no key")


def _principal(claims: Mapping[str, Any], settings: JwtSettings) -> Principal:
    tenant = claims.get(settings.tenant_claim)
    if not isinstance(tenant, str) or not tenant:
        raise Unauthenticated(f"the bearer token has no claim {settings.tenant_claim!r}")
    if len(tenant) > MOST_TENANT:
        claim = f"{settings.tenant_claim!r} has {len(tenant)} characters"
        raise Unauthenticated(f"the bearer token's {claim}, more than {MOST_TENANT}")
    models = claims.get(settings.models_claim, []) if settings.models_claim else []
    models = models.split() if isinstance(models, str) else models
    if not isinstance(models, list) or not all(isinstance(name, str) for name in models):
        raise Unauthenticated(f"the bearer token's {settings.models_claim!r} is no list of names")
    if settings.models_claim in claims and not models:
        models = [""]  # which no model is called: an empty list allows none
    try:
        expires = float(claims["exp"]) + settings.leeway_s
    except OverflowError:
        raise Unauthenticated("the bearer token's 'exp' is no time") from None
    return Principal(
        tenant=tenant,
        key_id=f"jwt:{claims.get('sub', '')}"[:80],
        models=frozenset(models),
        max_priority=settings.max_priority,
        shared_cache=settings.shared_cache,
        limits=settings.limits,
        expires=expires,
        account=f"jwt {tenant}",
    )
