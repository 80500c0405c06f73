"""LoRA adapters: each a checkpoint in the store, loaded when it is first asked for, forgotten when others are used more.

An adapter is a UNet of its own, and a text encoder where it has matrices for that too, that shares every weight with the
base and adds its small matrices: the base is never changed, no adapter has to be switched on or off between ticks, and ten
of them cost little more memory than one.
"""

from __future__ import annotations

import copy
import tempfile
from collections import OrderedDict
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from momalisa import checkpoint
from momalisa.checkpoint import LORA_FILE, Checkpoint
from momalisa.config import Diffusion
from momalisa.engine.catalogue import Catalogue, NoAdapter
from momalisa.latents import TextEncoder

MAX_ADAPTERS = 4


@dataclass(frozen=True, eq=False)
class Adapted:
    """The models with one adapter."""

    unet: Any
    text_encoder: TextEncoder | None  # None: the adapter leaves the text encoder as it is


class Adapters:
    """Those of a catalogue that are for one base."""

    def __init__(
        self, unet: Any, text_encoder: TextEncoder, catalogue: Catalogue, base: Diffusion, most: int = MAX_ADAPTERS
    ) -> None:
        """Raises ValueError where `most` is less than 1."""
        if most < 1:
            raise ValueError(f"max_adapters={most} must be at least 1")
        self._unet, self._text_encoder = unet, text_encoder
        self.catalogue, self._base, self._most = catalogue, base, most
        self._loaded: OrderedDict[str, Future[Adapted]] = OrderedDict()  # the one used last is last
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapters")

    def check(self, name: str) -> Checkpoint:
        """The manifest of an adapter that the catalogue has found. Raises NoAdapter, for one of another base too."""
        found = self.catalogue.known(name)
        if found.diffusion != self._base:
            raise NoAdapter(f"adapter={name!r} was trained on another base model than this engine's: its manifest says which")
        return found

    def __contains__(self, name: str) -> bool:
        """Whether it has a place: loaded, or being loaded."""
        return name in self._loaded

    def get(self, name: str, busy: Collection[str]) -> Adapted | None:
        """The models with that adapter, or None while it is loaded or waits for a place among the `busy` ones, which keep theirs.

        Raises what loading it raised, once; the next call tries again.
        """
        if name not in self._loaded and self._make_room(busy):
            self._loaded[name] = self._thread.submit(self._load, self.check(name))
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

    def _load(self, found: Checkpoint) -> Adapted:
        from diffusers import StableDiffusionPipeline

        unet, text_model = _sharing(self._unet), _sharing(self._text_encoder.model)
        with tempfile.TemporaryDirectory(prefix="momalisa-") as scratch:
            directory = self.catalogue.store.download(f"{found.path}/weights", found.files, Path(scratch))
            state, alphas = StableDiffusionPipeline.lora_state_dict(directory, weight_name=LORA_FILE, unet_config=unet.config)
            StableDiffusionPipeline.load_lora_into_unet(state, network_alphas=alphas, unet=unet)
            own_texts = checkpoint.add_text_adapters(text_model, directory)
        for model, like in ((unet, self._unet), (text_model, self._text_encoder.model)):
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.to(like.device, like.dtype)
        text_encoder = TextEncoder(self._text_encoder.tokenizer, text_model) if own_texts else None
        return Adapted(unet.requires_grad_(False).eval(), text_encoder)


def _sharing(model: Any) -> Any:
    """A copy of a model's structure around the same weights."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})
