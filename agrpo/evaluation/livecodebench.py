"""LiveCodeBench's test cases as the tests of the reward `code`."""

from __future__ import annotations

import base64
import binascii
import json
import pickletools
import zlib
from collections.abc import Mapping
from typing import Any

_LARGEST = 1 << 28  # bytes of one problem's tests, unpacked
_TEXT = ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE")
_AROUND = ("PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP")


def cases_of(row: Mapping[str, Any]) -> list[Any]:
    """Public and private tests: {input, output} of programs, or assertions about the function of a `Solution`.

    Raises:
        ValueError: a field is not what LiveCodeBench publishes.
    """
    try:
        cases = json.loads(row["public_test_cases"]) + unpacked(row["private_test_cases"])
        function = json.loads(row["metadata"]).get("func_name") if row.get("metadata") else None
        if function is None:
            return [{"input": case["input"], "output": case["output"]} for case in cases]
        if not function.isidentifier():
            raise ValueError(f"metadata names the function {function!r}")
        return [_assertion(function, case) for case in cases]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its tests cannot be read: {type(error).__name__}: {error}") from None


def unpacked(private: str) -> list[dict[str, Any]]:
    """The private cases: JSON, or JSON in a pickled string, compressed, in base64. The pickle is read, never run."""
    if private.lstrip().startswith("["):
        return json.loads(private)
    try:
        unzip = zlib.decompressobj()
        data = unzip.decompress(base64.b64decode(private, validate=True), _LARGEST)
    except (binascii.Error, zlib.error) as error:
        raise ValueError(f"private_test_cases: {error}") from None
    if unzip.unconsumed_tail:
        raise ValueError(f"private_test_cases: more than {_LARGEST >> 20} MiB")
    operations = [(code.name, argument) for code, argument, _ in pickletools.genops(data)]
    texts = [argument for name, argument in operations if name in _TEXT]
    if len(texts) != 1 or any(name not in (*_TEXT, *_AROUND) for name, _ in operations):
        raise ValueError("private_test_cases: a pickle of more than one string")
    return json.loads(texts[0])


def _assertion(function: str, case: Mapping[str, str]) -> str:
    arguments = [json.loads(line) for line in case["input"].split("\n") if line.strip()]
    given = ", ".join(map(repr, arguments))
    return f"assert Solution().{function}({given}) == {json.loads(case['output'])!r}"
