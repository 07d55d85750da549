"""Interaction logs: find, download, read, check, filter, split.

`load(name_or_folder)` reads MovieLens (1M, 100K, latest-small), Amazon reviews (2014, 2018, 2023 files) or
anybody's own `interactions.csv` (+ `items.csv`) into one `Data`. Files are read line by line and ids are
interned, so memory is bounded by what is kept, not by the file. Parsed data are cached under a fingerprint of
the source.
"""

import ast
import csv
import difflib
import gzip
import hashlib
import html
import http.client
import json
import math
import os
import re
import shutil
import sys
import urllib.error
import urllib.request
import zipfile
import zlib
from array import array
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock                 # comes with huggingface_hub
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from common.run import UserError

PARSER = 2                                # raise it when the parser changes: old caches are then left alone
TITLE, TEXT, CATEGORY = 300, 1000, 100    # longest that is kept, in characters: some sources hold web pages
GROUPLENS = "https://files.grouplens.org/datasets/movielens/"
SNAP = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/"
MCAULEY = "https://mcauleylab.ucsd.edu/public_datasets/data/"


def amazon_urls(year, category):
    """Addresses of a category's reviews (the 5-core of 2014 and 2018, all of 2023) and metadata."""
    return {"2014": (f"{SNAP}reviews_{category}_5.json.gz", f"{SNAP}meta_{category}.json.gz"),
            "2018": (f"{MCAULEY}amazon_v2/categoryFilesSmall/{category}_5.json.gz",
                     f"{MCAULEY}amazon_v2/metaFiles2/meta_{category}.json.gz"),
            "2023": (f"{MCAULEY}amazon_2023/raw/review_categories/{category}.jsonl.gz",
                     f"{MCAULEY}amazon_2023/raw/meta_categories/meta_{category}.jsonl.gz")}[year]


# name -> (folder names under which it is looked for, [(address, bytes, sha256)])
SOURCES = {
    "ml1m": (("ml-1m", "ml1m"), [(GROUPLENS + "ml-1m.zip", 5_917_549,
             "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20")]),
    "ml100k": (("ml-100k", "ml100k"), [(GROUPLENS + "ml-100k.zip", 4_924_029,
               "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229")]),
    "ml-latest-small": (("ml-latest-small",), [(GROUPLENS + "ml-latest-small.zip", 978_202,
                        "696d65a3dfceac7c45750ad32df2c259311949efec81f0f144fdfb91ebc9e436")]),
}
# Without a year the default edition is meant; some editions call a category differently. The Amazon files
# have no published checksums: they are read to their end instead, which checks gzip's own CRC.
for _name, _default, _category, _other in (
        ("video-games", "2018", "Video_Games", {}), ("movies-tv", "2018", "Movies_and_TV", {}),
        ("sports", "2014", "Sports_and_Outdoors", {}), ("toys", "2014", "Toys_and_Games", {}),
        ("beauty", "2014", "Beauty", {"2018": "All_Beauty", "2023": "All_Beauty"}),
        ("books", "2014", "Books", {})):
    for _year in ("2014", "2018", "2023"):
        _files = [(url, None, None) for url in amazon_urls(_year, _other.get(_year, _category))]
        SOURCES[f"amazon-{_name}-{_year}"] = ((f"amazon-{_name}-{_year}",), _files)
        if _year == _default:
            SOURCES[f"amazon-{_name}"] = ((f"amazon-{_name}-{_year}", f"amazon-{_name}"), _files)
KNOWN = ("toy, ml1m, ml100k, ml-latest-small, "
         "amazon-{video-games,movies-tv,sports,beauty,toys,books}[-2014|-2018|-2023]")


@dataclass
class Data:
    """Interactions sorted by time (ties in file order), items and users. Ids are 0-based and contiguous.

    titles are never empty ("item <raw id>" where the source has none), categories and texts may be.
    """
    name: str
    users: list                                  # uid -> raw id
    items: list                                  # iid -> raw id
    titles: list                                 # iid -> title
    categories: list                             # iid -> list of names
    texts: list                                  # iid -> description
    user: np.ndarray                             # (n,) int32
    item: np.ndarray                             # (n,) int32
    rating: np.ndarray                           # (n,) float32, 1 where the source has none
    time: np.ndarray                             # (n,) int64 seconds; else the place in the history
    user_fields: dict = field(default_factory=dict)       # name -> uid -> value
    fingerprint: str = ""                        # of the content, the parser and the filters
    has_ratings: bool = True
    notes: list = field(default_factory=list)    # what was mended on the way in
    world: object = None                         # the toy world's truth; None for real data

    def __post_init__(self):
        self._seen = None

    def seen_keys(self):
        """Sorted user * n_items + item of all interactions: membership by binary search."""
        if self._seen is None:
            self._seen = np.unique(self.user.astype(np.int64) * len(self.items) + self.item)
        return self._seen


class Split(NamedTuple):
    """Sorted int64 indices into the interactions; disjoint, together all of them."""
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray


class Histories(NamedTuple):
    """Item sequences in time order: user u has items[offsets[u]:offsets[u + 1]], and positions likewise."""
    offsets: np.ndarray                          # (n_users + 1,) int64
    items: np.ndarray                            # (m,) int32
    positions: np.ndarray                        # (m,) int64 indices into the interactions


# ------------------------------------------------------------------------------------------ find and download
def cache_folder():
    return Path(os.environ.get("LLMREC_CACHE") or Path.home() / ".cache" / "llmrec")


def load(name, data_dir=None, max_bad_rows=0, seed=0):
    """`toy`, `toy:USERSxITEMSxINTERACTIONS[:MISLED]`, one of SOURCES, or a folder -> Data. The seed is the toy's.

    A named data set is looked for in data_dir, LLMREC_DATA and the cache, then downloaded. Raises UserError.
    """
    if name.split(":")[0] == "toy":
        from common import toy
        sizes = re.fullmatch(r"toy(?::(\d+)x(\d+)x(\d+)(?::(0?\.\d+|[01]))?)?", name)
        if sizes is None:
            raise UserError(f"--data {name}: the toy world's sizes are written toy:USERSxITEMSxINTERACTIONS, "
                            "and after another : the share of misled users, such as 0.3")
        try:
            return toy.make(*(float(n) if k == 3 else int(n) for k, n in enumerate(sizes.groups()) if n),
                            seed=seed).data()
        except ValueError as problem:
            raise UserError(f"--data {name}: {problem}") from None
    if name in SOURCES:
        if data_dir and not Path(data_dir).is_dir():
            raise UserError(f"--data-dir {data_dir}: no such folder")
        folder = find(name, data_dir) or fetch(name)
        return read_folder(folder, name, max_bad_rows)
    folder = Path(name)
    if not folder.is_dir():
        near = difflib.get_close_matches(name, SOURCES, 1)
        raise UserError(f"--data {name}: "
                        + (f"did you mean {near[0]}?" if near else
                           "it is a file." if folder.exists() else "no such folder.")
                        + f" It is a folder or one of {KNOWN}")
    return read_folder(folder, folder.resolve().name, max_bad_rows)


def find(name, data_dir=None):
    """The folder that holds a named data set, in --data-dir, LLMREC_DATA or the download cache; or None."""
    for root in (data_dir, os.environ.get("LLMREC_DATA"), cache_folder() / "data"):
        for spelling in SOURCES[name][0] if root else ():
            folder = Path(root) / spelling
            if folder.is_dir() and any(folder.iterdir()):
                return folder
    return None


def put_where(name):
    spellings, files = SOURCES[name]
    what = "what is in it" if len(files) == 1 else "both files"
    return (f"get {' and '.join(url for url, _, _ in files)} and put {what} into "
            f"{cache_folder() / 'data' / spellings[0]} (or name its parent with --data-dir)")


def fetch(name):
    """Download, verify and unpack a named data set into the cache; the folder appears whole or not at all. Of
    processes that come at once, such as torchrun's, one does so and the others wait."""
    spellings, files = SOURCES[name]
    target = cache_folder() / "data" / spellings[0]
    stage = target.with_name(f".{spellings[0]}.download")        # stays after a failure, to go on from there
    whole = stage / "unpacked"
    lock = target.with_name(f".{spellings[0]}.lock")
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        if not target.is_dir():                                  # else another process was faster
            shutil.rmtree(whole, ignore_errors=True)
            whole.mkdir(parents=True)
            paths = [download(url, stage / url.rsplit("/", 1)[1], size, sha, put_where(name))
                     for url, size, sha in files]
            for path in paths:
                unzip(path, whole) if path.suffix == ".zip" else check_gzip(path)
            for path in paths:
                if path.suffix != ".zip":
                    os.replace(path, whole / path.name)
            inner = list(whole.iterdir())
            os.replace(inner[0] if len(inner) == 1 and inner[0].is_dir() else whole, target)
            shutil.rmtree(stage, ignore_errors=True)
    lock.unlink(missing_ok=True)
    return target


def download(url, path, size, sha256, hint):
    """Fetch a file, from where an earlier try stopped; it is verified before it gets its name."""
    if path.exists():                                            # whole and verified, by an earlier call
        return path
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "llmrec"} | ({"Range": f"bytes={have}-"} if have else {})
    total = size
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as reply:
            have = have if reply.status == 206 else 0        # the server may ignore the range and start anew
            length = reply.headers.get("Content-Length")
            total = total or (have + int(length) if length else None)
            pace = 0.2 if sys.stderr.isatty() else 30
            with open(part, "ab" if have else "wb") as out, tqdm(
                    desc=f"downloading {path.name}", total=total, initial=have, unit="B", unit_scale=True,
                    mininterval=pace, delay=2, file=sys.stderr, leave=False) as bar:
                while block := reply.read(1 << 20):
                    out.write(block)
                    bar.update(len(block))
    except urllib.error.HTTPError as problem:
        if problem.code != 416:
            raise UserError(f"{url}: {problem.code} {problem.reason}; {hint}") from None
        if size is not None and have < size:                     # 416: nothing is left, so of another file
            part.unlink()
    except (OSError, ValueError, http.client.HTTPException) as problem:
        raise UserError(f"{url}: no connection ({getattr(problem, 'reason', problem)}); {hint}") from None
    have = part.stat().st_size if part.exists() else 0
    if total is not None and have < total:
        raise UserError(f"{url}: the download ended early ({have} of {total} bytes); run the command again "
                        "to go on")
    if sha256 is not None and hashlib.sha256(part.read_bytes()).hexdigest() != sha256:
        part.unlink()
        raise UserError(f"{url}: the file's sha256 is not the published one; it was removed, "
                        f"run the command again or {hint}")
    os.replace(part, path)
    return path


def unzip(path, folder, limit=2 << 30):
    """Unpack plain files only: no absolute paths, no `..`, no links, at most `limit` bytes."""
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(info.file_size for info in archive.infolist()) > limit:
                raise UserError(f"{path}: unpacks to more than {limit} bytes; not unpacked")
            for info in archive.infolist():
                inside, kind = Path(info.filename.replace("\\", "/")), info.external_attr >> 16 & 0o170000
                plain = kind in (0, 0o100000, 0o040000)          # unknown, file, folder: no link, no device
                if inside.is_absolute() or ".." in inside.parts or ":" in info.filename or not plain:
                    raise UserError(f"{path}: holds the unsafe entry {info.filename!r}; not unpacked")
            for info in archive.infolist():
                if not info.is_dir():
                    out = folder / info.filename
                    out.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(info) as source, open(out, "wb") as sink:
                        shutil.copyfileobj(source, sink)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as problem:
        raise UserError(f"{path}: not a readable zip file ({problem}); remove it and run again") from None


def check_gzip(path):
    try:
        with gzip.open(path) as f:
            while f.read(1 << 20):
                pass
    except (OSError, EOFError, zlib.error):
        path.unlink()
        raise UserError(f"{path}: not a whole gzip file; it was removed, run the command again") from None


# ---------------------------------------------------------------------------------------------------- reading
class BadRows:
    """Counts broken rows and stops, naming file:line, at the first one too many."""

    def __init__(self, allowed):
        self.allowed, self.count, self.first = allowed, 0, None

    def __call__(self, path, line, why):
        self.count += 1
        self.first = self.first or f"{path}:{line}: {why}"
        if self.count > self.allowed:
            more = f" ({self.count} broken rows, the first at {self.first})" if self.count > 1 else ""
            raise UserError(f"{path}:{line}: {why}{more}; mend the row, or skip such rows with "
                            "--max-bad-rows N")


def lines_of(path):
    """(line number, text) of the non-empty lines of a plain or .gz file, each in UTF-8 or else Windows-1252."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as f:
            for number, line in enumerate(f, 1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError:
                    # what Excel saves; Latin-1 with quotes and dashes
                    text = line.decode("cp1252", "replace")
                if not text.isspace():
                    yield number, text
    except (EOFError, OSError, zlib.error) as problem:
        raise UserError(f"{path}: cannot be read to its end ({problem}); fetch it again") from None


def clean(text, longest):
    """Text as data: HTML entities resolved, control characters out, white space folded, cut."""
    text = html.unescape(text[:4 * longest])
    if not text.isprintable():
        text = "".join(ch if ch.isprintable() else " " if ch.isspace() else "" for ch in text)
    return " ".join(text.split())[:longest].rstrip()


def number(value, what):
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"the {what} {value!r} is no number") from None


def seconds(value):
    """A timestamp as it stands, or what an ISO date such as 2020-01-17T10:00:00Z is in seconds since 1970 (UTC
    unless it says)."""
    if "-" not in value[1:]:
        return value
    try:
        date = datetime.fromisoformat(value.strip().replace("Z", "+00:00"))
    except ValueError:
        return value
    return (date if date.tzinfo else date.replace(tzinfo=timezone.utc)).timestamp()


class Columns:
    """The growing result: interned ids and flat arrays, 20 bytes an interaction."""

    def __init__(self):
        self.users, self.items, self.has_ratings, self.has_times = {}, {}, True, True
        self.user, self.item, self.rating, self.time = array("i"), array("i"), array("f"), array("d")

    def add(self, user, item, rating, time):
        """Raises ValueError or TypeError on what is no interaction, and then has added nothing."""
        rating, time = number(rating, "rating"), number(time, "timestamp")
        if not -1e38 < rating < 1e38 or not -2**53 < time < 2**53:           # also false for nan
            raise ValueError("a rating or timestamp that is not a finite number of usual size")
        for raw, known in ((user, self.users), (item, self.items)):
            if type(raw) is not str or raw not in known and not (raw.strip() and raw.isprintable()):
                raise ValueError("a user or item id that is empty or not plain text")
        self.user.append(self.users.setdefault(user, len(self.users)))
        self.item.append(self.items.setdefault(item, len(self.items)))
        self.rating.append(rating)
        self.time.append(time)                                   # kept with its fraction: sorting comes first

    def extend(self, path, bad, rows):
        for number, user, item, rating, time in rows:
            try:
                self.add(user, item, rating, time)
            except (ValueError, TypeError, OverflowError) as problem:
                bad(path, number, str(problem))


def split_rows(path, separator, columns, bad):
    """Rows of a `::`, tab or pipe file with at least `columns` fields."""
    for number, line in lines_of(path):
        row = line.rstrip("\r\n").split(separator)
        if len(row) >= columns:
            yield number, row
        else:
            bad(path, number, f"{len(row)} fields instead of {columns}")


def csv_rows(path, bad, needed, optional=(), one_line=True):
    """Rows of a CSV file with a header -> (line number, needed and optional fields; None if no such column).

    one_line: a field holds no line break, so that a stray quote costs one row and not the rest of the file.
    """
    lines = lines_of(path)
    try:
        header = [h.strip().lower() for h in next(csv.reader([next(lines, (1, ""))[1]]), [])]
    except csv.Error:
        header = []
    missing = [c for c in needed if c not in header]
    if missing:
        shown = ",".join(header)[:200]
        raise UserError(f"{path}:1: the header {shown!r} has no column {', '.join(missing)}; "
                        + ("save the file as UTF-8, each line ended by a line feed"
                           if "\0" in shown or not shown else "the first line must name the columns"))
    if twice := sorted({c for c in (*needed, *optional) if header.count(c) > 1}):
        raise UserError(f"{path}:1: the header names {', '.join(twice)} twice; rename or remove one of them")
    pick = [header.index(c) if c in header else None for c in (*needed, *optional)]
    for number, row in (csv_lines if one_line else csv_blocks)(path, lines, bad):
        if len(row) == len(header):
            yield number, [None if k is None else row[k] for k in pick]
        else:
            bad(path, number, f"{len(row)} fields instead of {len(header)}")


def csv_lines(path, lines, bad):
    for number, text in lines:
        if '"' not in text:                                      # nearly always, and three times as fast
            yield number, text.rstrip("\r\n").split(",")
            continue
        try:
            yield number, next(csv.reader([text], strict=True))
        except csv.Error as problem:
            bad(path, number, str(problem))


def csv_blocks(path, lines, bad):
    taken = []                                                   # numbers of the lines that make up the row

    def texts():
        for number, text in lines:
            taken.append(number)
            yield text
    reader = csv.reader(texts(), strict=True)
    while True:
        taken.clear()
        try:
            row = next(reader, None)
        except csv.Error as problem:
            bad(path, taken[0], f"{problem}, in the row that starts here")
            continue
        if row is None:
            return
        yield taken[0], row


# A reader fills the columns and returns {raw item: (title, [category], text)} and {raw user: {field: value}}.
def read_ml1m(folder, columns, bad):
    path = folder / "ratings.dat"
    columns.extend(path, bad, ((n, *r[:4]) for n, r in split_rows(path, "::", 4, bad)))
    meta = {r[0]: ("::".join(r[1:-1]), r[-1].strip().split("|"), "")
            for _, r in split_rows(folder / "movies.dat", "::", 3, bad)}
    path, people = folder / "users.dat", {}
    if path.exists():
        names = ("gender", "age", "occupation")
        people = {r[0]: dict(zip(names, r[1:])) for _, r in split_rows(path, "::", 4, bad)}
    return meta, people


def read_ml100k(folder, columns, bad):
    path = folder / "u.data"
    columns.extend(path, bad, ((n, *r[:4]) for n, r in split_rows(path, "\t", 4, bad)))
    genres = [r[0] for _, r in split_rows(folder / "u.genre", "|", 1, bad)]
    meta = {}
    for _, r in split_rows(folder / "u.item", "|", 5 + len(genres), bad):
        names = [g for g, flag in zip(genres, r[-len(genres):]) if flag.strip() == "1" and g != "unknown"]
        meta[r[0]] = (r[1] if r[1] != "unknown" else "", names, "")
    path, people = folder / "u.user", {}
    if path.exists():
        names = ("age", "gender", "occupation")
        people = {r[0]: dict(zip(names, r[1:])) for _, r in split_rows(path, "|", 4, bad)}
    return meta, people


def read_ml_latest(folder, columns, bad):
    path = folder / "ratings.csv"
    rows = csv_rows(path, bad, ("userid", "movieid", "rating", "timestamp"))
    columns.extend(path, bad, ((n, *r) for n, r in rows))
    rows = csv_rows(folder / "movies.csv", bad, ("movieid", "title", "genres"), one_line=False)
    return {i: (title, [] if genres.startswith("(no genres") else genres.split("|"), "")
            for _, (i, title, genres) in rows}, {}


def read_generic(folder, columns, bad):
    def rows():
        found = csv_rows(path, bad, ("user", "item"), ("rating", "timestamp"))
        for number, (user, item, rating, time) in found:
            columns.has_ratings, columns.has_times = rating is not None, time is not None
            yield (number, user.strip(), item.strip(), 1 if rating is None else rating,
                   0 if time is None else seconds(time))
    path = first_of(folder, "interactions.csv")
    columns.extend(path, bad, rows())
    meta, path = {}, first_of(folder, "items.csv")
    optional = ("categories", "description", "text")
    found = csv_rows(path, bad, ("item", "title"), optional, one_line=False) if path else ()
    for _, (item, title, names, *texts) in found:
        meta[item.strip()] = (title, (names or "").split("|"), next(filter(None, texts), ""))
    return meta, {}


def read_bookcrossing(folder, columns, bad):
    """BX-Book-Ratings.csv and BX-Books.csv: semicolons, quotes, latin-1; no times, the order of the file counts."""
    def rows(path, n):
        for number, line in lines_of(path):
            try:
                row = next(csv.reader([line.rstrip("\r\n")], delimiter=";", escapechar="\\", strict=True))
            except csv.Error as problem:
                bad(path, number, str(problem))
                continue
            if len(row) < n:
                bad(path, number, f"{len(row)} fields instead of {n}")
            elif number > 1:                                     # the first line names the columns
                yield number, row
    path, columns.has_times = folder / "BX-Book-Ratings.csv", False
    columns.extend(path, bad, ((n, user, isbn.strip(), rating, 0)
                               for n, (user, isbn, rating, *_) in rows(path, 3)))
    meta = {}
    for _, (isbn, title, author, *_) in rows(folder / "BX-Books.csv", 3):
        if isbn.strip() in columns.items:
            meta[isbn.strip()] = (title, [author], "")
    return meta, {}


def record(line):
    """A line of an Amazon file as a dict: JSON, or a Python literal as in 2014's metadata. Or ValueError."""
    try:
        found = ast.literal_eval(line.strip()) if line.startswith("{'") else json.loads(line)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as problem:
        raise ValueError(f"not a JSON object ({type(problem).__name__})") from None
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


def read_amazon(folder, columns, bad):
    """Reviews and metadata of 2014, 2018 or 2023. Of 2023's variants of an item only the parent counts."""
    reviews, metas = amazon_files(folder)

    def rows(path):
        for number, line in lines_of(path):
            try:
                r = record(line)
                if "reviewerID" in r:
                    row = number, r["reviewerID"], r["asin"], r["overall"], r["unixReviewTime"]
                else:
                    item = r.get("parent_asin") or r["asin"]
                    row = number, r["user_id"], item, r["rating"], r["timestamp"] / 1000      # ms
            except KeyError as problem:
                bad(path, number, f"no field {problem}")
            except (ValueError, TypeError, OverflowError) as problem:
                bad(path, number, str(problem))
            else:
                yield row
    columns.extend(reviews[0], bad, rows(reviews[0]))
    meta = {}
    for path in metas:
        for number, line in lines_of(path):
            literal = re.match(r"\{'asin': '(\w+)'", line)       # slow to read: only what is kept
            if literal and literal[1] not in columns.items:
                continue
            try:
                r = record(line)
            except ValueError as problem:
                bad(path, number, str(problem))
                continue
            raw = r.get("parent_asin") or r.get("asin")
            if not isinstance(raw, str):
                bad(path, number, "an item without asin")
            elif raw in columns.items:
                title, text = str(r.get("title") or ""), amazon_text(r.get("description"))
                meta[raw] = (title, amazon_categories(r), text)
    return meta, {}


def amazon_categories(r):
    """2014: the first of several paths; 2018 and 2023: one. The root, which all items share, is left out."""
    path = r.get("categories") or r.get("category") or []
    path = path[0] if isinstance(path, list) and path and isinstance(path[0], list) else path
    return [str(name) for name in (path[1:5] or path)] if isinstance(path, list) else [str(path)]


def amazon_text(text):
    return " ".join(map(str, text))[:4 * TEXT] if isinstance(text, list) else str(text or "")[:4 * TEXT]


def amazon_files(folder):
    files = sorted(p for p in folder.iterdir() if re.search(r"\.jsonl?(\.gz)?$", p.name))
    metas = [p for p in files if p.name.lower().startswith("meta")]
    reviews = [p for p in files if p not in metas]
    if len(reviews) > 1:
        names = ", ".join(p.name for p in reviews)
        raise UserError(f"{folder}: several review files ({names}); keep one per folder")
    return reviews, metas


def first_of(folder, name):
    return next((folder / n for n in (name, name + ".gz") if (folder / n).exists()), None)


READERS = [("ratings.dat", read_ml1m, ("movies.dat",)), ("u.data", read_ml100k, ("u.item", "u.genre")),
           ("ratings.csv", read_ml_latest, ("movies.csv",)),
           ("BX-Book-Ratings.csv", read_bookcrossing, ("BX-Books.csv",)),
           ("interactions.csv", read_generic, ())]


def pick_reader(folder):
    """Detect the layout of a folder by its files."""
    for file, reader, others in READERS:
        if (folder / file).exists() or reader is read_generic and first_of(folder, file):
            missing = [f for f in others if not (folder / f).exists()]
            if missing:
                raise UserError(f"{folder}: has {file} but no {', '.join(missing)}; put it there")
            return reader
    if not amazon_files(folder)[0]:
        raise UserError(f"{folder}: no known layout; it needs interactions.csv "
                        "(user,item[,rating][,timestamp]) and items.csv (item,title[,categories]), or "
                        "MovieLens or Amazon files")
    return read_amazon


def read_folder(folder, name, max_bad_rows=0):
    """Read a folder, or what the cache has of it -> Data. Prints what was mended, one note a line."""
    reader = pick_reader(folder)
    stat = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.iterdir()) if p.is_file()]
    identity = json.dumps([PARSER, str(folder.resolve()), name, stat, max_bad_rows])
    key = hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()[:24]
    cached = cache_folder() / "parsed" / f"{key}.safetensors"
    data = from_cache(cached)
    if data is None:
        columns, bad = Columns(), BadRows(max_bad_rows)
        meta, people = reader(folder, columns, bad)
        if not columns.user:
            skipped = f" ({bad.count} broken rows skipped, the first at {bad.first})" if bad.count else ""
            raise UserError(f"{folder}: there is no interaction in it{skipped}; "
                            "check that the files are whole")
        skipped = [f"{bad.count} broken rows skipped, the first at {bad.first}"] if bad.count else []
        data = assemble(columns, meta, people, skipped, name)
        to_cache(data, cached)
    for note in data.notes:
        print(f"note: {name}: {note}", file=sys.stderr)
    return data


def assemble(c, meta, people, notes, name):
    """Sort by time, drop repeated (user, item) pairs (the earliest stays), attach titles, hash."""
    user, item = np.frombuffer(c.user, np.int32), np.frombuffer(c.item, np.int32)
    rating, time = np.frombuffer(c.rating, np.float32), np.frombuffer(c.time, np.float64)
    order = np.argsort(time, kind="stable")
    _, first = np.unique(user[order].astype(np.int64) * len(c.items) + item[order], return_index=True)
    if len(first) < len(order):
        repeated = len(order) - len(first)
        notes = notes + [f"{repeated} repeated user-item pairs dropped, the earliest of each stays"]
    order = order[np.sort(first)]
    if not c.has_times:
        time = np.zeros(len(user))
        time[order] = places(user[order])
        order = order[np.argsort(time[order], kind="stable")]
    user, item, rating, time = user[order], item[order], rating[order], np.floor(time[order]).astype(np.int64)
    users, items = list(c.users), list(c.items)
    described = [meta.get(raw, ("", (), "")) for raw in items]
    titles = [clean(title, TITLE) for title, _, _ in described]
    if not all(titles):
        example = f" (such as {items[titles.index('')]!r}" + (
            f"; the titles' ids look like {next(iter(meta))!r})" if meta else "; there is no file of titles)")
        notes = notes + [f"{titles.count('')} of {len(titles)} items have no title{example}, "
                         "their id stands for it"]
    titles = [title or f"item {raw}" for title, raw in zip(titles, items)]
    categories = [list(dict.fromkeys(filter(None, (clean(x, CATEGORY) for x in names))))
                  for _, names, _ in described]
    texts = [clean(text, TEXT) for _, _, text in described]
    fields = {f: [clean(people.get(u, {}).get(f, ""), CATEGORY) for u in users]
              for f in dict.fromkeys(f for row in people.values() for f in row)}
    digest = hashlib.sha256(str(PARSER).encode())
    for strings in (users, items, titles, categories, texts, fields):
        digest.update(json.dumps(strings).encode())
    for column in (user, item, rating, time):
        digest.update(column.tobytes())
    return Data(name, users, items, titles, categories, texts, user, item, rating, time, fields,
                digest.hexdigest()[:16], c.has_ratings, notes)


ARRAYS = ("user", "item", "rating", "time")
STRINGS = ("name", "users", "items", "titles", "categories", "texts", "user_fields", "fingerprint",
           "has_ratings", "notes")


def checksum(arrays):
    return np.array([zlib.crc32(arrays[k]) for k in (*ARRAYS, "strings")], np.int64)


def to_cache(data, path):
    """One safetensors file, strings as JSON bytes. A cache that cannot be written is only a slower start."""
    arrays = {k: getattr(data, k) for k in ARRAYS}
    strings = json.dumps({k: getattr(data, k) for k in STRINGS})
    arrays["strings"] = np.frombuffer(strings.encode(), np.uint8)
    beside = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays | {"crc": checksum(arrays)}, beside)
        os.replace(beside, path)
    except (OSError, SafetensorError):
        pass


def from_cache(path):
    if not path.exists():
        return None
    try:
        arrays = load_file(path)
        if not np.array_equal(arrays.pop("crc"), checksum(arrays)):
            return None
        return Data(**json.loads(arrays.pop("strings").tobytes()), **arrays)
    except Exception:                                    # damaged, in whichever way: read the source again
        return None


# ------------------------------------------------------------------------------------------- filter and split
def keep(data, mask, note):
    """The interactions of `mask` (n,) bool, with users and items renumbered to those that are left."""
    if not mask.any():
        raise UserError(f"--data {data.name}: nothing is left after the filter ({note}); lower it")
    users, user = np.unique(data.user[mask], return_inverse=True)
    items, item = np.unique(data.item[mask], return_inverse=True)

    def pick(values, ids):
        return [values[i] for i in ids]
    digest = hashlib.sha256(f"{data.fingerprint} {note}".encode()).hexdigest()[:16]
    return replace(data, users=pick(data.users, users), items=pick(data.items, items),
                   titles=pick(data.titles, items), categories=pick(data.categories, items),
                   texts=pick(data.texts, items), user=user.astype(np.int32), item=item.astype(np.int32),
                   rating=data.rating[mask], time=data.time[mask], fingerprint=digest,
                   user_fields={k: pick(v, users) for k, v in data.user_fields.items()})


def min_rating(data, lowest):
    """Interactions rated at least so; 0 keeps all. Raises UserError where there are no ratings, or none so high."""
    if lowest <= 0:
        return data
    if not data.has_ratings or data.rating.max() < lowest:
        raise UserError(f"--min-rating {lowest:g}: {data.name} " + (
            f"has no rating above {data.rating.max():g}" if data.has_ratings else "has no ratings"))
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
    chosen = np.random.default_rng([seed, 23]).permutation(len(data.users))[:max(n, 0)]
    return keep(data, np.isin(data.user, chosen), f"{n} users, seed {seed}")


def places(user):
    """(n,) place of each interaction in its user's history, 0 first; `user` (n,) in time order."""
    order = np.argsort(user, kind="stable")
    count = np.bincount(user)
    place = np.empty(len(user), dtype=np.int64)
    place[order] = np.arange(len(user)) - np.repeat(np.cumsum(count) - count, count)
    return place


def histories(data, index=None):
    """Per user the items of the interactions `index` (any order; all if None) in time order -> Histories."""
    index = np.arange(len(data.user)) if index is None else np.sort(index)
    positions = index[np.argsort(data.user[index], kind="stable")]           # data are in time order already
    count = np.bincount(data.user[index], minlength=len(data.users))
    return Histories(np.concatenate([[0], np.cumsum(count)]), data.item[positions], positions)


def parts(label):
    return Split(*(np.flatnonzero(label == k) for k in range(3)))


def split_last_two(data):
    """Per user in time order the last interaction is test, the one before it validation, the rest train;
    users with fewer than 3 only train."""
    count = np.bincount(data.user)[data.user]
    left = count - 1 - places(data.user)                         # how many of the user's come after this one
    return parts(np.where(count < 3, 0, np.maximum(2 - left, 0)))


def shares(valid, test):
    if not (valid >= 0 and test >= 0 and valid + test < 1):
        raise UserError(f"split shares {valid} and {test}: none may be negative, and their sum must be < 1")
    return 1 - valid - test, 1 - test


def split_time(data, valid=0.1, test=0.1):
    """Global: the latest share is test, the share before it validation. Equal timestamps never straddle a
    cut: they go to the later part. UserError if nothing is left to train on."""
    n = len(data.time)
    label = np.zeros(n, dtype=int)
    for share in shares(valid, test):
        first = math.floor(n * share + 1e-9)
        if first < n:
            label += data.time >= data.time[first]
    if not (label == 0).any():
        raise UserError(f"--data {data.name}: timestamps too equal to be split by time; split per user")
    return parts(label)


def split_ratio(data, valid=0.1, test=0.1):
    """Per user in time order: the last share is test, the one before it validation, the first is train."""
    place, count = places(data.user), np.bincount(data.user)[data.user]
    label = np.zeros(len(place), dtype=int)
    for share in shares(valid, test):
        label += place >= np.maximum(np.floor(count * share + 1e-9), 1)
    return parts(label)


def negatives(data, users, n, seed, seen=None, weights=None):
    """(len(users), n) int32: items that the user has not seen, no repeats in a row.

    seen: sorted keys user * n_items + item. By default all that the user ever had: negatives to judge by. To
    train with, give Logs.train_keys: were held-out items spared, they would be the only ones that a user's
    vector is never pushed away from, which tells them. Uniform, or by weights (n_items,); a pure function of
    its arguments. Raises UserError if a user has fewer than n such items.
    """
    users, N, seen = (np.asarray(users, dtype=np.int64), len(data.items),
                      data.seen_keys() if seen is None else seen)
    low, high = np.searchsorted(seen, users * N), np.searchsorted(seen, (users + 1) * N)

    def unseen(row):
        return np.setdiff1d(np.arange(N), seen[low[row]:high[row]] - users[row] * N)
    for row in np.flatnonzero(N - (high - low) < n):             # too few
        raise UserError(f"user {data.users[users[row]]} has had all but {len(unseen(row))} of {N} items: "
                        f"no {n} negatives can be drawn; ask for fewer, or bring a larger catalogue")
    rng = np.random.default_rng(seed)
    share = None if weights is None else np.cumsum(weights) / np.sum(weights)

    def draw(shape):
        if share is None:
            return rng.integers(0, N, shape)
        return np.minimum(np.searchsorted(share, rng.random(shape), side="right"), N - 1)
    drawn, rows = draw((len(users), n)), np.arange(len(users))
    for _ in range(50):                                          # draw again what collides
        part = drawn[rows]
        key = users[rows, None] * N + part
        bad = seen[np.minimum(np.searchsorted(seen, key), len(seen) - 1)] == key
        order = np.argsort(part, axis=1, kind="stable")
        ranked, again = np.take_along_axis(part, order, 1), np.zeros_like(bad)
        np.put_along_axis(again, order[:, 1:], ranked[:, 1:] == ranked[:, :-1], 1)
        bad |= again
        some = bad.any(1)
        rows, bad, part = rows[some], bad[some], part[some]
        if not len(rows):
            break
        part[bad] = draw(bad.sum())
        drawn[rows] = part
    for row in rows:                                         # who has had nearly all: from a list of the rest
        rest = unseen(row)
        p = None if weights is None else weights[rest] / weights[rest].sum()
        drawn[row] = rng.choice(rest, n, replace=False, p=p)
    return drawn.astype(np.int32)
