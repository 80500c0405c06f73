"""Prompts as the UNet wants them; a text that comes again is not encoded again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from momalisa.latents import TextEncoder

KEPT = 512  # texts; at 77 x 768 in bf16 they take 60 MB


class Texts:
    """A cache in front of a text encoder; the texts used last are kept."""

    def __init__(self, encoder: TextEncoder, device: torch.device, dtype: torch.dtype) -> None:
        self.encoder, self.device, self.dtype = encoder, device, dtype
        self._states: OrderedDict[tuple[str, bool], Tensor] = OrderedDict()

    def embed(self, texts: Sequence[str], alone: bool = False) -> list[Tensor]:
        """Texts -> [L, D] each, on the device; `alone`: not in one batch, whose size shows in the last bits."""
        missing = [text for text in dict.fromkeys(texts) if (text, alone) not in self._states]
        for part in [[text] for text in missing] if alone else [missing] * bool(missing):
            states = self.encoder.embed(self.encoder.tokenize(part)).to(self.device, self.dtype)
            self._states.update(zip([(text, alone) for text in part], states.unbind(), strict=True))
        found = [self._states[text, alone] for text in texts]
        for text in texts:
            self._states.move_to_end((text, alone))
        while len(self._states) > KEPT:
            self._states.popitem(last=False)
        return found

    def forget(self) -> None:
        """What was encoded is stale: the encoder's weights have changed."""
        self._states.clear()
