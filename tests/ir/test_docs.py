"""The generated reference names everything that the registry knows."""

from __future__ import annotations

from moec.ir.docs import reference_markdown
from moec.ir.opdef import all_op_defs


def test_reference_is_complete() -> None:
    text = reference_markdown()
    for name, definition in all_op_defs().items():
        section = text.split(f"### {name}\n")[1].split("\n### ")[0]
        parts = [(p.name, p.doc) for p in definition.operands] + [(p.name, p.doc) for p in definition.attrs]
        for part, doc in parts + [(p.name, p.doc) for p in definition.regions]:
            assert f"`{part}`" in section, f"{name} lacks {part}"
            assert doc.replace("|", "\\|") in section
    assert '| `scoring` | `"softmax"` or `"sigmoid"` or' in text
    assert "| `group_fill` | float | `-inf` |" in text
    assert "| `experts` | int | required |" in text


def test_tables_are_well_formed() -> None:
    rows = 0
    for block in reference_markdown().split("\n\n"):
        if block.startswith("|"):
            widths = {line.replace("\\|", "").count("|") for line in block.strip().splitlines()}
            assert len(widths) == 1, block
            rows += 1
    assert rows > 5


def test_every_op_is_described() -> None:
    for name, definition in all_op_defs().items():
        assert type(definition).__doc__, f"{name} has no docstring"
        assert type(definition).__doc__ != type(definition).__mro__[1].__doc__
