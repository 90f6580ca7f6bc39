import gzip
import json
import os
import re
import subprocess
import sys

import pyarrow
import pytest
from pyarrow import parquet

from agrpo.data.records import DataError
from agrpo.data.sources import load_rows

ROWS = [{"prompt": 'a, "b"\nc\u2028d', "answer": "x"}, {"prompt": "é", "answer": "y"}]


def write(path, rows):
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[1]
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return
    if kind == "json":
        text = json.dumps({"data": rows}, indent=1)
    elif kind == "jsonl":
        text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    else:
        quoted = [[value.replace('"', '""') for value in row.values()] for row in rows]
        text = "prompt,answer\n" + "".join('"' + '","'.join(row) + '"\n' for row in quoted)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize(
    "name, places",
    [
        ("a.json", [" row 1", " row 2"]),
        ("a.json.gz", [" row 1", " row 2"]),
        ("a.jsonl", [":1", ":3"]),
        ("a.jsonl.gz", [":1", ":3"]),
        ("a.csv", [":2", ":4"]),
        ("a.csv.gz", [":2", ":4"]),
        ("a.parquet", [" row 1", " row 2"]),
    ],
)
def test_every_kind_of_file_gives_the_same_rows_and_where_they_stand(tmp_path, name, places):
    write(tmp_path / name, ROWS)
    rows = load_rows(path=tmp_path / name)
    assert [row for _, row in rows] == ROWS
    assert [location for location, _ in rows] == [f"{tmp_path / name}{place}" for place in places]


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    for name, text in (("a.csv", "prompt\nhi\n"), ("a.jsonl", '{"prompt": "hi"}'), ("a.json", '[{"prompt": "hi"}]')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert load_rows(path=tmp_path / name)[0][1] == {"prompt": "hi"}


def test_a_folder_gives_the_files_of_the_split(tmp_path):
    write(tmp_path / "train-0.jsonl", ROWS[:1])
    write(tmp_path / "train-1.json", ROWS[1:])
    write(tmp_path / "test.jsonl", ROWS * 2)
    (tmp_path / "README.md").write_text("not data")
    assert [row for _, row in load_rows(path=tmp_path)] == ROWS
    assert len(load_rows(path=tmp_path, split="test")) == 4
    with pytest.raises(DataError, match=r"no file begins with the split 'validation'; it holds test.jsonl, train-0"):
        load_rows(path=tmp_path, split="validation")


BROKEN = [
    ("cut.jsonl", b'{"a": 1}\n{"a": 2\n', r"cut\.jsonl:2: column \d+: not JSON: .*each line holds one whole object"),
    ("list.jsonl", b'[{"a": 1},\n{"a": 2}]', r"list\.jsonl:1: column \d+: not JSON"),
    ("oneline.jsonl", b'[{"a": 1}]', r"oneline\.jsonl:1: .* is not an object; .* is named \.json"),
    ("latin.jsonl", '{"a": 1}\n{"a": "é"}\n'.encode("latin-1"), r"latin\.jsonl:2: the byte 0xe9 is not UTF-8; convert"),
    ("latin.csv", "a\n1\né\n".encode("latin-1"), r"latin\.csv:3: the byte 0xe9 is not UTF-8; convert"),
    ("empty.jsonl", b"\n\n", r"empty\.jsonl: holds no rows"),
    ("empty.json", b"", r"empty\.json: holds no rows"),
    ("empty.csv", b"", r"empty\.csv: holds no rows"),
    ("header.csv", b"a,b\n", r"header\.csv: holds no rows"),
    ("lines.json", b'{"a": 1}\n{"a": 2}\n', r"lines\.json:2: column 1: .*; name it \.jsonl"),
    ("comma.json", b'[{"a": 1},\n {"a": 2},]', r"comma\.json:2: column \d+: not JSON: .*; correct the file there"),
    (
        "object.json",
        b'{"train": [], "rows": []}',
        r"object\.json: holds an object with train, rows; a \.json file is a list",
    ),
    ("row.json", b'[{"a": 1}, "text"]', r'row\.json row 2: "text" is not an object; a row is'),
    ("fields.csv", b'a,b\n"1\n1",2\n1,2,3\n', r"fields\.csv:4: 3 fields where the header names 2 \(a, b\); put text"),
    ("quote.csv", b'a,b\n"1,2\n', r"quote\.csv:\d: not CSV: .*; close the quotes"),
    ("twice.csv", b"a,a\n1,2\n", r"twice\.csv:1: the header a, a has a name twice"),
    (
        "cut.jsonl.gz",
        gzip.compress(b'{"a": 1}\n' * 99)[:-9],
        r"cut\.jsonl\.gz: not a whole gzip file .*; copy it again",
    ),
    ("plain.json.gz", b"[]", r"plain\.json\.gz: not a whole gzip file"),
    ("cut.parquet", b"PAR1 and no more", r"cut\.parquet: not a whole Parquet file"),
    (
        "data.txt",
        b"hello",
        r"data\.txt: cannot read this kind of file; known endings: \.json, \.jsonl, \.csv, \.parquet",
    ),
    ("data.parquet.gz", b"", r"data\.parquet\.gz: cannot read this kind of file; .* all but \.parquet"),
]


@pytest.mark.parametrize("name, content, message", BROKEN, ids=[name for name, _, _ in BROKEN])
def test_a_broken_file_is_refused_with_place_and_mend(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=re.escape(str(tmp_path)) + "/" + message):
        load_rows(path=tmp_path / name)


def test_skipped_rows_are_kept_as_messages(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\nnonsense\n7\n{"a": "\xff"}\n{"a": 2}\n')
    rows = load_rows(path=tmp_path / "a.jsonl", on_bad_row="skip")
    assert [row["a"] for _, row in rows] == [1, 2]
    assert [re.search(r":(\d):", message)[1] for message in rows.skipped] == ["2", "3", "4"]
    (tmp_path / "b.jsonl").write_text("nonsense\n")
    with pytest.raises(DataError, match=r"no usable row of 1; the first: .*b\.jsonl:1"):
        load_rows(path=tmp_path / "b.jsonl", on_bad_row="skip")


def test_a_missing_file_names_the_nearest_one(tmp_path):
    write(tmp_path / "pairs.jsonl.gz", ROWS)
    with pytest.raises(DataError, match=r"pairs\.json: no such file; did you mean .*pairs\.jsonl\.gz\?"):
        load_rows(path=tmp_path / "pairs.json")
    with pytest.raises(DataError, match=r"no folder .*nowhere"):
        load_rows(path=tmp_path / "nowhere" / "pairs.json")


def test_exactly_one_origin_and_no_setting_that_would_be_ignored(tmp_path):
    write(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(DataError, match="exactly one of source"):
        load_rows(path="a.jsonl", source="b")
    with pytest.raises(DataError, match=r"takes no parameters \(size\)"):
        load_rows(path=tmp_path / "a.jsonl", parameters={"size": 3})
    with pytest.raises(DataError, match=r"is a local file, not a source; write data\.path"):
        load_rows(source=str(tmp_path / "a.jsonl"))
    with pytest.raises(DataError, match="unknown source; write reasoning_gym:<task>"):
        load_rows(source="reasoning-gym:chain_sum")


def test_reasoning_gym_entries_come_whole_so_that_its_verifier_scores_them():
    import reasoning_gym

    parameters = {"size": 5, "seed": 3}
    rows = load_rows(source="reasoning_gym:chain_sum", parameters=parameters)
    own = reasoning_gym.create_dataset("chain_sum", **parameters)
    assert [row["question"] for _, row in rows] == [entry["question"] for entry in own]
    assert [json.loads(row["entry"]) for _, row in rows] == json.loads(json.dumps(list(own)))
    for location, row in rows:
        assert own.score_answer(row["answer"], json.loads(row["entry"])) == 1.0
        assert own.score_answer("no number", json.loads(row["entry"])) < 1.0
        assert location.startswith("reasoning_gym:chain_sum row ")
    unseeded = [load_rows(source="reasoning_gym:chain_sum", parameters={"size": 2}).items for _ in range(2)]
    assert unseeded[0] == unseeded[1]


@pytest.mark.parametrize(
    "task, split, parameters, message",
    [
        ("chain_sm", "train", {}, r"no such task; did you mean reasoning_gym:chain_sum\?"),
        ("chain_sum", "train", {"sizes": 3}, r"unknown parameter 'sizes'; did you mean size\?"),
        (
            "chain_sum",
            "train",
            {"min_terms": 9, "max_terms": 2},
            "max_terms must be >= min_terms; correct data.parameters",
        ),
        ("chain_sum", "test", {"size": 2}, "has no splits; give data.parameters a seed"),
    ],
)
def test_wrong_reasoning_gym_settings_are_refused(task, split, parameters, message):
    with pytest.raises(DataError, match=message):
        load_rows(source=f"reasoning_gym:{task}", split=split, parameters=parameters)


def test_a_function_is_called_with_split_and_parameters():
    rows = load_rows(
        source="python:agrpo.data.tasks.chains:problems", split="test", parameters={"count": 3, "max_terms": 3}
    )
    assert len(rows) == 3 and all(row["terms"] <= 3 for _, row in rows)
    assert rows[2][0] == "python:agrpo.data.tasks.chains:problems row 3"


@pytest.mark.parametrize(
    "name, split, parameters, message",
    [
        ("agrpo.data.tasks.chainz:problems", "test", {}, r"no module named agrpo.data.tasks.chainz; .*PYTHONPATH"),
        ("agrpo.data.tasks.chains:problem", "test", {}, r"has no function problem; did you mean problems\?"),
        ("agrpo.data.tasks.chains:problems", "test", {"cuont": 3}, r"unknown parameter 'cuont'; did you mean count\?"),
        ("agrpo.data.tasks.chains:problems", "tset", {}, "split: 'tset' is not one of"),
        ("json:dumps", "test", {}, "missing a required argument"),
    ],
)
def test_wrong_function_sources_are_refused(name, split, parameters, message):
    with pytest.raises(DataError, match=message):
        load_rows(source=f"python:{name}", split=split, parameters=parameters)


def test_a_function_of_ones_own_is_found_on_the_path_and_its_rows_are_checked(tmp_path, monkeypatch):
    (tmp_path / "rows_of_mine.py").write_text(
        "def rows(split, **others):\n    yield {'split': split, **others}\n    yield 'text'\n\ndef bare(n): return []\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    source = "python:rows_of_mine:rows"
    with pytest.raises(DataError, match=r"rows_of_mine:rows row 2: str is not an object; the function returns dicts"):
        load_rows(source=source)
    rows = load_rows(source=source, split="dev", parameters={"n": 1}, on_bad_row="skip")
    assert rows.items == ((f"{source} row 1", {"split": "dev", "n": 1}),) and len(rows.skipped) == 1
    with pytest.raises(DataError, match="takes no split; add the argument split"):
        load_rows(source="python:rows_of_mine:bare", parameters={"n": 1})


def test_an_unreachable_hub_is_said_in_words(tmp_path):
    code = "from agrpo.data.sources import load_rows\nload_rows(source='someone/data-set')"
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=offline, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert "DataError: someone/data-set: the Hub cannot be reached" in last and "use data.path" in last


def test_nothing_heavy_is_imported_to_read_a_local_file(tmp_path):
    write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])
    code = (
        "import sys; from agrpo.data.sources import load_rows; from agrpo.data.records import demonstrations\n"
        "from agrpo.data import streams, tokens\n"
        f"demonstrations(load_rows(path={str(tmp_path / 'a.jsonl')!r}), {{}})\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'reasoning_gym'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
