"""LoRA adapters: each a checkpoint in the store, loaded when it is first asked for, forgotten when others are used more.

An adapter is a UNet of its own that shares every weight with the base and adds its small matrices: the base is never
changed, no adapter has to be switched on or off between ticks, and ten of them cost little more memory than one.
"""

from __future__ import annotations

import copy
import re
import tempfile
from collections import OrderedDict
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from momalisa import checkpoint
from momalisa.checkpoint import LORA_FILE, Checkpoint, NoCheckpoint
from momalisa.config import Diffusion
from momalisa.storage import Store

MAX_ADAPTERS = 4
NAME = re.compile(r"[\w-][\w.-]*/\d+")


class Adapters:
    """What a store holds for one base. Named `<run>/<images seen>`, as its checkpoints are."""

    def __init__(self, unet: Any, store: Store, base: Diffusion, most: int = MAX_ADAPTERS) -> None:
        """Raises ValueError where `most` is less than 1."""
        if most < 1:
            raise ValueError(f"max_adapters={most} must be at least 1")
        self._unet, self._store, self._base, self._most = unet, store, base, most
        self._found: dict[str, Checkpoint] = {}
        self._loaded: OrderedDict[str, Future[Any]] = OrderedDict()  # the one used last is last
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapters")

    def check(self, name: str) -> None:
        """Raises ValueError for a name that is no adapter of this base. Reads a small file the first time."""
        if name in self._found:
            return
        if not NAME.fullmatch(name):
            raise ValueError(f"adapter={name!r} is not of the form run/images, such as impressionists/6400")
        try:
            found = checkpoint.read(self._store, f"checkpoints/{name}")
        except NoCheckpoint as error:
            raise ValueError(f"adapter={name!r}: {error}") from error
        if not found.lora:
            raise ValueError(f"adapter={name!r} is a whole model, not a LoRA: promote it instead")
        if found.diffusion != self._base:
            raise ValueError(
                f"adapter={name!r} belongs to {found.diffusion.model}, and this engine draws with {self._base.model}"
            )
        self._found[name] = found

    def unet(self, name: str, busy: Collection[str]) -> Any | None:
        """The UNet with that adapter, or None while it is loaded or waits for a place among the `busy` ones.

        Raises what loading it raised, once; the next call tries again.
        """
        if name not in self._loaded and self._make_room(busy):
            self._loaded[name] = self._thread.submit(self._load, self._found[name])
        loading = self._loaded.get(name)
        if loading is None or not loading.done():
            return None
        self._loaded.move_to_end(name)
        if loading.exception() is not None:
            del self._loaded[name]
        return loading.result()

    def wait(self, timeout_s: float) -> None:
        """Until something has been loaded, or time is up."""
        wait([loading for loading in self._loaded.values() if not loading.done()], timeout_s, "FIRST_COMPLETED")

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _make_room(self, busy: Collection[str]) -> bool:
        for name in [name for name, loading in self._loaded.items() if loading.done() and name not in busy]:
            if len(self._loaded) >= self._most:
                del self._loaded[name]
        return len(self._loaded) < self._most

    def _load(self, found: Checkpoint) -> Any:
        from diffusers import StableDiffusionPipeline

        shared = {id(tensor): tensor for tensor in [*self._unet.parameters(), *self._unet.buffers()]}
        unet = copy.deepcopy(self._unet, shared)
        with tempfile.TemporaryDirectory(prefix="momalisa-") as scratch:
            directory = self._store.download(f"{found.path}/weights", found.files, Path(scratch))
            state, alphas = StableDiffusionPipeline.lora_state_dict(directory, weight_name=LORA_FILE, unet_config=unet.config)
            StableDiffusionPipeline.load_lora_into_unet(state, network_alphas=alphas, unet=unet)
        for name, parameter in unet.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(self._unet.device, self._unet.dtype)
        return unet.requires_grad_(False).eval()
