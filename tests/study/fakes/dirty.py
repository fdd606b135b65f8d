"""A trainable that reports the state of the process it finds, and leaves it dirty."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from fake_trial import Report


def run(model: str, config: Mapping[str, Any], task_dir: str, seeds: Sequence[int], **options: Any) -> Iterator[Report]:
    """Reports, then changes all of it."""
    yield Report(
        epoch=1,
        metrics={
            "val_rmse": 1.0, "torch": float(torch.rand(1)), "numpy": float(np.random.rand()), "python": random.random(),
            "bits": torch.finfo(torch.get_default_dtype()).bits, "grad": float(torch.is_grad_enabled()),
            "threads": torch.get_num_threads(), "exact": float(torch.are_deterministic_algorithms_enabled()),
            "device": float(torch.zeros(1).device.type == "meta"), "anomaly": float(torch.is_anomaly_enabled()),
            "product": float(torch.get_float32_matmul_precision() != "highest"),
            "denormal": float((torch.tensor([1e-40]) * 1).item() == 0), "raises": float(np.geterr()["divide"] == "raise"),
        },
        final=True,
    )  # fmt: skip
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    torch.set_default_device("meta")
    torch.autograd.set_detect_anomaly(True, check_nan=False)
    torch.set_float32_matmul_precision("medium")
    torch.set_flush_denormal(True)
    np.seterr(divide="raise")
    torch.manual_seed(7)
