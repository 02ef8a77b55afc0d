"""Tokens and certificates compared with those of the settings, and the rights that each gives. No I/O."""

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from ipaddress import ip_network
from typing import Any

from services.gateway.admission.rights import NOBODY, Rights
from services.gateway.protocol.requests import RequestError
from shared.settings.entries import Token


class Tokens:
    """The rights of every `[[token]]`, by its token or by the certificate that is shown instead."""

    def __init__(self, tokens: Iterable[Token], *, names_beyond_loopback: bool = False) -> None:
        self._by_hash: list[tuple[bytes, Rights]] = []
        self._by_certificate: dict[str, Rights] = {}
        self._by_holder: dict[str, tuple[Token, Rights]] = {}
        for token in tokens:
            rights = _rights(token, names=names_beyond_loopback and token.certificate is not None)
            self._by_holder[token.name] = (token, rights)
            if token.hash is not None:
                self._by_hash.append((bytes.fromhex(token.hash.partition(":")[2]), rights))
            elif token.certificate is not None:
                self._by_certificate[token.certificate] = rights

    def rights_of_token(self, token: str) -> Rights:
        """Return the rights that a token gives; `RequestError`, always the same, when it is wrong.

        The work depends only on the number of tokens: every one is compared, each in constant time.
        """
        # No salt and no slow hash: a token is 256 random bits, which can't be found by trying, however fast that is.
        digest = hashlib.sha256(token.encode()).digest()
        matching = [hmac.compare_digest(digest, known) for known, _ in self._by_hash]
        if True not in matching:
            raise RequestError("not_permitted", "unknown token; the operator makes one with `fanwire token`")
        return self._by_hash[matching.index(True)][1]

    def rights_of_holder(self, holder: str) -> Rights:
        """Return the rights of the `[[token]]` of this name; none when there is none, or no more."""
        return self._by_holder[holder][1] if holder in self._by_holder else NOBODY

    def grant_the_same(self, holder: str, other: "Tokens") -> bool:
        """Return whether these and the others have the same `[[token]]` of this name, or both none."""
        return self._by_holder.get(holder) == other._by_holder.get(holder)

    def rights_of_certificate(self, common_name: str | None) -> Rights:
        """Return the rights of a verified certificate with this subject; none for a subject that no `[[token]]` has."""
        return NOBODY if common_name is None else self._by_certificate.get(common_name, NOBODY)


def common_name(certificate: Mapping[str, Any] | None) -> str | None:
    """Return the subject's common name in the result of `getpeercert()`; None: no certificate, or several names.

    >>> common_name({"subject": ((("organizationName", "Lab"),), (("commonName", "siem"),))})
    'siem'
    """
    subject = certificate.get("subject", ()) if certificate else ()
    names = [value for parts in subject for key, value in parts if key == "commonName"]
    return names[0] if len(names) == 1 else None


def _rights(token: Token, *, names: bool) -> Rights:
    destinations = tuple(map(ip_network, token.destinations))
    return Rights(token.name, frozenset(token.scopes), token.streams, destinations, names)
