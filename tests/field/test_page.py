"""docs/why-fullft.md claims nothing without a test."""

from __future__ import annotations

import ast
import re

from conftest import REPOSITORY


def test_every_row_names_tests_that_exist() -> None:
    page = (REPOSITORY / "docs" / "why-fullft.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and not re.match(r"\| (---|elsewhere) ", line)]
    assert len(rows) > 20
    for row in rows:
        threads, _, tests = row.strip("| ").split(" | ")
        assert re.search(r"#\d+|Axolotl 0", threads), row
        named = re.findall(r"`([^`:]+)::([^`]+)`", tests)
        assert named, f"no test: {row}"
        for path, name in named:
            tree = ast.parse((REPOSITORY / path).read_text())
            assert name in {one.name for one in tree.body if isinstance(one, ast.FunctionDef)}, f"{path}::{name}"
