"""Whose signatures are believed. :class:`Authority` holds one trust document and accepts or raises; it does no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

from thinwire.crypto import verified
from thinwire.errors import UntrustedError
from thinwire.wire.signing import Signature, message, parse_signatures
from thinwire.wire.trust import PublicKey, Role, TrustDocument

__all__ = ["Authority", "date_text"]


def date_text(time_ms: int) -> str:
    """A time since the epoch as days and seconds, without a calendar's library, in UTC (Hinnant's civil_from_days).

    >>> date_text(0), date_text(1_800_000_000_000)
    ('1970-01-01 00:00:00 UTC', '2027-01-15 08:00:00 UTC')
    """
    days, rest = divmod(time_ms // 1000, 86400)
    era, day = divmod(days + 719468, 146097)
    year_of_era = (day - day // 1460 + day // 36524 - day // 146096) // 365
    day -= 365 * year_of_era + year_of_era // 4 - year_of_era // 100
    month = (5 * day + 2) // 153
    date = day - (153 * month + 2) // 5 + 1
    month = month + 3 if month < 10 else month - 9
    year = year_of_era + 400 * era + (month <= 2)
    return f"{year:04d}-{month:02d}-{date:02d} {rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d} UTC"


@final
class Authority:
    """The trust document that holds now, and what follows from it.

    Times are milliseconds since the epoch, and the caller's: nothing here reads a clock.
    """

    def __init__(self, document: TrustDocument) -> None:
        self._document = document

    @property
    def document(self) -> TrustDocument:
        """The newest document that was accepted."""
        return self._document

    def advance(self, data: bytes) -> TrustDocument:
        """Accept the next version of the trust document, signed by enough root keys of this one and of itself.

        Whether root keys or documents on the way have expired does not matter, so that who was away for long finds
        the way; the last one must hold when something is checked against it.

        Raises:
            MalformedError, UnsupportedError: not a document this release can read.
            UntrustedError: not the next version, of another chain, or without enough signatures.
        """
        new, held = TrustDocument.parse(data), self._document
        if held.version == 0:
            raise UntrustedError(
                "bare public keys were pinned, which cannot be rotated; pin a trust document instead "
                "(thinwire trust create)"
            )
        if new.version != held.version + 1:
            raise UntrustedError(
                f"the trust document after version {held.version} is that of version {new.version}",
                expected=held.version + 1,
                actual=new.version,
            )
        if new.chain != held.chain:
            raise UntrustedError(
                f"trust document {new.version} is for the chain {new.chain!r}, not for {held.chain!r}",
                expected=held.chain,
                actual=new.chain,
            )
        signatures = parse_signatures(new.signatures)
        for document, whose in ((held, "the one before"), (new, "its own")):
            _enough(
                signatures, document.role("root"), document.keys, message(new.signed()), None,
                f"trust document {new.version}", f"root keys of {whose}",
            )  # fmt: skip
        self._document = new
        return new

    def check(self, signed: Mapping[str, Any], signatures: Sequence[Any], *, role: str, now_ms: int, what: str) -> None:
        """Return if enough keys of ``role`` that hold at ``now_ms`` have signed ``signed``.

        A signature by a key that the document does not know counts for nothing; one by a key that it knows must be
        good, even if there are enough without it.

        Raises:
            MalformedError: the signatures are no signatures.
            UntrustedError: not enough, or one is wrong; the document has expired; another chain's name.
        """
        document = self._document
        if document.expires_ms is not None and now_ms >= document.expires_ms:
            raise UntrustedError(
                f"the trust document (version {document.version}) ended at {date_text(document.expires_ms)}; its owner "
                "has to sign a newer one (thinwire trust rotate). If there is one the store withholds it",
                trust=document.version,
            )
        _enough(
            parse_signatures(signatures), document.role(role), document.keys, message(signed), now_ms, what,
            f"{role} keys of {_name(document)}",
        )  # fmt: skip
        if role == "publisher" and document.chain is not None and signed.get("chain") != document.chain:
            raise UntrustedError(
                f"{what} is of the chain {str(signed.get('chain'))[:80]!r}, trusted is {document.chain!r}: use the "
                "store of that chain",
                expected=document.chain,
                actual=signed.get("chain"),
            )


def _name(document: TrustDocument) -> str:
    return f"trust document {document.version}" if document.version else "the pinned ones"


def _enough(
    signatures: Sequence[Signature],
    role: Role,
    keys: Mapping[str, PublicKey],
    data: bytes,
    now_ms: int | None,
    what: str,
    whose: str,
) -> None:
    good, expired, unknown = 0, [], []
    for signature in signatures:
        key = keys.get(signature.keyid) if signature.keyid in role.keys else None
        if key is None:
            unknown.append(signature.keyid)
        elif not verified(key.public, signature.sig, data):
            raise UntrustedError(
                f"{what} carries a wrong signature of key {key.id[:12]}: it was altered, or forged. Do not use it; ask "
                "its publisher",
                keyid=key.id,
            )
        elif now_ms is not None and key.expires_ms is not None and now_ms >= key.expires_ms:
            expired.append(f"{key.id[:12]} (ended at {date_text(key.expires_ms)})")
        else:
            good += 1
    if good >= role.threshold:
        return
    if not signatures:
        why = "it is not signed. Was it published without a key, or by somebody else?"
    else:
        parts = [f"expired: {', '.join(expired)}"] if expired else []
        if unknown:
            parts.append(f"unknown, revoked or of another role: {', '.join(k[:12] for k in unknown)}")
        why = f"{good} signatures count" + (f" ({'; '.join(parts)})" if parts else "")
        why += ". Ask the publisher whether its keys have changed, and pin what it tells"
    raise UntrustedError(
        f"{what} needs {role.threshold} signatures by {whose}, and {why}",
        needed=role.threshold,
        good=good,
        unknown=unknown,
    )
