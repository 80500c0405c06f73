"""Load a pretrained part by its configured model name; a failure says which model and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from momalisa.weights import locate


def pretrained(kind: Any, model: str, **options: Any) -> Any:
    """`kind.from_pretrained` for a hub name, a folder, or `miniature://NAME`.

    Raises ValueError that names the model and the cause: no such folder, a file missing, gated, or no network.
    """
    where = locate(model)
    try:
        return kind.from_pretrained(where, **options)
    except (OSError, ValueError) as error:
        revision = f"@{options['revision']}" if options.get("revision") else ""
        part = f" ({options['subfolder']})" if options.get("subfolder") else ""
        hint = "" if Path(where).is_dir() else "; check its name and revision, the network, and HF_TOKEN if it is gated"
        raise ValueError(f"cannot load {model}{revision}{part}: {_cause(error)}{hint}") from error


def _cause(error: BaseException) -> str:
    """What went wrong in the end, and what that came from, in one line."""
    first: BaseException = error
    while (deeper := first.__cause__ or first.__context__) is not None:
        first = deeper
    texts = dict.fromkeys(" ".join(str(item).split()) or type(item).__name__ for item in (error, first))
    return ": ".join(texts)
