"""`cabochon adapters [PATH ...]`: which adapters this model can serve, what each is and what it costs.

    python -m cabochon.engine.adapters.show ENGINE_CONFIG_AS_JSON [PATH ...]

Without a path, those of lora_modules and merge_lora, and every one below lora_dir. They are read as a server
reads them. A process of its own, because that needs torch, which the server never loads.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from cabochon.engine.adapters.adapter import Adapter, slot_bytes
from cabochon.engine.adapters.peft_config import FILE, PeftConfig, read_config
from cabochon.engine.adapters.peft_format import read_adapter
from cabochon.engine.config import EngineConfig, split_module
from cabochon.engine.errors import BadAdapter, ConfigError, EngineError
from cabochon.engine.load import DTYPES
from cabochon.engine.models.hf_config import load_model_config
from cabochon.engine.models.source import DEMO, locate
from cabochon.engine.settle import settle_device, settle_dtype

MB = 1e6


class Found(NamedTuple):
    """An adapter to check. path: its directory."""

    name: str
    path: Path


def find_adapters(config: EngineConfig, paths: Sequence[str]) -> list[Found]:
    """The given directories; without one, those of the options. Raises ConfigError if there are none."""
    if paths:
        return [Found(Path(path).resolve().name, Path(path)) for path in paths]
    modules = [split_module("lora_modules", module) for module in config.lora_modules]
    if config.merge_lora is not None:
        modules.append(split_module("merge_lora", config.merge_lora))
    found = [Found(name, Path(path)) for name, path in modules]
    if config.lora_dir is not None:
        root = Path(config.lora_dir)
        found += [Found(str(file.parent.relative_to(root)), file.parent) for file in sorted(root.rglob(FILE))]
    if not modules and config.lora_dir is None:
        raise ConfigError(
            "adapters must be named by paths, lora_modules, merge_lora or lora_dir, got none of them:"
            " cabochon adapters DIRECTORY"
        )
    return found


def show(config: EngineConfig, paths: Sequence[str]) -> bool:
    """Write what there is to know of each to stdout. Returns whether all can be served.

    Raises ConfigError or ModelError.
    """
    adapters = find_adapters(config, paths)
    model = load_model_config(_model_dir(config))
    dtype_name = settle_dtype(config, settle_device(config))
    dtype = DTYPES[dtype_name]
    a_slot = slot_bytes(model, config.max_lora_rank, dtype.itemsize)
    print(
        f"model {config.model} ({model.architecture}, {dtype_name})\n"
        f"slots {config.max_loras} of rank {config.max_lora_rank}, on a GPU {a_slot / MB:.1f} MB each,"
        f" {config.max_loras * a_slot / MB:.1f} MB together"
    )
    num_fine = num_bytes = 0
    for name, path in adapters:
        try:
            adapter = read_adapter(path, model, dtype, max_rank=config.max_lora_rank)
            about = read_config(path)
        except BadAdapter as error:
            print(f"\n{name}: REFUSED\n  {error}", flush=True)
            continue
        num_fine += 1
        num_bytes += adapter.num_bytes
        print("\n".join((f"\n{name}: OK", *_lines(adapter, about, config.model))), flush=True)
    print(f"\n{num_fine} of {len(adapters)} can be served, {num_bytes / MB:.1f} MB in host memory")
    return num_fine == len(adapters)


def _model_dir(config: EngineConfig) -> Path:
    """Raises ModelError. A directory may lack the weights: nobody looks at them."""
    directory = Path(config.model)
    if config.model != DEMO and (directory / "config.json").is_file():
        return directory
    return locate(config.model, revision=config.revision, cache_dir=config.cache_dir)


def _lines(adapter: Adapter, about: PeftConfig, model: str) -> Iterator[str]:
    scale, root = about.scale(about.alpha, about.rank), "√" if about.use_rslora else ""
    has_patterns = about.rank_pattern or about.alpha_pattern
    others = ", others by rank_pattern and alpha_pattern" if has_patterns else ""
    yield f"  rank        {adapter.rank}"
    yield f"  scaling     {scale:.4g} = {about.alpha:g} / {root}{about.rank}{others}"
    yield f"  modules     {about.target_modules}"
    if about.base_model is None:
        yield "  base model  not named"
    else:
        is_same = Path(about.base_model).name == Path(model).name
        yield f"  base model  {about.base_model} ({'' if is_same else 'not '}the name of the model served)"
    yield f"  bytes       {adapter.num_bytes / MB:.1f} MB"


def main() -> None:
    """Exit code 0 if all can be served, 1 if one is refused or the model is, 2 if the options are."""
    given, *paths = sys.argv[1:]
    options = json.loads(given)
    config = EngineConfig(**{**options, "lora_modules": tuple(options["lora_modules"])})
    try:
        sys.exit(0 if show(config, paths) else 1)
    except EngineError as error:
        print(f"cabochon: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)


if __name__ == "__main__":
    main()
