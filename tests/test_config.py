"""config.py: every rule refuses what it should, dictionaries are strict, and the presets hold."""

import dataclasses
import json
import math

import pytest

import config

CLASSES = [
    config.HybridConfig,
    config.ConvConfig,
    config.TinyConfig,
    config.LSTMConfig,
    config.MambaConfig,
    config.TrainConfig,
]

# (class, field the message must name, a word of the advice, settings that break exactly that rule)
BROKEN = [
    (config.HybridConfig, "layer_pattern", "one letter per layer", {"layer_pattern": ""}),
    (config.HybridConfig, "layer_pattern", "one letter per layer", {"layer_pattern": "GX"}),
    (config.HybridConfig, "head_dim", "up to 256", {"head_dim": 257}),
    (config.HybridConfig, "value_dim", "up to 256", {"value_dim": 257}),
    (config.HybridConfig, "n_heads", "does not split", {"d_model": 512, "n_heads": 7}),
    (config.HybridConfig, "write_gate", "'hard'", {"write_gate": "soft"}),
    (config.HybridConfig, "decay", "'mamba'", {"decay": "linear"}),
    (config.HybridConfig, "erase", "'raw'", {"erase": "both"}),
    (config.HybridConfig, "impl", "'triton'", {"impl": "cuda"}),
    (config.HybridConfig, "key_conv_width", "needs an integer", {"key_conv_width": 2.5}),
    (config.HybridConfig, "query_conv_width", "integer of at least 0", {"query_conv_width": -1}),
    (config.HybridConfig, "key_context_conv", "integer of at least 0", {"key_context_conv": -1}),
    (config.HybridConfig, "key_bank_slots", "integer of at least 0", {"key_bank_slots": -1}),
    (config.HybridConfig, "key_context_conv", "set one of them", {"key_context_conv": 8, "key_conv_width": 4}),
    (config.HybridConfig, "use_rope", "must be even", {"use_rope": True, "d_model": 24, "n_heads": 8}),
    (config.HybridConfig, "rope_keys", "must be even", {"rope_keys": True, "head_dim": 63}),
    (config.HybridConfig, "rope_base", "above 1", {"rope_base": 1.0}),
    (config.HybridConfig, "init_std", "above 0", {"init_std": 0.0}),
    (config.HybridConfig, "beta_bias", "finite", {"beta_bias": math.nan}),
    (config.HybridConfig, "g_bias", "finite", {"g_bias": math.inf}),
    (config.HybridConfig, "key_bank_slots", "orthonormal", {"key_bank_slots": 65, "head_dim": 64}),
    (
        config.HybridConfig,
        "key_bank_start",
        "vocabulary",
        {"key_bank_slots": 8, "key_bank_start": 249, "vocab_size": 256},
    ),
    (config.HybridConfig, "key_bank_start", "vocabulary", {"key_bank_slots": 8, "key_bank_start": -1}),
    (config.HybridConfig, "key_bank_marker", "needs key_bank_slots", {"key_bank_marker": 3}),
    (config.HybridConfig, "key_bank_marker", "vocabulary", {"key_bank_slots": 8, "key_bank_marker": 50257}),
    (config.HybridConfig, "key_bank_marker", "vocabulary", {"key_bank_slots": 8, "key_bank_marker": -1}),
    (config.HybridConfig, "use_rope", "has none", {"use_rope": True, "layer_pattern": "G"}),
    (config.HybridConfig, "use_rope", "True or False", {"use_rope": "no"}),
    (config.HybridConfig, "query_proj", "has none", {"query_proj": True, "layer_pattern": "S"}),
    (config.HybridConfig, "key_bank_slots", "has none", {"key_bank_slots": 2, "layer_pattern": "SS"}),
    (config.HybridConfig, "query_proj", "set one of them", {"query_proj": True, "query_conv_width": 3}),
    (config.HybridConfig, "rope_keys", "key_bank_slots", {"rope_keys": True, "key_bank_slots": 3}),
    (config.HybridConfig, "key_bank_marker", "slot marker", {"key_bank_slots": 8, "key_bank_marker": 7}),
    (config.HybridConfig, "key_bank_start", "integer", {"key_bank_start": 1.5}),
    (config.HybridConfig, "layer_pattern", "a string", {"layer_pattern": ("G", "S")}),
    (config.HybridConfig, "init_std", "finite number", {"init_std": math.inf}),
    (config.HybridConfig, "beta_bias", "finite number", {"beta_bias": None}),
    (config.TrainConfig, "lr", "finite number", {"lr": "1e-3"}),
    (config.TrainConfig, "lr", "finite number", {"lr": math.inf}),
    (config.ConvConfig, "dilations", "tuple[int, ...]", {"dilations": 5}),
    (config.ConvConfig, "dilations", "per layer", {"dilations": ()}),
    (config.ConvConfig, "dilations", "per layer", {"dilations": (1, 0)}),
    (config.ConvConfig, "dilations", "tuple[int, ...]", {"dilations": (1, 1.5)}),
    (config.ConvConfig, "attention_layers", "from -6 to 5", {"attention_layers": (6,)}),
    (config.ConvConfig, "attention_layers", "from -6 to 5", {"attention_layers": (-7,)}),
    (config.ConvConfig, "attention", "'softmax'", {"attention": "flash"}),
    (config.ConvConfig, "feature_map", "'dpfp'", {"feature_map": "relu"}),
    (config.ConvConfig, "from_conv", "'QKV'", {"from_conv": "Q"}),
    (config.ConvConfig, "attention_heads", "do not split", {"attention_heads": 3}),
    (config.TinyConfig, "n_heads", "does not split", {"d_model": 7, "n_heads": 2}),
    (config.TinyConfig, "position", "'alibi'", {"position": "sin"}),
    (config.TinyConfig, "norm", "'rms'", {"norm": "batch"}),
    (config.TinyConfig, "n_heads", "even head width", {"position": "rope"}),
    (config.TinyConfig, "n_heads", "even head width", {"rope_v": 0.5}),
    (config.TinyConfig, "pos_rank", "at most 7", {"pos_rank": 8}),
    (config.TinyConfig, "qkv_rank", "at most 7", {"qkv_rank": 8}),
    (config.TinyConfig, "out_rank", "at most 7", {"out_rank": -1}),
    (config.TinyConfig, "ffn_rank", "at most 7", {"ffn_rank": 8}),
    (config.TinyConfig, "fixed_residual", "set a rank", {"fixed_residual": True}),
    (config.TinyConfig, "pos_rank", "has none", {"position": "none", "pos_rank": 3}),
    (config.TinyConfig, "tie_qkv", "'kv'", {"tie_qkv": "vk"}),
    (config.TinyConfig, "rope_v_inverse", "set rope_v", {"rope_v_inverse": True}),
    (config.TinyConfig, "rope_base", "above 1", {"rope_base": 1.0}),
    (config.TinyConfig, "rope_v", "0 to 1", {"d_model": 8, "rope_v": 1.5}),
    (config.TinyConfig, "init_std", "above 0", {"init_std": -1.0}),
    (config.TrainConfig, "lr", "above 0", {"lr": 0.0}),
    (config.TrainConfig, "weight_decay", "at least 0", {"weight_decay": -0.1}),
    (config.TrainConfig, "betas", "[0, 1)", {"betas": (0.9, 1.0)}),
    (config.TrainConfig, "betas", "tuple[float, float]", {"betas": (0.9,)}),
    (config.TrainConfig, "warmup_steps", "at least 0", {"warmup_steps": -1}),
    (config.TrainConfig, "schedule", "'constant'", {"schedule": "linear"}),
    (config.TrainConfig, "min_lr_ratio", "0 to 1", {"min_lr_ratio": 1.1}),
    (config.TrainConfig, "grad_clip", "no clipping", {"grad_clip": -1.0}),
    (config.TrainConfig, "save_every", "needs an integer", {"save_every": 2.5}),
    (config.TrainConfig, "precision", "'bf16'", {"precision": "fp16"}),
    (config.TrainConfig, "device", "'cpu'", {"device": "tpu"}),
]

POSITIVE = {
    config.HybridConfig: "d_model n_heads head_dim value_dim window_size chunk_size vocab_size",
    config.ConvConfig: "channels kernel_size attention_heads vocab_size",
    config.TinyConfig: "d_model n_layers n_heads ffn_dim vocab_size max_len depth_shared",
    config.LSTMConfig: "width n_layers vocab_size",
    config.MambaConfig: "d_model n_layers state_dim expand conv_width vocab_size",
    config.TrainConfig: "grad_accum log_every",
}
WHOLE = [(cls, field) for cls, fields in POSITIVE.items() for field in fields.split()]


# ------------------------------------------------------------------------------------------------ rules


@pytest.mark.parametrize(
    ("cls", "field", "advice", "settings"), BROKEN, ids=[f"{c.__name__}-{f}-{i}" for i, (c, f, *_) in enumerate(BROKEN)]
)
def test_rule_refuses_and_says_what_would_do(cls, field, advice, settings):
    with pytest.raises(ValueError) as caught:
        cls(**settings)
    message = str(caught.value)
    # The message opens with class, field and the value given; the value is in `settings` or is the field's default.
    default = {f.name: f.default for f in dataclasses.fields(cls)}[field]
    assert message.startswith(f"{cls.__name__}.{field} = {settings.get(field, default)!r}: ")
    assert advice in message


@pytest.mark.parametrize(("cls", "field"), WHOLE, ids=[f"{c.__name__}-{f}" for c, f in WHOLE])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, "3", None])
def test_sizes_are_whole_numbers_of_at_least_one(cls, field, value):
    with pytest.raises(ValueError, match=rf"^{cls.__name__}\.{field} = .*needs an integer"):
        cls(**{field: value})


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        # The nearest settings that each rule must let through.
        (config.HybridConfig, {"head_dim": 256, "value_dim": 256}),
        (config.HybridConfig, {"layer_pattern": "GGSGS"}),
        (config.HybridConfig, {"layer_pattern": "G", "n_heads": 7}),  # no window attention: any number of heads
        (config.HybridConfig, {"layer_pattern": "GS", "use_rope": True, "d_model": 16, "n_heads": 8}),
        (config.HybridConfig, {"key_bank_slots": 64, "head_dim": 64, "key_bank_start": 192, "vocab_size": 256}),
        (config.HybridConfig, {"key_bank_slots": 8, "key_bank_marker": 8}),
        (config.HybridConfig, {"key_context_conv": 8, "query_conv_width": 4}),
        (config.ConvConfig, {"attention_layers": (-6, 5)}),
        (config.ConvConfig, {"kernel_size": 1}),
        (config.TinyConfig, {"position": "rope", "d_model": 8}),
        (config.TinyConfig, {"pos_rank": 7, "qkv_rank": 7, "out_rank": 7, "ffn_rank": 7, "tie_qkv": "kv"}),
        (config.TinyConfig, {"fixed_residual": True, "ffn_rank": 3}),
        (config.TinyConfig, {"rope_v": 1.0, "rope_v_inverse": True, "d_model": 8}),
        (config.TrainConfig, {"weight_decay": 0.0, "warmup_steps": 0, "min_lr_ratio": 0.0, "grad_clip": 0.0}),
    ],
)
def test_the_edge_of_a_rule_is_allowed(cls, settings):
    cfg = cls(**settings)
    assert {name: getattr(cfg, name) for name in settings} == settings


@pytest.mark.parametrize("cls", CLASSES)
def test_frozen_and_validated_again_on_replace(cls):
    cfg = cls()
    field = dataclasses.fields(cls)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(cfg, field, 1)
    with pytest.raises(ValueError, match=rf"^{cls.__name__}\.{field}"):
        dataclasses.replace(cfg, **{field: 0})


# ------------------------------------------------------------------------------------------------ dictionaries


@pytest.mark.parametrize("cls", CLASSES)
def test_round_trip_through_json(cls):
    cfg = cls()
    assert cls.from_dict(cfg.to_dict()) == cfg
    assert cls.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    assert set(cfg.to_dict()) == {field.name for field in dataclasses.fields(cls)}


def test_round_trip_keeps_what_differs_from_the_defaults():
    hybrid = config.HybridConfig(layer_pattern="GGS", key_bank_slots=8, key_bank_marker=9, decay="hard", n_heads=4)
    conv = config.ConvConfig(dilations=(3, 5, 1), attention_layers=(-1,), kernel_size=13)
    for cfg in (hybrid, conv):
        again = type(cfg).from_dict(json.loads(json.dumps(cfg.to_dict())))
        assert again == cfg and again != type(cfg)()
        assert hash(again) == hash(cfg)


@pytest.mark.parametrize("cls", CLASSES)
def test_unknown_keys_are_named(cls):
    with pytest.raises(ValueError) as caught:
        cls.from_dict({**cls().to_dict(), "window": 3, "colour": 1})
    message = str(caught.value)
    assert message.startswith(f"{cls.__name__}: unknown keys ['colour', 'window']; known ones are [")
    assert dataclasses.fields(cls)[0].name in message


def test_missing_keys_take_defaults_and_values_are_validated():
    assert config.HybridConfig.from_dict({"d_model": 256}) == config.HybridConfig(d_model=256)
    with pytest.raises(ValueError, match=r"^HybridConfig\.window_size = 0"):
        config.HybridConfig.from_dict({"window_size": 0})


def test_a_missing_key_without_default_is_named():
    @dataclasses.dataclass(frozen=True)
    class Needs(config.Settings):
        length: int

    assert Needs.from_dict({"length": 3}).length == 3
    with pytest.raises(ValueError, match=r"^Needs: .*length"):
        Needs.from_dict({})


# ------------------------------------------------------------------------------------------------ the rest


@pytest.mark.parametrize("name", config.PRESETS)
def test_presets_are_valid_and_named(name):
    cfg = config.preset(name)
    assert cfg is config.PRESETS[name]
    assert type(cfg).from_dict(cfg.to_dict()) == cfg


def test_preset_defaults_remember_and_the_notes_do_not():
    assert config.half_life(config.preset("seed").g_bias) == pytest.approx(2066, abs=1)
    assert config.half_life(config.preset("notes").g_bias) == pytest.approx(5.46, abs=0.01)
    assert config.half_life(config.preset("smoke").g_bias) == pytest.approx(4096)


def test_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match="preset = 'sede': choose one of ") as caught:
        config.preset("sede")
    assert all(repr(name) in str(caught.value) for name in config.PRESETS)


def test_profile(monkeypatch):
    monkeypatch.delenv("WORKBOOK_PROFILE", raising=False)
    assert config.profile() == "smoke"
    for name in ("smoke", "full"):
        monkeypatch.setenv("WORKBOOK_PROFILE", name)
        assert config.profile() == name
        assert config.by_profile(smoke="a", full="b") == {"smoke": "a", "full": "b"}[name]
    for name in ("Full", "", "gpu"):
        monkeypatch.setenv("WORKBOOK_PROFILE", name)
        with pytest.raises(ValueError, match=f"WORKBOOK_PROFILE = '{name}': choose one of 'smoke', 'full'"):
            config.profile()


@pytest.mark.parametrize("tokens", [0.5, 1.0, 5.5, 256.0, 4096.0, 1e7])
def test_half_life_and_its_inverse(tokens):
    g_bias = config.g_bias_for(tokens)
    assert config.half_life(g_bias) == pytest.approx(tokens, rel=1e-6)
    decay = 1 / (1 + math.exp(-g_bias))
    assert decay**tokens == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("tokens", [0.0, -3.0, math.nan])
def test_half_life_must_be_positive(tokens):
    with pytest.raises(ValueError, match="half_life_tokens = .*above 0"):
        config.g_bias_for(tokens)


@pytest.mark.parametrize(("value", "multiple", "expected"), [(1, 64, 64), (64, 64, 64), (64.1, 64, 128), (0, 8, 0)])
def test_round_up(value, multiple, expected):
    assert config.round_up(value, multiple) == expected


def test_hybrid_repr_and_hidden_width():
    assert repr(config.HybridConfig()) == "HybridConfig(GS, d=512, h=8, K=64, V=128)"
    assert config.HybridConfig(d_model=512).ffn_dim == 1408  # 8/3 of 512 is 1365.3
    assert config.HybridConfig(d_model=96).ffn_dim == 256  # 8/3 of 96 is 256 exactly


def test_half_life_at_its_ends():
    assert config.half_life(1000.0) == math.inf
    assert config.half_life(-1000.0) == pytest.approx(math.log(2) / 1000)
