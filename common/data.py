"""Interaction logs: find, download, read, check, filter, split.

`load(name_or_folder)` reads MovieLens (1M, 100K, latest-small), Amazon reviews (2014, 2018, 2023 files) or anybody's own
`interactions.csv` (+ `items.csv`) into one `Data`. Files are read line by line and ids are interned, so memory is
bounded by what is kept. Parsed data are cached under a fingerprint of their source.
"""

import ast
import csv
import gzip
import hashlib
import html
import json
import math
import os
import re
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from array import array
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from common.run import UserError, progress

PARSER = 1                                     # raise it when the parser changes: old caches are then left alone
GROUPLENS = "https://files.grouplens.org/datasets/movielens/"
AMAZON_2014 = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/"
AMAZON_2018 = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2/"


def _amazon_2014(name):
    return [(AMAZON_2014 + f"reviews_{name}_5.json.gz", None, None), (AMAZON_2014 + f"meta_{name}.json.gz", None, None)]


def _amazon_2018(name):
    return [(AMAZON_2018 + f"categoryFilesSmall/{name}_5.json.gz", None, None),
            (AMAZON_2018 + f"metaFiles2/meta_{name}.json.gz", None, None)]


# name -> (folder names under which it is looked for, [(address, bytes, sha256)]); Amazon publishes no checksums: those
# files are read to their end instead, which checks gzip's own CRC
SOURCES = {
    "ml1m": (("ml-1m", "ml1m"), [(GROUPLENS + "ml-1m.zip", 5_917_549,
             "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20")]),
    "ml100k": (("ml-100k", "ml100k"), [(GROUPLENS + "ml-100k.zip", 4_924_029,
               "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229")]),
    "ml-latest-small": (("ml-latest-small",), [(GROUPLENS + "ml-latest-small.zip", 978_202,
                        "696d65a3dfceac7c45750ad32df2c259311949efec81f0f144fdfb91ebc9e436")]),
    "amazon-video-games": (("amazon-video-games", "amazon-video-games-2018"), _amazon_2018("Video_Games")),
    "amazon-movies-tv": (("amazon-movies-tv", "amazon-movies-tv-2018"), _amazon_2018("Movies_and_TV")),
    "amazon-sports": (("amazon-sports", "amazon-sports-2014"), _amazon_2014("Sports_and_Outdoors")),
    "amazon-beauty": (("amazon-beauty", "amazon-beauty-2014"), _amazon_2014("Beauty")),
    "amazon-toys": (("amazon-toys", "amazon-toys-2014"), _amazon_2014("Toys_and_Games")),
}


@dataclass
class Data:
    """Interactions sorted by time (ties in file order) with their items and users. Ids are 0-based and contiguous.

    user, item (n,) int32, rating (n,) float32 (1 where the source has none), time (n,) int64 (the position in the file
    where the source has none). titles are never empty, categories and texts may be.
    """
    name: str
    users: list
    items: list
    titles: list
    categories: list
    texts: list
    user: np.ndarray
    item: np.ndarray
    rating: np.ndarray
    time: np.ndarray
    user_fields: dict = field(default_factory=dict)
    fingerprint: str = ""
    has_ratings: bool = True
    notes: list = field(default_factory=list)
    world: object = None                         # the toy world's truth; None for real data

    def __post_init__(self):
        self._seen = None

    def seen_keys(self):
        """Sorted user * n_items + item of all interactions: membership by binary search."""
        if self._seen is None:
            self._seen = np.unique(self.user.astype(np.int64) * len(self.items) + self.item)
        return self._seen


# ------------------------------------------------------------------------------------------------ find and download
def cache_folder():
    return Path(os.environ.get("LLMREC_CACHE", Path.home() / ".cache" / "llmrec"))


def load(name, data_dir=None, max_bad_rows=0, seed=0, download=True):
    """`toy`, `toy:USERSxITEMSxINTERACTIONS`, one of SOURCES, or a folder -> Data. The seed is the toy world's.

    Raises UserError in one line: what, where, what to do.
    """
    if name.split(":")[0] == "toy":
        from common import toy
        sizes = re.fullmatch(r"toy(?::(\d+)x(\d+)x(\d+))?", name)
        if sizes is None:
            raise UserError(f"--data {name}: the toy world's sizes are written toy:USERSxITEMSxINTERACTIONS")
        try:
            return toy.make(*(int(n) for n in sizes.groups() if n), seed=seed).data()
        except ValueError as problem:
            raise UserError(f"--data {name}: {problem}") from None
    if name in SOURCES:
        folder = find(name, data_dir) or (fetch(name) if download else None)
        if folder is None:
            raise UserError(f"--data {name}: not found; {put_where(name)}")
    else:
        folder = Path(name)
        if not folder.is_dir():
            raise UserError(f"--data {name}: neither a folder nor one of toy, {', '.join(SOURCES)}")
    return read_folder(folder, name if name in SOURCES else folder.resolve().name, max_bad_rows)


def find(name, data_dir=None):
    """The folder that holds a named data set, in --data-dir, LLMREC_DATA or the download cache; or None."""
    for root in (data_dir, os.environ.get("LLMREC_DATA"), cache_folder() / "data"):
        for spelling in SOURCES[name][0] if root else ():
            if (Path(root) / spelling).is_dir():
                return Path(root) / spelling
    return None


def put_where(name):
    files = ", ".join(url for url, _, _ in SOURCES[name][1])
    return f"get {files} and put what is in it into {cache_folder() / 'data' / SOURCES[name][0][0]} (or use --data-dir)"


def fetch(name, sources=None):
    """Download, verify and unpack a named data set into the cache; the folder appears whole or not at all."""
    spellings, files = SOURCES[name] if sources is None else sources
    target = cache_folder() / "data" / spellings[0]
    target.parent.mkdir(parents=True, exist_ok=True)
    paths = [download(url, target.parent / url.rsplit("/", 1)[1], size, sha, lambda: put_where(name))
             for url, size, sha in files]
    beside = Path(tempfile.mkdtemp(prefix=f".{spellings[0]}-", dir=target.parent))
    try:
        for path in paths:
            if path.suffix == ".zip":
                unzip(path, beside)
            else:
                check_gzip(path)
                shutil.move(path, beside / path.name)
        inner = [p for p in beside.iterdir()]
        os.replace(inner[0] if len(inner) == 1 and inner[0].is_dir() else beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    for path in paths:
        path.unlink(missing_ok=True)
    return target


def download(url, path, size, sha256, hint):
    """Fetch a file with a progress bar; goes on where an earlier try stopped; verified before it gets its name."""
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            have = have if reply.status == 206 else 0            # the server may ignore the range and start anew
            total = have + int(reply.headers.get("Content-Length", 0))
            with open(part, "ab" if have else "wb") as out:
                bar = progress(None, f"downloading {path.name}", total or None, initial=have)
                while block := reply.read(1 << 20):
                    out.write(block)
                    bar.update(len(block))
                bar.close()
    except urllib.error.HTTPError as problem:
        if problem.code != 416:                                  # 416: the part is already whole
            raise UserError(f"{url}: {problem.code} {problem.reason}; {hint()}") from None
    except (OSError, ValueError) as problem:
        raise UserError(f"{url}: no connection ({getattr(problem, 'reason', problem)}); {hint()}") from None
    if size is not None and part.stat().st_size < size:
        raise UserError(f"{url}: the connection ended early ({part.stat().st_size} of {size} bytes); run the command again to go on")
    if sha256 is not None:
        digest = hashlib.sha256()
        with open(part, "rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != sha256:
            part.unlink()
            raise UserError(f"{url}: the file has another sha256 than published and was removed; run the command again")
    os.replace(part, path)
    return path


def unzip(path, folder, limit=2 << 30):
    """Unpack plain files only: no absolute paths, no `..`, no links, at most `limit` bytes."""
    with zipfile.ZipFile(path) as archive:
        if sum(info.file_size for info in archive.infolist()) > limit:
            raise UserError(f"{path}: unpacks to more than {limit >> 30} GiB; not unpacked")
        for info in archive.infolist():
            parts = Path(info.filename.replace("\\", "/"))
            link = (info.external_attr >> 16) & 0o170000 == 0o120000
            if parts.is_absolute() or ".." in parts.parts or link or ":" in info.filename:
                raise UserError(f"{path}: holds the unsafe entry {info.filename!r}; not unpacked")
        for info in archive.infolist():
            if not info.is_dir():
                out = folder / info.filename
                out.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(info) as source, open(out, "wb") as sink:
                    shutil.copyfileobj(source, sink)


def check_gzip(path):
    try:
        with gzip.open(path) as f:
            while f.read(1 << 20):
                pass
    except (OSError, EOFError):
        path.unlink()
        raise UserError(f"{path}: not a complete gzip file and was removed; run the command again") from None


# ---------------------------------------------------------------------------------------------------------- reading
class BadRows:
    """Counts broken rows and stops, naming file:line, at the first one too many."""

    def __init__(self, allowed):
        self.allowed, self.count, self.first = allowed, 0, None

    def __call__(self, path, line, why):
        self.count += 1
        self.first = self.first or f"{path}:{line}: {why}"
        if self.count > self.allowed:
            more = f" ({self.count} broken rows, the first at {self.first})" if self.count > 1 else ""
            raise UserError(f"{path}:{line}: {why}{more}; mend the row, or skip such rows with --max-bad-rows N")


def lines_of(path):
    """(line number, text) of a plain or gzipped file, in UTF-8 or, where a line is not that, latin-1."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as f:
            for number, line in enumerate(f, 1):
                try:
                    yield number, line.decode("utf-8")
                except UnicodeDecodeError:
                    yield number, line.decode("latin-1")
    except (EOFError, gzip.BadGzipFile, OSError) as problem:
        raise UserError(f"{path}: cannot be read to its end ({problem}); fetch it again") from None


def clean(text):
    """A title or description as data: HTML entities resolved, control characters out, white space folded."""
    text = html.unescape(text)
    text = "".join(ch if ch.isprintable() else " " for ch in text) if not text.isprintable() else text
    return re.sub(r"\s+", " ", text).strip()


class Columns:
    """The growing result: interned ids and flat arrays, 20 bytes an interaction."""

    def __init__(self):
        self.users, self.items = {}, {}
        self.user, self.item, self.rating, self.time = array("i"), array("i"), array("f"), array("q")

    def add(self, user, item, rating, time):
        """Raises ValueError with the reason on values that are no interaction."""
        if not user or not item:
            raise ValueError("an empty user or item")
        rating, time = float(rating), float(time)
        if not math.isfinite(rating) or not -2**62 < time < 2**62:
            raise ValueError("a rating or timestamp that is not a finite number")
        self.user.append(self.users.setdefault(user, len(self.users)))
        self.item.append(self.items.setdefault(item, len(self.items)))
        self.rating.append(rating)
        self.time.append(int(time))


def split_rows(path, separator, columns, bad):
    """Rows of a `::`, tab or pipe file with at least `columns` fields."""
    for number, line in lines_of(path):
        row = line.rstrip("\r\n").split(separator)
        if len(row) >= columns:
            yield number, row
        elif line.strip():
            bad(path, number, f"{len(row)} fields instead of {columns}")


def csv_rows(path, bad, needed):
    """Rows of a CSV file with a header as dicts by column name; quoted commas and line breaks are understood."""
    reader = csv.reader(text for _, text in lines_of(path))
    try:
        header = [h.strip().lstrip("\ufeff").lower() for h in next(reader)]
    except (StopIteration, csv.Error):
        raise UserError(f"{path}:1: empty; expected a header with the columns {', '.join(needed)}") from None
    missing = [c for c in needed if c not in header]
    if missing:
        raise UserError(f"{path}:1: no column {', '.join(missing)} in the header ({', '.join(header)[:200]}); add it")
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as problem:
            bad(path, reader.line_num, str(problem))
            continue
        if len(row) == len(header):
            yield reader.line_num, dict(zip(header, row))
        elif row:
            bad(path, reader.line_num, f"{len(row)} fields instead of {len(header)}")


def read_ml1m(folder, c, bad):
    path = folder / "ratings.dat"
    _add(c, path, bad, ((n, r[0], r[1], r[2], r[3]) for n, r in split_rows(path, "::", 4, bad)))
    meta = {r[0]: (r[1], r[2].strip().split("|"), "") for _, r in split_rows(folder / "movies.dat", "::", 3, bad)}
    people = {}
    if (folder / "users.dat").exists():
        for _, r in split_rows(folder / "users.dat", "::", 4, bad):
            people[r[0]] = {"gender": r[1], "age": r[2], "occupation": r[3]}
    return meta, people


def read_ml100k(folder, c, bad):
    path = folder / "u.data"
    _add(c, path, bad, ((n, r[0], r[1], r[2], r[3]) for n, r in split_rows(path, "\t", 4, bad)))
    genres = [r[0] for _, r in split_rows(folder / "u.genre", "|", 1, bad) if r[0]]
    meta = {r[0]: (r[1] if r[1] != "unknown" else "", [g for g, flag in zip(genres, r[5:]) if flag == "1" and g != "unknown"], "")
            for _, r in split_rows(folder / "u.item", "|", 6, bad)}
    people = {}
    if (folder / "u.user").exists():
        people = {r[0]: {"age": r[1], "gender": r[2], "occupation": r[3]} for _, r in split_rows(folder / "u.user", "|", 4, bad)}
    return meta, people


def read_ml_latest(folder, c, bad):
    path = folder / "ratings.csv"
    rows = csv_rows(path, bad, ("userid", "movieid", "rating", "timestamp"))
    _add(c, path, bad, ((n, r["userid"], r["movieid"], r["rating"], r["timestamp"]) for n, r in rows))
    genres = lambda text: [] if text.startswith("(no genres") else text.split("|")
    return {r["movieid"]: (r["title"], genres(r["genres"]), "")
            for _, r in csv_rows(folder / "movies.csv", bad, ("movieid", "title", "genres"))}, {}


def read_generic(folder, c, bad):
    path = first_of(folder, "interactions.csv")
    rows = csv_rows(path, bad, ("user", "item"))
    _add(c, path, bad, ((n, r["user"].strip(), r["item"].strip(), r.get("rating", 1.0), r.get("timestamp", n)) for n, r in rows))
    with_header = next(iter(csv.reader(text for _, text in lines_of(path))))
    c.has_ratings = "rating" in [h.strip().lower() for h in with_header]
    meta, items = {}, first_of(folder, "items.csv")
    for _, r in csv_rows(items, bad, ("item", "title")) if items else ():
        text = r.get("description") or r.get("text") or ""
        meta[r["item"].strip()] = (r["title"], [x for x in (r.get("categories") or "").split("|") if x.strip()], text)
    return meta, {}


def read_amazon(folder, c, bad):
    """Reviews and metadata of 2014, 2018 or 2023: JSON lines, 2014's metadata Python literals."""
    reviews, metas = amazon_files(folder)
    path = reviews[0]
    def rows():
        for number, line in lines_of(path):
            try:
                r = json.loads(line)
                if "reviewerID" in r:
                    yield number, r["reviewerID"], r["asin"], r["overall"], r.get("unixReviewTime", number)
                else:
                    yield number, r["user_id"], r.get("parent_asin") or r["asin"], r["rating"], r["timestamp"] // 1000
            except (ValueError, KeyError, TypeError, AttributeError) as problem:
                bad(path, number, f"no review ({type(problem).__name__}: {problem})")
    _add(c, path, bad, rows())
    meta = {}
    for path in metas:
        for number, line in lines_of(path):
            try:
                r = json.loads(line) if line.startswith('{"') else ast.literal_eval(line.strip())
                key = r.get("parent_asin") or r["asin"]
                if key not in c.items:                           # memory bounded by what is kept
                    continue
                groups = r.get("categories") or r.get("category") or []
                groups = groups[0] if groups and isinstance(groups[0], list) else groups
                text = r.get("description") or ""
                text = " ".join(map(str, text)) if isinstance(text, list) else str(text)
                meta[key] = (str(r.get("title") or ""), [str(g) for g in groups][1:5] or [str(g) for g in groups], text)
            except (ValueError, SyntaxError, KeyError, TypeError, AttributeError, MemoryError, RecursionError) as problem:
                bad(path, number, f"no item description ({type(problem).__name__})")
    return meta, {}


def amazon_files(folder):
    files = sorted(p for p in folder.iterdir() if re.search(r"\.jsonl?(\.gz)?$", p.name))
    metas = [p for p in files if p.name.lower().startswith("meta")]
    reviews = [p for p in files if p not in metas]
    if len(reviews) > 1:
        raise UserError(f"{folder}: several review files ({', '.join(p.name for p in reviews)}); keep one per folder")
    return reviews, metas


def first_of(folder, name):
    return next((folder / n for n in (name, name + ".gz") if (folder / n).exists()), None)


def _add(c, path, bad, rows):
    c.has_ratings = True
    for number, user, item, rating, time in rows:
        try:
            c.add(user, item, rating, time)
        except (ValueError, TypeError, OverflowError) as problem:
            bad(path, number, str(problem))


READERS = [("ratings.dat", read_ml1m, ("movies.dat",)), ("u.data", read_ml100k, ("u.item", "u.genre")),
           ("ratings.csv", read_ml_latest, ("movies.csv",)), ("interactions.csv", read_generic, ())]


def read_folder(folder, name, max_bad_rows=0):
    """Detect the layout of a folder by its files, read it (or its cache), and check it."""
    for file, reader, others in READERS:
        if first_of(folder, file):
            missing = [f for f in others if not (folder / f).exists()]
            if missing:
                raise UserError(f"{folder}: has {file} but no {', '.join(missing)}; put it there")
            break
    else:
        reader = read_amazon
        if not folder.is_dir() or not amazon_files(folder)[0]:
            raise UserError(f"{folder}: no known layout; it needs interactions.csv (user,item[,rating][,timestamp]) and "
                            "items.csv (item,title[,categories]), or MovieLens or Amazon files")
    stat = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.iterdir()) if p.is_file()]
    key = hashlib.sha256(json.dumps([PARSER, str(folder.resolve()), stat, max_bad_rows]).encode()).hexdigest()[:24]
    cached = cache_folder() / "parsed" / f"{key}.safetensors"
    data = from_cache(cached)
    if data is None:
        data = assemble(*parse(folder, reader, max_bad_rows), name)
        to_cache(data, cached)
    for note in data.notes:
        print(f"note: {name}: {note}", file=sys.stderr)
    return data


def parse(folder, reader, max_bad_rows):
    columns, bad = Columns(), BadRows(max_bad_rows)
    meta, people = reader(folder, columns, bad)
    if not columns.user:
        raise UserError(f"{folder}: no interaction in it")
    return columns, meta, people, [f"{bad.count} broken rows skipped, the first at {bad.first}"] if bad.count else []


def assemble(c, meta, people, notes, name):
    """Sort by time, drop repeated (user, item) pairs (the earliest stays), attach titles, hash."""
    user, item = np.frombuffer(c.user, np.int32), np.frombuffer(c.item, np.int32)
    rating, time = np.frombuffer(c.rating, np.float32), np.frombuffer(c.time, np.int64)
    order = np.argsort(time, kind="stable")
    _, first = np.unique(user[order].astype(np.int64) * len(c.items) + item[order], return_index=True)
    if len(first) < len(order):
        notes.append(f"{len(order) - len(first)} repeated user-item pairs dropped, the earliest of each stays")
        order = order[np.sort(first)]
    user, item, rating, time = user[order], item[order], rating[order], time[order]
    described = [meta.get(raw, ("", [], "")) for raw in c.items]
    titles = [clean(d[0])[:300] for d in described]
    missing = sum(not t for t in titles)
    if missing and meta:
        notes.append(f"{missing} items have no title and are called by their id")
    digest = hashlib.sha256(json.dumps([PARSER, list(c.users), list(c.items), titles]).encode())
    for column in (user, item, rating, time):
        digest.update(column.tobytes())
    fields = sorted({k for row in people.values() for k in row})
    return Data(name, list(c.users), list(c.items), [t or f"item {raw}" for t, raw in zip(titles, c.items)],
                [[clean(x) for x in d[1] if clean(x)] for d in described], [clean(d[2])[:1000] for d in described],
                user, item, rating, time, {f: [people.get(u, {}).get(f, "") for u in c.users] for f in fields},
                digest.hexdigest()[:16], c.has_ratings, notes)


STRINGS = ("name", "users", "items", "titles", "categories", "texts", "user_fields", "fingerprint", "has_ratings", "notes")


def to_cache(data, path):
    """One safetensors file, strings as JSON bytes. A cache that cannot be written is only a slower start."""
    text = json.dumps({k: getattr(data, k) for k in STRINGS}).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{os.getpid()}-{path.name}")
        save_file({"user": data.user, "item": data.item, "rating": data.rating, "time": data.time,
                   "strings": np.frombuffer(text, np.uint8)}, beside)
        os.replace(beside, path)
    except OSError:
        pass


def from_cache(path):
    if not path.exists():
        return None
    try:
        arrays = load_file(path)
        return Data(**json.loads(arrays.pop("strings").tobytes()), **arrays)
    except Exception:                                            # a damaged cache: read the source again
        return None


# ------------------------------------------------------------------------------------------------- filter and split
def keep(data, mask, note):
    """The interactions of `mask`, with users and items renumbered to those that are left."""
    if not mask.any():
        raise UserError(f"--data {data.name}: nothing is left after the filter ({note}); lower it")
    users, user = np.unique(data.user[mask], return_inverse=True)
    items, item = np.unique(data.item[mask], return_inverse=True)
    pick = lambda values, ids: [values[i] for i in ids]
    digest = hashlib.sha256(f"{data.fingerprint} {note}".encode()).hexdigest()[:16]
    return replace(data, users=pick(data.users, users), items=pick(data.items, items), titles=pick(data.titles, items),
                   categories=pick(data.categories, items), texts=pick(data.texts, items), user=user.astype(np.int32),
                   item=item.astype(np.int32), rating=data.rating[mask], time=data.time[mask], fingerprint=digest,
                   user_fields={k: pick(v, users) for k, v in data.user_fields.items()})


def min_rating(data, lowest):
    return keep(data, data.rating >= lowest, f"rating >= {lowest}")


def min_interactions(data, n):
    """Users with at least n interactions (CURec: 30)."""
    return keep(data, np.bincount(data.user, minlength=len(data.users))[data.user] >= n, f"users with >= {n}")


def k_core(data, k):
    """Repeat until every user and every item has at least k interactions."""
    mask = np.ones(len(data.user), dtype=bool)
    while True:
        few_u = np.bincount(data.user[mask], minlength=len(data.users)) < k
        few_i = np.bincount(data.item[mask], minlength=len(data.items)) < k
        smaller = mask & ~few_u[data.user] & ~few_i[data.item]
        if smaller.sum() == mask.sum():
            return keep(data, mask, f"{k}-core")
        mask = smaller


def sample_users(data, n, seed):
    """A seeded sample of n users (all, if there are no more)."""
    if n >= len(data.users):
        return data
    chosen = np.random.default_rng([seed, 23]).permutation(len(data.users))[:n]
    return keep(data, np.isin(data.user, chosen), f"{n} users, seed {seed}")


def split_last_two(data):
    """Per user in time order the last interaction is test, the one before it validation, the rest train; users with
    fewer than 3 only train -> three sorted index arrays into the interactions."""
    order = np.argsort(data.user, kind="stable")
    count = np.bincount(data.user, minlength=len(data.users))
    end = np.cumsum(count)
    judged = count >= 3
    test, valid = order[end[judged] - 1], order[end[judged] - 2]
    held = np.zeros(len(order), dtype=bool)
    held[test] = held[valid] = True
    return np.flatnonzero(~held), np.sort(valid), np.sort(test)


def split_time(data, valid=0.1, test=0.1):
    """Global: the latest share is test, the share before it validation. Equal timestamps never straddle a cut."""
    n = len(data.time)
    cuts = [data.time[min(int(n * share), n - 1)] for share in (1 - valid - test, 1 - test)]
    part = np.searchsorted(cuts, data.time, side="right")
    return tuple(np.flatnonzero(part == k) for k in range(3))


def split_ratio(data, valid=0.1, test=0.1):
    """Per user in time order: the last share is test, the share before it validation."""
    order = np.argsort(data.user, kind="stable")
    count = np.bincount(data.user, minlength=len(data.users))
    place = np.arange(len(order)) - np.repeat(np.cumsum(count) - count, count)
    share = (place + 1) / np.repeat(count, count)
    part = np.empty(len(order), dtype=int)
    part[order] = (share > 1 - valid - test + 1e-9).astype(int) + (share > 1 - test + 1e-9)
    return tuple(np.flatnonzero(part == k) for k in range(3))


def negatives(data, users, n, seed):
    """(len(users), n) int32: items that the user never had, in training or held out; no repeats in a row.

    Uniform; a pure function of its arguments. Raises UserError if a user has fewer than n unseen items.
    """
    users, N, seen = np.asarray(users, dtype=np.int64), len(data.items), data.seen_keys()
    had = np.searchsorted(seen, (users + 1) * N) - np.searchsorted(seen, users * N)
    if len(users) and (N - had).min() < n:
        u = users[(N - had).argmin()]
        raise UserError(f"user {data.users[u]} has had all but {N - had.max()} items: no {n} negatives can be drawn; "
                        "ask for fewer, or bring a larger catalogue")
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, N, (len(users), n))
    rows = np.arange(len(users))
    for attempt in range(1000):
        key = users[rows, None] * N + drawn[rows]
        bad = seen[np.minimum(np.searchsorted(seen, key), len(seen) - 1)] == key
        order = np.argsort(drawn[rows], axis=1, kind="stable")
        ranked = np.take_along_axis(drawn[rows], order, 1)
        again = np.zeros_like(bad)
        np.put_along_axis(again, order[:, 1:], ranked[:, 1:] == ranked[:, :-1], 1)
        bad |= again
        if not bad.any():
            return drawn.astype(np.int32)
        some = bad.any(1)
        rows, bad = rows[some], bad[some]
        fresh = drawn[rows]
        fresh[bad] = rng.integers(0, N, bad.sum())
        drawn[rows] = fresh
    for row in rows:                                             # a user who has had nearly everything: draw exactly
        unseen = np.setdiff1d(np.arange(N), seen[np.searchsorted(seen, users[row] * N):np.searchsorted(seen, (users[row] + 1) * N)]
                              - users[row] * N)
        drawn[row] = rng.choice(unseen, n, replace=False)
    return drawn.astype(np.int32)
