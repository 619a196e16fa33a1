"""Which folders of transformers hold an MoE, read from their text."""

from __future__ import annotations

from pathlib import Path

import pytest

from moec.coverage.families import CoverageError, Family, discover, family_of, select

DECORATED = {"mixtral", "deepseek_v3", "gpt_oss", "gemma4", "qwen3_omni_moe", "nemotron_h", "zaya"}
UNDECORATED = {"llama4", "longcat_flash", "dbrx", "jetmoe", "switch_transformers", "nllb_moe", "step3p7", "doge"}
NONE_AT_ALL = {"llama", "bert", "bamba", "evolla", "pi0"}

MODEL = """
class {0}PreTrainedModel(PreTrainedModel):
    _can_record_outputs = {{"router_logits": OutputRecorder(Experts)}}

class {0}Block(nn.Module):
    def __init__(self, config):
        self.mlp = {1}(config)

class {0}Model({0}PreTrainedModel):
    def __init__(self, config):
        self.layers = nn.ModuleList([{0}Block(config) for _ in range(2)])

class {0}ForCausalLM({0}PreTrainedModel, GenerationMixin):
    def __init__(self, config):
        self.model = {0}Model(config)

class {0}VisionModel({0}PreTrainedModel):
    def __init__(self, config):
        self.patches = nn.Conv2d(3, 4, 2)
"""


def experts(body: str, name: str = "Experts", base: str = "nn.Module", before: str = "") -> Family | None:
    """The family of a file with one class of that body, and models around it."""
    lines = "\n        ".join(body.strip().split("\n"))
    text = f"{before}\nclass {name}({base}):\n    def __init__(self, config):\n        {lines}\n"
    return family_of("fake", "fake.modeling_fake", text + MODEL.format("Fake", name))


@pytest.mark.parametrize("decorator", ["@use_experts_implementation", "@moe.use_experts_implementation(has_bias=True)"])
def test_decorated_experts_are_known(decorator: str) -> None:
    found = experts("pass", before=decorator)
    assert found is not None
    assert found.decorated == ("Experts",)
    assert found.undecorated == ()
    assert found.entries == ("FakeForCausalLM", "FakeModel")


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("self.up = nn.Parameter(torch.empty(self.num_experts, 2 * a, b))", "stacked by expert (up)"),
        ("self.up = nn.Parameter(torch.zeros((num_experts, a, b)))", "stacked by expert (up)"),
        ("self.w1 = nn.Parameter(torch.empty(self.moe_num_experts * a, b))", "stacked by expert (w1)"),
        ("self.experts = nn.ModuleList([MLP(config) for _ in range(4)])", "a list of experts (experts)"),
        ("self.up_embed = nn.Embedding(self.num_experts, a)", "one embedding an expert (up_embed)"),
    ],
)
def test_undecorated_experts_are_known_by_what_they_hold(body: str, why: str) -> None:
    found = experts(body, name="Mixture")
    assert found is not None
    assert found.decorated == ()
    assert [name for name, _ in found.undecorated] == ["Mixture"]
    assert why in found.undecorated[0][1]


def test_undecorated_experts_are_known_by_name_and_base() -> None:
    assert experts("pass", name="ParallelExperts") is not None
    assert experts("pass", name="NaiveMoe", base="nn.ModuleList") is not None


@pytest.mark.parametrize(
    ("body", "name", "base"),
    [
        ("self.weight = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim))", "Router", "nn.Module"),
        ("self.bias = nn.Parameter(torch.zeros(self.num_experts))", "Router", "nn.Module"),
        ("self.up = nn.Parameter(torch.empty(self.heads, a, b))", "Attention", "nn.Module"),
        ("self.up = nn.Parameter(torch.empty(n_shared_experts, a, b))", "SharedExperts", "nn.Module"),
        ("self.shared_experts = nn.ModuleList([MLP(config)])", "Block", "nn.Module"),
        ("self.layers = nn.ModuleList([MLP(config)])", "Layers", "nn.Module"),
        ("self.experts = 4", "ModelOutputOfExperts", "ModelOutput"),
    ],
)
def test_what_is_no_experts(body: str, name: str, base: str) -> None:
    assert experts(body, name=name, base=base) is None


def test_experts_that_no_model_builds_are_no_family() -> None:
    text = "class Experts(nn.Module):\n    pass\n" + MODEL.format("Fake", "MLP")
    assert family_of("fake", "fake.modeling_fake", text) is None


def test_the_text_part_comes_before_the_whole() -> None:
    text = "\n".join(
        f"class {n}(XPreTrainedModel):\n    def __init__(self, c):\n        self.e = Experts(c)"
        for n in ("XForConditionalGeneration", "XModel", "XTextModel")
    )
    found = family_of("x", "x.modeling_x", "class Experts(nn.Module):\n    pass\n" + text)
    assert found is not None
    assert found.entries == ("XTextModel", "XModel", "XForConditionalGeneration")


def test_a_folder_of_models(tmp_path: Path) -> None:
    moe = "@use_experts_implementation\nclass Experts(nn.Module):\n    pass\n" + MODEL.format("Fake", "Experts")
    for name, text in (("fake", moe), ("dense", MODEL.format("Dense", "MLP"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"modeling_{name}.py").write_text(text)
    (tmp_path / "fake" / "configuration_fake.py").write_text("class Experts: pass")
    (found,) = discover(tmp_path, "somewhere")
    assert (found.name, found.module) == ("fake", "somewhere.fake.modeling_fake")
    assert Family.from_dict(found.to_dict()) == found


@pytest.fixture(scope="module")
def installed() -> tuple[Family, ...]:
    return discover()


def test_the_installed_families(installed: tuple[Family, ...]) -> None:
    by_name = {f.name: f for f in installed}
    assert by_name.keys() >= DECORATED | UNDECORATED
    assert not by_name.keys() & NONE_AT_ALL
    assert all(by_name[n].decorated for n in DECORATED)
    assert not any(by_name[n].decorated for n in UNDECORATED)
    assert sum(bool(f.decorated) for f in installed) >= 64


def test_the_language_model_is_what_is_built(installed: tuple[Family, ...]) -> None:
    first = {f.name: f.entries[0] for f in installed}
    assert first["mixtral"] == "MixtralForCausalLM"
    assert first["qwen3_vl_moe"] == "Qwen3VLMoeTextModel"
    assert first["llama4"] == "Llama4ForCausalLM"
    assert all(f.entries for f in installed)


def test_selection(installed: tuple[Family, ...]) -> None:
    assert [f.name for f in select(installed, "olmoe, mixtral,olmoe")] == ["olmoe", "mixtral"]
    parts = [select(installed, None, f"{i}/3") for i in (1, 2, 3)]
    assert sorted(f.name for part in parts for f in part) == [f.name for f in installed]
    with pytest.raises(CoverageError, match="did you mean 'mixtral'"):
        select(installed, "mixtrall")
    for part in ("4/3", "0/3", "1", "a/b", "-1/3"):
        with pytest.raises(CoverageError, match="part"):
            select(installed, None, part)
