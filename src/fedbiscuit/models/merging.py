"""A base model with an adapter computed into its weights: a plain model folder that needs no PEFT to load."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import peft
import torch
import transformers

from fedbiscuit.config import ModelSettings
from fedbiscuit.models.base import check_quantize, digest_of, load_plain, resolve_model
from fedbiscuit.rundir import read_adapter
from fedbiscuit.types import EnvironmentFault

__all__ = ["write_merged"]


def write_merged(settings: ModelSettings, adapter: Path, folder: Path) -> None:
    """Write model (safetensors) and tokenizer of a base with a PEFT folder merged in, into a temporary ``folder``.

    The sum is taken in float32 and saved in the type in which the base is saved. Of a base in 4 bits (``quantize``) the sum
    is with what its 4 bits stand for: the weights that the adapter was trained on and measured with, not the original ones.
    ``IntegrityError`` where the adapter was trained on another base, or changed after it was written.
    """
    check_quantize(settings)
    source, digest = resolve_model(settings.base)
    read_adapter(adapter, base=digest_of(digest, settings.quantize))
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer, model = load_plain(settings.base, source, torch.float32, quantize=settings.quantize)
    if settings.quantize != "none":
        model = model.dequantize(torch.float32)
    saved_as = getattr(transformers.AutoConfig.from_pretrained(source), "dtype", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of peft about transformers' names
        merged = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    if isinstance(saved_as, torch.dtype):
        merged = merged.to(saved_as)
    try:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for path in folder.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    except OSError:
        raise
    except Exception as error:  # safetensors has an error class of its own for a full disk
        raise EnvironmentFault(f"{folder}: the merged model could not be written: {error}; make room") from error
