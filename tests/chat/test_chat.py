"""Conversations: through a pipe with a real tiny model, and line by line with a model that repeats."""

import io
import itertools
import os
import pty
import signal
import subprocess
import sys
import termios

import pytest
import torch
from rich.console import Console
from stage_runs import ROOT, environment, tiny_policy
from transformers import AutoModelForCausalLM, AutoTokenizer

from agrpo.chat.conversation import Conversation
from agrpo.chat.screens import Lines, Panels
from agrpo.chat.settings import ChatSettings
from agrpo.chat.speaker import Answer, Speaker


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return str(tiny_policy(tmp_path_factory.mktemp("policy") / "model"))


def greedy(policy, prompt, count):
    """What plain transformers says, and its tokens."""
    tokenizer, lm = AutoTokenizer.from_pretrained(policy), AutoModelForCausalLM.from_pretrained(policy)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    made = lm.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count)
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def chat(policy, text, *arguments):
    command = [sys.executable, "-m", "agrpo.cli", "chat", policy, *arguments]
    return subprocess.run(command, input=text, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)


def test_a_pipe_is_answered_line_by_line(policy):
    lines = "1+2=\n/data solution=3\n/set samples=2\n3+4=\n/nonsense\n/set temperature=cold\n/quit\n5+6=\n"
    asked = ["--no-chat", "--temperature", "0", "--max-tokens", "8", "--reward", "reward_models.rules.tag_count"]
    done = chat(policy, lines, *asked, "--compare", policy)
    assert done.returncode == 0, done.stderr
    one, two = greedy(policy, "1+2=", 8), greedy(policy, "3+4=", 8)
    out = done.stdout
    assert out.count(f"[{policy}]\n{one}\n(reward ") == 2
    assert out.count(f"1│ {two}  (reward ") == 2 and out.count(f"2│ {two}  (reward ") == 2
    assert "error: /nonsense: no such command" in out and "error: /set temperature: Input should be" in out
    assert greedy(policy, "5+6=", 8) not in out.partition("/set temperature")[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["MODEL", "--samples", "0"], "--samples: Input should be"),
        (["MODEL", "--no-chat", "--system", "x"], "--system: the model is asked in plain prompts"),
        (["MODEL", "--reward", "no_such_module.rule"], "no module 'no_such_module'"),
    ],
)
def test_what_is_wrong_is_said(policy, arguments, message, capsys):
    import runpy

    script = runpy.run_path(str(ROOT / "stages/evaluation/chat.py"))
    assert script["exit_code"](script["main"], [policy if a == "MODEL" else a for a in arguments]) == 2
    assert message in capsys.readouterr().err


def test_what_is_shown_grows_to_the_answer_and_samples_differ(policy):
    speaker, shown = Speaker(policy), []
    answers = speaker.answer("1+2=", ChatSettings(samples=3, temperature=2.0, max_tokens=10), 0, shown.append)
    assert shown[-1] == [a.text for a in answers] and len({a.text for a in answers}) > 1
    for before, after in itertools.pairwise(shown):
        assert all(new.startswith(old) for old, new in zip(before, after, strict=True))
    again = speaker.answer("1+2=", ChatSettings(samples=3, temperature=2.0, max_tokens=10), 0, shown.append)
    other = speaker.answer("1+2=", ChatSettings(samples=3, temperature=2.0, max_tokens=10), 1, shown.append)
    assert again == answers != other
    for answer in answers:
        assert answer.finished == (answer.ids[-1] in speaker.stop) and (answer.finished or len(answer.ids) == 10)


class Parrot:
    """Answers with how many turns it heard, and the last."""

    name = "parrot"

    def __init__(self):
        self.heard = []

    def answer(self, prompt, settings, turn, show):
        self.heard.append(prompt)
        texts = [f"{len(prompt)}:{n}" for n in range(settings.samples)]
        show(texts)
        return [Answer(text, (1,), True) for text in texts]


def talk(lines, **options):
    parrot, out = Parrot(), io.StringIO()
    conversation = Conversation([parrot], Lines(out), ChatSettings(samples=2), **options)
    conversation.run(lines)
    return parrot.heard, out.getvalue()


def test_history_is_kept_picked_and_reset():
    heard, out = talk(["hello", "/pick 2", "more", "/reset", "anew", "/history"], system="Be brief.")
    start = {"role": "system", "content": "Be brief."}
    user = [{"role": "user", "content": text} for text in ("hello", "more", "anew")]
    assert heard == [
        [start, user[0]],
        [start, user[0], {"role": "assistant", "content": "2:1"}, user[1]],
        [start, user[2]],
    ]
    assert out.endswith("system: Be brief.\nuser: anew\nassistant: 2:0\n")


def test_plain_prompts_have_no_history():
    heard, out = talk(["one", "/pick 1", "two", "/system x"], turns=False)
    assert heard == ["one", "two"] and out.count("--chat gives") == 2


def test_an_interrupted_turn_leaves_no_trace():
    class Interrupted(Parrot):
        def answer(self, prompt, settings, turn, show):
            if turn == 1 and len(self.heard) == 1:
                self.heard.append(prompt)
                show(["half an answ"])
                raise KeyboardInterrupt
            return super().answer(prompt, settings, turn, show)

    one, other, out = Parrot(), Interrupted(), io.StringIO()
    conversation = Conversation([one, other], Lines(out), ChatSettings())
    conversation.run(["first", "stopped", "second"])
    for parrot in (one, other):
        turns = [[turn["content"] for turn in prompt] for prompt in parrot.heard]
        assert turns == [["first"], ["first", "1:0", "stopped"], ["first", "1:0", "second"]]
    assert "half an answ\nstopped; nothing of this turn is kept\n" in out.getvalue()


def test_what_a_model_writes_cannot_steer_the_terminal():
    out = io.StringIO()
    lines = Lines(out)
    lines.begin([""], 1)
    lines.show(0, ["a\x1b"])
    lines.show(0, ["a\x1b[2Jb\x1b[31mc"])
    lines.judged(0, [])
    lines.end()
    assert "\x1b" not in out.getvalue() and "b" in out.getvalue() and out.getvalue().endswith("c\n")


def test_ctrl_c_stops_between_tokens():
    class Busy(Parrot):
        def answer(self, prompt, settings, turn, show):
            show(["one"])
            signal.raise_signal(signal.SIGINT)
            self.heard.append("goes on to the next token")
            show(["one two"])
            raise AssertionError("was not stopped")

    busy, out = Busy(), io.StringIO()
    Conversation([busy], Lines(out), ChatSettings()).run(["hello"])
    assert busy.heard == ["goes on to the next token"]
    assert out.getvalue() == "one\nstopped; nothing of this turn is kept\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_nothing_that_is_typed_moves_the_cursor_while_answers_are_drawn(monkeypatch):
    ours, theirs = pty.openpty()
    with open(theirs, closefd=True) as terminal:
        monkeypatch.setattr("sys.stdin", terminal)
        panels = Panels(Console(file=io.StringIO(), width=80, height=10))

        def echoes():
            return bool(termios.tcgetattr(terminal)[3] & termios.ECHO)

        assert echoes()
        panels.begin([""], 1)
        assert not echoes()
        panels.end()
        assert echoes()
    os.close(ours)


@pytest.mark.parametrize(
    ("width", "titles", "count", "rows"),
    [
        (80, [""], 3, [["1", "2"], ["3"]]),
        (200, [""], 3, [["1", "2", "3"]]),
        (40, [""], 2, [["1"], ["2"]]),
        (80, ["a", "b"], 1, [["a", "b"]]),
        (200, ["a", "b"], 2, [["a 1", "b 1"], ["a 2", "b 2"]]),
    ],
)
def test_panels_stand_beside_each_other_where_they_fit(width, titles, count, rows):
    out = io.StringIO()
    panels = Panels(Console(file=out, width=width, height=10))
    panels.begin(titles, count)
    text = " ".join(f"word{n}" for n in range(120)) + " " + "long" * 60 + "!"  # taller, and a word wider, than all
    for place in range(len(titles)):
        panels.show(place, [text] * count)
        panels.judged(place, ["reward 1.000  [b]length[/b] 0.500"] * count)
    panels.end()
    shown = out.getvalue().splitlines()
    assert [[t.strip("─ ") for t in line.split("╮")[:-1]] for line in shown if "╭" in line] == [
        [f"╭─ {title}" for title in row] for row in rows
    ]
    assert all(len(line) <= width for line in shown)
    assert "…" not in out.getvalue() and out.getvalue().count("!") == count * len(titles)
    assert out.getvalue().count("word119 ") == out.getvalue().count("[b]length[/b]") == count * len(titles)
