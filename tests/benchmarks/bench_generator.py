"""A chat model as generator of pseudo-items: how fast it decodes, and how many real items its texts find.

    python tests/benchmarks/bench_generator.py speed --model random --users 32 --rows 8
    python tests/benchmarks/bench_generator.py speed --users 16 --rows 8 --most 200
    python tests/benchmarks/bench_generator.py recall --data ../shared/data/food-kitchen --home HOME --users 40
    python tests/benchmarks/bench_generator.py tune --data ../shared/data/food-kitchen --home HOME --adapters FOLDER

`speed`: prompts whose answers have unequal lengths, by the product (rows that are refilled) and by batches of
transformers' own `generate`, which wait for their longest answer. In CPU seconds of one thread.

`recall`: training overlapping users of Food-Kitchen whom nothing was trained on, half in each direction. Beside the chat
model in several settings: the local model, the most popular items, random ones, those nearest to the user's mean vector,
and item-kNN across the domains (cosine of who has both). Only training users are read; no test user takes part.

`tune`: SmolLM2 fine-tuned by LoRA (`pip install peft`) on the other training overlapping users, for `recall --adapters`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse

from features.pseudo.generate import Execution, History, _PseudoMaker, item_titles
from features.pseudo.generator import (
    CausalGenerator,
    GeneratorSpec,
    ResolvedGenerator,
    load_generator,
    resolve_generator,
)
from features.pseudo.prompts import PseudoPrompt, find_wording, parse_texts, write_prompt
from features.pseudo.recall import UserItems, measure_recall

AT = 20
DOMAINS = ("food", "kitchen")
LEARNING_RATE, BATCH_USERS = 5e-4, 4  # of LoRA
SETTINGS: dict[str, dict[str, Any]] = {
    "chat": {},
    "chat, temperature 0": {"temperature": 0.0},
    "chat, temperature 1": {"temperature": 1.0},
    "chat, 3 titles shown": {"history": 3},
    "plain": {"examples": 0},
    "plain, 3 examples": {"examples": 3},
}


class Examples(CausalGenerator):
    """Without the chat template: the plain wording, after that of other users with their own titles."""

    examples: Sequence[tuple[PseudoPrompt, Sequence[str]]] = ()

    def _tokens(self, prompt: PseudoPrompt) -> list[int]:
        wording = find_wording(self.spec.prompt)
        texts = [
            write_prompt(one, wording, 0, chat=False) + "\n".join(titles) + "\n\n"
            for one, titles in self.examples
            if one.target == prompt.target
        ]
        text = "".join([*texts, write_prompt(prompt, wording, 0, chat=False)])
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids


class Asked(_PseudoMaker):
    """Lists by a generator that is called directly, so that its answers can be looked at."""

    model: CausalGenerator
    answers: list[str]

    def _texts(self, prompts: Sequence[PseudoPrompt], generator: ResolvedGenerator) -> list[list[str]]:
        # A direction at a time: all of its prompts begin with the same examples, which are read once.
        parts = [list(group) for _, group in groupby(prompts, key=lambda prompt: prompt.target)]
        self.answers = [answer for part in parts for answer in self.model.generate(part)]
        return [parse_texts(answer, self.spec.texts) for answer in self.answers]


def speed(model: str, prompts: int, rows: int, most: int) -> None:
    """Print tokens a second of both ways, and how many texts are the same."""
    from features.pseudo.decoding import Decoder
    from tests.features.pseudo.batches import answer_in_batches
    from tests.gpu import language

    if model == "random":  # 8 layers of 256, whose texts are token numbers
        shape = {
            "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        }  # fmt: skip
        torch.manual_seed(0)
        spec = GeneratorSpec(model=model, dtype="float32", texts=6, max_new_tokens=most, temperature=1.0, seed=1)
        network = language.causal_model(shape, torch.device("cpu")).float()
        generator = CausalGenerator(network, language.Numbers(shape["vocab_size"]), spec)
    else:
        spec = GeneratorSpec(model=model, dtype="float32", texts=4, max_new_tokens=most, temperature=0.7)
        generator = load_generator(resolve_generator(spec))
    makers = ("Bodum", "Lipton", "Norpro", "OXO Good Grips", "Cuisinart", "Lodge")
    things = ("Tea Press", "Chef's Knife 8 Inch", "Cast Iron Skillet", "Silicone Spatula Set", "Mixing Bowls")
    titles = [f"{maker} {thing}" for maker in makers for thing in things]
    draw = np.random.default_rng(0)
    asked = [
        PseudoPrompt(user=f"u{k}", source="kitchen", target="food", titles=tuple(draw.choice(titles, 1 + k % 6)))
        for k in range(prompts)
    ]
    tokens = [generator._tokens(one) for one in asked]
    start = time.process_time()
    refilled = Decoder(generator, tokens, [one.user for one in asked], rows)
    answers = refilled.run()
    ours = time.process_time() - start
    print(f"refilled, {rows} rows: {refilled.tokens / ours:.1f} tokens/s ({ours:.0f} s of CPU)", flush=True)
    lengths = np.array([len(generator.tokenizer(answer)["input_ids"]) for answer in answers])
    print(f"{refilled.tokens} tokens; answers of {lengths.min()} to {lengths.max()}, mean {lengths.mean():.0f}")
    start = time.process_time()
    expected = answer_in_batches(generator, asked)
    theirs = time.process_time() - start
    same = sum(a == b for a, b in zip(answers, expected, strict=True))
    print(f"batches: {refilled.tokens / theirs:.1f} tokens/s ({theirs:.0f} s of CPU)")
    print(f"{theirs / ours:.2f} times; {same} of {prompts} answers are the same")


def item_knn(
    held_out: Sequence[UserItems], fit: Sequence[UserItems], sources: Sequence[str], targets: Sequence[str]
) -> list[list[str]]:
    """Return the AT target items nearest to each user's source items, by the cosine of who has both."""

    def table(items: Sequence[str], rows: Sequence[Sequence[str]]) -> sparse.csr_array:
        number = {item: n for n, item in enumerate(items)}
        user = [n for n, row in enumerate(rows) for _ in row]
        column = [number[item] for row in rows for item in row]
        matrix = sparse.csr_array((np.ones(len(user)), (user, column)), shape=(len(rows), len(items)))
        matrix.data[:] = 1
        return matrix

    source, target = table(sources, [one.source for one in fit]), table(targets, [one.target for one in fit])
    norms = [np.sqrt(matrix.sum(0)).clip(1) for matrix in (source, target)]
    wanted = table(sources, [one.source for one in held_out]) / norms[0]
    scores = np.asarray(((wanted @ source.T) @ target).todense()) / norms[1]
    return [[targets[n] for n in np.argsort(-row, kind="stable")[:AT]] for row in scores]


class Sample:
    """Training overlapping users of Food-Kitchen: `held_out`, whom nothing is trained on, and `fit`, the others."""

    def __init__(self, data: Path, home: Path) -> None:
        from study.data.domains import given_split, prepare_domains
        from study.data.pseudo_items import histories
        from study.data.tables import make_tables
        from study.home import Home
        from study.plan.load import load_plan
        from trainables.tasks.sequential_build import training_users

        def silent(*_: Any) -> Any:
            return lambda *_: None

        plan, self.place = load_plan("food-kitchen"), Home(home)
        assert plan.features.pseudo is not None
        assert plan.features.text is not None
        self.spec, self.encoder = plan.features.pseudo, plan.features.text.encoder
        domains = prepare_domains(plan, data, self.place, silent)
        made = make_tables(plan, domains, self.place, silent)
        self.tables = {name: table for (name, kind), table in made.items() if kind == "items"}
        training = training_users(plan.sequences.at(1.0), domains["food"], domains["kitchen"], given_split(plan, data))
        people: list[History] = sorted(histories(training, DOMAINS), key=lambda user: user.user)
        self.titles = {name: item_titles(domains[name]) for name in DOMAINS}
        self.local = self.maker(_PseudoMaker, self.spec)
        self.held_out, self.fit = self.local.hold_out(
            [user for user in people if len(self.local.domains_of(user)) == 2]
        )

    def maker(self, kind: Any, spec: GeneratorSpec) -> Any:
        """A maker of lists by a generator."""
        from features.encoders.spec import resolve_encoder

        encoder = resolve_encoder(self.encoder)
        return kind(spec, encoder, self.titles, self.tables, self.place.store, Execution())


def recall(
    sample: Sample, users: int, settings: Sequence[str], most: int, adapters: Sequence[Path], dtype: str
) -> None:  # fmt: skip
    """Print two lines for each kind of list, a direction each."""
    held_out = sample.held_out[: users // 2]
    requests = [(user, target) for target in DOMAINS for user in held_out]

    def show(name: str, lists: Sequence[Any]) -> None:
        for n, target in enumerate(DOMAINS):
            made = lists[n * len(held_out) :][: len(held_out)]
            show_row(name, target, sample.local.recall(held_out, sample.fit, target, made)[2])

    for target in DOMAINS:
        (source,) = set(DOMAINS) - {target}

        def items_of(user: History, source: str = source, target: str = target) -> UserItems:
            return UserItems(source=user.items[source], target=user.items[target])

        people, fit = [items_of(user) for user in held_out], [items_of(user) for user in sample.fit]
        tables = sample.tables[source], sample.tables[target]
        near = item_knn(people, fit, tables[0].ids, tables[1].ids)
        for row in measure_recall(people, near, fit, tables, (source, target), 0):
            if row["at"] == AT:
                show_row("item-kNN" if row["items"] == "pseudo" else row["items"], target, row)
    show("local model", sample.local.lists(requests, sample.local.generator(sample.fit)))
    base = GeneratorSpec(model="smollm2", texts=AT, max_new_tokens=most, dtype=dtype)
    loaded = load_generator(resolve_generator(base))

    def answer(name: str, kind: type[CausalGenerator], spec: GeneratorSpec, examples: int = 0) -> None:
        asked = sample.maker(Asked, spec)
        asked.model = kind(loaded.model, loaded.tokenizer, spec)
        if examples:
            asked.model.examples = [pair for user in sample.fit[:examples] for pair in pairs(asked, user, AT)]
        start, cpu = time.perf_counter(), time.process_time()
        lists = asked.lists(requests, resolve_generator(base))
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        texts = [parse_texts(answer, AT) for answer in asked.answers]
        count = np.array([len(one) for one in texts])
        tokens = sum(len(ids) for ids in loaded.tokenizer(asked.answers)["input_ids"])
        show(name, lists)
        print(f"  {(count == AT).mean():.2f} of the answers give {AT} texts, {(count > 0).mean():.2f} any; mean "
              f"{count.mean():.1f}; {len({text.casefold() for one in texts for text in one})} different texts; "
              f"{tokens} tokens in {cpu:.0f} s of CPU ({seconds:.0f} s)", flush=True)  # fmt: skip
        print(f"  {asked.answers[0][:300]!r}", flush=True)

    for name in settings:
        fields = dict(SETTINGS[name])
        examples = fields.pop("examples", None)
        answer(name, CausalGenerator if examples is None else Examples, replace(base, **fields), examples or 0)
    for folder in adapters:
        from peft import PeftModel

        loaded = load_generator(resolve_generator(base))
        loaded.model = PeftModel.from_pretrained(loaded.model, folder).merge_and_unload()
        for temperature in (0.0, 0.3, 1.0):
            answer(f"{folder.name}, temperature {temperature}", CausalGenerator, replace(base, temperature=temperature))


def show_row(name: str, target: str, row: Mapping[str, Any]) -> None:
    """Print the recall of one kind of list in one direction."""
    print(f"{name} -> {target}: recall@{AT} {row['recall']:.4f}, hit {row['hit']:.3f}, {row['different']} different "
          f"items, {row['users']} users", flush=True)  # fmt: skip


def pairs(maker: _PseudoMaker, user: History, most: int) -> list[tuple[PseudoPrompt, Sequence[str]]]:
    """Both directions' prompts of a user who has both domains, and the titles that would be right."""
    return [
        (maker.prompt(user, target), maker.distinct_titles(target, user.items[target])[:most]) for target in DOMAINS
    ]


def tune(sample: Sample, out: Path, minutes: float, most: int, dtype: str) -> None:
    """Fine-tune SmolLM2 by LoRA on what `fit` users have in the other domain, in the chat prompt; keep the adapter.

    Only the answer is learned. Users come in a drawn order, both directions of each, until the time is up.
    """
    from peft import LoraConfig, get_peft_model

    generator = load_generator(resolve_generator(GeneratorSpec(model="smollm2", texts=AT, dtype=dtype)))
    maker = sample.maker(Asked, generator.spec)
    torch.manual_seed(0)
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(
        generator.model, LoraConfig(r=16, lora_alpha=32, target_modules=layers, task_type="CAUSAL_LM")
    )
    whole = model.get_base_model()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    start, seen, tokens, recent = time.perf_counter(), 0, 0, [0.0]
    order = np.random.default_rng(0).permutation(len(sample.fit))
    while time.perf_counter() - start < minutes * 60 and seen < len(order):
        batch = [pair for n in order[seen : seen + BATCH_USERS] for pair in pairs(maker, sample.fit[n], most)]
        seen += BATCH_USERS
        # Warm-up over the first twentieth, then down to 0 by the clock.
        part = (time.perf_counter() - start) / (minutes * 60)
        optimiser.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, part * 20, 1.05 - part)
        rows = []
        for prompt, titles in batch:
            asked = generator._tokens(prompt)
            # No end: a user's list goes on for as many texts as are asked for.
            rows.append((asked, generator.tokenizer("\n".join([*titles, ""]), add_special_tokens=False)["input_ids"]))
        width = max(len(asked) + len(answer) for asked, answer in rows)
        ids = torch.full((len(rows), width), generator.pad)
        label = torch.zeros_like(ids, dtype=torch.bool)
        for n, (asked, answer) in enumerate(rows):
            ids[n, : len(asked) + len(answer)] = torch.tensor(asked + answer)
            label[n, len(asked) : len(asked) + len(answer)] = True
        mask = (torch.arange(width) < torch.tensor([len(a) + len(b) for a, b in rows])[:, None]).long()
        # The vocabulary's logits are computed where an answer is, not for the prompts.
        state = whole.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1][label[:, 1:]]
        loss = torch.nn.functional.cross_entropy(whole.lm_head(state).float(), ids[label])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        tokens, recent = tokens + int(mask.sum()), [*recent[-49:], loss.item()]
        if seen // BATCH_USERS % 5 == 0:
            print(f"{seen} users, {tokens} tokens, {(time.perf_counter() - start) / 60:.1f} minutes, "
                  f"loss {np.mean(recent):.3f}", flush=True)  # fmt: skip
    model.save_pretrained(str(out))
    print(f"{seen} of {len(order)} users, {tokens} tokens, loss {np.mean(recent):.3f}: {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "recall", "tune"])
    parser.add_argument("--model", default="smollm2", help="of speed: a generator, or random")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--home", type=Path)
    parser.add_argument("--users", type=int, default=40, help="prompts: half of them in each direction")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--most", type=int, default=400, help="tokens of an answer")
    parser.add_argument("--dtype", default="float32", help="of recall and tune; bfloat16 where the CPU multiplies it")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS))
    parser.add_argument(
        "--adapters", nargs="*", type=Path, default=[], help="folders of LoRA; of tune: the one to write"
    )
    parser.add_argument("--minutes", type=float, default=50, help="of tune")
    parser.add_argument("--titles", type=int, default=10, help="of tune: most titles of an answer")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.what == "speed":
        speed(given.model, given.users, given.rows, given.most)
    elif given.what == "recall":
        recall(Sample(given.data, given.home), given.users, given.settings, given.most, given.adapters, given.dtype)
    else:
        tune(Sample(given.data, given.home), given.adapters[0], given.minutes, given.titles, given.dtype)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
