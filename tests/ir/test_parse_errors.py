"""Every message of the parser, at the right line and column. ``¦`` marks where the caret must stand."""

from __future__ import annotations

import pytest

from moec.ir.errors import IRError, ParseError
from moec.ir.parser import parse, parse_graph

OPEN = "graph @g(%x: f32[T, 8], %i: i64[T, 2]) {\n  "

CASES = [
    ("x", "¦x", "expected 'graph'"),
    ("no at", "graph ¦g() {}", "expected a graph's name"),
    ("twice", "graph @g() {}\ngraph ¦@g() {}", "graph @g is defined twice"),
    ("trailing", "graph @g() { return } ¦}", "expected 'graph', found '}'"),
    ("no arguments", "graph @g ¦{", "expected '(' before the graph's arguments"),
    ("argument name", "graph @g(¦x: f32[]) {}", "expected an argument"),
    ("argument type", "graph @g(%x ¦f32[]) {}", "expected ':' after argument %x"),
    ("argument comma", "graph @g(%x: f32[] ¦%y: f32[]) {}", "expected ',' or ')' after an argument"),
    ("duplicate argument", "graph @g(%x: f32[],\n  ¦%x: f32[]) {}", "value %x is defined twice; first in line 1"),
    ("header type", "graph @g(%x: f32[]) -> ¦f64[] { return %x }", "declares the results f64[], but returns f32[]"),
    ("header without return", "graph @g() -> ¦f64[] { }", "does not end in return"),
    ("header comma", "graph @g() -> (f64[] ¦f32[]) { }", "expected ',' or ')' after a result type"),
    ("no body", "graph @g()¦", "expected '{' before the graph's ops, found the end"),
    ("not closed", "graph @g() { return¦", "is not closed"),
    ("unknown type", "graph @g(%x: ¦f33[T]) {}", "unknown type 'f33'; did you mean 'f32'?"),
    ("unknown dialect type", "graph @g(%x: !¦moe.plam<8>) {}", "did you mean '!moe.plan'?"),
    ("plan", "graph @g(%x: !moe.plan<¦x>) {}", "expected an integer, found 'x'"),
    ("opaque", "graph @g(%x: !torch.opaque<¦x>) {}", "expected a string in !torch.opaque"),
    ("no type", "graph @g(%x: ¦=) {}", "expected a type, found '='"),
    ("bare element type", "graph @g(%x: ¦f32) {}", "a number is f32[]"),
    ("device", "graph @g(%x: f32[]@¦:) {}", "expected a device after '@'"),
    ("sym", "graph @g(%x: sym_int¦[s0]) {}", "expected '<' after sym_int"),
    ("sym kind", "graph @g(%x: sym_int<¦s0 < 4>) {}", "sym_bool holds a comparison"),
    ("sym open", "graph @g(%x: sym_int<s0¦]) {}", "expected '>' behind an expression"),
    ("dimension missing", "graph @g(%x: f32[T, ¦]) {}", "expected a dimension, found ']'"),
    ("dimension comma", "graph @g(%x: f32[T ¦4]) {}", "expected ',' or ']' in a shape"),
    ("dimension truth", "graph @g(%x: f32[¦T < 4]) {}", "not a truth value"),
    ("dimension function", "graph @g(%x: f32[¦FloorDv(T, 2)]) {}", "did you mean 'FloorDiv'"),
    ("dimension arguments", "graph @g(%x: f32[1 + ¦FloorDiv(T)]) {}", "FloorDiv takes exactly 2 arguments"),
    ("dimension paren", "graph @g(%x: f32[(T + 1¦]) {}", "expected ')' in a dimension"),
    ("dimension call", "graph @g(%x: f32[Max(T¦]) {}", "expected ',' or ')' in the arguments of Max"),
    ("dimension zero", "graph @g(%x: f32[T ¦/ 0]) {}", "division by zero"),
    ("dimension power", "graph @g(%x: f32[9 ¦** 99999]) {}", "exponent 99999 is out of range"),
    ("dimension powers", "graph @g(%x: f32[(9 ** 900) ¦** 900]) {}", "power too large"),
    ("dimension chain", "graph @g(%x: sym_bool<a < b ¦< c>) {}", "comparisons do not chain"),
    ("dimension digits", f"graph @g(%x: f32[¦{'9' * 1001}]) {{}}", "number of more than 1000 digits"),
    ("dimension logic", "graph @g(%x: f32[(a < b) ¦+ 1]) {}", "a truth value has no arithmetic"),
    ("dimension depth", "graph @g(%x: f32[" + "(" * 61 + "¦T" + ")" * 61 + "]) {}", "nested more than 60 deep"),
    ("undefined", OPEN + "return ¦%z }", "value %z is not defined here"),
    ("nearest value", OPEN.replace("%x", "%logits") + "return ¦%logit }", "did you mean 'logits'?"),
    ("redefined", OPEN + "¦%x = torch.call @a() : f32[]\n}", "value %x is defined twice; first in line 1"),
    ("closed region", OPEN + "%a = moe.activation [%x] {\n    (%h: f32[]) { return ¦%x } } : f32[] }", "closed"),
    ("own result", OPEN + "%a = torch.call @f(¦%a) : f32[] }", "value %a is not defined"),
    ("no equals", OPEN + "%a ¦moe.route %x : f32[] }", "expected '=' after an op's results"),
    ("no op", OPEN + "%a = ¦3 }", "expected an op's name, found '3'"),
    ("unknown op", OPEN + "%a = ¦moe.rote %x : f32[] }", "unknown op 'moe.rote'; did you mean 'moe.route'"),
    ("operand missing", OPEN + "%a = moe.dispatch %x ¦: f32[] }", "missing its operand 'ids'; it takes %x, %ids"),
    ("operand kind", OPEN + "%a = moe.dispatch %x, ¦[%i] : f32[] }", "missing its operand 'ids'"),
    ("operand excess", OPEN + "%a = moe.dispatch %x, %i, ¦%i : f32[] }", "takes %x, %ids"),
    ("operand name", OPEN + "%a = moe.route %x, ¦bia = %x : f32[] }", "bias = %..., [captures...]"),
    ("operand list", OPEN + "%a = moe.activation [%x ¦%x] : f32[] }", "expected ',' or ']' in rows"),
    ("attribute", OPEN + "%a = moe.dispatch %x, %i {¦expert = 8} : f32[] }", "did you mean 'experts'?"),
    ("attribute twice", OPEN + "%a = moe.dispatch %x, %i {experts = 8, ¦experts = 8} : f32[] }", "is given twice"),
    ("attribute equals", OPEN + "%a = moe.dispatch %x, %i {experts ¦8} : f32[] }", "expected '=' after attribute"),
    ("attribute comma", OPEN + "%a = moe.dispatch %x, %i {experts = 8 ¦9} : f32[] }", "expected ',' or '}'"),
    ("attribute key", OPEN + "%a = moe.dispatch %x, %i {¦8} : f32[] }", "expected an attribute's name"),
    ("attribute value", OPEN + "%a = moe.dispatch %x, %i {experts = ¦tru} : f32[] }", "did you mean 'true'?"),
    ("attribute operand", OPEN + "%a = moe.dispatch %x, %i {experts = ¦%x} : f32[] }", "a value cannot stand"),
    ("attribute float", OPEN + f"%a = moe.route %x {{scale = ¦{'9' * 400}}} : f32[] }}", "too large for a float"),
    ("region missing", OPEN + "%a = ¦moe.activation [%x] : f32[] }", "missing its nested graph 'body'"),
    ("region excess", OPEN + "%a = moe.dispatch %x, %i ¦{ () { } } : f32[] }", "moe.dispatch takes 0 nested graphs"),
    ("region open", OPEN + "%a = moe.activation [%x] { () { return } ¦: f32[] }", "expected '}' after a nested"),
    ("result types", OPEN + "%a, %b = ¦moe.dispatch %x, %i : f32[] }", "has 2 results but 1 result types"),
    ("no results", OPEN + "¦torch.call @f() : f32[] }", "has 0 results but 1 result types"),
    ("call target", OPEN + "%a = torch.call @¦() : f32[] }", "expected a target ('@name')"),
    ("call argument", OPEN + "%a = torch.call @f(a = 1, ¦2) : f32[] }", "a positional argument after a named one"),
    ("call twice", OPEN + "%a = torch.call @f(a = 1, ¦a = 2) : f32[] }", "argument 'a' is given twice"),
    ("call comma", OPEN + "%a = torch.call @f(1 ¦2) : f32[] }", "expected ',' or ')' after an argument"),
    ("call value", OPEN + "%a = torch.call @f(¦:) : f32[] }", "expected an attribute value, found ':'"),
    ("list comma", OPEN + "%a = torch.call @f([1 ¦2]) : f32[] }", "expected ',' or ']'"),
    ("minus", OPEN + "%a = torch.call @f(-¦true) : f32[] }", "expected a number after '-'"),
    ("range", OPEN + "%a = torch.call @f(¦1e999) : f32[] }", "number '1e999' is out of range"),
    ("digits", OPEN + f"%a = torch.call @f(¦{'9' * 1001}) : f32[] }}", "number of more than 1000 digits"),
    ("literal kind", OPEN + "%a = torch.call @f(#¦4) : f32[] }", "expected a literal's kind after '#'"),
    ("literal text", OPEN + "%a = torch.call @f(#device<¦cpu>) : f32[] }", "expected a string in #device<...>"),
    ("unterminated", OPEN + '%a = torch.call @f(¦"abc) : f32[]\n}', "unterminated string"),
    ("escape", OPEN + '%a = torch.call @f("ab¦\\q") : f32[] }', "unknown escape"),
    ("code point", OPEN + '%a = torch.call @f("¦\\U00110000") : f32[] }', "beyond the last Unicode character"),
    ("character", OPEN + "¦? }", "unexpected character '?'"),
    ("percent", OPEN + "return ¦% }", "expected a value's name after '%'"),
    ("nul", OPEN + "¦\0 }", "unexpected character '\\x00'"),
    ("depth of graphs", "graph @g" + "() { torch.call @f() { " * 49 + "()", "graphs nested more than 48 deep"),
    ("depth of lists", OPEN + "return template " + "[" * 60, "attribute nested more than 48 deep"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_message_and_place(text: str, message: str) -> None:
    plain = text.replace("¦", "")
    with pytest.raises(ParseError) as caught:
        parse(plain, "file.moe")
    error = caught.value
    assert message in error.message
    if "¦" in text:
        before = text[: text.index("¦")]
        assert (error.line, error.column) == (before.count("\n") + 1, len(before.rpartition("\n")[2]) + 1)
        shown, caret = str(error).splitlines()[-2:]
        at = caret.index("^")
        after = plain[len(before) :].split("\n")[0]
        assert shown[at : at + 1] == (after[:1] if after[:1].isprintable() else "?"), "the caret stands elsewhere"
    assert str(error).startswith(f"file.moe:{error.line}:{error.column}: ")


def test_exactly_one_graph() -> None:
    with pytest.raises(IRError, match="exactly one graph, found 2"):
        parse_graph("graph @a() { return } graph @b() { return }")
    with pytest.raises(IRError, match="exactly one graph, found 0"):
        parse_graph("// nothing")


def test_long_lines_are_shown_in_part() -> None:
    with pytest.raises(ParseError) as caught:
        parse("graph @g(" + "%x: f32[], " * 10_000)
    assert len(str(caught.value)) < 1000
