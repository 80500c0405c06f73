"""Greedy decoding with BLIP's text decoder (Li et al. 2022), a batch at a time, over the weights of a loaded model.

    L layers · B rows · H heads · T tokens at most · N states of a picture · d = D / H · V words

What a step reads lies in buffers that are made once: keys and values of the pictures (computed once each), keys and
values of the words so far, the last words, the position. A step is the same work every time, so on a GPU it is
captured as a CUDA graph, one for each power of two of rows, and replayed. A row whose caption has ended leaves: as
soon as half of the rows are done, the others move together and go on as a smaller batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from momalisa.captioner.attention import attend

LOOK_EVERY = 4  # steps between two looks at which rows have ended on a GPU, which waits for each look; on a CPU: 1


class Decoder:
    """`BlipTextLMHeadModel` as a function: states of pictures -> token ids."""

    def __init__(self, model: Any, image_tokens: int, max_new_tokens: int, capacity: int) -> None:
        """`capacity`: rows at most. Raises ValueError where the model has too few positions."""
        config, bert, head = model.config, model.bert, model.cls.predictions
        if max_new_tokens >= config.max_position_embeddings:
            raise ValueError(
                f"max_new_tokens={max_new_tokens} does not fit a decoder with {config.max_position_embeddings} positions; "
                f"try {config.max_position_embeddings - 1} or less"
            )
        self.start_id, self.end_id, self.pad_id = config.bos_token_id, config.sep_token_id, config.pad_token_id
        self.max_new_tokens, self.capacity = max_new_tokens, capacity
        self.words, self.places = bert.embeddings.word_embeddings.weight, bert.embeddings.position_embeddings.weight
        self.norm = bert.embeddings.LayerNorm
        self.layers = [Layer(layer, config.num_attention_heads) for layer in bert.encoder.layer]
        self.transform, self.head = head.transform, head.decoder
        self.device, self.dtype = self.words.device, self.words.dtype
        self._make_buffers(image_tokens, config.num_attention_heads)
        self._advance: Callable[[int], None] | None = None

    def _make_buffers(self, image_tokens: int, heads: int) -> None:
        layers, rows, length = len(self.layers), self.capacity, self.max_new_tokens
        head_width = self.words.shape[1] // heads
        floats: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        self.image = torch.zeros(layers, 2, rows, heads, image_tokens, head_width, **floats)  # keys, values
        self.said = torch.zeros(layers, 2, rows, heads, length, head_width, **floats)
        self.tokens = torch.zeros(rows, length, dtype=torch.int64, device=self.device)
        self.last = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=self.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.steps = torch.arange(length, device=self.device)

    @torch.no_grad()
    def __call__(self, states: Tensor) -> Tensor:
        """States [B, N, D] of `capacity` pictures at most -> token ids [B, T] int64 on the CPU.

        A caption ends with the model's end token, if it ends within T; padding follows.
        """
        count, look_every = len(states), LOOK_EVERY if self.device.type == "cuda" else 1
        rows, advance = self.fit(count), self._advancer()
        self.begin(states, rows)
        found = torch.full((rows + 1, self.max_new_tokens), self.pad_id)  # the last row takes what fills a batch up
        order = torch.arange(rows)  # which row of `found` a row of the batch belongs to
        for step in range(1, self.max_new_tokens + 1):
            advance(rows)
            if step % look_every and step < self.max_new_tokens:
                continue
            going = (~self.ended[:rows]).nonzero().flatten().cpu()
            if step == self.max_new_tokens or not len(going):
                break
            if (fewer := self.fit(len(going))) * 2 <= rows:
                found[order] = self.tokens[:rows].cpu()
                self.keep(going, fewer)
                order, rows = torch.cat([order[going], order.new_full((fewer - len(going),), len(found) - 1)]), fewer
        found[order] = self.tokens[:rows].cpu()
        return found[:count]

    def fit(self, count: int) -> int:
        """Rows of the smallest batch that holds `count`: on a GPU one that has a graph."""
        return min(1 << (count - 1).bit_length(), self.capacity) if self.device.type == "cuda" else count

    def begin(self, states: Tensor, rows: int) -> None:
        """Fill the buffers for new pictures; rows beyond them count as ended."""
        count = len(states)
        for layer, image in zip(self.layers, self.image, strict=True):
            image[:, :count] = layer.image_keys_values(states)
        self.restart()
        self.ended[count:rows] = True

    def restart(self) -> None:
        """Back to the start token."""
        self.position.zero_()
        self.tokens.fill_(self.pad_id)
        self.last.fill_(self.start_id)
        self.ended.zero_()

    def keep(self, going: Tensor, rows: int) -> None:
        """Move the rows `going` (ascending) to the front of the buffers, as a batch of `rows`."""
        count, going = len(going), going.to(self.device)
        for layer in range(len(self.layers)):
            for buffer in (self.image[layer], self.said[layer]):
                buffer[:, :count] = buffer[:, going]
        for row in (self.tokens, self.last, self.ended):
            row[:count] = row[going]
        self.ended[count:rows] = True

    def step(self, rows: int) -> None:
        """One token more for each of the first rows; an ended row gets padding."""
        token = self.logits(rows).argmax(dim=-1)
        ended = self.ended[:rows]
        token = token.masked_fill(ended, self.pad_id)
        self.tokens[:rows].index_copy_(1, self.position, token[:, None])
        self.last[:rows] = token
        self.ended[:rows] = ended | (token == self.end_id)
        self.position += 1

    def logits(self, rows: int) -> Tensor:
        """[rows, V]: scores of the next word, after the last ones at the present position."""
        x = self.norm(F.embedding(self.last[:rows], self.words) + self.places.index_select(0, self.position))
        seen = self.steps <= self.position
        for layer, image, said in zip(self.layers, self.image, self.said, strict=True):
            x = layer(x, image[:, :rows], said[:, :rows], self.position, seen)
        scores: Tensor = self.head(self.transform(x))
        return scores

    def _advancer(self) -> Callable[[int], None]:
        """`step`, on a GPU as graphs that are captured at first use: capturing overwrites the buffers."""
        if self._advance is None:
            self._advance = Graphs(self) if self.device.type == "cuda" else self.step
        return self._advance


class Layer:
    """One block, after BERT: norm(x + attention(x)), the same with the picture's states, the same with an MLP."""

    def __init__(self, layer: Any, heads: int) -> None:
        said, image = layer.attention, layer.crossattention
        self.heads = heads
        self.said_qkv = joined([said.self.query, said.self.key, said.self.value])
        self.said_out, self.said_norm = said.output.dense, said.output.LayerNorm
        self.image_query, self.image_kv = image.self.query, joined([image.self.key, image.self.value])
        self.image_out, self.image_norm = image.output.dense, image.output.LayerNorm
        self.grow, self.activation = layer.intermediate.dense, layer.intermediate.intermediate_act_fn
        self.shrink, self.norm = layer.output.dense, layer.output.LayerNorm

    def image_keys_values(self, states: Tensor) -> Tensor:
        """States [B, N, D] -> [2, B, H, N, d]."""
        batch, tokens, _ = states.shape
        return F.linear(states, *self.image_kv).view(batch, tokens, 2, self.heads, -1).permute(2, 0, 3, 1, 4)

    def __call__(self, x: Tensor, image: Tensor, said: Tensor, position: Tensor, seen: Tensor) -> Tensor:
        """x [B, D], image [2, B, H, N, d], said [2, B, H, T, d] (written at `position`), seen [T] bool -> [B, D]."""
        rows = len(x)
        query, *new = F.linear(x, *self.said_qkv).view(rows, 3, self.heads, 1, -1).unbind(1)  # each [B, H, 1, d]
        for cache, value in zip(said, new, strict=True):
            cache.index_copy_(2, position, value)
        attended = attend(query, said[0], said[1], seen)
        x = self.said_norm(x + self.said_out(attended.reshape(rows, -1)))
        query = self.image_query(x).view(rows, self.heads, 1, -1)
        attended = attend(query, image[0], image[1])
        x = self.image_norm(x + self.image_out(attended.reshape(rows, -1)))
        fed: Tensor = self.norm(x + self.shrink(self.activation(self.grow(x))))
        return fed


def joined(parts: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Linear modules of the same input as one: (weight, bias)."""
    return torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])


class Graphs:
    """A decoder's step as CUDA graphs, one for each number of rows that `fit` gives; they share their memory."""

    def __init__(self, decoder: Decoder) -> None:
        sizes = sorted({decoder.fit(count) for count in range(1, decoder.capacity + 1)}, reverse=True)
        beside, pool = torch.cuda.Stream(decoder.device), torch.cuda.graph_pool_handle()
        beside.wait_stream(torch.cuda.current_stream(decoder.device))
        with torch.cuda.stream(beside):  # libraries make their workspaces in a first run, which must not be captured
            for size in sizes:
                decoder.restart()
                decoder.step(size)
        torch.cuda.current_stream(decoder.device).wait_stream(beside)
        self.graphs = {size: torch.cuda.CUDAGraph() for size in sizes}
        for size, graph in self.graphs.items():
            with torch.cuda.graph(graph, pool=pool):
                decoder.step(size)

    def __call__(self, rows: int) -> None:
        self.graphs[rows].replay()
