"""Errors of the Hub's client: each as one line that says what to do, and hiccups waited out."""

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from huggingface_hub.errors import (  # type: ignore[attr-defined]
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from cbd_hub.errors import CbdError, ChainNotFoundError, PublishError

__all__ = ["again", "clear_errors"]

T = TypeVar("T")

_HICCUPS = frozenset({408, 425, 429, 500, 502, 503, 504})
_WAITS, _LONGEST_WAIT = (0.5, 1.0, 2.0, 4.0), 30.0  # seconds before each further try; the most a server can ask for


@contextmanager
def clear_errors(repo_id: str, what: str, revision: str | None = None, *, writing: bool = False) -> Iterator[None]:
    """Turns the client's errors into one line each. GatedRepoError is a RepositoryNotFoundError: it comes first.

    Args:
        repo_id: The repository.
        what: A file of it, or what is being done to it.
        revision: Branch, tag or commit.
        writing: Whether something is being published.

    Raises:
        ChainNotFoundError: Reading failed.
        PublishError: Writing failed.
        OSError: The system's own; with the client's other OSErrors turned into one of the above.
    """
    at = f" at revision {revision!r}" if revision else ""
    kind = PublishError if writing else ChainNotFoundError
    try:
        yield
    except CbdError:
        raise
    except GatedRepoError:
        raise kind(
            f"{repo_id} is gated: ask for access on its page at the Hub, then log in (`hf auth login`) or pass token="
        ) from None
    except RepositoryNotFoundError:
        raise kind(
            f"there is no repository {repo_id!r} that you may {'write to' if writing else 'read'}. Check the "
            "spelling; a private one needs `hf auth login`, HF_TOKEN or token="
        ) from None
    except RevisionNotFoundError:
        raise kind(f"{repo_id} has no revision {revision!r}; see its branches, tags and commits") from None
    except LocalEntryNotFoundError:
        raise kind(
            f"{what} of {repo_id}{at} is not in the cache and the Hub cannot be asked (offline, not reached, or "
            "local_files_only=True). Connect once to fetch it"
        ) from None
    except EntryNotFoundError:
        raise kind(f"{repo_id}{at} has no file {what!r}; is it a chain?") from None
    except HFValidationError as error:
        raise kind(f"{repo_id!r} is neither a folder nor a repository id: {error}") from None
    except OfflineModeIsEnabled:
        raise kind(f"HF_HUB_OFFLINE is set, and {what} of {repo_id}{at} needs the Hub: unset it") from None
    except LocalTokenNotFoundError:
        raise kind(f"{repo_id} needs a token: `hf auth login`, HF_TOKEN or token=") from None
    except HfHubHTTPError as error:
        raise kind(_refusal(repo_id, what, at, error)) from None
    except HTTPError as error:
        why = str(error) or type(error).__name__
        raise kind(f"the connection to the Hub broke during {what} of {repo_id}{at} ({why}); try again") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise kind(
                f"the disk is full: {what} of {repo_id}{at} does not fit into the cache. Free some space, or name "
                "another cache with HF_HOME or cache_dir="
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise kind(
                f"{what} of {repo_id}{at} is to be written where you may not write ({error.filename}); name another "
                "cache with HF_HOME or cache_dir="
            ) from None
        if error.errno is not None:  # the system's own
            raise
        raise kind(f"{what} of {repo_id}{at} could not be fetched: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _refusal(repo_id: str, what: str, at: str, error: HfHubHTTPError) -> str:
    status = error.response.status_code
    reason = error.server_message or _first_line(error)
    if status == 401:
        return f"the Hub does not accept the token for {repo_id}: `hf auth login`, HF_TOKEN or token= ({reason})"
    if status == 403:
        return f"your token has no permission for {what} of {repo_id}: it needs write access to it ({reason})"
    if status == 412:
        return f"{repo_id}{at} was changed by another commit meanwhile; nothing was overwritten: run this again"
    if status == 429:
        return f"the Hub limits the rate of requests ({what} of {repo_id}{at}); wait a little and try again"
    if status >= 500:
        return f"the Hub failed ({status}) during {what} of {repo_id}{at}; try again later"
    return f"the Hub refused {what} of {repo_id}{at}: {reason}"


def again(call: Callable[[], T]) -> T:
    """Returns what a call returns; a hiccup of the Hub or the network is waited out, a few times.

    The client retries the bytes of a download by itself, but not the question that comes before them.
    """
    for wait in _WAITS:
        try:
            return call()
        except (HTTPError, OSError) as error:
            if (after := _passing(error)) is None:
                raise
            time.sleep(min(after or wait, _LONGEST_WAIT))
    return call()


def _passing(error: BaseException | None) -> float | None:
    """For how many seconds the server asked to wait (0: not said); None for an error that will be there again."""
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None and response.status_code in _HICCUPS:
            after = response.headers.get("Retry-After", "")
            return float(after) if after.isdigit() else 0.0
        if isinstance(error, HTTPError) and response is None:  # a connection that broke, or none at all
            return 0.0
        error = error.__cause__ or error.__context__
    return None
