"""Where metrics go beside metrics.jsonl: TensorBoard, Weights & Biases, trackio; the same names in each.

wandb and trackio get metrics and the redacted configuration, nothing else: no code, no environment, no machine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

PROJECT = "agrpo"


class Logger(Protocol):
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    def __init__(self, directory: Path, name: str, first_step: int, config: Mapping[str, Any]) -> None:
        # Imported here: it takes a second, and whoever only prints a summary should not wait for it.
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step, flush_secs=30)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._board.close()


class WeightsAndBiases:
    """Its account and mode come from the environment (WANDB_API_KEY, WANDB_MODE=offline)."""

    def __init__(self, directory: Path, name: str, first_step: int, config: Mapping[str, Any]) -> None:
        import wandb

        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            save_code=False,
            silent=True,
            x_disable_meta=True,
            x_disable_stats=True,
        )
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=name,
            group=name.rsplit("/", 1)[0],
            dir=str(directory),
            config=dict(config),
            settings=settings,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """Local, in trackio's own database: TRACKIO_DIR, or its cache folder. `trackio show` opens it."""

    def __init__(self, directory: Path, name: str, first_step: int, config: Mapping[str, Any]) -> None:
        import trackio

        self._run = trackio.init(
            project=PROJECT,
            name=name.replace("/", "-"),
            config=dict(config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


LOGGERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "trackio": Trackio}
