"""Every error thinwire raises, grouped by what the caller should do about it.

========================  ====================================================  =========
base class                remedy                                                exit code
========================  ====================================================  =========
:class:`MisuseError`      fix the call or the command line                      2
:class:`RefuseError`      do not use this input: it is malformed or untrusted   3
:class:`RebaseError`      start again from another version of the weights       4
:class:`RefetchError`     get the object again, or take another path            5
:class:`RetryError`       wait, then try the same thing again                   6
========================  ====================================================  =========

A message says what happened, what was expected and what to do. The facts behind it are attributes
(``error.facts``), so that a program need not parse the message.

>>> try:
...     raise WrongBaseError("the model is not version 3", expected="aa", actual="bb")
... except RebaseError as error:
...     print(error.facts["expected"], error.exit_code)
aa 4
"""

from __future__ import annotations

__all__ = [
    "ConflictError",
    "DamagedObjectError",
    "MalformedError",
    "MisuseError",
    "NoPathError",
    "ObjectExistsError",
    "ObjectNotFoundError",
    "RebaseError",
    "RefetchError",
    "RefuseError",
    "RetryError",
    "StoreUnavailableError",
    "ThinwireError",
    "UnsafeStoreError",
    "UnsupportedError",
    "UntrustedError",
    "WrongBaseError",
    "first_line",
]


class ThinwireError(Exception):
    """Base of every error raised on purpose by thinwire.

    ``facts`` holds what the message was made from (keys, digests, sizes); ``exit_code`` is what the command
    line ends with.
    """

    exit_code = 1

    def __init__(self, message: str, **facts: object) -> None:
        super().__init__(message)
        self.facts = facts


# --- the five remedies ---------------------------------------------------------------------------------------------


class MisuseError(ThinwireError):
    """The call itself is wrong; fix the arguments."""

    exit_code = 2


class RefuseError(ThinwireError):
    """The input must not be used. Nothing was changed."""

    exit_code = 3


class RebaseError(ThinwireError):
    """The input is fine but does not fit the weights at hand; start from another version."""

    exit_code = 4


class RefetchError(ThinwireError):
    """An object is missing or is not what its manifest says; get it again or take another path."""

    exit_code = 5


class RetryError(ThinwireError):
    """A passing fault outside this process; the same call may succeed later."""

    exit_code = 6


# --- refuse --------------------------------------------------------------------------------------------------------


class MalformedError(RefuseError):
    """Bytes that do not follow the format: truncated, oversized, out of range, inconsistent."""


class UnsupportedError(RefuseError):
    """Well-formed, but of a newer format version or with an unknown codec or data type. Upgrade thinwire."""


class UntrustedError(RefuseError):
    """A manifest that contradicts what has already been accepted (fork, rollback, wrong parent)."""


class UnsafeStoreError(RefuseError):
    """The store overwrites objects that were to be created only; two publishers could both win a version."""


class ConflictError(RefuseError):
    """Another publisher has written this version."""


# --- rebase --------------------------------------------------------------------------------------------------------


class WrongBaseError(RebaseError):
    """The weights at hand are not the ones the patch was made from."""


class NoPathError(RebaseError):
    """No intact chain of objects leads to the wanted version."""


# --- refetch -------------------------------------------------------------------------------------------------------


class DamagedObjectError(RefetchError):
    """An object's bytes differ from the size or digest in its manifest."""


class ObjectNotFoundError(RefetchError):
    """There is no object under this key."""


# --- retry ---------------------------------------------------------------------------------------------------------


class StoreUnavailableError(RetryError):
    """The store did not answer, throttled the request or failed inside."""


# --- an answer rather than a failure -------------------------------------------------------------------------------


class ObjectExistsError(ThinwireError):
    """A create-only put found the key taken. The publisher decides what that means."""


def first_line(error: BaseException) -> str:
    """The first line of what another library's error says, or its name if it says nothing: for a message of ours.

    >>> first_line(OSError("no route\\nat all")), first_line(TimeoutError())
    ('no route', 'TimeoutError')
    """
    return next(iter(str(error).splitlines()), "") or type(error).__name__
