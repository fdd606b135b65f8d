"""What a plan's preparation will find and do, before anything is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from features.domains.domain import Domain, find_domain, prepare_domain
from features.encoders.spec import EncoderSpec, resolve_encoder
from features.encoders.throughput import Throughput, measure_throughput
from features.extraction.workers import count_actors, count_threads
from study.data.pseudo_items import all_ratios, domain_pairs, pair_name, users_to_generate_for
from study.data.tables import estimates
from study.data.tasks import task_rules
from study.home import Home
from study.plan.schema import Plan
from study.specs import Cluster


@dataclass(frozen=True)
class DomainSize:
    """How large a domain is."""

    users: int
    items: int
    interactions: int
    titles_left: int  # without a stored vector


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What a plan's preparation will find and do."""

    domains: Mapping[str, DomainSize]
    users: Mapping[str, int]  # pair of domains and ratio -> users of one domain, whom texts are generated for
    texts: int  # for each of them
    note: str


def preview_simulated(plan: Plan) -> Preview | None:
    """Return what simulated domains will hold; None for task types whose domains say it by themselves."""
    return _preview(plan, *_simulated(plan), "as simulated, before filters") if task_rules(plan).previewed else None


def preview(plan: Plan, domains: Mapping[str, Domain], split: Mapping[str, str] | None, home: Home) -> Preview:
    """Return what language models have to do for these domains."""
    left = {name: work.rows_left for (name, _), work in estimates(plan, domains, home).items()}
    sizes = {name: _size(domain, left.get(name, 0)) for name, domain in domains.items()}
    return _preview(plan, sizes, users_to_generate_for(plan, domains, split), "after filters")


@contextmanager
def domains_for_check(plan: Plan, data: Path, home: Home) -> Iterator[dict[str, Domain]]:
    """Prepare the domains into a folder that is gone afterwards; those that the home folder holds are opened there."""
    with TemporaryDirectory() as folder:
        domains = {}
        for name, spec in plan.domains.items():
            stored = find_domain(spec, data, home.domains) if home.domains.is_dir() else None
            domains[name] = stored or prepare_domain(spec, data, Path(folder))
        yield domains


def _simulated(plan: Plan) -> tuple[dict[str, DomainSize], dict[str, int]]:
    """Return the sizes of the domains, and the users to generate for, as the simulator's specification gives them."""
    assert plan.simulate is not None
    titles = 1 if plan.features.text else 0
    files = {f"{name}.jsonl.gz": size for name, size in plan.simulate.domains.items()}
    domains = {name: files[spec.files("interactions")[0]] for name, spec in plan.domains.items()}
    sizes = {
        name: DomainSize(size.users, size.items, size.ratings, titles * size.items) for name, size in domains.items()
    }
    shared = plan.simulate.overlap
    training = round(shared * (1 - plan.sequences.validation_share - plan.sequences.test_share))
    users = {}
    for pair in domain_pairs(plan):
        single = domains[pair[0]].users + domains[pair[1]].users - 2 * shared
        for ratio in all_ratios(plan):
            users[pair_name(pair, ratio)] = single + 2 * round(training * (1 - ratio))
    return sizes, users


def _preview(plan: Plan, sizes: Mapping[str, DomainSize], users: Mapping[str, int], note: str) -> Preview:
    pseudo = plan.features.pseudo
    return Preview(domains=sizes, users=users if pseudo else {}, texts=pseudo.texts if pseudo else 0, note=note)


def _size(domain: Domain, titles_left: int) -> DomainSize:
    last = domain.manifest["counts"][-1]
    return DomainSize(last["users"], last["items"], last["interactions"], titles_left)


def extraction_lines(plan: Plan, domains: Mapping[str, Domain], home: Home, cluster: Cluster) -> Iterator[str]:
    """Yield a line for each feature table: what is left to encode, and how long it takes the cluster at hand.

    The time is measured, once for each encoder: one worker encodes a sample of what is left of its first table, here or,
    on a cluster, where workers run.
    """
    work = estimates(plan, domains, home)
    text = plan.features.text
    if text is None or not work:
        yield "no texts to encode: the plan has no text features"
        return
    workers, measure = _workers(cluster)
    rates: dict[EncoderSpec, Throughput] = {}
    for (name, kind), left in work.items():
        line = f"{kind} of {name}: {left.rows_left:,} of {left.rows:,} rows to encode, {left.texts_left:,} texts, "
        encoder = text.spec(kind).encoder
        line += f"about {left.tokens_left:,} tokens{' without those of images' if encoder.reads_images else ''}, "
        line += f"{left.bytes_left / 1e6:,.1f} MB of vectors"
        if left.images_left:
            yield f"{line}, {left.images_left:,} images to find first"
        elif left.sample:
            if encoder not in rates:
                rates[encoder] = measure(resolve_encoder(encoder), left.sample, home.store)
            rate = rates[encoder]
            if encoder.reads_images:  # only the sample tells what an image is in tokens
                seconds = left.texts_left / rate.texts_per_second
            else:  # texts of one table are longer than those of another
                seconds = left.tokens_left / rate.tokens_per_second
            speed = f"{rate.tokens_per_second:,.0f} tokens/s{' with them' if encoder.reads_images else ''}"
            yield f"{line}; about {seconds / workers / 60:,.1f} min on {workers} workers at {speed}"
        else:
            yield line


def _workers(cluster: Cluster) -> tuple[int, Callable[..., Throughput]]:
    """Return how many workers there will be, and what measures one of them where it would run."""
    if cluster.address is None:
        return count_threads(), measure_throughput
    import ray

    from study.engine.launch import connect, most_actors

    connect(cluster)
    actors = most_actors(cluster) or count_actors()
    remote = ray.remote(num_cpus=1, num_gpus=int(actors.on_gpu))(measure_throughput)
    return actors.count, lambda *sample: ray.get(remote.remote(*sample))
