"""What obstore raises, as errors grouped by remedy.

obstore has few classes of error; most of what one wants to know (the status, the server's code) is in the text only.
The text is written by obstore and by the server: it chooses between errors of ours here and decides nothing else.
"""

from __future__ import annotations

import re

from obstore.exceptions import (
    AlreadyExistsError,
    GenericError,
    InvalidPathError,
    NotSupportedError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnknownConfigurationKeyError,
)

from thinwire.errors import MisuseError, StoreUnavailableError, ThinwireError
from thinwire.stores.checks import already_there, not_there, too_short

__all__ = ["translate"]

_TEXT_MAX = 300
_METADATA_SERVERS = re.compile(r"latest/api/token|security-credentials|metadata\.google|/metadata/identity")
_REGION_CODES = {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"}
_PASSING_CODES = {
    "ConditionalRequestConflict",  # two creates met: neither is known to have won
    "NoSuchUpload",  # the reply to the completion of an upload was lost, and the server forgot it since
    "OperationAborted",
    "RequestTimeout",
    "SlowDown",
    "TooManyRequests",
}
_PASSING_STATUS = {408, 409, 412, 429}
_NEVER_PASSING = (InvalidPathError, NotSupportedError, UnknownConfigurationKeyError)


def translate(
    error: Exception, *, url: str, key: str, asked: tuple[int, int] | None = None, opening: bool = False
) -> ThinwireError:
    """The error of ours for one of obstore's.

    Args:
        error: what obstore raised.
        url, key: the store and the object, for the message.
        asked: start and length in bytes, if a range was asked for.
        opening: it was raised while the store was opened: nothing was requested yet, so waiting will not help.
    """
    text = str(error).split("\n\nDebug source")[0]
    status = int(_found(r"status code: (\d{3})", text) or 0)
    code = _found(r"<Code>(\w{1,64})</Code>", text)
    what = re.sub(r"\?\S*", "", text.split("<?xml")[0]).strip()[:_TEXT_MAX]  # a query may hold a signature
    what = f"({what} {code})" if code else f"({what})"
    facts: dict[str, object] = {"key": key, "store": url, "status": status, "code": code}

    if isinstance(error, AlreadyExistsError) and code not in _PASSING_CODES:
        return already_there(url, key)
    if code in {"NoSuchBucket", "ContainerNotFound"}:
        return MisuseError(f"there is no bucket for {url}; make it, or check name and endpoint {what}", **facts)
    if isinstance(error, FileNotFoundError) and code not in _PASSING_CODES:
        return not_there(url, key)
    if status == 416 and asked is not None:
        return too_short(url, key, None, *asked)
    remedy = _remedy(error, text, status, code)
    if remedy:
        return MisuseError(f"{url} cannot be used for {key}: {remedy} {what}", **facts)
    passing = status == 0 or status >= 500 or status in _PASSING_STATUS or code in _PASSING_CODES
    if passing and not opening and not isinstance(error, _NEVER_PASSING):
        return StoreUnavailableError(f"{url} gave no answer for {key}; try again {what}", **facts)
    return MisuseError(f"{url} does not take this for {key} {what}", **facts)


def _remedy(error: Exception, text: str, status: int, code: str) -> str:
    """What the caller should set right, or "" if nothing is known to be wrong with the call."""
    if code in _REGION_CODES or "redirect" in text:
        return "it is in another region; set region=... or AWS_REGION"
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) or status in {401, 403}:
        return "these credentials are refused; check them and what they allow"
    if _METADATA_SERVERS.search(text):
        return (
            "there are no credentials; set them in the environment (for S3 AWS_ACCESS_KEY_ID and"
            " AWS_SECRET_ACCESS_KEY), or skip_signature=True for a public bucket"
        )
    if isinstance(error, GenericError) and "builder error" in text:
        return "the endpoint is no http:// or https:// URL"
    if "non-partial" in text:
        return "its server does not do ranged reads; use another"
    return ""


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match[1] if match else ""
