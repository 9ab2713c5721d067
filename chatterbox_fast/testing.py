"""Random models of every Chatterbox class, for people and machines without the weights.

    model = random_model("english", "tiny", stop_after=20)
    model.generate("Hello.", audio_prompt_path=VOICE_PROMPT)

The audio is noise, but every module, shape and operation is stock's. Needs chatterbox-tts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .assets import VOICE_PROMPT
from .watermark import require_perth

__all__ = ["VOICE_PROMPT", "random_model", "random_s3gen", "random_t3", "write_tokenizer"]

Kind = Literal["english", "multilingual", "turbo", "nano", "vc"]
Size = Literal["full", "reduced", "tiny"]

KINDS: tuple[Kind, ...] = ("english", "multilingual", "turbo", "nano", "vc")
_GPT_CONFIG = {"turbo": "GPT2_medium", "nano": "GPT2_small"}
_LANGUAGES = ("ar", "da", "de", "el", "en", "es", "fi", "fr", "hi", "it", "ja", "pl", "pt", "zh")


@dataclass(frozen=True)
class Depth:
    """How much of each stack of layers is kept; widths stay, so shapes are stock's."""

    t3_layers: int
    t3_intermediate: int
    estimator_blocks: int
    estimator_transformers: int
    encoder_layers: int
    tokenizer_layers: int


SIZES: dict[Size, Depth] = {
    "full": Depth(30, 4096, 12, 4, 6, 6),
    "reduced": Depth(4, 4096, 2, 2, 2, 2),
    "tiny": Depth(2, 512, 1, 1, 1, 1),
}


def random_model(
    kind: Kind = "english",
    size: Size = "full",
    *,
    seed: int = 0,
    device: str = "cpu",
    stop_after: int | None = None,
) -> Any:
    """A stock Chatterbox object with random weights.

    Args:
        kind: ``"english"``, ``"multilingual"``, ``"turbo"``, ``"nano"`` or ``"vc"``.
        size: ``"full"`` is the real architecture (about 4 GB in float32); ``"reduced"`` and
            ``"tiny"`` keep its shapes but fewer layers.
        seed: of the weights. Torch's global generators are left as they were.
        device: as stock takes it.
        stop_after: the model stops by itself after this many speech tokens; None hardly ever
            stops before stock's limit of 1000. See `random_t3`.

    Raises:
        ValueError: an unknown kind or size, or Nano with a release that does not have it.
        RuntimeError: Perth did not load.
    """
    _require_choice("kind", kind, KINDS)
    _require_choice("size", size, tuple(SIZES))
    require_perth()
    s3gen = random_s3gen(size, meanflow=kind in _GPT_CONFIG, seed=seed).to(device).eval()
    if kind == "vc":
        return import_module("chatterbox.vc").ChatterboxVC(s3gen, device)
    t3 = random_t3(kind, size, seed=seed, stop_after=stop_after).to(device).eval()
    with _seeded(seed):
        encoder = import_module("chatterbox.models.voice_encoder").VoiceEncoder()
    encoder = encoder.to(device).eval()
    module, name = {
        "english": ("tts", "ChatterboxTTS"),
        "multilingual": ("mtl_tts", "ChatterboxMultilingualTTS"),
    }.get(kind, ("tts_turbo", "ChatterboxTurboTTS"))
    stock_class = getattr(import_module(f"chatterbox.{module}"), name)
    return stock_class(t3, s3gen, encoder, _tokenizer(kind), device)


def random_t3(
    kind: Kind = "english",
    size: Size = "full",
    *,
    seed: int = 0,
    stop_after: int | None = None,
) -> Any:
    """A stock T3 with random weights, on the CPU.

    Its draws are neither certain nor all alike (an entropy of 2 to 4.5 nats at the default
    parameters, 1.4 at full size), and it draws no special token but the stop token.

    Args:
        stop_after: English and HEAD's Multilingual draw exactly this many tokens and then the
            stop token. Turbo and Nano count positions, so they stop near it; the alignment
            analysis of the wheel's Multilingual may stop it earlier or forbid it to stop.
    """
    if stop_after is not None and stop_after < 1:
        raise ValueError(f"chatterbox_fast.testing: stop_after must be >= 1, got {stop_after}")
    stock = import_module("chatterbox.models.t3.t3")
    config_class = import_module("chatterbox.models.t3.modules.t3_config").T3Config
    configs = import_module("chatterbox.models.t3.llama_configs").LLAMA_CONFIGS
    depth = SIZES[size]
    if kind in _GPT_CONFIG:
        hp = config_class(text_tokens_dict_size=50276)
        hp.llama_config_name = _GPT_CONFIG[kind]
        hp.speech_tokens_dict_size = 6563
        hp.input_pos_emb = None
        hp.speech_cond_prompt_len = 375
        hp.use_perceiver_resampler = False
        hp.emotion_adv = False
        if hp.llama_config_name not in configs:
            raise ValueError(f"this release of chatterbox-tts has no {kind} model")
        stock_layers = configs[hp.llama_config_name]["n_layer"]
        change = {"n_layer": min(depth.t3_layers, stock_layers)}
    else:
        multilingual = kind == "multilingual"
        hp = config_class.multilingual() if multilingual else config_class.english_only()
        # The multilingual analysis reads layers 9, 12 and 13.
        layers = max(depth.t3_layers, 14) if multilingual else depth.t3_layers
        change = {"num_hidden_layers": layers, "intermediate_size": depth.t3_intermediate}
    with _seeded(seed), _changed(configs, hp.llama_config_name, change):
        t3 = stock.T3(hp)
        if t3.is_gpt:
            del t3.tfmr.wte  # as stock's loader does
            _steer_gpt(t3, stop_after)
        else:
            _steer_llama(t3, stop_after)
    return t3.eval()


def random_s3gen(size: Size = "full", *, meanflow: bool = False, seed: int = 0) -> Any:
    """A stock S3Gen with random weights, on the CPU; `meanflow` as Turbo and Nano have it."""
    depth = SIZES[size]
    with _seeded(seed):
        s3gen = import_module("chatterbox.models.s3gen").S3Gen(meanflow=meanflow)
    estimator, encoder = s3gen.flow.decoder.estimator, s3gen.flow.encoder
    estimator.mid_blocks = estimator.mid_blocks[: depth.estimator_blocks]
    for block in (*estimator.down_blocks, *estimator.mid_blocks, *estimator.up_blocks):
        block[1] = block[1][: depth.estimator_transformers]
    encoder.encoders = encoder.encoders[: depth.encoder_layers]
    encoder.up_encoders = encoder.up_encoders[: depth.encoder_layers]
    s3gen.tokenizer.encoder.blocks = s3gen.tokenizer.encoder.blocks[: depth.tokenizer_layers]
    return s3gen.eval()


def write_tokenizer(path: str | Path) -> Path:
    """Writes a character tokenizer that stock's `EnTokenizer` and `MTLTokenizer` load.

    ``[STOP]`` is 0, ``[UNK]`` 1, ``[SPACE]`` 2 and ``[START]`` 255, as in stock's vocabulary.
    """
    _character_tokenizer().save(str(path))
    return Path(path)


def _character_tokenizer() -> Any:
    tokenizers = import_module("tokenizers")
    special = ["[STOP]", "[UNK]", "[SPACE]", *(f"[{language}]" for language in _LANGUAGES)]
    symbols = [*special, *(chr(code) for code in range(33, 127))]
    symbols += [f"[unused {number}]" for number in range(len(symbols), 255)]
    vocabulary = {symbol: number for number, symbol in enumerate([*symbols, "[START]"])}
    model = tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.add_special_tokens([*special, "[START]"])
    return tokenizer


def _tokenizer(kind: Kind) -> Any:
    if kind in _GPT_CONFIG:
        fast = import_module("transformers").PreTrainedTokenizerFast
        return fast(
            tokenizer_object=_character_tokenizer(),
            unk_token="[UNK]",
            pad_token="[STOP]",
            model_max_length=2048,
        )
    stock = import_module("chatterbox.models.tokenizers.tokenizer")
    with tempfile.TemporaryDirectory() as folder:
        path = str(write_tokenizer(Path(folder) / "tokenizer.json"))
        if kind == "english":
            return stock.EnTokenizer(path)
        # Its constructor downloads a Chinese table that other languages do not need.
        tokenizer = object.__new__(stock.MTLTokenizer)
        tokenizer.tokenizer = import_module("tokenizers").Tokenizer.from_file(path)
        tokenizer.cangjie_converter = None
        return tokenizer


_LOGIT_SCALE = 8.0
"""Scale of the random head, which the entropy of its draws comes from."""
_GPT_PREFIX = 210
"""Positions before Turbo's first token: speaker, VOICE_PROMPT's tokens, a sentence, start."""


@torch.no_grad()
def _steer_llama(t3: Any, stop_after: int | None) -> None:
    """Makes the stop token depend on the speech position alone.

    Two directions of the hidden state are taken from the other logits: `go` is in the positions
    before `stop_after` and lowers every special token, `stop` is in those after and raises the
    stop token.
    """
    head, table = t3.speech_head.weight, t3.speech_pos_emb.emb.weight
    go, stop = _two_directions(head.shape[1])
    head.mul_(_LOGIT_SCALE)
    for direction in (go, stop):
        head -= (head @ direction)[:, None] * direction
    head[t3.hp.start_speech_token :] = -3.0 * go
    head[t3.hp.stop_speech_token] = 3.0 * (stop - go)
    first_stop = len(table) if stop_after is None else stop_after
    table *= 50.0  # as large as a token's embedding: a wrong position is another token
    table[:first_stop] += 32.0 * go
    table[first_stop:] += 32.0 * stop


@torch.no_grad()
def _steer_gpt(t3: Any, stop_after: int | None) -> None:
    """The same for Turbo and Nano, which have positions in the backbone and a bias in the head."""
    head, bias, table = t3.speech_head.weight, t3.speech_head.bias, t3.tfmr.wpe.weight
    _, stop = _two_directions(head.shape[1])
    head.mul_(_LOGIT_SCALE)
    head -= (head @ stop)[:, None] * stop
    head[t3.hp.start_speech_token :] = 0.0
    bias[t3.hp.start_speech_token] = -1e4
    head[t3.hp.stop_speech_token] = 6.0 * stop
    bias[t3.hp.stop_speech_token] = -50.0
    first_stop = len(table) if stop_after is None else _GPT_PREFIX + stop_after
    table[first_stop:] += 64.0 * stop


def _two_directions(dim: int) -> tuple[Tensor, Tensor]:
    """Two orthogonal unit vectors ``(dim,)``."""
    basis = torch.linalg.qr(torch.randn(dim, 2)).Q
    return basis[:, 0].contiguous(), basis[:, 1].contiguous()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def _changed(configs: dict[str, Any], name: str, change: dict[str, int]) -> Iterator[None]:
    """Stock reads its configuration from a table of dictionaries; ours stands there meanwhile."""
    stock = configs[name]
    configs[name] = {**stock, **change}
    try:
        yield
    finally:
        configs[name] = stock


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(
            f"chatterbox_fast.testing: {name} must be one of {', '.join(choices)}, got {value!r}"
        )
