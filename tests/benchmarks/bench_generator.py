"""A chat model as generator of pseudo-items: how fast it decodes, and how many real items its texts find.

    python tests/benchmarks/bench_generator.py speed --model random --users 32 --rows 8
    python tests/benchmarks/bench_generator.py speed --users 16 --rows 8 --most 200
    python tests/benchmarks/bench_generator.py recall --data ../shared/data/food-kitchen --home HOME --users 40

`speed`: prompts whose answers have unequal lengths, by the product (rows that are refilled) and by batches of
transformers' own `generate`, which wait for their longest answer. In CPU seconds of one thread.

`recall`: training overlapping users of Food-Kitchen whom nothing was trained on, half in each direction. Beside the chat
model in several settings: the local model, the most popular items, random ones, those nearest to the user's mean vector,
and item-kNN across the domains (cosine of who has both). Only training users are read; no test user takes part.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
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
        self.answers = self.model.generate(prompts)
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


def recall(data: Path, home: Path, users: int, settings: Sequence[str], most: int) -> None:
    """Print a line for each kind of list."""
    from study.data.domains import given_split, prepare_domains
    from study.data.pseudo_items import histories
    from study.data.tables import make_tables
    from study.home import Home
    from study.plan.load import load_plan
    from trainables.tasks.sequential_build import training_users

    plan, place = load_plan("food-kitchen"), Home(home)

    def silent(*_: Any) -> Any:
        return lambda *_: None

    domains = prepare_domains(plan, data, place, silent)
    tables = {
        name: table for (name, kind), table in make_tables(plan, domains, place, silent).items() if kind == "items"
    }
    pair, spec, encoder = ("food", "kitchen"), plan.features.pseudo, plan.features.text
    assert spec is not None
    assert encoder is not None
    training = training_users(plan.sequences.at(1.0), domains["food"], domains["kitchen"], given_split(plan, data))
    people: list[History] = sorted(histories(training, pair), key=lambda user: user.user)
    titles = {name: item_titles(domains[name]) for name in pair}

    def maker(kind: Any, changed: GeneratorSpec) -> Any:
        from features.encoders.spec import resolve_encoder

        return kind(changed, resolve_encoder(encoder.encoder), titles, tables, place.store, Execution())

    local = maker(_PseudoMaker, spec)
    held_out, fit = local.hold_out([user for user in people if len(local.domains_of(user)) == 2])
    sample = held_out[: users // 2]
    requests = [(user, target) for target in pair for user in sample]

    def show(name: str, lists: Sequence[Any], more: str = "") -> None:
        for n, target in enumerate(pair):
            row = local.recall(sample, fit, target, lists[n * len(sample) :][: len(sample)])[2]
            print(f"{name} -> {target}: recall@{AT} {row['recall']:.4f}, hit {row['hit']:.3f}, "
                  f"{row['different']} different items, {row['users']} users{more}", flush=True)  # fmt: skip

    for target in pair:
        (source,) = set(pair) - {target}

        def items_of(user: History, source: str = source, target: str = target) -> UserItems:
            return UserItems(source=user.items[source], target=user.items[target])

        people_of, fit_of = [items_of(user) for user in sample], [items_of(user) for user in fit]
        near = item_knn(people_of, fit_of, tables[source].ids, tables[target].ids)
        rows = measure_recall(people_of, near, fit_of, (tables[source], tables[target]), (source, target), 0)
        for row in rows:
            if row["at"] == AT:
                name = "item-kNN" if row["items"] == "pseudo" else row["items"]
                print(f"{name} -> {target}: recall@{AT} {row['recall']:.4f}, hit {row['hit']:.3f}, "
                      f"{row['different']} different items", flush=True)  # fmt: skip
    show("local model", local.lists(requests, local.generator(fit)))
    base = GeneratorSpec(model="smollm2", texts=AT, max_new_tokens=most)
    loaded = load_generator(resolve_generator(base))
    for name in settings:
        fields = dict(SETTINGS[name])
        examples = fields.pop("examples", None)
        changed = replace(base, **fields)
        asked = maker(Asked, changed)
        asked.model = (CausalGenerator if examples is None else Examples)(loaded.model, loaded.tokenizer, changed)
        if examples:
            shown = fit[:examples]
            asked.model.examples = [
                (asked.prompt(user, target), asked.distinct_titles(target, user.items[target])[:AT])
                for target in pair for user in shown
            ]  # fmt: skip
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "recall"])
    parser.add_argument("--model", default="smollm2", help="of speed: a generator, or random")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--home", type=Path)
    parser.add_argument("--users", type=int, default=40, help="prompts: half of them in each direction")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--most", type=int, default=400, help="tokens of an answer")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.what == "speed":
        speed(given.model, given.users, given.rows, given.most)
    else:
        recall(given.data, given.home, given.users, given.settings, given.most)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
