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
import gc
import json
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from features.encoders.batches import TokenBudget
from features.encoders.inputs import EncoderInput
from features.encoders.spec import EncoderSpec
from features.encoders.text import TextEncoder
from features.encoders.throughput import Operations, matrix_peak
from features.encoders.vision import ImageTextEncoder
from features.pseudo.decoding import Decoder
from features.pseudo.generator import CausalGenerator, GeneratorSpec
from features.pseudo.prompts import PseudoPrompt
from tests.features.pseudo.batches import answer_in_batches
from tests.gpu import language, tasks
from tests.gpu.failing import rows_after_a_failure
from tests.gpu.side_by_side import trials_per_hour
from tests.gpu.varlen import VarlenEncoder
from trainables.interface import field_types, load_model
from trainables.models.music import Config, VectorUNet
from trainables.trial import open_task, run

TOLERANCES = {"val_rmse": 0.01, "val_ndcg10": 0.03}  # between devices; without dropout, but for LGCD's encoders
RIVALS = ("music", "lgcd", "emcdr", "sasrec")
TASK_1_GOAL_S, TASK_1_CPU_S = 15.0, 454.0  # issue 14; docs/benchmarks.md, one thread
CORPORA = {  # MuSiC's Table 1: reviews of both domains, items of both, each with a text and an image
    "movie-music": (881_003 + 513_247, 156_884 + 159_997),
    "book-movie": (2_772_516 + 881_003, 674_378 + 156_884),
    "book-music": (2_772_516 + 513_247, 674_378 + 159_997),
}
TITLE = "a title of ten words as they are in a shop"
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


def part(found: dict[str, Any], name: str, measure: Callable[[], Any]) -> Any:
    """Put what is measured under a name, or how it failed: one part that fails costs no other. None where it failed."""
    try:
        found[name] = measure()
        return found[name]
    except Exception:
        found[name] = {"error": traceback.format_exc()}
        found["failed_parts"] = [*found.get("failed_parts", []), name]
        return None


# --- sections -----------------------------------------------------------------------------------------------------


def trials(on: Run) -> dict[str, Any]:
    """Models trained on the device and on a CPU thread, from the same seed; a MuSiC trial of the size of Task 1."""
    found: dict[str, Any] = {"tolerances": TOLERANCES}
    size, users, items = (tasks.TINY, 80, 64) if on.tiny else (tasks.SMALL, 3_000, 4_000)
    for model in RIVALS:
        # A folder for each device: what trials share (LGCD's encoders) is trained on each of them.
        with tempfile.TemporaryDirectory() as cpu, tempfile.TemporaryDirectory() as device:
            if load_model(model).TASK_TYPE == "ratings":
                task = [str(tasks.write_task(Path(folder), size)) for folder in (cpu, device)]
            else:
                width = 16 if on.tiny else 384
                task = [str(tasks.write_sequences(Path(folder), users, items, width)) for folder in (cpu, device)]
            part(found, model, partial(_both_devices, on, model, task, 2 if on.tiny else 20))
    part(found, "music_task_1", partial(_task_1, on))
    return found


def _task_1(on: Run) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        task_1 = str(tasks.write_task(Path(name), tasks.TINY if on.tiny else tasks.TASK_1))
        most = 2 if on.tiny else 100
        config = {"steps": 10, "epochs": most, "patience": most}
        _reset_peak(on)
        began, marks = time.perf_counter(), []
        for report in run("music", config, task_1, [0], device=on.device.type):
            marks.append((report.epoch, round(time.perf_counter() - began, 2)))
        found = {
            "seconds": marks[-1][1], "epochs": most, "first_epoch_after_s": next(s for epoch, s in marks if epoch),
            "goal_s": TASK_1_GOAL_S, "cpu_thread_s": TASK_1_CPU_S, "peak_gib": _peak_gib(on),
            "table_held_on_the_device": open_task(task_1, on.device.type).items._held is not None,
        }  # fmt: skip
        short = {**config, "epochs": 3, "feature_epochs": 1, "side_epochs": 1}
        found["profile"] = on.top_operators(lambda: list(run("music", short, task_1, [1], device=on.device.type)))
        open_task.cache_clear()
    return found


def _both_devices(on: Run, model: str, task: list[str], epochs: int) -> dict[str, Any]:
    chosen = load_model(model)
    short = {"epochs": epochs, "feature_epochs": 1, "side_epochs": 1, "encoder_epochs": 1, "dropout": 0.0}
    config = {name: value for name, value in short.items() if name in field_types(chosen.Config)}
    metric, threads = chosen.SELECTION.metric, torch.get_num_threads()
    out: dict[str, Any] = {"metric": metric}
    torch.set_num_threads(1)
    if on.device.type == "cuda":  # its libraries load at the first use, which is none of the trial's seconds
        for _ in run(model, {**config, "epochs": 1}, task[1], [1], device="cuda"):
            pass
    for place, device, folder in zip(("cpu", "device"), ("cpu", on.device.type), task, strict=True):
        began = time.perf_counter()
        *_, last = run(model, config, folder, [0], device=device)
        on.synchronise()
        out[place] = {"value": last.metrics[metric], "seconds": round(time.perf_counter() - began, 2)}
    torch.set_num_threads(threads)
    out["difference"] = abs(out["cpu"]["value"] - out["device"]["value"])
    out["within_tolerance"] = out["difference"] <= TOLERANCES[metric]
    if not on.tiny:
        out["profile"] = on.top_operators(
            lambda: list(run(model, {**config, "epochs": 1}, task[1], [0], device=on.device.type))
        )
    return out


def _reset_peak(on: Run) -> None:
    if on.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak_gib(on: Run) -> float | None:
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if on.device.type == "cuda" else None


def many(on: Run) -> dict[str, Any]:
    """Many trials in one process and in many, and training steps of many seeds: loop, streams, batched weights, graphs."""
    found: dict[str, Any] = {"trial": "MuSiC, 6 epochs, a small task", "trials_per_hour": {}}
    with tempfile.TemporaryDirectory() as folder:
        task = str(tasks.write_task(Path(folder), tasks.TINY if on.tiny else tasks.SMALL))
        config = {"epochs": 1, "feature_epochs": 1, "side_epochs": 1} if on.tiny else {"epochs": 6}
        for seeds in (1, 2) if on.tiny else (1, 8):
            found["trials_per_hour"][f"one process, {seeds} seeds in lockstep"] = round(
                3600 * on.per_second(partial(_lockstep, on, config, task, seeds)), 1
            )
        places = [(on.device.type, 2)] if on.tiny else [("cuda", 4), ("cuda", 16), ("cpu", 16)]
        for device, processes in places:
            found["trials_per_hour"][f"{processes} processes, {device}"] = _noted(
                partial(trials_per_hour, task, config, device, processes, on.seconds * 3)
            )
        open_task.cache_clear()
    found |= {"step": "MuSiC's denoiser, 128 users, forward, backward, Adam", "steps_per_second": {}}
    rows, music = 16 if on.tiny else 128, Config()
    for count in (1, 2) if on.tiny else (1, 8, 64):
        ways: dict[str, Callable[[], Callable[[], int]]] = {
            "loop": partial(_looped, on, music, rows, count, streams=False),
            "streams": partial(_looped, on, music, rows, count, streams=True),
            "batched": partial(_batched, on, music, rows, count),
            "streams_graph": partial(_looped, on, music, rows, count, streams=True, graph=True),
            "batched_graph": partial(_batched, on, music, rows, count, graph=True),
        }
        if not on.tiny and count == 64:
            ways["batched_compiled"] = partial(_batched, on, music, rows, count, compiled=True)
        found["steps_per_second"][str(count)] = {way: _rate(on, make) for way, make in ways.items()}
    found["profile"] = on.top_operators(_batched(on, music, rows, 2 if on.tiny else 64))
    return found


def _lockstep(on: Run, config: dict[str, Any], task: str, seeds: int) -> int:
    for _ in run("music", config, task, list(range(seeds)), device=on.device.type):
        pass
    return seeds


def _noted(measure: Callable[[], float]) -> float | str:
    """A measured number, or in words why there is none: one way that fails says nothing of the others."""
    try:
        return round(measure(), 1)
    except (RuntimeError, NotImplementedError, ValueError, ImportError, AttributeError, TypeError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _rate(on: Run, make: Callable[[], Callable[[], int]]) -> float | str:
    """Steps a second."""
    return _noted(lambda: on.per_second(make()))


def _inputs(on: Run, config: Config, rows: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    x, condition, clean = (torch.randn(count, rows, config.dim, generator=draw).to(on.device) for _ in range(3))
    t = torch.randint(1, config.steps + 1, (count, rows), generator=draw).to(on.device)
    return x, t, condition, clean


def _looped(
    on: Run, config: Config, rows: int, count: int, *, streams: bool, graph: bool = False
) -> Callable[[], int]:  # fmt: skip
    networks = [VectorUNet(config).to(on.device).eval() for _ in range(count)]
    optimisers = [torch.optim.Adam(one.parameters(), fused=True, capturable=graph) for one in networks]
    x, t, condition, clean = _inputs(on, config, rows, count)
    cuda = on.device.type == "cuda"
    lanes = [torch.cuda.Stream() if streams and cuda else None for _ in networks]

    def step() -> int:
        current = torch.cuda.current_stream() if cuda else None
        for k, (network, optimiser, lane) in enumerate(zip(networks, optimisers, lanes, strict=True)):
            if lane is not None and current is not None:
                lane.wait_stream(current)
            with torch.cuda.stream(lane):  # None: the stream that is current
                loss = (network(x[k], t[k], condition[k]) - clean[k]).square().mean()
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
        for lane in lanes:
            if lane is not None and current is not None:
                current.wait_stream(lane)
        return count

    return _captured(on, step) if graph else step


def _batched(
    on: Run, config: Config, rows: int, count: int, *, graph: bool = False, compiled: bool = False
) -> Callable[[], int]:  # fmt: skip
    from torch.func import functional_call, grad, stack_module_state, vmap

    networks = [VectorUNet(config).to(on.device).eval() for _ in range(count)]
    weights, buffers = stack_module_state(networks)  # type: ignore[arg-type]
    weights = {name: value.detach() for name, value in weights.items()}
    mean, square = ({name: torch.zeros_like(value) for name, value in weights.items()} for _ in range(2))
    x, t, condition, clean = _inputs(on, config, rows, count)
    rate = torch.logspace(-4, -2, count, device=on.device)  # a learning rate each: configurations, not only seeds
    network = networks[0]

    def loss(own: Any, buffer: Any, x_BD: Tensor, t_B: Tensor, condition_BD: Tensor, clean_BD: Tensor) -> Tensor:
        found: Tensor = functional_call(network, (own, buffer), (x_BD, t_B, condition_BD))
        return (found - clean_BD).square().mean()

    gradient = vmap(grad(loss), randomness="different")

    def step() -> int:
        for name, slope in gradient(weights, buffers, x, t, condition, clean).items():
            mean[name].mul_(0.9).add_(slope, alpha=0.1)
            square[name].mul_(0.999).addcmul_(slope, slope, value=0.001)
            change = mean[name] / (square[name].sqrt() + 1e-8)
            weights[name].sub_(change * rate.view(-1, *[1] * (change.dim() - 1)))
        return count

    if compiled:
        whole: Callable[[], int] = torch.compile(step)
        return whole
    return _captured(on, step) if graph else step


def _captured(on: Run, step: Callable[[], int]) -> Callable[[], int]:
    """The step as one CUDA graph, on the numbers that it was captured on."""
    if on.device.type != "cuda":
        raise NotImplementedError("CUDA graphs need a GPU")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            count = step()
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
    peak, found = matrix_peak(on.device, torch.bfloat16), dict[str, Any]()
    found |= {"shape": shape, "peak_flops": peak, "runs": {}, "goal_share_of_peak": 0.5}
    texts = language.texts_of(language.review_lengths(32 if on.tiny else 4_096), shape["vocab_size"])
    inputs = [EncoderInput(texts=(text,)) for text in texts]
    model = language.causal_model(shape, on.device).model
    operations, tokenizer = Operations(model), language.Numbers(shape["vocab_size"])
    for attention in ("sdpa", "flash_attention_2", "varlen"):  # the last one changes how the model attends, for good
        kind = VarlenEncoder if attention == "varlen" else TextEncoder
        try:
            if attention != "varlen":
                model.set_attn_implementation(attention)
            for budget in (256,) if on.tiny else (8_192, 32_768, 131_072):
                spec = EncoderSpec(model="random", dtype="bfloat16", batch_tokens=budget, max_tokens=128)
                encoder = kind(model, tokenizer, spec)
                found["runs"][f"{attention}, {budget} tokens"] = _encoded(on, encoder, operations, inputs, peak)
                if attention == "sdpa" and budget <= 8_192:
                    found["profile"] = on.top_operators(partial(encoder.encode, inputs[:256]))
        except (ImportError, ValueError, RuntimeError) as error:
            found["runs"][attention] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    good = {way: one for way, one in found["runs"].items() if isinstance(one, dict) and not one["failed"]}
    found["fastest"] = max(good, key=lambda way: good[way]["tokens_per_second"])
    tokens = float(np.mean(language.review_lengths(4_096)))
    found["mean_tokens_of_a_review"], rate = tokens, good[found["fastest"]]["tokens_per_second"]
    del model, encoder
    _free(on)
    seeing = part(found, "seeing", partial(_seeing, on, peak))
    found["hours"] = {
        name: {
            "reviews": round(reviews * tokens / rate / 3600, 3),
            "items": round(items / seeing["items_per_second"] / 3600, 3) if seeing else None,
        }
        for name, (reviews, items) in CORPORA.items()
    }
    return found


def _free(on: Run) -> None:
    gc.collect()
    if on.device.type == "cuda":
        torch.cuda.empty_cache()


def _encoded(
    on: Run, encoder: TextEncoder | ImageTextEncoder, operations: Operations, inputs: list[EncoderInput], peak: float
) -> dict[str, Any]:
    encoder.encode(inputs[:32])
    _reset_peak(on)
    on.synchronise()
    operations.take()
    began = time.perf_counter()
    encoded = encoder.encode(inputs)
    on.synchronise()
    seconds = time.perf_counter() - began
    tokens = int(np.sum(encoded.tokens))
    return {
        "tokens_per_second": round(tokens / seconds, 1), "seconds": round(seconds, 4),
        "padded_share": round(1 - tokens / encoded.padded, 3),
        "share_of_peak": round(operations.take() / seconds / peak, 3), "failed": len(encoded.failed),
        "peak_gib": _peak_gib(on),
    }  # fmt: skip


def _seeing(on: Run, peak: float) -> dict[str, Any]:
    """Items with an image of 448 x 448 and a text by a vision-language model of 8B, through the project's own encoder."""
    shape, count, side = (language.QWEN_3_VL_TINY, 4, 32) if on.tiny else (language.QWEN_3_VL_8B, 256, 448)
    found: dict[str, Any] = {"shape": shape, "runs": {}}
    with tempfile.TemporaryDirectory() as name:
        spec = EncoderSpec(model="random", sees=True, dtype="bfloat16", max_tokens=64)
        encoder = language.seeing_encoder(shape, on.device, Path(name), spec)
        images = language.save_images(Path(name), count, side)
        texts = language.texts_of(np.full(count, 60), 390)
        inputs = [EncoderInput(texts=(text,), image=image) for text, image in zip(texts, images, strict=True)]
        operations = Operations(encoder.model)
        for budget in (256,) if on.tiny else (2_048, 8_192, 32_768):
            encoder.budget = TokenBudget(budget)
            run_of = _encoded(on, encoder, operations, inputs, peak)
            found["runs"][f"{budget} tokens"] = {**run_of, "items_per_second": round(count / run_of["seconds"], 2)}
        found["profile"] = on.top_operators(partial(encoder.encode, inputs[:32]))
    found["items_per_second"] = max(one["items_per_second"] for one in found["runs"].values())
    return found


def generation(on: Run) -> dict[str, Any]:
    """Pseudo-interactions by transformers' batches, and by the project's refilled rows: tokens a second, users an hour."""
    shape = language.TINY if on.tiny else language.LLAMA_2_7B
    model, tokenizer = language.causal_model(shape, on.device), language.Numbers(shape["vocab_size"])
    most, prompt = (12, 104) if on.tiny else (200, 104)
    found: dict[str, Any] = {"shape": shape, "answers_of_at_most": most, "batches": {}, "refilled": {}}
    made: CausalGenerator | None = None
    for rows in (2,) if on.tiny else (64, 128, 256, 512):
        spec = GeneratorSpec(
            model="random", texts=2 if on.tiny else 10, max_new_tokens=most, dtype="bfloat16", temperature=1.0,
            batch_tokens=rows * (prompt + most),
        )  # fmt: skip
        made = generator = CausalGenerator(model, tokenizer, spec)
        prompts = [
            PseudoPrompt(user=f"u{k}", source="books", target="movies", titles=(f"{k} {TITLE}", *[TITLE] * 9))
            for k in range(2 * rows)
        ]
        try:
            generator.generate(prompts[:rows]) if on.tiny or rows == 64 else None  # what a first call loads
            found["batches"][str(rows)] = _generated(on, prompts[:rows], partial(answer_in_batches, generator))
            if rows <= 128:  # two batches of users, in the rows of one
                tokens, users = [generator._tokens(prompt) for prompt in prompts], [prompt.user for prompt in prompts]
                one = Decoder(generator, tokens, users, rows)
                found["refilled"][str(rows)] = {
                    **_generated(on, prompts, lambda _, one=one: one.run()),
                    "full_rows": round(
                        (one.tokens - len(prompts)) / max(1, one.row_steps), 3
                    ),  # a first token takes no step
                }
        except torch.OutOfMemoryError as error:
            found["batches"][str(rows)] = f"out of memory: {' '.join(str(error).split())[:120]}"
        _free(on)
    rates = [
        one["users_per_hour"] for way in ("batches", "refilled") for one in found[way].values() if isinstance(one, dict)
    ]
    found["hours_of_43663_users"] = round(USERS_WITHOUT / max(rates), 2)
    assert made is not None
    short = CausalGenerator(model, tokenizer, replace(made.spec, max_new_tokens=8))
    found["profile"] = on.top_operators(partial(short.generate, prompts[:64]))
    return found


def _generated(on: Run, prompts: list[PseudoPrompt], generate: Callable[[list[PseudoPrompt]], list[str]]) -> Any:
    _reset_peak(on)
    began = time.perf_counter()
    answers = generate(prompts)
    on.synchronise()
    seconds, lengths = time.perf_counter() - began, np.array([len(answer.split()) for answer in answers])
    return {
        "tokens_per_second": round(float(lengths.sum()) / seconds, 1), "seconds": round(seconds, 3),
        "waits_for_the_longest": round(1 - float(lengths.mean()) / max(1, int(lengths.max())), 3),
        "users_per_hour": round(3600 * len(prompts) / seconds), "peak_gib": _peak_gib(on),
    }  # fmt: skip


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

    found: dict[str, Any] = {
        "budget_before": spec.batch_tokens, "budget_after": small.budget.tokens, "rows_lost": len(encoded.failed),
        "largest_difference": float(apart), "profile": on.top_operators(partial(small.encode, inputs)),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        part(found, "failing_device", lambda: rows_after_a_failure(Path(name), on.device.type))
    return found


SECTIONS: dict[str, Callable[[Run], dict[str, Any]]] = {
    "trials": trials, "many": many, "extraction": extraction, "generation": generation, "faults": faults,
}  # fmt: skip


def main() -> int:
    """Run the sections asked for; 0 where all of them ran."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON files")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="comma-separated, in the order they run")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--seconds", type=float, default=1.0, help="of one measurement")
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
        failed += "failed_parts" in found
        bad = "failed" if "error" in found else ", ".join(found.get("failed_parts", []))
        print(f"{name}: {document['wall_s']} s{f', {bad}: see the file' if bad else ''}", flush=True)
        _free(on)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
