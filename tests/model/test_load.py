"""Base models: where each kind of name leads, what is refused and how, types, and GGUF files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM, AutoTokenizer

from batches import collate
from shoestring import ConfigError, DataError, load_policy, train
from shoestring.adapters import ADAPTERS
from shoestring.algorithms import ALGORITHMS
from shoestring.model.load import ModelSettings, Source, load, locate, models_folder, pick_device, torch_dtype
from shoestring.model.policy import Policy
from shoestring.objectives.loss import Objective
from shoestring.optimizers.adamw import AdamW
from shoestring.rollout.rollout import encode
from shoestring.samplers import SAMPLERS, Sampling
from shoestring.tasks.multiplication import Multiplication
from shoestring.training.update import build_optimizer, update
from shoestring.types import Group, Problem, Score
from tiny import TINY, random_model

CPU = torch.device("cpu")
IDS = torch.tensor([[260, 17, 18, 9, 30, 44]])
SMALL: dict[str, Any] = {
    "steps": 2,
    "save_every": 0,
    "algorithm": "grpo",
    "sampling": {"num_prompts": 3, "num_completions": 6, "max_new_tokens": 24},
    "out": "run",
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def model_folder(name: str, *left_out: str, family: str | None = None) -> Path:
    """A model folder: the embedded one's files, or those of a random model of a family, with some files left out."""
    folder = Path(name)
    shutil.copytree(TINY, folder)
    if family:
        for part in ("config.json", "generation_config.json", "model.safetensors"):
            (folder / part).unlink()
        random_model(family).save_pretrained(folder)
    for part in left_out:
        (folder / part).unlink()
    return folder


def varied(completions: list[Any], **others: Any) -> list[float]:
    """Rewards that differ within every group of completions that differ, whatever form they have."""
    return [float(sum(map(ord, str(completion))) % 11) for completion in completions]


def refused(name: str, **settings: Any) -> str:
    """What the `ConfigError` says that loading raises; all three parts are there, on one line."""
    with pytest.raises(ConfigError) as caught:
        load(ModelSettings(name=name, **settings), CPU)
    error = caught.value
    assert all((error.given, error.why, error.write))
    assert "\n" not in str(error)
    return str(error)


# --- locate ---------------------------------------------------------------------------------------------------------


def test_tiny_lies_in_the_package() -> None:
    assert locate("tiny") == Source(str(TINY))
    assert (TINY / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen2-1.5B-Instruct"])
def test_a_name_that_is_no_path_is_a_hub_id(name: str) -> None:
    assert locate(name) == Source(name)


def test_a_folder_with_a_config_is_a_model_wherever_it_lies(tmp_path: Path) -> None:
    model_folder("org/mine")
    for name in ("org/mine", "./org/mine", str(tmp_path / "org" / "mine")):
        found = locate(name)
        assert Path(found.path).resolve() == tmp_path / "org" / "mine"
        assert found[1:] == (None, None, None)


def test_a_home_folder_may_be_written_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model_folder("mine")
    assert locate("~/mine") == Source(str(tmp_path / "mine"))


@pytest.mark.parametrize(
    ("config", "base"),
    [("", str(TINY)), ('model = "org/x"\n', "org/x"), ('[model]\nname = "org/y"\n', "org/y"), ("[model]\n", str(TINY))],
)
def test_a_run_folder_is_its_configs_model_with_the_runs_adapter(config: str, base: str) -> None:
    Path("run/adapter").mkdir(parents=True)
    Path("run/config.toml").write_text(config)
    Path("run/adapter/adapter_config.json").write_text('{"base_model_name_or_path": "org/other"}')
    assert locate("run") == Source(base, None, Path("run/adapter"))


def test_a_runs_base_is_found_from_any_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model_folder("warm/model")
    train({**SMALL, "model": "warm"}, rewards=[varied], quiet=True)
    noted = json.loads(Path("run/adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    assert noted == str(Path("warm/model").absolute())
    run = Path("run").absolute()
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    for folder in (run, run / "adapter"):
        assert locate(str(folder)) == Source(noted, None, run / "adapter" if folder == run else folder)
        load_policy(ModelSettings(name=str(folder)), device="cpu")


def test_an_adapter_folder_is_the_base_that_peft_wrote_down_with_it() -> None:
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text('{"base_model_name_or_path": "org/other"}')
    assert locate("adapter") == Source("org/other", None, Path("adapter"))


def test_an_sft_folder_is_the_model_in_it() -> None:
    model_folder("warm/model")
    Path("warm/config.toml").write_text('model = "gpt2"\n')
    assert locate("warm") == Source("warm/model")


def test_a_gguf_file_is_named_apart_from_its_folder() -> None:
    Path("models").mkdir()
    Path("models/q4.gguf").write_bytes(b"GGUF")
    assert locate("models/q4.gguf") == Source("models", "q4.gguf")


def test_smollm2_is_the_prepared_folder_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOESTRING_MODELS", str(tmp_path / "models"))
    assert models_folder() == tmp_path / "models"
    assert locate("smollm2-135m") == Source("HuggingFaceTB/SmolLM2-135M-Instruct")
    model_folder("models/smollm2-135m")
    assert locate("smollm2-135m") == Source(str(tmp_path / "models" / "smollm2-135m"))


def test_prepared_models_lie_in_the_cache_folder_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHOESTRING_MODELS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert models_folder() == tmp_path / "cache" / "shoestring" / "models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models_folder() == tmp_path / ".cache" / "shoestring" / "models"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("./nowhere", "there is no such folder"),
        ("/nowhere/model", "there is no such folder"),
        ("~/nowhere-at-all", "there is no such folder"),
        ("a/b/c", "there is no such folder"),
        ("", "folder"),
        ("notes.txt", "this file is not a GGUF file"),
        ("./notes.txt", "this file is not a GGUF file"),
        ("empty", "the folder holds no config.json"),
        ("none.gguf", "there is no such file"),
        ("empty/none.gguf", "there is no such file"),
    ],
)
def test_paths_that_are_no_model_are_told(name: str, says: str) -> None:
    Path("notes.txt").write_text("notes")
    Path("empty").mkdir()
    with pytest.raises(ConfigError, match=says):
        locate(name)
    assert says in refused(name)


# --- load -----------------------------------------------------------------------------------------------------------


def test_what_is_loaded_is_what_transformers_loads() -> None:
    model, tokenizer, source = load(ModelSettings(), CPU)
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(TINY)))
    assert not model.training
    assert tokenizer("12*3=")["input_ids"] == AutoTokenizer.from_pretrained(TINY)("12*3=")["input_ids"]
    assert source == locate("tiny")


def test_spaces_that_the_model_wrote_are_kept() -> None:
    _, tokenizer, _ = load(ModelSettings(), CPU)
    text = "it 's 1 , 2 . do n't ?"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_the_base_has_the_type_that_was_asked_for(dtype: Any, wanted: torch.dtype) -> None:
    model, *_ = load(ModelSettings(dtype=dtype), CPU)
    assert {p.dtype for p in model.parameters()} == {wanted}
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(TINY, dtype=wanted)))


def test_auto_is_bf16_on_a_gpu() -> None:
    assert torch_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert torch_dtype("fp32", torch.device("cuda")) == torch.float32
    assert pick_device("cpu") == CPU


def test_a_hub_id_that_cannot_be_reached_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it reads the environment at its import
    assert 'model is "org/not-here"' in refused("org/not-here")
    assert "could not be loaded" in refused("not-here-at-all")


def test_only_safetensors_are_loaded() -> None:
    """A pickle can run code when it is read."""
    folder = model_folder("pickled", "model.safetensors")
    torch.save(AutoModelForCausalLM.from_pretrained(TINY).state_dict(), folder / "pytorch_model.bin")
    assert "safetensors" in refused("pickled")


def test_a_models_own_code_is_not_run_unless_it_is_asked_for() -> None:
    folder = model_folder("coded")
    values = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({**values, "model_type": "own", "auto_map": auto}))
    (folder / "own.py").write_text(f'open({str(Path("ran").absolute())!r}, "w").close()\n')
    assert not ModelSettings().trust_remote_code
    assert "model.trust_remote_code = true" in refused("coded")
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("part", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"{}"),
        ("config.json", b'{"model_type": "no-such-family"}'),
        ("config.json", b'{"model_type": "vit"}'),
        ("tokenizer.json", b"{"),
        ("tokenizer.json", None),  # BUG: transformers makes a tokenizer without any vocabulary, and nothing is raised
        ("model.safetensors", None),
        ("model.safetensors", b""),  # BUG: SafetensorError goes through
        ("model.safetensors", b"torn" * 100),  # BUG: SafetensorError goes through
    ],
)
def test_a_broken_part_of_a_folder_is_told(part: str, content: bytes | None) -> None:
    folder = model_folder("broken")
    (folder / part).unlink()
    if content is not None:
        (folder / part).write_bytes(content)
    assert 'model is "broken"' in refused("broken")


def test_weights_that_do_not_fit_the_config_are_told() -> None:
    """BUG: transformers' RuntimeError goes through."""
    folder = model_folder("misfit")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "intermediate_size": 100}))
    assert 'model is "misfit"' in refused("misfit")


@pytest.mark.parametrize("content", ['{"base_model_name_or_path": null}', "{}", "{"])
def test_an_adapter_that_names_no_base_is_told(content: str) -> None:
    """BUG: the TypeError, KeyError or JSONDecodeError goes through. PEFT writes null for a model made from a config."""
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text(content)
    assert 'model is "adapter"' in refused("adapter")


# --- policies over them ---------------------------------------------------------------------------------------------


def test_a_run_and_its_bare_adapter_load_as_one_frozen_policy() -> None:
    run = train(SMALL, rewards=[varied], quiet=True)
    wanted = logits(run.policy.base)
    assert not torch.equal(wanted, logits(load_policy(ModelSettings(), device="cpu").base))
    for name in ("run", "run/adapter"):
        policy = load_policy(ModelSettings(name=name), device="cpu")
        assert torch.equal(logits(policy.base), wanted)
        assert policy.trained() == {}
        assert policy.name == name
    with pytest.raises(ConfigError, match="shoestring merge run OUT"):
        load_policy(ModelSettings(name="run"), adapter=ADAPTERS["lora"](), device="cpu")


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_steps_on_a_short_base_are_applied_and_train_fp32_weights(dtype: str) -> None:
    run = train({**SMALL, "model": {"dtype": dtype}}, rewards=[varied], quiet=True)
    assert {str(p.dtype) for p in run.policy.trained().values()} == {"torch.float32"}
    assert {p.dtype for p in run.policy.base.parameters() if not p.requires_grad} == {torch_dtype(dtype, CPU)}
    assert all(report.applied for report in run.reports)
    for report in run.reports:
        assert report.grad_norm > 0
        assert torch.tensor([report.loss, report.grad_norm, report.kl]).isfinite().all()
    assert all(p.isfinite().all() for p in run.policy.trained().values())
    assert any((p != 0).any() for name, p in run.policy.trained().items() if "lora_B" in name)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_the_gradient_on_a_short_base_is_near_the_one_in_fp32(dtype: str) -> None:
    """For the same completions; fp16's would underflow unscaled."""

    def policy(kind: Any) -> Policy:
        torch.manual_seed(0)
        return load_policy(ModelSettings(dtype=kind), adapter=ADAPTERS["lora"](), device="cpu")

    whole, algorithm = policy("fp32"), ALGORITHMS["grpo"]()
    asked, _ = encode(whole, Multiplication(), [Multiplication().draw("train", i) for i in range(2)], 24)
    found = SAMPLERS["hf"]().open(whole).sample(asked, num=6, sampling=Sampling(max_new_tokens=24), seed=0)
    scores = tuple(Score(float(i % 3), {}) for i in range(6))
    groups = [Group(p, completions, scores) for p, completions in zip(asked, found, strict=True)]
    batches = collate(groups, [algorithm.credit(group, torch.Generator().manual_seed(0)) for group in groups])

    def norm(policy: Policy) -> float:
        optimizer = build_optimizer(policy.trained(), AdamW())
        objective = Objective(**algorithm.objective._asdict())
        report = update(policy, optimizer, batches, objective, temperature=1.0, max_grad_norm=1.0, checkpointing=False)
        assert report.applied
        return report.grad_norm

    assert norm(policy(dtype)) == pytest.approx(norm(whole), rel=0.1)


def test_without_a_chat_template_a_task_must_ask_in_plain_text() -> None:
    model_folder("base", "chat_template.jinja")
    with pytest.raises(ConfigError, match=r'task\.format = "plain"'):
        train({**SMALL, "model": "./base", "out": "first"}, quiet=True)
    plain = {"name": "multiplication", "format": "plain"}
    run = train({**SMALL, "model": "./base", "task": plain}, rewards=[varied], quiet=True)
    assert len(run.reports) == 2
    policy = load_policy(ModelSettings(name="base"), device="cpu")
    asked = [{"role": "system", "content": "Count."}, {"role": "user", "content": "12*3="}]
    assert policy.encode(asked, "plain") == tuple(policy.tokenizer("Count.\n\n12*3=")["input_ids"])


ROWS = [{"prompt": f"{'z' * 1100}{a}*3=", "answer": str(3 * a)} for a in range(10, 30)]


def test_a_prompt_longer_than_the_context_is_refused() -> None:
    with pytest.raises(DataError, match=r"longer than the model's context of 1024; .*allow_truncated_prompts = true"):
        train(SMALL, data=ROWS, quiet=True)


def test_a_prompt_longer_than_the_context_is_cut_from_the_left_and_counted_if_asked_for() -> None:
    policy = load_policy(ModelSettings(), device="cpu")
    problems = [Problem("long", "z" * 1100 + "12*3=", "36"), Problem("short", "12*3=", "36")]
    (long, short), cut = encode(policy, Multiplication(), problems, 24, allow_truncated=True)
    assert cut == 1
    assert (len(long.token_ids), long.answer_start) == (1000, 1000)
    assert long.token_ids == policy.encode([{"role": "user", "content": problems[0].question}])[-1000:]
    assert short.token_ids == policy.encode([{"role": "user", "content": "12*3="}])
    with pytest.raises(DataError, match=r"lower sampling\.max_new_tokens"):
        encode(policy, Multiplication(), problems, 1024, allow_truncated=True)  # no room for a prompt at all


def test_a_run_with_cut_prompts_goes_through() -> None:
    few = {"num_prompts": 1, "num_completions": 4, "max_new_tokens": 16}
    config = {**SMALL, "steps": 1, "allow_truncated_prompts": True, "sampling": few}
    run = train(config, data=ROWS, rewards=[varied], quiet=True)
    assert run.reports[0].tokens_sampled > 0
    assert run.reports[0].prompts_truncated == 1


def test_evaluations_during_a_run_with_cut_prompts_cut_them_too() -> None:
    changes = {"steps": 1, "eval_every": 1, "allow_truncated_prompts": True, "evaluation": {"num": 2}}
    task = {"validation": 4, "check": "text"}
    run = train({**SMALL, **changes, "task": task}, data=ROWS, rewards=[varied], quiet=True)
    assert len(run.reports) == 1


# --- GGUF -----------------------------------------------------------------------------------------------------------

MERGED = 254  # this and the next stand for " t" and " a" instead of bytes that no test writes: any BPE has merges


def write_gguf(path: str, model: Any, family: str) -> None:
    """A GGUF file of fp32 tensors under llama.cpp's names, with a byte-level BPE and the embedded chat template."""
    config, tokenizer = model.config, AutoTokenizer.from_pretrained(TINY)
    writer = gguf.GGUFWriter(path, family)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])

    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    tokens[MERGED : MERGED + 2] = ["Ġt", "Ġa"]
    kinds = [gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * (len(tokens) - 256)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["Ġ t", "Ġ a"])  # two: a list of one is read as a bare string by transformers 5.17
    writer.add_bos_token_id(tokenizer.pad_token_id)  # transformers 5.17 needs one to read a llama file
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)

    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == family)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        if stem == "lm_head" and config.tie_word_embeddings:
            continue
        if family == "llama" and stem.endswith(("q_proj", "k_proj")):  # it turns neighbours, not halves
            heads = config.num_attention_heads if stem.endswith("q_proj") else config.num_key_value_heads
            value = value.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def original(kind: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(TINY) if kind == "tied qwen2" else random_model(kind)


@pytest.mark.parametrize("kind", ["qwen2", "llama", "tied qwen2"])
def test_a_gguf_file_gives_the_originals_logits_and_a_model_like_any_other(kind: str) -> None:
    """It can be cast, saved and loaded again, and its weights can be trained."""
    model = original(kind)
    Path("models").mkdir()
    write_gguf("models/it.gguf", model, kind.split()[-1])
    found, tokenizer, source = load(ModelSettings(name="models/it.gguf"), CPU)
    assert source == Source("models", "it.gguf")
    torch.testing.assert_close(logits(found), logits(model), atol=1e-5, rtol=0)
    assert not found.training
    assert found.config.tie_word_embeddings == kind.startswith("tied")
    assert not hasattr(found.config, "quantization_config")
    torch.testing.assert_close(logits(found.to(torch.float64)).float(), logits(model), atol=1e-5, rtol=0)

    found.float().save_pretrained("again")
    tokenizer.save_pretrained("again")
    again, same, _ = load(ModelSettings(name="again"), CPU)
    assert torch.equal(logits(again), logits(found))
    assert same("12* t3=")["input_ids"] == tokenizer("12* t3=")["input_ids"]

    found(input_ids=IDS).logits.sum().backward()
    assert all(p.grad is not None for p in found.parameters())


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"), reason="transformers 5.17 splits a qwen2 file's control tokens"
)
def test_a_gguf_files_tokenizer_asks_and_ends_as_the_original_does() -> None:
    write_gguf("it.gguf", original("tied qwen2"), "qwen2")
    policy = load_policy(ModelSettings(name="it.gguf"), device="cpu")
    plain = load_policy(ModelSettings(), device="cpu")
    messages = [{"role": "user", "content": "12*3="}]
    assert policy.encode(messages) == plain.encode(messages)
    assert (policy.end_id, policy.eos_ids) == (plain.end_id, plain.eos_ids)
    assert policy.context == 1024
    assert MERGED in policy.encode([{"role": "user", "content": "12 times"}])
    assert policy.decode(policy.encode([{"role": "user", "content": "12 times 3 ."}])) == "12 times 3 ."


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_gguf_file_in_a_short_type_is_the_same_as_the_original_in_it(dtype: Any) -> None:
    write_gguf("it.gguf", original("tied qwen2"), "qwen2")
    found, *_ = load(ModelSettings(name="it.gguf", dtype=dtype), CPU)
    assert {p.dtype for p in found.parameters()} == {torch_dtype(dtype, CPU)}
    plain, *_ = load(ModelSettings(dtype=dtype), CPU)
    assert torch.equal(logits(found), logits(plain))


# PEFT looks for a config.json beside the file, and its user can do nothing about that.
@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
def test_a_run_on_a_gguf_file_trains_and_loads_again() -> None:
    write_gguf("it.gguf", original("tied qwen2"), "qwen2")
    run = train({**SMALL, "model": "it.gguf"}, rewards=[varied], quiet=True)
    assert all(report.applied for report in run.reports)
    policy = load_policy(ModelSettings(name="run"), device="cpu")
    assert torch.equal(logits(policy.base), logits(run.policy.base))


# As above.
@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
def test_the_bare_adapter_of_a_run_on_a_gguf_file_finds_the_file() -> None:
    """BUG: PEFT notes the file's folder as the base, without the file."""
    write_gguf("it.gguf", original("tied qwen2"), "qwen2")
    train({**SMALL, "model": "it.gguf", "steps": 1}, rewards=[varied], quiet=True)
    assert locate("run/adapter").gguf_file == "it.gguf"


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all" * 50, b"GGUF" + bytes(200)])
def test_a_file_that_is_no_gguf_in_spite_of_its_name_is_told(content: bytes) -> None:
    """BUG: for a file that is shorter than a header, the reader's struct.error goes through."""
    Path("it.gguf").write_bytes(content)
    assert 'model is "it.gguf"' in refused("it.gguf")


def test_a_gguf_file_whose_tensors_do_not_fit_its_settings_is_told() -> None:
    """BUG: transformers' RuntimeError goes through."""
    model = random_model()
    model.config.intermediate_size = 100
    write_gguf("it.gguf", model, "qwen2")
    assert 'model is "it.gguf"' in refused("it.gguf")
