"""Mistakes of the user, damage and failures: three kinds of errors, three ways to go on.

A `UserError` ends a command with one line and exit code 2, and launchers do not restart it. All
other exceptions keep their traceback, end with another code, and the command is restarted.
"""

import contextlib
import difflib
import errno
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path


class UserError(ValueError):
    """What was given cannot work; the message says what was expected and what to do.

    Raised where input is checked, and for what a restart cannot mend: a loss that is not finite, a
    full disk, a platform that the machine lacks.
    """


# Numbers of the OSErrors that only the user can mend: a wrong path, no permission, no space.
MISTAKES = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP,
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG,
}  # fmt: skip
# Storage libraries report failures as text: what only the user can mend, and what may pass. A full
# disk is a mistake, though TensorStore calls it RESOURCE_EXHAUSTED, as it calls a busy service.
FULL_TEXT = re.compile(r"no space left|disk quota exceeded|os_error_code='(28|122)'", re.IGNORECASE)
MISTAKE_TEXT = re.compile(
    "no space left|quota|file too large|permission.denied|forbidden|not permitted|read-only|"
    "is a directory",
    re.IGNORECASE,
)
FAILURE_TEXT = re.compile(
    r"\b(ABORTED|CANCELLED|DEADLINE_EXCEEDED|INTERNAL|RESOURCE_EXHAUSTED|UNAUTHENTICATED|"
    r"UNAVAILABLE|timed out|[Cc]onnection (reset|refused|closed|aborted)|"
    r"Input/output error|Stale file handle|Transport endpoint is not connected)\b"  # array_record's
    r"|http_response_code='401'"  # credentials that expired are renewed; TensorStore says denied
)


def is_failure(error: BaseException) -> bool:
    """Whether a read or write failed for a reason that may pass: a network, a device, memory."""
    if isinstance(error, TimeoutError | ConnectionError | MemoryError):
        return True
    status = getattr(error, "code", None)  # of gcsfs's HttpError: 429 is a rate limit
    if isinstance(status, int) and (status == 429 or status >= 500):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno not in MISTAKES
    return bool(FAILURE_TEXT.search(str(error))) and not FULL_TEXT.search(str(error))


# What TensorStore says of content that is missing or malformed.
DAMAGE_TEXT = re.compile(
    "(NOT_FOUND|DATA_LOSS|FAILED_PRECONDITION|INVALID_ARGUMENT|OUT_OF_RANGE|UNIMPLEMENTED): "
)
# Orbax raises these for malformed metadata; a mistake in the code raises them for any content.
MISTAKES_IN_CODE = (TypeError, AttributeError, AssertionError)
STATUS_TEXT = re.compile(r"[A-Z]+(_[A-Z]+)*: ")


def is_damage(error: BaseException) -> bool:
    """Whether a read failed since the content is malformed, or a part of it is missing.

    Everything that is not known to be damage may be a failure, which is no reason to give up what
    was to be read.
    """
    error = unwrapped(error)
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    if STATUS_TEXT.match(str(error)):
        return bool(DAMAGE_TEXT.match(str(error))) and not is_failure(error)
    kinds = ValueError, LookupError, EOFError, *MISTAKES_IN_CODE
    return isinstance(error, kinds) and not is_failure(error)


def unwrapped(error: BaseException) -> BaseException:
    """The error to which Orbax added details."""
    while type(error) is Exception and error.__cause__ is not None:
        error = error.__cause__
    return error


def is_in_code(error: BaseException) -> bool:
    """Whether a mistake in the code raises such errors, as malformed metadata does."""
    return isinstance(unwrapped(error), MISTAKES_IN_CODE)


def is_mistake(error: BaseException) -> bool:
    """Whether a read or write failed for a reason that only the user can mend."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in MISTAKES
    return not is_failure(error) and bool(MISTAKE_TEXT.search(str(error)))


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """ " Did you mean 'this'?" of the nearest name, or the shortest that contains it; or ""."""
    names = sorted(names, key=lambda each: (len(each), each))
    within = [each for each in names if name and name.lower() in each.lower()]
    near = difflib.get_close_matches(name, names, n=1) or within
    return f" Did you mean {near[0]!r}?" if near else ""


def listed(names: Sequence[str], count: int = 10) -> str:
    """The first names, separated by commas, and how many more there are."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if names[count:] else "")


@contextlib.contextmanager
def reported(what: str):
    """Turns an OSError that only the user can mend into a UserError.

    Args:
        what: the start of the message, such as "runs/x cannot be written".
    """
    try:
        yield
    except OSError as error:
        if not is_mistake(error):
            raise
        file = str(error.filename or "")
        place = "" if file in what else f" ({file})"
        raise UserError(
            f"{what}: {error.strerror or error}{place}. Fix the cause and run the same command "
            "again."
        ) from error


def comes_with(extra: str) -> Callable[[Exception], None]:
    """For `epy.lazy_imports(error_callback=...)` of packages that only an extra installs.

    Using one that is not installed raises UserError with the command that installs it.
    """

    clone = Path(__file__).parents[1]
    in_clone = (clone / "pyproject.toml").is_file()
    install = f'-e "{clone}[{extra}]"' if in_clone else f'"nvg_jax[{extra}]"'

    def report(error: Exception):
        if isinstance(error, ModuleNotFoundError) and error.name:
            raise UserError(
                f"This needs {error.name.partition('.')[0]}, which is not installed. Run: "
                f"pip install {install}"
            ) from error

    return report
