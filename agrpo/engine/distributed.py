"""The processes of a job: who this one is, and sums over all of them. One process needs no launcher."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from agrpo import job
from agrpo.engine.memory import main_memory


def start() -> None:
    """Join the job that torchrun describes in the environment; alone, be a job of one process."""
    if dist.is_initialized():
        return
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(minutes=30))


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def free_memory() -> int:
    """Bytes that this process may still take: of its GPU, or its share of the host's."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return main_memory()[1] // here


def barrier() -> None:
    if world() > 1:
        job.mark()
        dist.barrier()


def sum_over_ranks(values: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Each value summed over all processes, in float64. Every process must name the same keys."""
    numbers = torch.tensor([float(v) for v in values.values()], dtype=torch.float64, device=device())
    if world() > 1:
        job.mark()
        dist.all_reduce(numbers)
    return dict(zip(values, numbers.tolist(), strict=True))


def max_over_ranks(value: int) -> int:
    number = torch.tensor([value], device=device())
    if world() > 1:
        job.mark()
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def gather_objects(value: Any) -> list[Any]:
    """Every process's value, in the order of the ranks."""
    if world() == 1:
        return [value]
    job.mark()
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values
