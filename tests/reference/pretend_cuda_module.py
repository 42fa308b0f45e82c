"""`torch.cuda` of a device that is not there: what `pretend_cuda` puts in the place of its functions."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

GIBIBYTE = 2**30


def functions(mode: Any) -> dict[str, Any]:
    def nothing(*_: Any, **__: Any) -> None: ...

    def seed(number: int) -> None:
        mode.random = type(torch.random.default_generator)().manual_seed(int(number)).get_state()

    def set_state(state: Tensor, *_: Any) -> None:
        if mode.has(state):
            raise TypeError("RNG state must be a torch.ByteTensor")
        mode.random = state.clone()

    def device(*_: Any) -> Any:
        return nullcontext()

    about = SimpleNamespace(name="Pretended", total_memory=GIBIBYTE, major=8, minor=0, multi_processor_count=1)
    stream = SimpleNamespace(synchronize=nothing, wait_stream=nothing, wait_event=nothing)
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_initialized": True,
        "_lazy_init": nothing,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "device": device,
        "device_of": device,
        "set_device": nothing,
        "synchronize": nothing,
        "empty_cache": nothing,
        "ipc_collect": nothing,
        "current_stream": lambda *_: stream,
        "is_current_stream_capturing": lambda: False,
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0,
        "max_memory_reserved": lambda *_: 0,
        "reset_peak_memory_stats": nothing,
        "memory_stats": lambda *_: {},
        "mem_get_info": lambda *_: (GIBIBYTE, GIBIBYTE),
        "get_device_properties": lambda *_: about,
        "get_device_capability": lambda *_: (8, 0),
        "get_device_name": lambda *_: about.name,
        "is_bf16_supported": lambda *_, **__: True,
        "manual_seed": seed,
        "manual_seed_all": seed,
        "get_rng_state": lambda *_: mode.random.clone(),
        "get_rng_state_all": lambda: [mode.random.clone()],
        "set_rng_state": set_state,
        "set_rng_state_all": lambda states: set_state(states[0]),
    }
