"""Reading, downloading, filtering and splitting logs: hand-made files of every layout, and real ones."""

import gzip
import hashlib
import http.server
import io
import json
import os
import random
import threading
import time
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common import data as datasets
from common.data import Data, load
from common.run import UserError
from common.sequences import Logs


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Every test has a cache of its own, and real data only where it asks for them."""
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LLMREC_DATA", raising=False)


REAL = os.environ.get("LLMREC_DATA")


def write(folder, **files):
    """Files by name (`__` stands for a dot); bytes as they are, .gz compressed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        name, raw = name.replace("__", "."), content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return str(folder)


def logs(*rows, n_users=None, n_items=None):
    """Data of (user, item) or (user, item, time) rows, which must be in time order."""
    rows = [r if len(r) == 3 else (*r, t) for t, r in enumerate(rows)]
    user, item, time = (np.array(c) for c in zip(*rows))
    U, I = n_users or user.max() + 1, n_items or item.max() + 1
    return Data(
        "hand",
        [f"u{u}" for u in range(U)],
        [f"i{i}" for i in range(I)],
        [f"title {i}" for i in range(I)],
        [[] for _ in range(I)],
        [""] * I,
        user.astype(np.int32),
        item.astype(np.int32),
        np.ones(len(rows), np.float32),
        time.astype(np.int64),
        {"age": [str(u) for u in range(U)]},
        "f",
    )


def random_logs(seed, users=60, items=40):
    rng = np.random.default_rng(seed)
    rows = [(u, i) for u in range(users) for i in rng.permutation(items)[:rng.integers(1, 25)]]
    return logs(*(rows[k] for k in rng.permutation(len(rows))), n_users=users, n_items=items)


def valid(d):
    """Everything that the Data docstring promises."""
    n = len(d.user)
    assert n == len(d.item) == len(d.rating) == len(d.time) > 0
    assert [c.dtype for c in (d.user, d.item, d.rating, d.time)] == [np.int32, np.int32, np.float32, np.int64]
    assert np.array_equal(np.unique(d.user), np.arange(len(d.users)))
    assert np.array_equal(np.unique(d.item), np.arange(len(d.items)))
    assert len(d.items) == len(d.titles) == len(d.categories) == len(d.texts) and all(d.titles)
    assert all(isinstance(x, str) for x in d.users + d.items + d.titles + d.texts)
    assert all(x.isprintable() for x in d.users + d.items + d.titles)
    assert np.isfinite(d.rating).all() and (np.diff(d.time) >= 0).all()
    assert len(d.seen_keys()) == n                                           # no pair twice
    assert all(len(v) == len(d.users) for v in d.user_fields.values())
    return d


def rows_of(d):
    return [
        (d.users[u], d.items[i], float(r), int(t)) for u, i, r, t in zip(d.user, d.item, d.rating, d.time)
    ]


# ---------------------------------------------------------------------------------------------------- layouts
def test_ml_1m_files_are_latin_1_sorted_by_time_with_user_fields(tmp_path):
    d = valid(load(write(tmp_path / "x", ratings__dat="1::20::5::300\n2::10::3::100\n1::10::4::200\n",
                         movies__dat="10::Les Misérables (1995)::Drama|Musical\n20::Heat (1995)::Action\n"
                                     "30::Unseen (1990)::Action\n".encode("latin-1"),
                         users__dat="1::F::25::10::48067\n2::M::56::16::70072\n")))
    assert rows_of(d) == [("2", "10", 3, 100), ("1", "10", 4, 200), ("1", "20", 5, 300)]
    assert dict(zip(d.items, d.titles)) == {"20": "Heat (1995)", "10": "Les Misérables (1995)"}
    assert d.categories[d.items.index("10")] == ["Drama", "Musical"] and d.has_ratings
    assert d.user_fields == {"gender": ["F", "M"], "age": ["25", "56"], "occupation": ["10", "16"]}


def test_ml_100k_genres_are_the_last_flags_and_unknown_is_no_title(tmp_path):
    d = valid(
        load(
            write(
                tmp_path / "x",
                u__data="7\t1\t5\t10\n7\t2\t1\t20\n",
                u__genre="unknown|0\nAction|1\nWar|2\n\n",
                u__item="1|Am\xe9lie|1-Jan-95||http://x|0|1|1\n2|unknown||||1|0|0\n".encode("latin-1"),
                u__user="7|24|M|technician|85711\n",
            )
        )
    )
    assert d.titles == ["Amélie", "item 2"] and d.categories == [["Action", "War"], []]
    assert d.user_fields == {"age": ["24"], "gender": ["M"], "occupation": ["technician"]}


def test_ml_latest_csv_has_crlf_quoted_commas_and_half_stars(tmp_path):
    d = valid(
        load(
            write(
                tmp_path / "x",
                ratings__csv="userId,movieId,rating,timestamp\r\n1,11,4.5,7\r\n1,12,0.5,8\r\n",
                movies__csv='movieId,title,genres\r\n11,"American President, The (1995)",Comedy|Drama\r\n'
                "12,No Year,(no genres listed)\r\n",
            )
        )
    )
    assert d.titles == ["American President, The (1995)", "No Year"] and d.categories == [
        ["Comedy", "Drama"],
        [],
    ]
    assert d.rating.tolist() == [4.5, 0.5]


REVIEW = {"reviewerID": "A1", "asin": "B1", "overall": 5.0, "unixReviewTime": 100, "reviewText": "fine"}


def lines(*records):
    return "".join(json.dumps(r) + "\n" for r in records)


def test_amazon_2014_metadata_are_python_literals(tmp_path):
    meta = (
        "{'asin': 'B1', 'title': \"A 'quoted' title\", 'categories': [['Beauty', 'Makeup', 'Face'], ['O']]}\n"
        "{'asin': 'B9', 'title': __import__('os')}\n"
    )  # not kept, so not even looked at
    d = valid(
        load(write(tmp_path / "x", reviews_Beauty_5__json__gz=lines(REVIEW), meta_Beauty__json__gz=meta))
    )
    assert d.titles == ["A 'quoted' title"] and d.categories == [["Makeup", "Face"]]


def test_amazon_metadata_are_never_run(tmp_path):
    meta = "{'asin': 'B1', 'title': __import__('os').mkdir('" + str(tmp_path / "made") + "')}\n"
    folder = write(tmp_path / "x", reviews__json=lines(REVIEW), meta__json=meta)
    with pytest.raises(UserError, match=r"meta\.json:1: not a JSON object"):
        load(folder)
    assert load(folder, max_bad_rows=1).titles == ["item B1"] and not (tmp_path / "made").exists()


def test_amazon_2018_descriptions_are_lists_and_only_kept_items_are_held(tmp_path):
    meta = [
        {
            "asin": "B1",
            "title": "Pok&eacute;mon",
            "category": ["Games", "Switch", "Switch"],
            "description": ["a", "b"],
        },
        {"asin": "B2", "title": "never reviewed", "category": []},
    ]
    d = valid(load(write(tmp_path / "x", G_5__json__gz=lines(REVIEW, REVIEW | {"reviewerID": "A2"}),
                         meta_G__json__gz=lines(*meta))))
    assert (
        d.items == ["B1"] and d.titles == ["Pokémon"] and d.categories == [["Switch"]] and d.texts == ["a b"]
    )


def test_amazon_2023_counts_the_parent_item_and_milliseconds(tmp_path):
    reviews = [{"user_id": "U", "asin": "C1", "parent_asin": "P1", "rating": 4.0, "timestamp": 1588687728923},
               {"user_id": "U", "asin": "C2", "parent_asin": "P2", "rating": 2.0, "timestamp": 1588687728922},
               {"user_id": "U", "asin": "C3", "parent_asin": "P1", "rating": 1.0, "timestamp": 1588687729000}]
    meta = [{"parent_asin": "P1", "title": "One", "categories": ["Toys", "Puzzles"], "description": []},
            {"parent_asin": "P2", "title": None, "categories": [], "description": ["text"]}]
    d = valid(load(write(tmp_path / "x", Toys__jsonl=lines(*reviews), meta_Toys__jsonl=lines(*meta))))
    # ordered by the millisecond
    assert rows_of(d) == [("U", "P2", 2, 1588687728), ("U", "P1", 4, 1588687728)]
    assert dict(zip(d.items, d.titles)) == {"P1": "One", "P2": "item P2"}
    assert dict(zip(d.items, d.categories)) == {"P1": ["Puzzles"], "P2": []} and "1 repeated" in d.notes[0]


def test_generic_columns_are_found_by_name_in_any_order(tmp_path):
    d = valid(
        load(
            write(
                tmp_path / "x",
                items__csv='title,categories,item,description\n"A, ""b""",x|y,i1,"two\nlines"\n',
                interactions__csv='\ufefftimestamp,Item,extra,user\n2.5,"i,2",,u\n2.25,i1,,u\n',
            )
        )
    )
    # fractions of a second order
    assert rows_of(d) == [("u", "i1", 1, 2), ("u", "i,2", 1, 2)] and not d.has_ratings
    assert d.titles[d.items.index("i1")] == 'A, "b"' and d.texts[d.items.index("i1")] == "two lines"
    assert d.categories[d.items.index("i1")] == ["x", "y"] and d.titles[d.items.index("i,2")] == "item i,2"


def test_without_timestamps_file_order_counts_and_time_is_the_place_in_the_history(tmp_path):
    d = valid(load(write(tmp_path / "x", interactions__csv="user,item\na,x\na,y\nb,y\na,x\na,z\n")))
    assert rows_of(d) == [("a", "x", 1, 0), ("b", "y", 1, 0), ("a", "y", 1, 1), ("a", "z", 1, 2)]


def test_dates_are_timestamps_and_what_is_none_is_named(tmp_path):
    d = load(write(tmp_path / "x", interactions__csv="user,item,timestamp\nu,a,1970-01-02T00:00:01Z\nu,b,1970-01-01\nu,c,1970-01-02 01:00:00+01:00\n"))
    assert rows_of(d) == [("u", "b", 1, 0), ("u", "c", 1, 86400), ("u", "a", 1, 86401)]
    with pytest.raises(UserError, match="csv:2: the timestamp 'soon' is no number"):
        load(write(tmp_path / "y", interactions__csv="user,item,timestamp\nu,a,soon\n"))
    with pytest.raises(UserError, match="csv:2: the rating '' is no number"):
        load(write(tmp_path / "z", interactions__csv="user,item,rating\nu,a,\n"))


def test_a_date_without_a_zone_is_utc_wherever_the_machine_stands(monkeypatch):
    try:
        with monkeypatch.context() as elsewhere:
            elsewhere.setenv("TZ", "Asia/Tokyo")
            time.tzset()
            assert datasets.seconds("1970-01-02") == 86400 and datasets.seconds("1970-01-02T09:00:00+09:00") == 86400
    finally:
        time.tzset()


def test_ties_in_time_keep_the_order_of_the_file(tmp_path):
    rows = "".join(f"u,i{k},{k % 2}\n" for k in range(200))
    d = load(write(tmp_path / "x", interactions__csv="user,item,timestamp\n" + rows))
    assert [d.items[i] for i in d.item] == [f"i{k}" for k in (*range(0, 200, 2), *range(1, 200, 2))]


def test_of_repeated_pairs_the_earliest_in_time_stays(tmp_path, capsys):
    d = valid(
        load(
            write(
                tmp_path / "x", interactions__csv="user,item,rating,timestamp\nu,i,1,30\nu,i,2,10\nu,i,3,20\n",
                items__csv="item,title\ni,An item\n",
            )
        )
    )
    assert rows_of(d) == [("u", "i", 2, 10)]
    assert (
        capsys.readouterr().err == "note: x: 2 repeated user-item pairs dropped, the earliest of each stays\n"
    )


@pytest.mark.parametrize(
    "raw, title",
    [
        ("Pok&eacute;mon &amp; more", "Pokémon & more"),
        ("a\0b\x1bc", "abc"),
        ("  wide\t \u00a0gap ", "wide gap"),
        ("<b></answer>{x}%s", "<b></answer>{x}%s"),
        ("&nbsp;", "item B1"),
        ("\ud800", "item B1"),
        ("x" * 999, "x" * 300),
    ],
)
def test_titles_are_data(tmp_path, raw, title):
    folder = write(tmp_path / "x", r__json=lines(REVIEW), meta__json=lines({"asin": "B1", "title": raw}))
    assert valid(load(folder)).titles == [title]


# ------------------------------------------------------------------------------------------------ broken rows
GOOD = "user,item,rating,timestamp\nu,a,1,1\n"


@pytest.mark.parametrize(
    "row",
    [
        "u,b,nan,2",
        "u,b,inf,2",
        "u,b,1e300,2",
        "u,b,,2",
        "u,b,five,2",
        "u,b,1,soon",
        "u,b,1,1e40",
        "u,b,1",
        "u,b,1,2,3",
        ",b,1,2",
        "u, ,1,2",
        "u,b\0,1,2",
        'u,"b,1,2',
    ],
)
def test_a_broken_row_is_named_and_skipped_only_when_allowed(tmp_path, row):
    folder = write(tmp_path / "x", interactions__csv=GOOD + row + "\nu,c,2,3\n")
    with pytest.raises(UserError, match=r"interactions\.csv:3: .*--max-bad-rows"):
        load(folder)
    d = valid(load(folder, max_bad_rows=1))
    assert rows_of(d) == [("u", "a", 1, 1), ("u", "c", 2, 3)]
    assert "1 broken rows skipped" in d.notes[0] and "interactions.csv:3" in d.notes[0]


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "5",
        "[" * 99999,
        lines(REVIEW | {"asin": ["B"]}),
        lines(REVIEW | {"asin": 7}),
        lines(REVIEW | {"overall": None}),
        lines({"asin": "B"}),
        lines(REVIEW | {"overall": 10**400}),
        '{"reviewerID": "A", "asin": "B", "overall": NaN, "unixReviewTime": 1}',
    ],
    ids=["no json", "number", "nested", "list id", "number id", "null", "no user", "huge", "nan"],
)
def test_a_broken_review_leaves_nothing_behind(tmp_path, line):
    folder = write(
        tmp_path / "x", r__json=lines(REVIEW) + line.strip() + "\n" + lines(REVIEW | {"asin": "B2"})
    )
    with pytest.raises(UserError, match=r"r\.json:2: "):
        load(folder)
    assert rows_of(valid(load(folder, max_bad_rows=1))) == [("A1", "B1", 5, 100), ("A1", "B2", 5, 100)]


def test_more_broken_rows_than_allowed_stop_at_the_first_too_many(tmp_path):
    folder = write(
        tmp_path / "x", ratings__dat="1::1::5::1\nx\n1::2::5::2\ny\nz\n", movies__dat="1::A::B\n2::C::D\n"
    )
    with pytest.raises(UserError, match=r"ratings\.dat:4: .*2 broken rows, the first at .*ratings\.dat:2"):
        load(folder, max_bad_rows=1)
    assert len(load(folder, max_bad_rows=3).user) == 2


def test_a_stray_quote_among_items_is_named_where_its_row_starts(tmp_path):
    folder = write(tmp_path / "x", interactions__csv=GOOD, items__csv='item,title\nb,x\na,"open\nc,y\n')
    with pytest.raises(UserError, match=r"items\.csv:3: "):
        load(folder)


@pytest.mark.parametrize(
    "files, says",
    [
        ({}, "no known layout"),
        ({"interactions__csv": ""}, "no column user, item"),
        ({"interactions__csv": "user,item\n"}, "no interaction"),
        ({"interactions__csv": "who,item\n"}, "no column user"),
        ({"ratings__dat": "1::1::1::1\n"}, "no movies.dat"),
        ({"a__json": "", "b__json": ""}, "several review files"),
        ({"r__json__gz": "x"}, "not a JSON object"),
    ],
)
def test_folders_that_cannot_be_read_say_why(tmp_path, files, says):
    with pytest.raises(UserError, match=says):
        load(write(tmp_path / "x", **files))


def test_a_cut_gzip_file_is_an_error_and_not_half_the_data(tmp_path):
    folder = Path(
        write(tmp_path / "x", r__json__gz=lines(*(REVIEW | {"asin": f"B{k * 7919}"} for k in range(999))))
    )
    path = folder / "r.json.gz"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="cannot be read to its end"):
        load(str(folder))


def test_of_1000_mangled_files_each_is_a_user_error_or_valid_data(tmp_path):
    rng, outcomes = random.Random(5), Counter()
    base = (
        "user,item,rating,timestamp\n" + "".join(f"u{k % 3},i{k},{k % 5},{k}.5\n" for k in range(6))
    ).encode()
    titles = ("item,title,categories\n" + "".join(f'i{k},"t, {k}",a|b\n' for k in range(6))).encode()
    alphabet = [*b'",\n\r\0|\xff\x1a-.e9nu &;', 0xc3, 0x85]
    for k in range(1000):
        files = [bytearray(base), bytearray(titles)]
        for _ in range(rng.randint(1, 4)):
            raw = files[rng.random() < 0.4]
            at = rng.randrange(len(raw))
            raw[at:at + rng.randint(0, 2)] = bytes(rng.choice(alphabet) for _ in range(rng.randint(0, 2)))
        folder = write(tmp_path / "x", interactions__csv=bytes(files[0]), items__csv=bytes(files[1]))
        try:
            valid(load(folder, max_bad_rows=rng.choice([0, 2, 9])))
            outcomes["data"] += 1
        except UserError as problem:
            assert "\n" not in str(problem) and "\r" not in str(problem)
            outcomes["error"] += 1
    assert min(outcomes["data"], outcomes["error"]) > 100, outcomes


# ------------------------------------------------------------------------------------------------------ cache
def same(a, b):
    return rows_of(a) == rows_of(b) and all(getattr(a, k) == getattr(b, k) for k in datasets.STRINGS)


def test_the_second_start_reads_the_cache_and_a_changed_source_does_not(tmp_path, monkeypatch):
    folder = write(tmp_path / "x", interactions__csv=GOOD)
    first = load(folder)
    monkeypatch.setattr(datasets, "assemble", None)                          # parsing would fail now
    assert same(load(folder), first)
    monkeypatch.undo()
    write(tmp_path / "x", interactions__csv=GOOD + "u,b,1,2\n")
    changed = load(folder)
    assert len(changed.user) == 2 and changed.fingerprint != first.fingerprint


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[: len(raw) // 2],
        lambda raw: b"x" * len(raw),
        lambda raw: raw.replace(np.float32(1).tobytes(), np.float32(2).tobytes()),
    ],
)
def test_a_damaged_cache_is_parsed_anew_without_a_word(tmp_path, damage, capsys):
    folder = write(tmp_path / "x", interactions__csv=GOOD)
    first = load(folder)
    (cached,) = (tmp_path / "cache" / "parsed").iterdir()
    cached.write_bytes(damage(cached.read_bytes()))
    capsys.readouterr()
    assert same(load(folder), first) and "note: x: 1 of 1 items have no title (such as 'a'; there is no file of titles)" in capsys.readouterr().err


def test_the_cache_of_a_lenient_start_of_an_older_parser_or_of_a_file_since_edited_is_not_read(tmp_path, monkeypatch):
    folder = write(tmp_path / "x", interactions__csv=GOOD + "u,b,1\n")
    assert len(load(folder, max_bad_rows=1).user) == 1
    with pytest.raises(UserError, match="csv:3"):
        load(folder)
    write(tmp_path / "x", interactions__csv=GOOD)
    os.utime(tmp_path / "x" / "interactions.csv", ns=(1, 1))
    assert load(folder).items == ["a"]
    write(tmp_path / "x", interactions__csv=GOOD.replace("u,a", "u,b"))          # as many bytes
    os.utime(tmp_path / "x" / "interactions.csv", ns=(2, 2))
    assert load(folder).items == ["b"]
    monkeypatch.setattr(datasets, "PARSER", datasets.PARSER + 1)
    monkeypatch.setattr(datasets, "assemble", None)
    with pytest.raises(TypeError):                                           # it is parsed
        load(folder)


def test_the_fingerprint_sees_every_part_of_the_content(tmp_path):
    rows, items = "user,item,rating,timestamp\nu,a,1,1\nu,b,1,2\n", "item,title,categories,text\na,A,c,t\nb,B,c,t\n"
    changed = [(rows, items), (rows.replace("u,b", "v,b"), items), (rows.replace("u,b,1", "u,b,2"), items), (rows.replace("1,2", "1,3"), items)]
    changed += [(rows, items.replace("b,B,c,t", line)) for line in ("b,C,c,t", "b,B,d,t", "b,B,c,s")]
    found = [load(write(tmp_path / str(k), interactions__csv=x, items__csv=y)).fingerprint for k, (x, y) in enumerate([*changed, changed[0]])]
    assert len(set(found)) == len(changed) and found[0] == found[-1]


def test_a_header_in_another_encoding_or_with_a_column_twice_is_one_line(tmp_path):
    for number, (text, encoding, words) in enumerate((("user,item\nu,i\n", "utf-16", "save the file as UTF-8"), ("user,item,item\nu,i,j\n", "utf-8", "item twice"))):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "interactions.csv").write_text(text, encoding=encoding)
        with pytest.raises(UserError, match=f"interactions.csv:1: .*{words}"):
            load(str(tmp_path / str(number)))


def test_titles_whose_ids_are_written_otherwise_are_a_note(tmp_path, capsys):
    load(write(tmp_path / "x", interactions__csv="user,item\nu,10.0\n", items__csv="item,title\n10,Heat\n"))
    assert "1 of 1 items have no title (such as '10.0'; the titles' ids look like '10')" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "cache").write_text("")
    assert len(load(write(tmp_path / "x", interactions__csv=GOOD)).user) == 1


# --------------------------------------------------------------------------------------------------- download
def zipped(**entries):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():                                # content, or (ZipInfo, content)
            archive.writestr(*(content if isinstance(content, tuple) else (name, content)))
    return buffer.getvalue()


class Server:
    """Serves bytes by path, with Range; `cut[path] = n` sends only n bytes, once, of what was promised."""

    def __init__(self):
        outer, self.files, self.cut, self.asked, self.ranges = self, {}, {}, [], True

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                body, wanted = outer.files.get(self.path), self.headers.get("Range")
                outer.asked.append((self.path, wanted))
                if body is None:
                    return self.send_error(404)
                start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and outer.ranges else 0
                if start and start >= len(body):
                    return self.send_error(416)
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(body) - start))
                self.end_headers()
                self.wfile.write(body[start:][:outer.cut.pop(self.path, None)])

            def log_message(self, *args):
                pass
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    s = Server()
    yield s
    s.http.shutdown()
    s.http.server_close()


def offer(server, monkeypatch, raw, path="/set.zip", published=None):
    """Make `some-set` a named data set whose zip is `raw`; published: what its checksum is made from."""
    server.files[path] = raw
    entry = raw if published is None else published
    monkeypatch.setitem(datasets.SOURCES, "some-set", (("some-set",), [
        (server.url + path, len(entry), hashlib.sha256(entry).hexdigest())]))


SET = zipped(**{"inner/interactions.csv": GOOD + "".join(f"u,x{k},1,{k}\n" for k in range(500))})


def leftovers(tmp_path):
    return sorted(p.name for p in (tmp_path / "cache" / "data").iterdir())


def test_a_named_data_set_is_downloaded_once_verified_and_unpacked(tmp_path, server, monkeypatch):
    offer(server, monkeypatch, SET)
    assert len(valid(load("some-set")).user) == len(load("some-set").user) == 501
    assert server.asked == [("/set.zip", None)] and leftovers(tmp_path) == ["some-set"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_download_goes_on_where_it_stopped(tmp_path, server, monkeypatch, ranges):
    offer(server, monkeypatch, SET)
    server.cut["/set.zip"], server.ranges = 700, ranges
    with pytest.raises(UserError, match="700 of .* bytes.*run the command again"):
        load("some-set")
    assert len(load("some-set").user) == 501 and leftovers(tmp_path) == ["some-set"]
    assert server.asked == [("/set.zip", None), ("/set.zip", "bytes=700-")]


def test_of_two_that_come_at_once_one_downloads_and_the_other_waits(tmp_path, server, monkeypatch):
    offer(server, monkeypatch, SET)
    with ThreadPoolExecutor(4) as pool:
        assert [len(d.user) for d in pool.map(load, ["some-set"] * 4)] == [501] * 4
    assert len(server.asked) == 1 and leftovers(tmp_path) == ["some-set"]


def test_what_excel_saves_keeps_its_quotes_and_dashes(tmp_path):
    d = load(write(tmp_path / "x", interactions__csv="user,item\nŽižek,a\n".encode("cp1252"), items__csv="item,title\na,Don’t Look – now €5\n".encode("cp1252")))
    assert (d.users, d.titles) == (["Žižek"], ["Don’t Look – now €5"])


def test_a_file_with_another_checksum_is_removed_and_never_unpacked(tmp_path, server, monkeypatch):
    bad = SET[:200] + bytes([SET[200] ^ 1]) + SET[201:]
    offer(server, monkeypatch, bad, published=SET)
    with pytest.raises(UserError, match="sha256"):
        load("some-set")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.suffix != ".lock"]
    server.files["/set.zip"] = SET  # mended: the next try starts anew
    assert len(load("some-set").user) == 501


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "ABSOLUTE", "..\\evil", "C:evil", "LINK"])
def test_an_evil_zip_writes_nothing(tmp_path, server, monkeypatch, name):
    info = zipfile.ZipInfo(name.replace("ABSOLUTE", str(tmp_path / "evil")))
    if name == "LINK":
        info.external_attr = 0o120777 << 16
    offer(server, monkeypatch, zipped(**{"good/interactions.csv": GOOD}, evil=(info, "/etc/passwd")))
    with pytest.raises(UserError, match="unsafe entry"):
        load("some-set")
    written = [p for p in tmp_path.rglob("*") if p.is_file() or p.is_symlink()]
    assert sorted(p.name for p in written) == [".some-set.lock", "set.zip"]  # the good entry is not there either


def test_a_zip_bomb_and_a_file_that_is_no_zip_are_refused(tmp_path):
    (tmp_path / "a.zip").write_bytes(zipped(big="0" * 5000))
    (tmp_path / "b.zip").write_bytes(b"no zip")
    with pytest.raises(UserError, match="more than 4999 bytes"):
        datasets.unzip(tmp_path / "a.zip", tmp_path / "out", limit=4999)
    with pytest.raises(UserError, match="not a readable zip"):
        datasets.unzip(tmp_path / "b.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def amazon(server, monkeypatch):
    monkeypatch.setitem(datasets.SOURCES, "some-set", (("some-set",), [
        (server.url + "/r_5.json.gz", None, None), (server.url + "/meta_r.json.gz", None, None)]))
    server.files["/r_5.json.gz"] = gzip.compress(lines(REVIEW).encode())
    server.files["/meta_r.json.gz"] = gzip.compress(lines({"asin": "B1", "title": "T"}).encode())


def test_files_without_a_checksum_are_read_to_their_end_and_fetched_one_by_one(tmp_path, server, monkeypatch):
    amazon(server, monkeypatch)
    server.cut["/meta_r.json.gz"] = 20
    with pytest.raises(UserError, match="20 of"):                            # known from Content-Length alone
        load("some-set")
    assert valid(load("some-set")).titles == ["T"] and leftovers(tmp_path) == ["some-set"]
    assert [path for path, _ in server.asked] == ["/r_5.json.gz", "/meta_r.json.gz", "/meta_r.json.gz"]


def test_a_damaged_gzip_file_is_removed(tmp_path, server, monkeypatch):
    amazon(server, monkeypatch)
    good = server.files["/r_5.json.gz"]
    server.files["/r_5.json.gz"] = good[:-6] + b"wrong!"
    with pytest.raises(UserError, match="not a whole gzip file"):
        load("some-set")
    server.files["/r_5.json.gz"] = good
    assert load("some-set").titles == ["T"]


def test_without_a_network_one_line_says_which_file_to_put_where(tmp_path, monkeypatch, server):
    offer(server, monkeypatch, SET)
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(UserError) as problem:
        load("some-set")
    said = str(problem.value)
    assert (
        "\n" not in said
        and server.url + "/set.zip" in said
        and str(tmp_path / "cache" / "data" / "some-set") in said
    )


def test_a_name_is_looked_for_in_data_dir_then_llmrec_data_then_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMREC_DATA", str(tmp_path / "env"))
    (tmp_path / "dir").mkdir()
    for place, item in ((tmp_path / "cache" / "data", "c"), (tmp_path / "env", "e"), (tmp_path / "dir", "d")):
        write(place / "amazon-beauty-2014", interactions__csv=f"user,item\nu,{item}\n")
        assert load("amazon-beauty", data_dir=tmp_path / "dir").items == [item]
    with pytest.raises(UserError, match="dirt: no such folder"):
        load("amazon-beauty", data_dir=tmp_path / "dirt")
    with pytest.raises(UserError, match="did you mean ml1m"):
        load("ml1mm")


def test_every_named_source_is_an_https_address_with_its_checksum_or_a_gzip_crc():
    assert {
        "ml1m",
        "ml100k",
        "ml-latest-small",
        "amazon-video-games",
        "amazon-movies-tv",
        "amazon-sports",
        "amazon-beauty",
        "amazon-toys",
    } <= set(datasets.SOURCES)
    for spellings, files in datasets.SOURCES.values():
        for url, size, sha in files:
            assert (
                url.startswith("https://")
                and (url.endswith(".gz") or len(sha) == 64 and size > 0)
                and spellings
            )


# ---------------------------------------------------------------------------------------------------- filters
def test_filters_keep_the_ids_contiguous_and_change_the_fingerprint():
    d = logs((0, 0), (0, 1), (1, 1), (2, 3), (2, 1), (0, 3), n_items=5)
    few = datasets.min_interactions(d, 2)
    assert (
        few.users == ["u0", "u2"]
        and few.items == ["i0", "i1", "i3"]
        and few.user_fields == {"age": ["0", "2"]}
    )
    assert [(few.users[u], few.items[i]) for u, i in zip(few.user, few.item)] == [
        ("u0", "i0"), ("u0", "i1"), ("u2", "i3"), ("u2", "i1"), ("u0", "i3")]
    core = datasets.k_core(d, 2)  # i0 goes, and with u1 also nothing else
    assert core.users == ["u0", "u2"] and core.items == ["i1", "i3"] and len(core.user) == 4
    assert (
        len(
            {
                x.fingerprint
                for x in (
                    d,
                    few,
                    core,
                    datasets.min_interactions(d, 3),
                    datasets.sample_users(d, 2, 0),
                    datasets.sample_users(d, 2, 1),
                )
            }
        )
        == 6
    )
    with pytest.raises(UserError, match="nothing is left"):
        datasets.k_core(d, 3)


def test_what_belongs_to_an_item_stays_with_it_when_others_are_filtered_out():
    d = replace(logs((0, 1), (1, 0), (0, 2), n_items=3), titles=["A", "B", "C"], categories=[["a"], ["b"], ["c"]], texts=["ta", "tb", "tc"])
    few = datasets.min_interactions(d, 2)
    assert (few.titles, few.categories, few.texts) == (["B", "C"], [["b"], ["c"]], ["tb", "tc"])


def test_the_lowest_rating_that_is_asked_for_is_kept():
    d = replace(logs((0, 0), (0, 1), (0, 2)), rating=np.array([3.5, 4, 5], np.float32))
    assert datasets.min_rating(d, 4).rating.tolist() == [4, 5] and datasets.min_rating(d, 0) is d
    with pytest.raises(UserError, match="no rating above 5"):
        datasets.min_rating(d, 5.5)
    with pytest.raises(UserError, match="has no ratings"):
        datasets.min_rating(replace(d, has_ratings=False), 4)


def test_k_core_repeats_until_nothing_more_falls():
    d = datasets.k_core(random_logs(1), 6)
    assert np.bincount(d.user).min() >= 6 and np.bincount(d.item).min() >= 6
    assert len(d.user) < len(random_logs(1).user)


def test_a_sample_of_users_is_seeded_and_keeps_whole_histories():
    d = random_logs(2)
    a, b, c = (datasets.sample_users(d, 10, seed) for seed in (0, 0, 1))
    assert a.users == b.users != c.users and len(a.users) == 10 and datasets.sample_users(d, 99, 0) is d
    for uid, raw in enumerate(a.users):
        assert (a.user == uid).sum() == (d.user == d.users.index(raw)).sum()
    with pytest.raises(UserError):
        datasets.sample_users(d, -5, 0)


# ----------------------------------------------------------------------------------------------------- splits
def whole(d, split):
    together = np.concatenate(split)
    assert np.array_equal(np.sort(together), np.arange(len(d.user)))         # disjoint, and nothing is lost
    assert all((np.diff(part) > 0).all() for part in split)


def test_split_last_two_by_hand():
    d = logs((0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (2, 0), (0, 3))
    split = datasets.split_last_two(d)
    assert (split.train.tolist(), split.valid.tolist(), split.test.tolist()) == ([0, 1, 2, 3, 5], [4], [6])


@pytest.mark.parametrize("seed", range(5))
def test_split_last_two_leaks_nothing(seed):
    d = random_logs(seed)
    split = datasets.split_last_two(d)
    whole(d, split)
    of = [{int(d.user[k]): k for k in part} for part in (split.valid, split.test)]
    assert len(of[0]) == len(split.valid) and of[0].keys() == of[1].keys()
    assert set(of[0]) == set(np.flatnonzero(np.bincount(d.user) >= 3))
    for u in of[0]:  # all of train is before, in order and item
        before = split.train[d.user[split.train] == u]
        assert before.max() < of[0][u] < of[1][u]
        assert not {d.item[of[0][u]], d.item[of[1][u]]} & set(d.item[before])


def test_split_time_by_hand_and_equal_timestamps_never_straddle():
    d = logs(*((0, k, k) for k in range(10)))
    assert [p.tolist() for p in datasets.split_time(d)] == [[*range(8)], [8], [9]]
    assert [len(p) for p in datasets.split_time(d, 0.2, 0)] == [8, 2, 0]
    rng = np.random.default_rng(0)
    for _ in range(50):
        d = logs(*((0, k, t) for k, t in enumerate(np.sort(rng.integers(0, 12, 80)))))
        split = datasets.split_time(d, 0.2, 0.3)
        whole(d, split)
        times = [set(d.time[p]) for p in split]
        assert not times[0] & times[1] and not times[1] & times[2] and not times[0] & times[2]
        assert max(times[0]) < min(times[1] | times[2])
    with pytest.raises(UserError, match="too equal"):
        datasets.split_time(logs((0, 0, 7), (0, 1, 7)))
    with pytest.raises(UserError, match="shares"):
        datasets.split_time(d, 0.6, 0.4)


def test_split_ratio_by_hand():
    d = logs(*((0, k) for k in range(10)), *((1, k) for k in range(3)), (2, 0))
    split = datasets.split_ratio(d)
    whole(d, split)
    # the share of 3 rounds up, for the last
    assert split.valid.tolist() == [8] and split.test.tolist() == [9, 12]
    assert [len(p) for p in datasets.split_ratio(d, 0, 0)] == [14, 0, 0]
    for part in datasets.split_ratio(random_logs(3), 0.2, 0.2)[1:]:
        assert len(part)
    assert set(d.user[split.train]) == {0, 1, 2}  # everybody has something to train on


def test_histories_are_sequences_in_time_order():
    d = logs((1, 4), (0, 2), (1, 0), (0, 3), (1, 1), n_users=3)
    h = datasets.histories(d)
    assert h.offsets.tolist() == [0, 2, 5, 5] and h.items.tolist() == [2, 3, 4, 0, 1]
    assert h.positions.tolist() == [1, 3, 0, 2, 4]
    part = datasets.histories(d, np.array([4, 3, 0]))                        # any order in, time order out
    assert part.offsets.tolist() == [0, 1, 3, 3] and part.items.tolist() == [3, 4, 1]


# -------------------------------------------------------------------------------------------------- negatives
@pytest.mark.parametrize("seed", range(8))
def test_negatives_are_never_in_the_whole_history_and_never_repeat(seed):
    d = random_logs(seed)
    users = np.random.default_rng(seed).integers(0, len(d.users), 300)
    drawn = datasets.negatives(d, users, 15, seed)                           # of 40 items up to 24 are seen
    assert drawn.shape == (300, 15) and drawn.dtype == np.int32 and drawn.min() >= 0 and drawn.max() < 40
    for u, row in zip(users, drawn):
        assert len(set(row)) == 15 and not set(row) & set(d.item[d.user == u])


def test_negatives_are_a_pure_function_of_their_arguments():
    d, users = random_logs(0), np.arange(60)
    again = datasets.negatives(random_logs(0), users, 5, 3)
    assert np.array_equal(datasets.negatives(d, users, 5, 3), again)
    assert not np.array_equal(datasets.negatives(d, users, 5, 4), again)
    assert datasets.negatives(d, [], 5, 0).shape == (0, 5) and datasets.negatives(d, [1], 0, 0).shape == (
        1,
        0,
    )


def test_negatives_are_uniform_over_what_is_unseen():
    d = logs((0, 0), (0, 3), n_items=8)
    drawn = datasets.negatives(d, np.zeros(30000, int), 3, 0)
    count = np.bincount(drawn.ravel(), minlength=8)  # 6 unseen, each in half of the rows
    assert count[[0, 3]].sum() == 0 and np.abs(count[[1, 2, 4, 5, 6, 7]] / 15000 - 1).max() < 0.03
    first = np.bincount(drawn[:, 0], minlength=8)
    assert np.abs(first[[1, 2, 4, 5, 6, 7]] / 5000 - 1).max() < 0.06         # in every column


def test_weighted_negatives_are_drawn_in_proportion_to_their_weights_and_are_still_unseen():
    d = random_logs(0)
    weights = np.arange(1.0, len(d.items) + 1)
    drawn = datasets.negatives(d, np.zeros(30000, int), 1, 0, weights=weights)[:, 0]
    free = np.setdiff1d(np.arange(len(d.items)), d.item[d.user == 0])
    share = np.bincount(drawn, minlength=len(d.items)) / len(drawn)
    assert share[free].sum() == pytest.approx(1) and np.abs(share[free] - weights[free] / weights[free].sum()).max() < 0.01
    d = logs(*((0, k) for k in range(5)), n_items=10)            # nearly all weight is on what was had: drawn from a list
    drawn = datasets.negatives(d, np.zeros(2000, int), 1, 0, weights=np.array([1e4] * 5 + [16, 1, 1, 1, 1]))[:, 0]
    assert abs((drawn == 5).mean() - 0.8) < 0.05


def test_negatives_to_train_with_spare_what_was_learned_from_and_nothing_else():
    d = logs(*((0, k) for k in range(5)), n_items=8)                         # items 3 and 4 are held out
    drawn = datasets.negatives(d, np.zeros(3000, int), 1, 0, seen=Logs(d, 10).train_keys())
    assert set(drawn[:, 0]) == {3, 4, 5, 6, 7} and set(datasets.negatives(d, np.zeros(3000, int), 1, 0)[:, 0]) == {5, 6, 7}
    with pytest.raises(UserError, match="all but 5 of 8 items"):
        datasets.negatives(d, [0], 6, 0, seen=Logs(d, 10).train_keys())


def test_who_has_seen_nearly_everything_gets_the_rest_or_an_error():
    d = logs(*((0, k) for k in range(2000)), (1, 0), n_items=2003)
    assert set(datasets.negatives(d, [0], 3, 0)[0]) == {2000, 2001, 2002}
    with pytest.raises(UserError, match="user u0 has had all but 3 of 2003 items: no 4 negatives"):
        datasets.negatives(d, [1, 0], 4, 0)


# ------------------------------------------------------------------------------------------------- real files
def real(folder):
    if not REAL or not (Path(REAL) / folder).is_dir():
        pytest.skip(f"LLMREC_DATA has no {folder}")
    return str(Path(REAL) / folder)


def sizes(d):
    return len(d.users), len(d.items), len(d.user)


@pytest.mark.parametrize(
    "folder, expected",
    [
        ("ml-1m", (6040, 3706, 1000209)),
        ("ml-100k", (943, 1682, 100000)),
        ("ml-latest-small", (610, 9724, 100836)),
        ("amazon-gift-cards-2018", (458, 148, 2965)),
        ("amazon-video-games-2018", (50546, 16859, 452989)),
        ("amazon-beauty-2014", (22363, 12101, 198502)),
    ],
)
def test_real_files_have_their_published_sizes(folder, expected):
    assert sizes(valid(load(real(folder)))) == expected


def test_real_ml_1m_filters_splits_and_negatives():
    d = load("ml1m", data_dir=Path(real("ml-1m")).parent)
    assert d.titles[d.items.index("1")] == "Toy Story (1995)" and set(d.user_fields) == {
        "gender",
        "age",
        "occupation",
    }
    frequent = datasets.min_interactions(d, 30)
    assert sizes(frequent) == (5289, 3701, 982040)
    split = datasets.split_last_two(d)
    assert [len(p) for p in split] == [1000209 - 2 * 6040, 6040, 6040]
    users = np.arange(6040)
    key = users[:, None] * len(d.items) + datasets.negatives(d, users, 99, 0)
    assert not np.isin(key, d.seen_keys()).any()


def test_real_half_stars_repeats_and_empty_titles():
    assert {0.5, 4.5} < set(load(real("ml-latest-small")).rating.tolist())
    cards, games = load(real("amazon-gift-cards-2018")), load(real("amazon-video-games-2018"))
    assert cards.notes == ["7 repeated user-item pairs dropped, the earliest of each stays"]
    assert (
        sum(t.startswith("item ") for t in games.titles) == 14
        and "Pokémon Moon - Nintendo 3DS" in games.titles
    )
    unknown = load(real("ml-100k"))
    assert unknown.titles[unknown.items.index("267")] == "item 267"
