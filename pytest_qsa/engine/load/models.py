"""Loading: a checkpoint → a model, by transformers, with its tokenizer."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

import psutil
import torch
from torch import nn

from ...captures import ModelProvenance
from ...checkpoint import OF_A_LOAD, Folder, check_side_files, format_of, no_folder, open_folder
from ...common import AnomalyError, InfraError, QsaError, Scratch, UnloadableFormatError, one_line
from ...suite import Memory, Model, cached_snapshot
from ..modules import device_of, uncompiled
from ..stream.stream import Stream, check_format, skipping_packed, stream_of
from ..threads import threads_text, use_free_cores
from .adapters import WITHOUT, ModelSource, adapter_text, add_adapter, check_adapter, source_of
from .classes import class_of, fetching_kernels
from .completeness import check_complete, check_declaration, declares_quantization
from .load_errors import loading_errors
from .tokenizer import TextTokenizer, load_tokenizer

Result = TypeVar("Result")

FIT_FACTOR = 1.2
"""A model fits if its weights times this do; the rest is for activations."""
NOISY = ("torchao", "torch.utils._pytree", "huggingface_hub")
"""Loggers that warn of what is no news here.

Of the machine and of each other when torchao is imported, kernels for other GPUs, enums; and of each try of a download,
whose last error is ours to say.
"""
RETRY_PAUSE = 2.0
"""Seconds before the second try of a download."""
BROKEN = ("ConnectError", "ConnectTimeout", "ReadError", "ReadTimeout", "RemoteProtocolError", "WriteTimeout")
"""Errors of the hub's HTTP client, by name: which client it is changes with the hub's library."""
BUSY_STATUS = (429, 500, 502, 503, 504)


@dataclass(eq=False)
class Loaded:
    """A loaded subject: the model, its tokenizer if it has one, and what it needs where it is not all in memory.

    `stream`: reads the weights while the model runs. `scratch`: the folder of its offloaded part. `tokenizer_error`:
    why there is no tokenizer, where it has one that can't be loaded; only data that need a tokenizer raise it.
    """

    model: nn.Module
    tokenizer: TextTokenizer | None
    scratch: Scratch | None = None
    stream: Stream | None = None
    tokenizer_error: QsaError | None = None

    def required_tokenizer(self, name: str) -> TextTokenizer:
        """Return the tokenizer. `name`: what the text of an error calls the subject.

        Raises:
            AnomalyError: there is none, or its files are to blame that it can't be loaded.
            InfraError: the installation is.
        """
        if self.tokenizer is None:
            raise self.tokenizer_error or AnomalyError(
                f"{name} has no tokenizer to make token batches with; save one beside the weights, or give batches in "
                "a fixture qsa_batches"
            )
        return self.tokenizer

    def close(self) -> None:
        """Remove what was offloaded to disk."""
        if self.scratch is not None:
            self.scratch.cleanup()


def load_model(spec: Model, path: str, memory: Memory, *, allow_code: bool, base: str = "") -> Loaded:
    """Load a subject. `path`, `base`: the folders or hub ids that those of the suite stand for.

    Raises:
        AnomalyError: its files are damaged, or their tensors aren't those of the model.
        InfraError: it can't be loaded, or runs code that nobody allowed.
    """
    check_allowed(spec, path, memory, allow_code=allow_code)
    if spec.engine.name != "transformers":
        raise InfraError(
            f"this loads a model by transformers, and the suite says model.engine: {spec.engine.name}: leave that out"
        )
    use_free_cores()
    if spec.factory is not None:
        return _from_factory(spec.factory)
    with quiet(), loading_errors(spec, path):
        source = once_more(lambda: source_of(path, spec.revision, base))
    spec = spec.model_copy(update={"revision": source.revision})
    with quiet(), loading_errors(spec, source.path):
        loaded = once_more(lambda: _from_checkpoint(spec, source, memory, allow_code))
    if spec.submodule:
        try:
            loaded.model = submodule_of(loaded.model, spec.submodule)
        except InfraError:
            # Else the folder of offloaded weights would stay as long as the error lives.
            loaded.close()
            raise
    return loaded


def check_allowed(spec: Model, path: str, memory: Memory, *, allow_code: bool) -> None:
    """Check what can be known before a file is read: that there is a model to load, and that it may be.

    Raises:
        InfraError: it is a served one, its folder or its device isn't there, or it runs code that nobody allowed.
    """
    if spec.logprobs_only:
        raise InfraError(
            "a served model can't be loaded, for only its answers are known: give the checkpoint, model.path"
        )
    if spec.factory is not None:
        if not allow_code:
            raise InfraError(
                f"model.factory '{spec.factory}' runs code that the suite names: allow it with --qsa-allow-code"
            )
        return
    if not allow_code:
        check_code(spec)
    check_path(path, spec.revision)
    device_for(memory)


def check_folder(spec: Model, path: str) -> None:
    """Check the files of a checkpoint's folder as far as their headers and its settings say it.

    Raises:
        AnomalyError: one is damaged or missing.
        InfraError: one can't be read.
    """
    if Path(path).is_dir() and not spec.gguf_file:
        folder = Folder(Path(path))
        folder.check_files()
        check_side_files(folder, OF_A_LOAD)


def check_loader(spec: Model, path: str) -> None:
    """Check that the format of a checkpoint's folder has a loader.

    Raises:
        UnloadableFormatError: transformers has none.
    """
    if Path(path).is_dir() and not (form := format_of(Folder(Path(path), spec.gguf_file))).loads:
        raise UnloadableFormatError(f"{path} can't be loaded: transformers has no loader for {form.label}")


def check_code(spec: Model, config: Any = None) -> None:
    """Refuse a model that runs code of others, by its suite or by its `config`, without --qsa-allow-code.

    Raises:
        InfraError: it does; the text names the key and the option.
    """
    if spec.trust_remote_code:
        raise InfraError("model.trust_remote_code runs code of the checkpoint's author: allow it with --qsa-allow-code")
    named, where = spec.attn_implementation or "", "model.attn_implementation"
    if "/" not in named and (parts := fetching_kernels(config)):
        named, where = parts[0]._attn_implementation, "attn_implementation in config.json"
    if "/" in named:
        raise InfraError(f"{where} '{named}' is code that is fetched from the hub: allow it with --qsa-allow-code")


def check_path(path: str, revision: str | None = None) -> None:
    """Refuse a folder that isn't there, which transformers would report as a malformed hub id.

    So is a hub id that isn't in the local cache where the hub has no address: libraries would try for minutes.

    Raises:
        InfraError: it isn't there.
    """
    if Path(path).is_dir():
        return
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).is_absolute():
        raise InfraError(no_folder(path, "it can't be a hub id"))
    if cached_snapshot(path, revision) is None and (host := _lost_hub()):
        raise InfraError(no_folder(path, f"as a hub id it can't be fetched, for {host} has no address here"))


def _lost_hub() -> str:
    """Return the hub's host where it can't be found for sure; empty where it can, or where a proxy would find it."""
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT).hostname or ""
    if constants.HF_HUB_OFFLINE or getproxies():  # offline, libraries give up at once
        return ""
    try:
        once_more(lambda: socket.getaddrinfo(host, 443))
    except OSError:
        return host
    return ""


def _from_checkpoint(spec: Model, source: ModelSource, memory: Memory, allow_code: bool) -> Loaded:
    import transformers

    path = source.path
    check_path(path, source.revision)
    check_folder(spec, path)
    common = {"revision": source.revision, "trust_remote_code": spec.trust_remote_code}
    gguf = {"gguf_file": spec.gguf_file} if spec.gguf_file else {}
    config = transformers.AutoConfig.from_pretrained(path, **common, **gguf)
    if not allow_code:
        check_code(spec, config)
    # Before the weights are read: without a loader they would be taken for floats, and hours later refused.
    check_loader(spec, path)
    declares = not spec.gguf_file and declares_quantization(path, config)
    kind = class_of(config, remote=spec.trust_remote_code, gguf=bool(spec.gguf_file))
    streamed = memory.offload_device == "disk"
    if source.adapter is not None:
        check_adapter(source, spec.gguf_file)
    if streamed:
        check_format(path, config, gguf=bool(spec.gguf_file))
        kind = skipping_packed(kind)
    # With all weights on disk accelerate leaves an index of them, by which they are streamed.
    placement = {"device_map": {"": "disk"}} if streamed else _placement(path, memory)
    if placement and source.adapter is not None:  # peft's layers would have no weights
        why = "memory.offload_device is disk" if streamed else "its base does not fit into memory"
        raise InfraError(f"{source.adapter}: an offloaded model takes no adapter, and {why}: merge it into the base")
    scratch = Scratch("qsa-offload") if placement else None
    offload = {"offload_folder": scratch.name} if scratch else {}
    arguments = {"dtype": spec.dtype, "attn_implementation": spec.attn_implementation, **placement, **offload}
    arguments |= WITHOUT if source.adapter is not None else {}
    with contextlib.ExitStack() as cleaning:
        if scratch is not None:
            cleaning.callback(scratch.cleanup)
        # Mismatched sizes are let through, so that `check_complete` can say whose fault they are.
        model, info = kind.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, **common, **gguf, **arguments
        )
        if not Path(path).is_dir() and not spec.gguf_file:  # by now what was fetched lies in the local cache
            check_side_files(open_folder(path, source.revision), OF_A_LOAD)
        check_complete(spec, path, type(model).__name__, info)
        check_declaration(spec, path, declares=declares)
        # accelerate has placed a model with a device map already, and refuses to move one.
        if "device_map" not in placement:
            model.to(device_for(memory))
        if source.adapter is not None:
            add_adapter(model, source.adapter)
        model.eval()
        stream = stream_of(model, device_for(memory)) if streamed else None
        cleaning.pop_all()  # from here on Loaded.close cleans up
    try:
        return Loaded(model, once_more(lambda: _tokenizer_of(source, common, gguf)), scratch, stream)
    except QsaError as error:
        return Loaded(model, None, scratch, stream, error)


def _tokenizer_of(source: ModelSource, common: dict[str, Any], gguf: dict[str, Any]) -> Any:
    """Return the tokenizer that an adapter was saved with, which may have tokens of its own; else the base's."""
    own = load_tokenizer(str(source.adapter), {**common, "revision": None}) if source.adapter is not None else None
    return own if own is not None else load_tokenizer(source.path, common | gguf)


def device_for(memory: Memory) -> torch.device:
    """Return the device that `memory.device` names; `auto` is CUDA where there is one."""
    if memory.device != "auto":
        return _existing(torch.device(memory.device))
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _existing(device: torch.device) -> torch.device:
    if device.type != "cpu":
        backend = getattr(torch, device.type)
        count = backend.device_count() if backend.is_available() else 0
        if (device.index or 0) >= count:
            raise InfraError(f"memory.device {device}: torch sees no such device here; write auto or cpu")
    return device


def _placement(path: str, memory: Memory) -> dict[str, Any]:
    """Return the `device_map` of a model that doesn't fit on its device; empty for one that fits."""
    folder = Path(path)
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0
    device = device_for(memory)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if not memory.auto_offload or weights * FIT_FACTOR < free:
        return {}
    rest = int(psutil.virtual_memory().available / FIT_FACTOR)
    limits = {"cpu": rest} if device.type == "cpu" else {device.index or 0: int(free / FIT_FACTOR), "cpu": rest}
    return {"device_map": "auto", "max_memory": limits}


def _from_factory(name: str) -> Loaded:
    module, _, attribute = name.partition(":")
    try:
        made = getattr(importlib.import_module(module), attribute)()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a user's code may raise anything, end the program, or skip the test
        raise InfraError(f"model.factory '{name}' failed: {type(error).__name__}: {one_line(error)}") from error
    model, tokenizer = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise InfraError(
            f"model.factory '{name}' returned {type(model).__name__}, not a torch.nn.Module or a pair with a tokenizer"
        )
    return Loaded(uncompiled(model).eval(), tokenizer)


def loaded_from_fixture(model: object, tokenizer: TextTokenizer | None, fixture: str = "qsa_model") -> Loaded:
    """Take what a fixture returned: a module, or a pair of a module and a tokenizer; one that is compiled, as it was.

    Raises:
        InfraError: it is something else; or as `uncompiled`.
    """
    if isinstance(model, tuple) and len(model) == 2:
        model, tokenizer = model
    if not isinstance(model, nn.Module):
        raise InfraError(f"the fixture {fixture} returned {type(model).__name__}, not a torch.nn.Module")
    return Loaded(uncompiled(model), tokenizer)


def submodule_of(model: nn.Module, name: str) -> nn.Module:
    """Return the part of a model that the suite names.

    Raises:
        InfraError: there is none of that name.
    """
    try:
        return model.get_submodule(name)
    except AttributeError:
        children = ", ".join(child for child, _ in model.named_children())
        raise InfraError(
            f"model.submodule '{name}' does not exist in {type(model).__name__}; it has {children}"
        ) from None


def provenance_of(model: nn.Module, path: str = "") -> ModelProvenance:
    """Return what is known of a loaded model: class, dtype, device, attention implementation, versions of libraries."""
    import transformers

    device = device_of(model)
    config = getattr(model, "config", None)
    dtype = next((str(p.dtype) for p in model.parameters() if p.is_floating_point()), "none")
    return ModelProvenance(
        path,
        class_name=type(model).__name__,
        dtype=dtype.removeprefix("torch."),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        device_class=device_class(device),
        attention=str(getattr(config, "_attn_implementation", None) or "none"),
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        adapter=adapter_text(model),
        threads=threads_text() if device.type == "cpu" else None,
    )


def device_class(device: torch.device) -> str:
    """Return what decides which kernels run: `cpu`, `mps`, `xpu`, a CUDA architecture `sm_90`, a ROCm one `gfx942`."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    architecture = str(getattr(properties, "gcnArchName", "")).partition(":")[0] if torch.version.hip else ""
    return architecture or f"sm_{properties.major}{properties.minor}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars, warnings and questions of the loading libraries from the terminal; exceptions still come."""
    from transformers.utils import logging as transformers_logging

    stdin = sys.stdin
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), _errors_only(NOISY):
            sys.stdin = io.StringIO()  # where a library asks whether it may run a checkpoint's code, nobody answers
            yield
    finally:
        sys.stdin = stdin
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _errors_only(names: tuple[str, ...]) -> Iterator[None]:
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def once_more(attempt: Callable[[], Result], *, pause: float = RETRY_PAUSE) -> Result:
    """Return what the attempt returns; after an error of the network, what a second attempt returns.

    Raises:
        Exception: whatever the last attempt raised.
    """
    try:
        return attempt()
    except Exception as error:
        if not is_transient(error):
            raise
    time.sleep(pause)
    return attempt()


def is_transient(error: BaseException) -> bool:
    """Say whether the network broke or the server was busy, so that another try may succeed."""
    chain = list(_causes(error))
    # It is a ConnectionError, but offline a second try fails as well.
    if any(type(cause).__name__ == "OfflineModeIsEnabled" for cause in chain):
        return False
    return any(
        isinstance(cause, (ConnectionError, TimeoutError))
        or (isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_AGAIN)
        or type(cause).__name__ in BROKEN
        or getattr(getattr(cause, "response", None), "status_code", None) in BUSY_STATUS
        for cause in chain
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    # A chain of causes may lead back to itself.
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
