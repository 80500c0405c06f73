"""Where a model's files are: a hub name with a revision, a local folder, or `miniature://NAME`.

The miniature's own weights travel inside the package; nothing else distinguishes them from the real models.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

SCHEME = "miniature://"
MINIATURE = Path(__file__).parent / "miniature" / "weights"


def locate(model: str) -> str:
    """What `from_pretrained` takes for a configured model name.

    Raises ValueError where the name looks like a path and nothing is there.
    """
    if model.startswith(SCHEME):
        path = MINIATURE / model.removeprefix(SCHEME)
        if not path.is_dir():
            names = ", ".join(SCHEME + entry.name for entry in sorted(MINIATURE.iterdir()) if entry.is_dir())
            raise ValueError(f"model {model!r} is not one of {names}")
        return str(path)
    if Path(model).is_dir():
        return model
    if model.startswith(("/", ".", "~")) or model.count("/") != 1:
        raise ValueError(f"model {model!r} is neither a folder here nor a hub name such as 'owner/name'")
    return model


@lru_cache(maxsize=16)
def identity(model: str, revision: str | None = None) -> str:
    """A name for a model's exact weights: a hash over a folder's safetensors, else `name@revision`."""
    path = Path(locate(model))
    if not path.is_dir():
        return f"{model}@{revision or 'main'}"
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.suffix in {".safetensors", ".json", ".txt"}:
            digest.update(file.relative_to(path).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def short_id(*parts: object) -> str:
    """Twelve hexadecimal digits that name a tuple of parts: the cache keys of captions and latents."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
