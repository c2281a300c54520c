"""Asking the Hugging Face hub, once and quickly, whether something is there, so that a typing error is told at once.

Without this the libraries retry for half a minute and print as they go.
"""

from __future__ import annotations

from replacement.errors import InputError

TIMEOUT = 10.0  #: seconds to wait for the hub's first answer


def require_on_hub(repository: str, filename: str, *, what: str, choices: str) -> None:
    """Raise InputError unless `repository` is in the local cache or the hub says that it has it.

    filename: a file whose presence in the cache shows that the repository was downloaded before.
    what: how the error calls it, such as "model".
    choices: what else could be passed.
    """
    from huggingface_hub import model_info, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    try:
        if isinstance(try_to_load_from_cache(repository, filename), str):
            return
        model_info(repository, timeout=TIMEOUT)
    except HFValidationError as error:
        raise InputError(f"{what} {repository!r}: no such directory, and no hub id; pass {choices}") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{what} {repository!r}: no such directory, and the hub has none of that name (or it is private); "
            f"pass {choices}"
        ) from error
    except Exception as error:  # any transport's errors: no network, a proxy, an outage
        raise InputError(
            f"{what} {repository!r}: no such directory, and the hub cannot be reached ({type(error).__name__}); "
            f"pass {choices}"
        ) from error
