"""Settings: strict, printed back, and wrong ones told in three parts before anything heavy is imported."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from conftest import ROOT
from shoestring.config import files as config_files
from shoestring.config.run import RunConfig, load, settle
from shoestring.errors import ConfigError, ShoestringError, nearest
from shoestring.run.sft import SftConfig

RECIPES = sorted((ROOT / "recipes").glob("*.toml"))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["optim.lrr=1e-4"], 'did you mean "lr"'),
        (["stepz=3"], 'did you mean "steps"'),
        (["algorithm.name=s-gpro"], 'did you mean "s-grpo"'),
        (["task.name=swamp"], 'did you mean "svamp"'),
        (["adapter.name=lorra"], 'did you mean "lora"'),
        (["sampler.name=vllm"], "use one of: auto, graph, hf"),
        (["algorithm.alfa=3"], 'did you mean "alpha"'),
        (["steps=many"], "steps is 'many'"),
        (["steps=0"], "steps is 0"),
        (["optim.lr=-1"], "optim.lr is -1"),
        (["optim.lr=nan"], "optim.lr is nan"),
        (["sampling.num_completions=1"], "a group of one has no mean to differ from"),
        (["sampling.temperature=0"], "greedy completions of a prompt are all the same"),
        (["sampling.top_k=1"], "completions of a prompt are all the same"),
        (["evaluation.keep=best"], "without evaluations there is no best"),
        (["task.digits=[2]"], "task.digits is [2]; it needs 2 values"),
        (["task.digits=[]"], "task.digits is []; it needs 2 values"),
        (["epochs=3"], "use `shoestring sft`"),
        (["learning_rate=1e-4"], "write optim.lr"),
        (["num_generations=8"], "write sampling.num_completions"),
        (["sampling.max_completion_length=8"], "write sampling.max_new_tokens"),
        (["save_steps=2"], "write save_every"),
        (["temperature=0.7"], "write sampling.temperature"),
        (["num_prompts=4"], "write sampling.num_prompts"),
        (["beta=0.04"], "write objective.beta"),
        (["algorithm.alpha=100"], "alpha at most k"),
        (["algorithm.name=grpo", "algorithm.loss_agg=token_sum_norm"], "norm_length"),
        (["task.digits=[1, 1]"], "only 81 such problems"),
        (["task.digits=[1, 2]"], "only 810 such problems"),
        (["task.prompt=Hello"], "put {question} where it goes"),
        (["task.name=file:"], "does not say which"),
        (["rewards.functions=[]"], "nothing would be scored"),
        (['rewards.functions=["task"]', "rewards.weights=[1.0, 2.0]"], "each function needs one weight"),
        (["noequals"], "it has no key and value"),
        (["steps.deep=1"], "steps is {'deep': 1}"),
        (["model.dtype=int8"], "model.dtype is 'int8'"),
        (["task=3"], "it does not say which one"),
        (["objective=5"], "objective is 5"),
        (["adapter.modules=[]"], "adapter.modules"),
        (["adapter.layers=foo"], "adapter.layers is 'foo'"),
    ],
)
def test_mistakes_have_three_parts(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, overrides)
    assert says in str(caught.value)
    assert caught.value.given
    assert caught.value.why
    assert caught.value.write


def test_a_recipe_that_is_not_there_or_not_toml() -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load("nowhere.toml")
    Path("bad.toml").write_text("steps = ")
    with pytest.raises(ConfigError, match="not TOML"):
        load("bad.toml")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_says_what_to_expect(path: Path) -> None:
    if path.stem.endswith("-sft"):
        SftConfig.model_validate(config_files.read(path))
    else:
        load(path)
    assert path.read_text().startswith("# ")


def test_settings_that_a_script_or_a_recipes_comment_names_are_taken_by_some_recipe() -> None:
    scripts = "".join(path.read_text() for path in (ROOT / "bench").glob("*.sh"))
    comments = "\n".join(line for path in RECIPES for line in path.read_text().splitlines() if line.startswith("#"))
    named = set(re.findall(r"(?<![\w.])(?:algorithm|objective|sampling|adapter)\.\w+=[\w.-]*\w", scripts + comments))
    assert "sampling.dynamic_sampling=4" in named
    beside = ((), ("algorithm.alpha=0",))  # with fewer tokens than alpha no k is taken
    refused = [s for s in sorted(named) if not any(taken(path, s, *more) for path in RECIPES for more in beside)]
    assert not refused


def taken(recipe: Path, *settings: str) -> bool:
    try:
        load(recipe, settings)
    except ConfigError:
        return False
    return True


def test_the_recipes_that_must_be_there() -> None:
    names = {"demo", "smollm2-sft", "svamp-smollm2", "svamp-qwen2-1.5b", "multiplication-qwen2-1.5b"}
    assert names <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", [None, *(p for p in RECIPES if not p.stem.endswith("-sft"))])
def test_a_config_printed_back_is_the_same_config(path: Path | None) -> None:
    config = load(path, ['task.prompt=Say "{question}"\n now', "task.chat={enable_thinking = false}"])
    Path("back.toml").write_text(config_files.dump(config))
    assert load("back.toml") == config


def test_overrides_reach_nested_keys_and_a_new_name_starts_its_table_afresh() -> None:
    config = load(
        ROOT / "recipes" / "svamp-smollm2.toml", ["algorithm.name=t-spmo", "optim.betas=[0.8, 0.9]", "model=x/y"]
    )
    assert (config.algorithm.name, config.optim.betas, config.model.name) == ("t-spmo", (0.8, 0.9), "x/y")
    assert load(None, ["model=a/b", "model.dtype=fp32"]).model.dtype == "fp32"


def test_naming_what_is_meant_anyway_loses_no_setting() -> None:
    assert load(None, ["algorithm.alpha=8", "algorithm.k=16", "algorithm.name=s-grpo"]).algorithm.alpha == 8
    recipe = ROOT / "recipes" / "svamp-qwen2-1.5b.toml"
    assert load(recipe, ["adapter.name=lora"]).adapter.layers == "last-third"
    assert load(None, ["algorithm.u_count=branching", "algorithm.name=t-spmo"]).algorithm.u_count == "branching"
    assert load(ROOT / "recipes" / "demo.toml", ["task.name=gsm8k"]).task.name == "gsm8k"


def test_a_bare_name_is_short_for_name_wherever_it_stands() -> None:
    recipe = ROOT / "recipes" / "svamp-qwen2-1.5b.toml"
    assert load(recipe, ["adapter=lora"]) == load(recipe, ["adapter.name=lora"]) == load(recipe)
    assert load(recipe, ["algorithm=t-spmo"]) == load(recipe, ["algorithm.name=t-spmo"])
    for order in (["tracking.project=x", "tracking=wandb"], ["tracking=wandb", "tracking.project=x"]):
        assert load(None, order).tracking.project == "x"
    assert load(recipe, ["model.dtype=fp32", "model=a/b"]).model == load(None, ["model=a/b", "model.dtype=fp32"]).model
    assert load(recipe, ["model=a/b"]).model == load(None, ["model=a/b"]).model


def test_the_objective_takes_the_algorithms_defaults_where_nothing_is_said() -> None:
    assert settle({}).objective.l2 == 0
    assert settle({"algorithm": {"name": "t-spmo"}}).objective.l2 > 0
    assert settle({"algorithm": "t-spmo", "objective": {"l2": 0.5}}).objective.l2 == 0.5
    assert settle({"algorithm": "grpo", "objective": {"beta": 0.04}}).objective.updates == 1


def test_settings_are_frozen() -> None:
    config = settle({})
    for target in (config, config.algorithm, config.task, config.sampling):
        with pytest.raises(Exception, match="frozen"):
            target.name = "x"


def test_differences_are_named() -> None:
    assert config_files.differences(settle({}), settle({"seed": 3, "optim": {"lr": 1.0}})) == ["optim.lr", "seed"]


def test_nearest_offers_the_nearest_or_all() -> None:
    assert nearest("lorra", ["lora", "dora"]) == 'did you mean "lora"?'
    assert nearest("zzz", ["b", "a"]) == "use one of: a, b"


def test_our_errors_are_value_errors() -> None:
    assert issubclass(ShoestringError, ValueError)
    assert isinstance(RunConfig().algorithm.k, int)


def test_entropies_are_not_for_a_recipe_to_ask_for() -> None:
    with pytest.raises(ConfigError, match=r"sampling\.entropy is true; the algorithm says"):
        load(None, ["sampling.entropy=true"])
    assert load(None, ["algorithm.name=entropy-filter"]).drawing.entropy


def test_paths_and_single_texts_stand_for_what_they_say() -> None:
    given = {"model": Path("models/x"), "out": Path("runs/y"), "rewards": {"functions": "rw:f"}}
    config = settle({**given, "adapter": {"modules": "q_proj"}})
    assert (config.model.name, config.out, config.rewards.functions) == ("models/x", "runs/y", ("rw:f",))
    assert config.adapter.modules == ("q_proj",)
    assert settle({"adapter": {"modules": "all-linear"}}).adapter.modules == "all-linear"
