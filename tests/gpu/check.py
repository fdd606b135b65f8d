"""What a GPU does for this project, measured where one is at hand; at `--size tiny` the same code runs on a CPU.

    python -m tests.gpu.check --out DIR                          # all sections, under 8 minutes on one H100
    python -m tests.gpu.check --out DIR --sections trials,many

Needs torch, transformers, NumPy, SciPy, pandas, pyarrow and PyYAML alone: no Ray, Optuna or MLflow, so it calls `features`
and `trainables` directly. After each section it writes DIR/<section>.json, so that what ends it early loses only the
section under way. All data and all language models are simulated: random weights of a published shape. A section that fails
says so in its file, the others run, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from features.encoders.batches import run_batch
from features.encoders.inputs import EncoderInput
from features.encoders.spec import EncoderSpec
from features.encoders.text import TextEncoder
from features.encoders.throughput import Operations, matrix_peak
from features.pseudo.generator import CausalGenerator, GeneratorSpec
from features.pseudo.prompts import PseudoPrompt
from tests.gpu import language, tasks
from trainables.interface import field_types, load_model
from trainables.models.music import Config, VectorUNet
from trainables.trial import run

TOLERANCES = {"val_rmse": 0.01, "val_ndcg10": 0.03}  # between devices: the same draws, other orders of addition
RIVALS = ("music", "lgcd", "emcdr", "sasrec")
TASK_1_GOAL_S, TASK_1_CPU_S = 15.0, 454.0  # issue 14; docs/benchmarks.md, one thread
REVIEWS, ITEMS = 1_394_250, 316_881  # of MuSiC's Task 1, both domains (Table 1)
USERS_WITHOUT = 43_663  # of Food-Kitchen in one domain alone, each with 20 texts to be written


@dataclass(frozen=True)
class Run:
    """Where the check runs, and how much of it."""

    device: torch.device
    tiny: bool
    seconds: float  # of one measurement

    def synchronise(self) -> None:
        """Wait for what the device has been told to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def per_second(self, step: Callable[[], int]) -> float:
        """Call `step`, which returns how much it did, for a while; return how much was done in a second."""
        step()
        self.synchronise()
        began, done = time.perf_counter(), 0
        while done == 0 or time.perf_counter() - began < self.seconds:
            done += step()
            self.synchronise()
        return done / (time.perf_counter() - began)

    def top_operators(self, work: Callable[[], object]) -> list[dict[str, Any]]:
        """The ten operators that take most of the time of some work."""
        cuda = self.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with profile(activities=activities) as measured:
            work()
            self.synchronise()
        key = "self_device_time_total" if cuda else "self_cpu_time_total"
        averages = sorted(measured.key_averages(), key=lambda one: -getattr(one, key))[:10]
        total = sum(getattr(one, key) for one in measured.key_averages()) or 1
        return [
            {"operator": one.key, "calls": one.count, "share": round(getattr(one, key) / total, 4)} for one in averages
        ]


# --- sections -----------------------------------------------------------------------------------------------------


def trials(on: Run) -> dict[str, Any]:
    """Models trained on the device and on a CPU thread, from the same seed; a MuSiC trial of the size of Task 1."""
    found: dict[str, Any] = {"tolerances": TOLERANCES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size, users, items = (tasks.TINY, 80, 64) if on.tiny else (tasks.SMALL, 3_000, 4_000)
        search = {
            "ratings": str(tasks.write_task(folder, size)),
            "sequences": str(tasks.write_sequences(folder, users, items, 16 if on.tiny else 384)),
        }
        epochs = 2 if on.tiny else 6
        for model in RIVALS:
            found[model] = _both_devices(on, model, search[load_model(model).TASK_TYPE], epochs)
    with tempfile.TemporaryDirectory() as name:
        task = str(tasks.write_task(Path(name), tasks.TINY if on.tiny else tasks.TASK_1))
        most = 2 if on.tiny else 100
        config = {"steps": 10, "epochs": most, "patience": most}
        began, marks = time.perf_counter(), []
        for report in run("music", config, task, [0], device=str(on.device)):
            marks.append((report.epoch, round(time.perf_counter() - began, 2)))
        found["music_task_1"] = {
            "seconds": marks[-1][1], "epochs": most, "first_epoch_after_s": marks[0][1], "goal_s": TASK_1_GOAL_S,
            "cpu_thread_s": TASK_1_CPU_S, "peak_gib": _peak_gib(on),
            "profile": on.top_operators(
                lambda: list(run("music", {**config, "epochs": 3}, task, [1], device=str(on.device)))
            ),
        }  # fmt: skip
    return found


def _both_devices(on: Run, model: str, task: str, epochs: int) -> dict[str, Any]:
    chosen = load_model(model)
    short = {"epochs": epochs, "feature_epochs": 1, "side_epochs": 1, "encoder_epochs": 1}
    config = {name: value for name, value in short.items() if name in field_types(chosen.Config)}
    metric, out, threads = chosen.SELECTION.metric, dict[str, Any](), torch.get_num_threads()
    torch.set_num_threads(1)
    for device in ("cpu", str(on.device)):
        began = time.perf_counter()
        *_, last = run(model, config, task, [0], device=device)
        out[device] = {metric: last.metrics[metric], "seconds": round(time.perf_counter() - began, 2)}
    torch.set_num_threads(threads)
    out["difference"] = abs(out["cpu"][metric] - out[str(on.device)][metric])
    out["within_tolerance"] = out["difference"] <= TOLERANCES[metric]
    return out


def _peak_gib(on: Run) -> float | None:
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if on.device.type == "cuda" else None


def many(on: Run) -> dict[str, Any]:
    """Training steps of MuSiC's denoiser for many seeds in one process: a loop, a stream each, weights in one batch."""
    found: dict[str, Any] = {"step": "MuSiC's denoiser, 128 users, forward, backward, Adam", "steps_per_second": {}}
    config, rows = Config(), 16 if on.tiny else 128
    for count in (1, 2) if on.tiny else (1, 8, 64):
        ways: dict[str, Callable[[], Callable[[], int]]] = {
            "loop": partial(_looped, on, config, rows, count, streams=False),
            "streams": partial(_looped, on, config, rows, count, streams=True),
            "batched": partial(_batched, on, config, rows, count, graph=False),
            "batched_graph": partial(_batched, on, config, rows, count, graph=True),
        }
        found["steps_per_second"][str(count)] = {way: _rate(on, make) for way, make in ways.items()}
    found["profile"] = on.top_operators(_batched(on, config, rows, 2 if on.tiny else 64, graph=False))
    return found


def _rate(on: Run, make: Callable[[], Callable[[], int]]) -> float | str:
    """Steps a second, or in words why there are none: one way that fails says nothing of the others."""
    try:
        return round(on.per_second(make()), 1)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _inputs(on: Run, config: Config, rows: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    x, condition, clean = (torch.randn(count, rows, config.dim, generator=draw).to(on.device) for _ in range(3))
    t = torch.randint(1, config.steps + 1, (count, rows), generator=draw).to(on.device)
    return x, t, condition, clean


def _looped(on: Run, config: Config, rows: int, count: int, *, streams: bool) -> Callable[[], int]:
    networks = [VectorUNet(config).to(on.device).eval() for _ in range(count)]
    optimisers = [torch.optim.Adam(network.parameters(), fused=True) for network in networks]
    x, t, condition, clean = _inputs(on, config, rows, count)
    cuda = on.device.type == "cuda"
    lanes = [torch.cuda.Stream() if streams and cuda else None for _ in networks]

    def step() -> int:
        for k, (network, optimiser, lane) in enumerate(zip(networks, optimisers, lanes, strict=True)):
            with torch.cuda.stream(lane):  # None: the stream that is current
                loss = (network(x[k], t[k], condition[k]) - clean[k]).square().mean()
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
        return count

    return step


def _batched(on: Run, config: Config, rows: int, count: int, *, graph: bool) -> Callable[[], int]:
    from torch.func import functional_call, grad, stack_module_state, vmap

    if graph and on.device.type != "cuda":
        raise NotImplementedError("CUDA graphs need a GPU")
    networks = [VectorUNet(config).to(on.device).eval() for _ in range(count)]
    weights, buffers = stack_module_state(networks)  # type: ignore[arg-type]
    weights = {name: value.detach() for name, value in weights.items()}
    mean, square = ({name: torch.zeros_like(value) for name, value in weights.items()} for _ in range(2))
    x, t, condition, clean = _inputs(on, config, rows, count)
    network = networks[0]

    def loss(own: Any, buffer: Any, x_BD: Tensor, t_B: Tensor, condition_BD: Tensor, clean_BD: Tensor) -> Tensor:
        found: Tensor = functional_call(network, (own, buffer), (x_BD, t_B, condition_BD))
        return (found - clean_BD).square().mean()

    gradient = vmap(grad(loss), randomness="different")

    def step() -> int:
        for name, slope in gradient(weights, buffers, x, t, condition, clean).items():
            mean[name].mul_(0.9).add_(slope, alpha=0.1)
            square[name].mul_(0.999).addcmul_(slope, slope, value=0.001)
            weights[name].addcdiv_(mean[name], square[name].sqrt() + 1e-8, value=-1e-3)
        return count

    if not graph:
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step()

    def replay() -> int:
        captured.replay()
        return count

    return replay


def extraction(on: Run) -> dict[str, Any]:
    """Vectors of texts by the project's own encoder: tokens a second, and share of the measured matrix peak."""
    shape = language.TINY if on.tiny else language.LLAMA_3_8B
    found: dict[str, Any] = {"shape": shape, "peak_flops": matrix_peak(on.device, torch.bfloat16), "runs": {}}
    texts = language.texts_of(language.review_lengths(32 if on.tiny else 4_096), shape["vocab_size"])
    inputs = [EncoderInput(texts=(text,)) for text in texts]
    budgets = (256,) if on.tiny else (8_192, 16_384, 32_768, 65_536)
    for attention in ("sdpa", "flash_attention_2"):
        try:
            model = language.causal_model(shape, on.device, attention)
        except (ImportError, ValueError) as error:
            found["runs"][attention] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        operations = Operations(model.model)
        for budget in budgets:
            spec = EncoderSpec(model="random", dtype="bfloat16", batch_tokens=budget, max_tokens=128)
            encoder = TextEncoder(model.model, language.Numbers(shape["vocab_size"]), spec)
            found["runs"][f"{attention}, {budget} tokens"] = _encoded(
                on, encoder, operations, inputs, found["peak_flops"]
            )
        if attention == "sdpa":
            found["profile"] = on.top_operators(lambda encoder=encoder: encoder.encode(inputs[:64]))  # type: ignore[misc]
        del model, encoder
    rates = [one["tokens_per_second"] for one in found["runs"].values() if isinstance(one, dict)]
    tokens = float(np.mean(language.review_lengths(4_096)))
    found["mean_tokens_of_a_review"] = tokens
    found["hours_of_task_1_texts"] = round((REVIEWS + ITEMS) * tokens / max(rates) / 3600, 2)
    found["seeing"] = _seeing(on)
    return found


def _encoded(
    on: Run, encoder: TextEncoder, operations: Operations, inputs: list[EncoderInput], peak: float
) -> dict[str, Any]:
    encoder.encode(inputs[:32])
    on.synchronise()
    operations.take()
    began = time.perf_counter()
    encoded = encoder.encode(inputs)
    on.synchronise()
    seconds = time.perf_counter() - began
    tokens = int(np.sum(encoded.tokens))
    return {
        "tokens_per_second": round(tokens / seconds, 1),
        "padded_share": round(1 - tokens / encoded.padded, 3),
        "share_of_peak": round(operations.take() / seconds / peak, 3), "failed": len(encoded.failed),
    }  # fmt: skip


def _seeing(on: Run) -> dict[str, Any]:
    """A vision-language model of 8B in direct forward passes: images of 336 x 336 and 60 tokens of text."""
    shape, vision = (language.TINY, language.CLIP_TINY) if on.tiny else (language.LLAMA_3_8B, language.CLIP_LARGE)
    model, image_tokens = language.seeing_model(shape, vision, on.device)
    rows, found = (2,) if on.tiny else (8, 16, 32), dict[str, Any]()
    for count in rows:
        inputs = language.image_inputs(count, image_tokens, 60, vision, on.device)

        def step(inputs: dict[str, Tensor] = inputs, count: int = count) -> int:
            with torch.inference_mode():
                model(**inputs, use_cache=False, logits_to_keep=1)
            return count

        found[f"{count} rows"] = {"items_per_second": round(on.per_second(step), 2)}
    fastest = max(one["items_per_second"] for one in found.values())
    return {**found, "tokens_of_an_item": image_tokens + 60, "hours_of_task_1_items": round(ITEMS / fastest / 3600, 2)}


def generation(on: Run) -> dict[str, Any]:
    """Pseudo-interactions by the project's own generator: tokens a second, and what waiting for the slowest row costs."""
    shape = language.TINY if on.tiny else language.LLAMA_2_7B
    model, tokenizer = language.causal_model(shape, on.device), language.Numbers(shape["vocab_size"])
    most, prompt = (12, 24) if on.tiny else (200, 120)
    found: dict[str, Any] = {"shape": shape, "batches": {}}
    for rows in (2,) if on.tiny else (64, 128, 256, 512):
        spec = GeneratorSpec(
            model="random", texts=2 if on.tiny else 10, max_new_tokens=most, dtype="bfloat16", temperature=1.0,
            batch_tokens=rows * (prompt + 60 + most),
        )  # fmt: skip
        generator = CausalGenerator(model, tokenizer, spec)
        prompts = [
            PseudoPrompt(user=f"u{k}", source="books", target="movies", titles=("title",) * 10) for k in range(rows)
        ]
        began = time.perf_counter()
        answers = generator.generate(prompts)
        on.synchronise()
        seconds, lengths = time.perf_counter() - began, np.array([len(answer.split()) for answer in answers])
        found["batches"][str(rows)] = {
            "tokens_per_second": round(float(lengths.sum()) / seconds, 1),
            "idle_share": round(1 - float(lengths.mean()) / max(1, int(lengths.max())), 3),
            "users_per_hour": round(3600 * rows / seconds),
        }  # fmt: skip
    fastest = max(one["users_per_hour"] for one in found["batches"].values())
    found["hours_of_43663_users"] = round(USERS_WITHOUT / fastest, 2)
    found["refill"] = "not built: a batch waits for its slowest row; idle_share is what a refill could win"
    found["profile"] = on.top_operators(lambda: generator.generate(prompts[: 2 if on.tiny else 16]))
    return found


def faults(on: Run) -> dict[str, Any]:
    """Out of memory halves the budget and loses no row; a device that fails is passed on, so that its worker ends."""
    shape = language.TINY
    texts = language.texts_of(language.review_lengths(64), shape["vocab_size"])
    inputs = [EncoderInput(texts=(text,)) for text in texts]
    spec = EncoderSpec(model="random", dtype="bfloat16", batch_tokens=4_096, max_tokens=128)
    small = TextEncoder(language.causal_model(shape, on.device).model, language.Numbers(shape["vocab_size"]), spec)
    whole = small.encode(inputs)
    vectors, hoard = small._vectors, list[Tensor]()

    def greedy(tokens: Any) -> Any:
        if sum(map(len, tokens)) > 1_024:
            if on.device.type == "cuda":  # on purpose: the device itself says that it has no more
                hoard.append(torch.empty(2 * torch.cuda.mem_get_info()[1], dtype=torch.uint8, device=on.device))
            raise torch.OutOfMemoryError("simulated: there is no GPU to fill")
        return vectors(tokens)

    small._vectors = greedy  # type: ignore[method-assign]
    encoded = small.encode(inputs)
    apart = np.abs(encoded.vectors.astype(np.float32) - whole.vectors.astype(np.float32)).max()

    def broken(tokens: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    try:
        run_batch([[1, 2]], broken, lambda batch: 2, small.budget, 4)
        passed_on = False
    except torch.AcceleratorError:
        passed_on = True
    return {
        "budget_before": spec.batch_tokens, "budget_after": small.budget.tokens, "rows_lost": len(encoded.failed),
        "largest_difference": float(apart), "a_failing_device_is_passed_on": passed_on,
    }  # fmt: skip


SECTIONS: dict[str, Callable[[Run], dict[str, Any]]] = {
    "trials": trials, "many": many, "extraction": extraction, "generation": generation, "faults": faults,
}  # fmt: skip


def main() -> int:
    """Run the sections asked for; 0 where all of them ran."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON files")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="comma-separated, in the order they run")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--seconds", type=float, default=2.0, help="of one measurement")
    arguments = parser.parse_args()
    names = arguments.sections.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"unknown section {', '.join(unknown)}; choose from {', '.join(SECTIONS)}")
    cuda, tiny = torch.cuda.is_available(), arguments.size == "tiny"
    if not cuda and not tiny:
        parser.error("there is no GPU; give --size tiny to try the code on a CPU")
    on = Run(torch.device("cuda" if cuda else "cpu"), tiny, 0.05 if tiny else arguments.seconds)
    arguments.out.mkdir(parents=True, exist_ok=True)
    machine = {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "CPU", "torch": torch.__version__,
        "python": platform.python_version(), "size": arguments.size,
    }  # fmt: skip
    failed = 0
    for name in names:
        began = time.perf_counter()
        try:
            found = SECTIONS[name](on)
        except Exception:
            found, failed = {"error": traceback.format_exc()}, failed + 1
        document = {"section": name, **machine, "wall_s": round(time.perf_counter() - began, 1), **found}
        (arguments.out / f"{name}.json").write_text(json.dumps(document, indent=1))
        print(f"{name}: {document['wall_s']} s{', failed' if 'error' in found else ''}", flush=True)
        if cuda:
            torch.cuda.empty_cache()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
