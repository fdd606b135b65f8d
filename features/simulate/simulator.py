"""Simulated domains in the Amazon Reviews 2023 layout, at any size up to MuSiC's Table 1, from a seed.

The data are simulated, never real: every id starts with SIM and the folder holds `SIMULATED.json`, by which each domain
prepared from it, and with it each run, figure and table, is labelled simulated.

Rating model (all standard deviations in rating points; `F` the number of latent factors):

    r[u,i] = MEAN + quality[i] + leniency[u] + TASTE * <taste_d[u], q[i]> / |q| + noise,  rounded, clipped to 1..5
    taste_d[u] = standardised(R_d z[u] + CURVE * tanh(A_d z[u])) + DRIFT * noise of (u, d)

A user's `leniency` and shared taste `z` are the same in every domain; R_d (a rotation) and A_d belong to the domain, so
that transferring taste takes more than a copy. Which items a user takes is random or, as `choice` rises, depends on
<taste_d[u], q[i]> / |q| too, so that there is something to learn from sequences. Times are random. Texts, metadata and
images are drawn from the same latent numbers.

Memory holds the latent vectors (4 (F + 2) bytes a user or item) and 8 bytes a rating while users and items are matched;
everything else passes through in chunks.
"""

import gzip
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from features.checks import number, refuse, whole
from features.errors import InputError
from features.progress import AdvanceBy
from features.simulate import vocabulary
from features.store.folders import SIMULATED, read_json, whole_folder, write_json

VERSION = 1  # of the files' contents
CHUNK = 50_000  # reviews or items written at a time
MEAN = 3.6  # rating of a middling item by a middling user
QUALITY, LENIENCY, TASTE = 0.5, 0.5, 0.55  # standard deviations of the three learnable parts
SWEEPS = 80  # of exchanges that let taste decide on items; at `choice` 3, 97% of the liking that 320 reach
CURVE, DRIFT = 0.6, 0.3  # share of the curved part of a domain's taste; of what is the domain's alone
ACTIVITY_FLOOR = 24  # fewest reviews of a user, where the mean allows it: enough for MuSiC's 20-review filter

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class DomainSize:
    """Size of one domain; each count is met exactly, and each user and item has at least one rating."""

    users: int
    items: int
    ratings: int


@dataclass(frozen=True, kw_only=True)
class SimulateSpec:
    """What to simulate, from plain values such as those of a YAML mapping."""

    domains: Mapping[str, DomainSize]  # name -> size; a mapping {users, items, ratings} is taken too
    overlap: int  # users that all the domains share
    seed: int = 0
    # how much taste decides which items a user takes: the log-odds that one standard deviation of liking is worth, 0 to 10
    choice: float = 0.0
    factors: int = 6  # latent factors of taste, 1 to 8
    noise: float = 0.5  # standard deviation of the unexplained part of a rating, in rating points
    short_reviews: float = 0.02  # share of reviews of fewer than 10 words, so that filters have work
    missing: float = 0.01  # share of items without description, and the same without image
    images: float = 1.0  # share of items (the most popular ones) for which an image file is written
    image_size: int = 64  # pixels, both ways

    def __post_init__(self) -> None:
        if not isinstance(self.domains, Mapping) or not self.domains:
            raise InputError(f"simulate: domains must map names to sizes, not {self.domains!r}; name at least one")
        sizes = {name: _size(name, size) for name, size in self.domains.items()}
        object.__setattr__(self, "domains", sizes)
        refuse(
            whole(self, "overlap", least=0, most=min(size.users for size in sizes.values())),
            whole(self, "seed", least=0, most=2**63 - 1),
            whole(self, "factors", least=1, most=len(vocabulary.FACTORS)),
            whole(self, "image_size", least=8, most=1024),
            *(number(self, "choice", least=0, most=10), number(self, "noise", least=0, most=5)),
            *(number(self, name, least=0, most=1) for name in ("short_reviews", "missing", "images")),
            place="simulate: ",
        )

    @property
    def rows(self) -> int:
        """Number of lines to write (reviews and items): the total that `progress` counts up to."""
        return sum(size.ratings + size.items for size in self.domains.values())


def _size(name: object, size: object) -> DomainSize:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise InputError(f"simulate: domain name {name!r}; use letters, digits, - and _ only")
    if isinstance(size, Mapping):
        if set(size) != {"users", "items", "ratings"}:
            raise InputError(f"simulate: domains.{name} has the fields {list(size)}; give users, items and ratings")
        size = DomainSize(**size)
    if not isinstance(size, DomainSize):
        raise InputError(f"simulate: domains.{name} is {size!r}; give users, items and ratings")
    place = f"simulate: domains.{name}."
    refuse(whole(size, "users", least=2, most=2**28), whole(size, "items", least=2, most=2**28), place=place)
    # Above a quarter of all pairs, long tails and unique pairs no longer go together.
    most = size.users * size.items // 4
    refuse(whole(size, "ratings", least=max(size.users, size.items), most=most), place=place)
    return size


def simulate(spec: SimulateSpec, out: Path, progress: AdvanceBy | None = None) -> Path:
    """Write the domains of `spec` into the folder `out` and return it.

    Per domain: `<name>.jsonl.gz`, `meta_<name>.jsonl.gz` and `images/<name>/..`; the label `SIMULATED.json` once. The
    bytes depend on `spec` alone. progress: told of lines written (`spec.rows` in all). The folder appears when it is
    whole. One that already holds this very simulation is left as it is; any other non-empty folder raises InputError.
    """
    label = {"simulated": True, "by": f"features.simulate {VERSION}", "spec": asdict(spec)}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return _same(out, label)
    with whole_folder(out) as folder:
        # The label is written first: not even a folder left by a crash holds simulated data without it.
        write_json(folder / SIMULATED, label)
        for name in spec.domains:
            _write_domain(spec, name, folder, progress or (lambda rows: None))
    return _same(out, label)


def _same(out: Path, label: Mapping[str, Any]) -> Path:
    """Return `out`, if it holds what `label` describes. Raises InputError if it holds anything else."""
    if not (out / SIMULATED).is_file() or read_json(out / SIMULATED) != label:
        raise InputError(f"{out}: holds something else already; name a new folder or remove this one")
    return out


# --- latent numbers -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Latent:
    """One domain's latent numbers; U users, I items, F factors."""

    user_ids: pa.Array  # [U]
    leniency: Floats  # [U], unit variance
    taste: Floats  # [U, F], unit variance
    item_ids: pa.Array  # [I]
    quality: Floats  # [I], unit variance
    factors: Floats  # [I, F], rows of length 1, two factors dominate
    popularity: Ints  # [I], ratings of each item


def _rng(spec: SimulateSpec, *purpose: str | int) -> np.random.Generator:
    """Return a random generator for one purpose, so that no domain's numbers depend on another domain."""
    words = [zlib.crc32(word.encode()) if isinstance(word, str) else word for word in purpose]
    return np.random.default_rng([spec.seed, *words])


def _ids(prefix: str, index: Ints, digits: int) -> pa.Array:
    """Return distinct ids that do not show their order: a bijection on 5*digits bits, in base 32."""
    bits = np.uint64(5 * digits)
    mask = np.uint64(2 ** int(bits) - 1)
    value = (index.astype(np.uint64) + np.uint64(0x5851F42D)) & mask
    for factor in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9):  # odd factors and xor-shifts are both invertible
        value = (value * np.uint64(factor)) & mask
        value ^= value >> (bits // np.uint64(2))
    alphabet = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", dtype="S1")
    letters = [alphabet[(value >> np.uint64(5 * i)) & np.uint64(31)] for i in range(digits)]
    text = np.stack(letters, axis=1).view(f"S{digits}")[:, 0]
    return _join(prefix, pa.array(text).cast(pa.string()))


def _long_tail(total: int, count: int, floor: int, cap: int, spread: float, rng: np.random.Generator) -> Ints:
    """Draw `count` log-normal numbers from `floor` to `cap` that sum to `total`."""
    weight = rng.lognormal(0.0, spread, count)
    spare = total - floor * count
    counts: Ints = np.minimum(floor + (spare * weight / weight.sum()).astype(np.int64), cap)
    while left := total - int(counts.sum()):
        room = np.flatnonzero(counts < cap)
        counts[rng.choice(room, size=min(left, room.size), replace=False)] += 1
    return counts


def _match(activity: Ints, popularity: Ints, rng: np.random.Generator) -> npt.NDArray[np.int32]:
    """Draw items in the order of their users: each user and item as often as given, no pair twice."""
    item = np.repeat(np.arange(popularity.size, dtype=np.int32), popularity)
    rng.shuffle(item)
    first_pair = np.repeat(
        np.arange(activity.size, dtype=np.int64) * popularity.size, activity
    )  # + item: number of a pair
    for _ in range(10_000):
        order = np.argsort(first_pair + item, kind="stable")
        pairs = (first_pair + item)[order]
        repeated = order[1:][pairs[1:] == pairs[:-1]]
        if not repeated.size:
            return item
        # Each repeated place swaps items with a random one, where both pairs are then new.
        right, first = np.unique(rng.integers(item.size, size=repeated.size), return_index=True)
        left = repeated[first]
        good = _new_pairs(first_pair, item, pairs, left, right) & ~np.isin(right, repeated)
        item[left[good]], item[right[good]] = item[right[good]], item[left[good]]
    raise InputError("simulate: so many ratings leave no way to keep each user-item pair unique; ask for fewer ratings")


def _new_pairs(
    first_pair: Ints, item: npt.NDArray[np.int32], pairs: Ints, left: Ints, right: Ints
) -> npt.NDArray[np.bool_]:
    """Return which exchanges of items between places `left` and `right` give two new pairs.

    They are new where neither `pairs` (all present pairs, sorted) nor another exchange has them.
    """
    new = np.stack([first_pair[left] + item[right], first_pair[right] + item[left]])
    present = pairs[np.minimum(np.searchsorted(pairs, new), pairs.size - 1)] == new
    _, which, times = np.unique(new, return_inverse=True, return_counts=True)
    good: npt.NDArray[np.bool_] = ~present.any(axis=0) & (times[which].reshape(new.shape) == 1).all(axis=0)
    return good


def _by_taste(
    item: npt.NDArray[np.int32], activity: Ints, latent: _Latent, choice: float, rng: np.random.Generator
) -> npt.NDArray[np.int32]:
    """Exchange items between users until a match is as likely as exp(choice * total liking) among all with its counts.

    Metropolis: random pairs of places exchange their items where that adds liking, and with that likelihood elsewhere.
    """
    item, user = item.copy(), np.repeat(np.arange(activity.size), activity)
    first_pair = user * latent.popularity.size
    for _ in range(SWEEPS):
        left, right = rng.permutation(item.size)[: item.size // 2 * 2].reshape(2, -1)
        difference = latent.factors[item[right]] - latent.factors[item[left]]
        gain = np.einsum("nf,nf->n", latent.taste[user[left]] - latent.taste[user[right]], difference)
        accepted = np.log(rng.random(left.size)) < choice * gain
        left, right = left[accepted], right[accepted]
        good = _new_pairs(first_pair, item, np.sort(first_pair + item), left, right)
        item[left[good]], item[right[good]] = item[right[good]], item[left[good]]
    return item


def _domain_taste(spec: SimulateSpec, name: str, shared: Floats) -> Floats:
    """Draw taste_d of the module's rating model for users with shared taste `shared` [U, F]."""
    maps = _rng(spec, "maps", name)
    rotation = np.linalg.qr(maps.normal(size=(spec.factors, spec.factors)))[0]
    bend = maps.normal(size=(spec.factors, spec.factors)) / np.sqrt(spec.factors)
    taste = shared @ rotation + CURVE * np.tanh(2.0 * shared @ bend)
    taste = taste / np.sqrt(1 + CURVE**2 / 2) + DRIFT * _rng(spec, "drift", name).normal(size=shared.shape)
    unit: Floats = (taste / np.sqrt(1 + DRIFT**2)).astype(np.float32)
    return unit


def _latent(spec: SimulateSpec, name: str) -> _Latent:
    size = spec.domains[name]

    def users(purpose: str, *width: int) -> npt.NDArray[np.float64]:
        overlapping = _rng(spec, purpose).normal(size=(spec.overlap, *width))
        return np.concatenate([overlapping, _rng(spec, purpose, name).normal(size=(size.users - spec.overlap, *width))])

    index = np.arange(size.users, dtype=np.int64)
    domain_ids = ((zlib.crc32(name.encode()) >> 1) + 1) << 28  # ids do not depend on the other domains either
    index[spec.overlap :] += domain_ids
    items = _rng(spec, "items", name)
    factors = items.normal(size=(size.items, spec.factors))
    strong = np.argsort(items.random(factors.shape), axis=1)[:, :2]
    scale = np.full(factors.shape, 0.25)
    np.put_along_axis(scale, strong, 1.0, axis=1)
    factors *= scale
    factors /= np.linalg.norm(factors, axis=1, keepdims=True)
    return _Latent(
        user_ids=_ids("SIMU", index, 12),
        leniency=users("leniency").astype(np.float32),
        taste=_domain_taste(spec, name, users("taste", spec.factors).astype(np.float32)),
        item_ids=_ids("SIMI", np.arange(size.items, dtype=np.int64) + domain_ids, 12),
        quality=items.normal(size=size.items).astype(np.float32),
        factors=factors.astype(np.float32),
        popularity=_long_tail(size.ratings, size.items, 1, size.users // 2, 1.2, items),
    )


# --- words --------------------------------------------------------------------------------------------------------


def _join(*parts: pa.Array | str) -> pa.Array:
    return pc.binary_join_element_wise(*parts, "")


def _pick(bank: tuple[tuple[str, ...], ...], row: npt.NDArray[Any], rng: np.random.Generator) -> pa.Array:
    """Draw a phrase of `bank[row]` for each row."""
    starts = np.cumsum([0, *(len(line) for line in bank)])
    width = np.diff(starts)[row]
    flat = pa.array([text for line in bank for text in line])
    return flat.take(pa.array(starts[row] + (rng.random(row.size) * width).astype(np.int64)))


def _level(value: Floats, blur: float, rng: np.random.Generator) -> Ints:
    """Turn a unit-variance value into one of five levels, with `blur` of noise."""
    level: Ints = np.digitize(value + blur * rng.normal(size=value.size), [-1.2, -0.4, 0.4, 1.2])
    return level


def _favourite(strength: Floats, rng: np.random.Generator) -> Ints:
    """Draw one factor per row of [N, F], in proportion to its squared strength (Gumbel's trick)."""
    choice: Ints = np.argmax(np.log(strength**2 + 1e-3) + rng.gumbel(size=strength.shape), axis=1)
    return choice


def _pole(factor: Ints, value: npt.NDArray[Any]) -> Ints:
    """Return the row of the phrase banks for each (factor, sign of its value)."""
    side: Ints = 2 * factor + (value > 0)
    return side


def _along(table: npt.NDArray[Any], column: Ints) -> npt.NDArray[Any]:
    taken: npt.NDArray[Any] = np.take_along_axis(table, column[:, None], axis=1)[:, 0]
    return taken


def _review_text(latent: _Latent, user: Ints, item: Ints, rating: Ints, rng: np.random.Generator) -> pa.Array:
    """Write the rating as sentiment, the item's trait and whether it pleased, then the user's taste or leniency."""
    taste, factors = latent.taste[user], latent.factors[item]
    trait = _favourite(factors, rng)
    pleased = (_along(taste, trait) * _along(factors, trait) > 0).astype(np.int64)
    trait_pole = _pole(trait, _along(factors, trait))
    preference = _favourite(taste, rng)
    preference_pole = _pole(preference, _along(taste, preference))
    about_user = pc.if_else(
        pa.array(rng.random(user.size) < 0.5),
        _join(
            _pick(vocabulary.PREFERENCES, np.zeros_like(user), rng),
            _pick(vocabulary.ADJECTIVES, preference_pole, rng),
            " things about ",
            _pick(vocabulary.NOUNS, preference_pole, rng),
            ".",
        ),
        _pick(vocabulary.LENIENCY, _level(latent.leniency[user], 0.5, rng), rng),
    )
    reaction = _join(
        "The ",
        _pick(vocabulary.ADJECTIVES, trait_pole, rng),
        " ",
        _pick(vocabulary.ASPECTS, np.zeros_like(user), rng),
        _pick(vocabulary.REACTIONS, pleased, rng),
    )
    return _join(_pick(vocabulary.SENTIMENT, rating - 1, rng), " ", reaction, " ", about_user)


def _json(*parts: pa.Array | str) -> pa.Array:
    """Join literal pieces and phrases to lines of JSON; no phrase holds a character that JSON would escape."""
    return _join(*parts, "\n")


def _reviews(spec: SimulateSpec, name: str, latent: _Latent) -> Iterator[pa.Array]:
    size = spec.domains[name]
    mean = size.ratings / size.users
    floor = max(1, min(int(0.92 * mean), ACTIVITY_FLOOR))
    pairs = _rng(spec, "pairs", name)
    activity = _long_tail(size.ratings, size.users, floor, size.items // 2, 1.0, pairs)
    items = _match(activity, latent.popularity, pairs)
    if spec.choice:
        items = _by_taste(items, activity, latent, spec.choice, _rng(spec, "choice", name))
    end = np.cumsum(activity)
    for start in range(0, size.ratings, CHUNK):
        rng = _rng(spec, "reviews", name, start)
        item = items[start : start + CHUNK].astype(np.int64)
        user = np.searchsorted(end, np.arange(start, start + item.size), side="right")
        liking = np.einsum("nf,nf->n", latent.taste[user], latent.factors[item])
        score = MEAN + QUALITY * latent.quality[item] + LENIENCY * latent.leniency[user] + TASTE * liking
        rating = np.clip(np.rint(score + spec.noise * rng.normal(size=item.size)), 1, 5).astype(np.int64)
        text = _review_text(latent, user, item, rating, rng)
        short = rng.random(item.size) < spec.short_reviews
        text = pc.if_else(pa.array(short), _pick(vocabulary.SHORT, rating - 1, rng), text)
        asin = latent.item_ids.take(pa.array(item))
        yield _json(
            '{"rating": ',
            pa.array(rating).cast(pa.string()),
            '.0, "title": "',
            _pick(vocabulary.TITLES, rating - 1, rng),
            '", "text": "',
            text,
            '", "images": [], "asin": "',
            asin,
            '", "parent_asin": "',
            asin,
            '", "user_id": "',
            latent.user_ids.take(pa.array(user)),
            '", "timestamp": ',
            pa.array(rng.integers(1_514_764_800_000, 1_690_000_000_000, size=item.size)).cast(pa.string()),
            ', "helpful_vote": 0, "verified_purchase": true}',
        )


def _absent(spec: SimulateSpec, popularity: Ints, share: float, purpose: str, name: str) -> npt.NDArray[np.bool_]:
    """Draw a `share` of the items, all from the less popular half: poor metadata is a matter of the tail."""
    rank = np.argsort(np.argsort(-popularity, kind="stable"))
    chance = _rng(spec, purpose, name).random(popularity.size)
    return (rank >= popularity.size // 2) & (chance < min(1.0, 2 * share))


def _image_paths(name: str, item_ids: pa.Array) -> pa.Array:
    """Return `images/<name>/<two letters>/<id>.jpg`: no folder grows beyond a thousandth of all items."""
    return _join(f"images/{name}/", pc.utf8_slice_codeunits(item_ids, 4, 6), "/", item_ids, ".jpg")


def _has_image(spec: SimulateSpec, name: str, latent: _Latent) -> npt.NDArray[np.bool_]:
    rank = np.argsort(np.argsort(-latent.popularity, kind="stable"))
    chosen = rank < round(spec.images * rank.size)
    return chosen & ~_absent(spec, latent.popularity, spec.missing, "no image", name)


def _metadata(spec: SimulateSpec, name: str, latent: _Latent, pictured: npt.NDArray[np.bool_]) -> Iterator[pa.Array]:
    bare = _absent(spec, latent.popularity, spec.missing, "no description", name)
    for start in range(0, latent.quality.size, CHUNK):
        rng = _rng(spec, "metadata", name, start)
        part = slice(start, start + CHUNK)
        factors, ids = latent.factors[part], latent.item_ids[part]
        two = np.argsort(-np.abs(factors), axis=1)[:, :2]
        first = _pole(two[:, 0], _along(factors, two[:, 0]))
        second = _pole(two[:, -1], _along(factors, two[:, -1]))
        quality = _level(latent.quality[part], 0.3, rng)
        adjective, noun = _pick(vocabulary.ADJECTIVES, first, rng), _pick(vocabulary.NOUNS, second, rng)
        description = _join(
            '"',
            _pick(vocabulary.QUALITY, quality, rng),
            " It is ",
            adjective,
            " and ",
            _pick(vocabulary.ADJECTIVES, second, rng),
            ", about ",
            _pick(vocabulary.NOUNS, first, rng),
            " and ",
            noun,
            '."',
        )
        image = _join('{"large": "', _image_paths(name, ids), '", "variant": "MAIN"}')
        yield _json(
            f'{{"main_category": "{name}", "title": "The ',
            adjective,
            " ",
            _pick(vocabulary.THINGS, np.zeros(len(ids), np.int64), rng),
            " of ",
            noun,
            '", "features": [], "description": [',
            pc.if_else(pa.array(bare[part]), "", description),
            '], "price": null, "images": [',
            pc.if_else(pa.array(pictured[part]), image, ""),
            f'], "videos": [], "store": "Simulated", "categories": ["{name}", "',
            _pick(vocabulary.CATEGORIES, first, rng),
            '", "',
            _pick(vocabulary.CATEGORIES, second, rng),
            '"], "details": {}, "parent_asin": "',
            ids,
            '"}',
        )


# --- files --------------------------------------------------------------------------------------------------------


@contextmanager
def _gzip(path: Path) -> Iterator[gzip.GzipFile]:
    """Open a gzip file whose bytes do not depend on its name or the clock."""
    with path.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) as packed:
        yield packed


def _write_lines(path: Path, chunks: Iterator[pa.Array], progress: AdvanceBy) -> None:
    with _gzip(path) as out:
        for lines in chunks:
            out.write(lines.buffers()[2])  # the strings of an Arrow array lie end to end
            progress(len(lines))


def _pixels(spec: SimulateSpec, factors: Floats, quality: Floats, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Draw images [N, S, S, 3]: factors set the two colours and the stripes, quality the size of the disc."""
    side = np.linspace(-1, 1, spec.image_size, dtype=np.float32)
    y, x = np.meshgrid(side, side, indexing="ij")
    wide = np.zeros((len(factors), 8), dtype=np.float32)
    wide[:, : factors.shape[1]] = factors
    colour = (0.5 + 0.45 * wide[:, :6])[:, None, None, :]
    radius = (0.5 + 0.15 * np.tanh(quality))[:, None, None, None]
    disc = (x**2 + y**2)[None, :, :, None] < radius**2
    angle = np.pi * wide[:, 6, None, None]
    stripes = np.sin(8 * (x * np.cos(angle) + y * np.sin(angle)) + 3 * wide[:, 7, None, None])[..., None]
    light = np.where(disc, colour[..., 3:6], colour[..., :3] * (0.85 + 0.15 * stripes))
    light = light + 0.02 * rng.normal(size=light.shape).astype(np.float32)
    pixels: npt.NDArray[np.uint8] = (255 * np.clip(light, 0, 1)).astype(np.uint8)
    return pixels


def _write_images(
    spec: SimulateSpec, name: str, latent: _Latent, pictured: npt.NDArray[np.bool_], folder: Path
) -> None:
    chosen = np.flatnonzero(pictured)
    created: set[Path] = set()
    for start in range(0, chosen.size, 256):
        part = chosen[start : start + 256]
        rng = _rng(spec, "images", name, start)
        pixels = _pixels(spec, latent.factors[part], latent.quality[part], rng)
        paths = _image_paths(name, latent.item_ids.take(pa.array(part))).to_pylist()
        for picture, relative in zip(pixels, paths, strict=True):
            path = folder / relative
            if path.parent not in created:
                path.parent.mkdir(parents=True, exist_ok=True)
                created.add(path.parent)
            Image.fromarray(picture).save(path, quality=85)


def _write_domain(spec: SimulateSpec, name: str, folder: Path, progress: AdvanceBy) -> None:
    latent = _latent(spec, name)
    pictured = _has_image(spec, name, latent)
    _write_images(spec, name, latent, pictured, folder)
    _write_lines(folder / f"meta_{name}.jsonl.gz", _metadata(spec, name, latent, pictured), progress)
    _write_lines(folder / f"{name}.jsonl.gz", _reviews(spec, name, latent), progress)
