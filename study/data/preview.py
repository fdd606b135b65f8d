"""What a plan's preparation will find and do, told before anything is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from features.domains.domain import Domain, prepare_domain
from features.encoders.encoder import EncoderSpec, resolve_encoder
from features.encoders.throughput import Rate, measure_rate
from features.extraction.workers import count_actors, count_threads
from study.data.prepare import data_folder, estimates, given_split, pair_name, pairs_of, ratios_of, unwatched
from study.plan.schema import Plan
from study.specs import Cluster
from trainables.tasks.sequential import OVERLAPPING
from trainables.tasks.sequential_build import training_users


@dataclass(frozen=True)
class Size:
    """How large a domain is."""

    users: int
    items: int
    interactions: int
    titles_left: int  # that no vector is stored of


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What a plan's preparation will find and do."""

    domains: Mapping[str, Size]
    users: Mapping[str, int]  # pair of domains and ratio -> users of one domain, who texts are generated for
    texts: int  # for each of them
    note: str


def outlook(plan: Plan, data: Path | None, home: Path) -> Outlook | None:
    """Of a plan of sequences: what its domains hold, read into a folder that is gone afterwards. None: not told ahead."""
    if plan.task_type.name != "sequences":
        return None
    if plan.simulate is not None:
        files = {f"{name}.jsonl.gz": size for name, size in plan.simulate.domains.items()}
        made = {name: files[spec.interactions] for name, spec in plan.domains.items()}
        sizes = {name: Size(size.users, size.items, size.ratings, size.items) for name, size in made.items()}
        shared = plan.simulate.overlap
        kept = round(shared * (1 - plan.sequences.validation_share - plan.sequences.test_share))
        single = {pair: made[pair[0]].users + made[pair[1]].users - 2 * shared for pair in pairs_of(plan)}
        users = {
            pair_name(pair, ratio): single[pair] + 2 * round(kept * (1 - ratio))
            for pair in pairs_of(plan)
            for ratio in ratios_of(plan)
        }
        return _outlook(plan, sizes, users, "as simulated, before filters")
    with TemporaryDirectory() as folder:
        raw = data_folder(plan, data, home, unwatched)
        domains = {name: prepare_domain(spec, raw, Path(folder)) for name, spec in plan.domains.items()}
        left = {name: of.rows_left for (name, _), of in estimates(plan, domains, home).items()}
        sizes = {name: _size(domain, left.get(name, 0)) for name, domain in domains.items()}
        users = users_to_ask_for(plan, domains, raw)
    return _outlook(plan, sizes, users, "after filters")


def extraction(plan: Plan, domains: Mapping[str, Domain], home: Path, cluster: Cluster) -> Iterator[str]:
    """A line for each feature table: what is left to encode, and how long it takes the cluster at hand.

    The time is measured, once for each encoder: one worker encodes a sample of what is left of its first table, here or,
    on a cluster, where workers run.
    """
    found = estimates(plan, domains, home)
    text = plan.features.text
    if text is None or not found:
        yield "rating-based vectors: no texts to encode"
        return
    workers, measure = _workers(cluster)
    rates: dict[EncoderSpec, Rate] = {}
    for (name, kind), left in found.items():
        line = f"{kind} of {name}: {left.rows_left:,} of {left.rows:,} rows to encode, {left.texts_left:,} texts, "
        encoder = text.spec(kind).encoder
        line += f"about {left.tokens_left:,} tokens{' without those of images' if encoder.looks else ''}, "
        line += f"{left.bytes_left / 1e6:,.1f} MB of vectors"
        if left.images_left:
            yield f"{line}, {left.images_left:,} images to find first"
        elif left.sample:
            if encoder not in rates:
                rates[encoder] = measure(resolve_encoder(encoder), left.sample, home / "store")
            rate = rates[encoder]
            if encoder.looks:  # only the sample tells what an image is in tokens
                seconds = left.texts_left / rate.texts_per_second
            else:  # texts of one table are longer than those of another
                seconds = left.tokens_left / rate.tokens_per_second
            speed = f"{rate.tokens_per_second:,.0f} tokens/s{' with them' if encoder.looks else ''}"
            yield f"{line}; about {seconds / workers / 60:,.1f} min on {workers} workers at {speed}"
        else:
            yield line


def _workers(cluster: Cluster) -> tuple[int, Callable[..., Rate]]:
    """How many there will be, and what measures one of them where it would run."""
    if cluster.address is None:
        return count_threads(), measure_rate
    import ray

    from study.engine.launch import connect, most_actors

    connect(cluster)
    actors = most_actors(cluster) or count_actors()
    remote = ray.remote(num_cpus=1, num_gpus=int(actors.on_gpu))(measure_rate)
    return actors.count, lambda *what: ray.get(remote.remote(*what))


def users_to_ask_for(plan: Plan, domains: Mapping[str, Domain], folder: Path) -> dict[str, int]:
    """Training users of one domain, by pair of domains and ratio; none where the plan has no pseudo-items."""
    split = given_split(plan, folder)
    users = {}
    for source, target in pairs_of(plan) if plan.features.pseudo else ():
        for ratio in ratios_of(plan):
            found = training_users(plan.sequences.at(ratio), domains[source], domains[target], split)
            users[pair_name((source, target), ratio)] = int((found.group != OVERLAPPING).sum())
    return users


def _outlook(plan: Plan, sizes: Mapping[str, Size], users: Mapping[str, int], note: str) -> Outlook:
    pseudo = plan.features.pseudo
    return Outlook(domains=sizes, users=users if pseudo else {}, texts=pseudo.texts if pseudo else 0, note=note)


def _size(domain: Domain, left: int) -> Size:
    last = domain.manifest["counts"][-1]
    return Size(last["users"], last["items"], last["interactions"], left)
