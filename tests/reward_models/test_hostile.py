"""A campaign: 512 completions, 64 of them written to hang, swell or crash the grader. The others must not notice."""

import os
import threading
import time
from pathlib import Path

import pytest

from reward_models.rules import accuracy, answers
from reward_models.verifier import VerifierPool

DEADLINE, WORKERS, MEMORY_MB = 1.0, 2, 512
HOSTILE, HONEST = 64, 448

# (solution, completion, its score), ~ a number: plain numbers, what only math-verify can read, letters, words, and a
# solution that cannot be read.
HONEST_ROWS = [
    ("1,200", "First ~, so <answer>1200</answer>", 1.0),
    ("1,200", "First 1200, so the answer is 12~.", 0.0),
    ("\\frac{\\sqrt{3}}{2}", "so \\boxed{\\frac{~}{~}\\cdot\\frac{3}{2\\sqrt{3}}}", 1.0),
    ("\\frac{\\sqrt{3}}{2}", "<answer>sqrt(3)/2 + ~</answer>", 0.0),
    ("x^2+~", "hence it is $~+x^2$.", 1.0),
    ("[0,~)", "<answer>(0,~)</answer>", 0.0),
    ("B", "Not A, not ~. The answer is (B).", 1.0),
    ("Evelyn", "<answer>evelyn</answer>", 1.0),
    ("\\frac{1}{", "<answer>~</answer>", None),
]


def hanging(n: int) -> list[str]:
    """What keeps math-verify busy beyond any deadline, other texts for every n."""
    number, many = str(10**9 + n), 300 + n
    return [
        "10^{10^{10}}+" + number,
        number + "!",
        f"((({9 + n}!)!)!)!",
        "\\sum_{k=1}^{" + number + "} k!",
        "\\binom{" + number + "}{500000000}",
        "{" * (1600 + n) + "1",
        f"(x+y+z+w)^{{{3000 + n}}}",
        "(a+a)*" * many + "b",
    ]


def swollen(n: int) -> list[str]:
    """What the rule itself, or math-verify within its deadline, must see through."""
    many = 300 + n
    return [
        "9**9**9**9**" + str(n),
        "\\frac{" * many + "1" + "}{2}" * many,
        "\\sqrt{" * many + "x" + "}" * many,
        "1/" * (40_000 + n) + "1",
        "9" * (3_000_000 + n),
        "\\text{" + "⅓٣𝟛" * (200 + n) + "}^{\u2028}",
        "\ud800\u202e\x00" + "\u0301" * (900 + n),
        "a" * (2_000_000 + n) + "! answer" + " " * 500_000,
    ]


def campaign() -> list[tuple]:
    """Solutions, completions, and scores: "hostile" where the completion is; one such before every seven others."""
    honest = [
        tuple(part.replace("~", str(n)) if isinstance(part, str) else part for part in row)
        for n in range(2, 2 + HONEST // len(HONEST_ROWS) + 1)
        for row in HONEST_ROWS
    ]
    evil = [text for n in range(2) for text in hanging(n)] + [text for n in range(6) for text in swollen(n)]
    rows = []
    for place, text in enumerate(evil):
        rows += [("\\frac{\\sqrt{3}}{2}", f"<answer>{text}</answer>", "hostile"), *honest[place * 7 : place * 7 + 7]]
    return list(zip(*rows, strict=True))


def verifiers() -> dict[int, int]:
    """The verifier processes that this one started, and the bytes that each has resident."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"reward_models.verifier" in (folder / "cmdline").read_bytes():
                found[int(folder.name)] = int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError, ValueError):  # it ended meanwhile
            continue
    return found


@pytest.fixture
def pool(monkeypatch):
    """The pool that the rule uses, with limits of its own."""
    with VerifierPool(WORKERS, DEADLINE, MEMORY_MB) as pool:
        monkeypatch.setattr(answers, "shared_pool", lambda: pool)
        yield pool


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to see what the workers hold")
def test_hostile_completions_cost_the_honest_ones_nothing(pool):
    solutions, completions, expected = campaign()
    assert (len(completions), expected.count("hostile")) == (HOSTILE + HONEST, HOSTILE)
    honest = [i for i, score in enumerate(expected) if score != "hostile"]
    others = set(verifiers())
    alone = accuracy([""] * HONEST, [completions[i] for i in honest], solution=[solutions[i] for i in honest])
    assert alone == [expected[i] for i in honest] and not pool.errors

    seen: list[dict[int, int]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            seen.append({pid: size for pid, size in verifiers().items() if pid not in others})

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    scores = accuracy([""] * len(completions), completions, solution=solutions)
    seconds = time.monotonic() - started
    over.set()
    watcher.join()
    assert [scores[i] for i in honest] == alone
    assert [scores[i] for i in set(range(len(scores))) - set(honest)] == [0.0] * HOSTILE
    assert pool.errors["deadline"] >= 12  # the campaign does reach the workers
    assert seconds < DEADLINE * HOSTILE / WORKERS + 5
    assert max(map(len, seen)) <= WORKERS
    assert 0 < max(size for moment in seen for size in moment.values()) < MEMORY_MB << 20

    pool.close()
    until = time.monotonic() + 5
    while set(verifiers()) - others and time.monotonic() < until:
        time.sleep(0.05)
    assert set(verifiers()) <= others
