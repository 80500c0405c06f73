"""Requests -> pictures: step-level continuous batching of a latent diffusion model.

request.py      what may be asked, and what a picture's file says about it
samplers.py     samplers as tables of coefficients
trajectory.py   one picture on its way from noise
batch.py        trajectories that take their steps together
decoding.py     finished latents -> pictures
preview.py      rough pictures on the way
texts.py        prompts, encoded once
events.py       what a tick says about requests
catalogue.py    which adapters there are
adapters.py     adapters, loaded
engine.py       the queue and the tick
"""

from momalisa.engine.catalogue import Catalogue, NoAdapter
from momalisa.engine.engine import Engine
from momalisa.engine.events import Broken, Done, Event, GenerationError, Preview
from momalisa.engine.request import SAMPLERS, Request, Sampler, from_parameters, to_parameters
from momalisa.engine.samplers import scheduler_config
from momalisa.engine.tiers import Tier, at_tier

__all__ = [
    "SAMPLERS",
    "Broken",
    "Catalogue",
    "Done",
    "Engine",
    "Event",
    "GenerationError",
    "NoAdapter",
    "Preview",
    "Request",
    "Sampler",
    "Tier",
    "at_tier",
    "from_parameters",
    "scheduler_config",
    "to_parameters",
]
