"""Where memory goes: KV pages of one sequence and of a busy engine, and what the processes hold.

    python benchmarks/memory.py --out FILE               # pages: arithmetic of the real engine, no weights
    python benchmarks/memory.py --processes --out FILE   # starts `cabochon serve` and asks the kernel

sequence: one request of each length through the engine's scheduler and page tables, tokens made up; its pages
at the last step, beside tables of full length in every layer group. busy: as many ShareGPT-like requests at
once as --seqs, one after the other in each row; `unused_share` is the share of used pages' slots in which no
visible token lies (last pages and pages that have not left the window yet), over all steps after the first
ends. processes: resident (RSS) and proportional (PSS) memory once ready, and after requests.
"""

import argparse
import socket
import statistics
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import startup
from gpu.random_weights import configuration, directory
from load.workloads import sharegpt_lengths
from machine import emit, environment

from cabochon.engine.kv_cache import KVCache
from cabochon.engine.kv_layout import KVLayout, kv_layout
from cabochon.engine.messages import GenerateRequest
from cabochon.engine.models.config import ModelConfig
from cabochon.engine.models.hf_config import load_model_config
from cabochon.engine.models.source import locate
from cabochon.engine.page_pool import PagePool
from cabochon.engine.rows import Rows
from cabochon.engine.sampling_params import SamplingParams
from cabochon.engine.scheduler import Scheduler

Row = dict[str, object]
MODELS = ("demo", "2b", "9b", "27b")
ROLES = {"cabochon.engine.process": "engine", "cabochon.engine.grammar_process": "grammars"}
BF16 = 2
TOKEN = 7  # what every sample gives


class Pages:
    """The engine's books without a model: scheduler, rows, page tables, pool."""

    def __init__(self, model: ModelConfig, layout: KVLayout, seqs: int, max_len: int) -> None:
        self.layout = layout
        self.rows = Rows(
            max_seqs=seqs, max_model_len=max_len, num_groups=layout.num_groups, page_tokens=layout.page_tokens
        )
        self.pool = PagePool(seqs * layout.num_groups * -(-max_len // layout.page_tokens + 1))
        cache = KVCache(self.rows, self.pool, None, layout.windows)
        self.scheduler = Scheduler(
            self.rows, cache, step_tokens=max(512, seqs), eos_token_ids=[1], max_model_len=max_len,
            vocab_size=model.vocab_size,
        )  # fmt: skip
        self._count = 0

    def add(self, prompt_tokens: int, output_tokens: int) -> None:
        """A request that ends after exactly output_tokens."""
        self._count += 1
        params = SamplingParams(max_tokens=output_tokens, temperature=0, ignore_eos=True)
        self.scheduler.add(
            GenerateRequest(request_id=f"{self._count}", prompt_ids=[TOKEN] * prompt_tokens, params=params)
        )

    def step(self) -> tuple[int, int, int]:
        """One step. Returns used pages, visible tokens summed over layer groups, and requests that ended."""
        plan = self.scheduler.schedule()
        assert plan is not None, "nothing to do: add requests first"
        used, lens = self.pool.num_used, self.rows.num_computed.copy()  # 0 in free rows
        lens[plan.rows] = plan.starts + plan.lens
        visible = sum(
            int((lens if window is None else np.minimum(lens, window)).sum())
            for window in self.layout.windows
        )
        outputs = self.scheduler.update(plan, np.full(int(plan.samples.sum()), TOKEN, np.int32))
        return used, visible, sum(output.finish_reason is not None for output in outputs)


def model_of(name: str) -> ModelConfig:
    """demo, or a size of Gemma 2: its configuration alone."""
    if name == "demo":
        return load_model_config(locate("demo"))
    with directory(configuration(name)) as folder:
        return load_model_config(folder)


def sequence(name: str, page_tokens: int, lengths: list[int]) -> Iterator[Row]:
    """A request of each length that decodes its last 32 tokens."""
    model = model_of(name)
    layout = kv_layout(model, page_tokens, BF16)
    for length in lengths:
        pages = Pages(model, layout, 1, length + 1)
        pages.add(length - 32, 33)
        used = 0
        while pages.rows.num_free == 0 or not used:
            used = pages.step()[0] or used
        full = layout.num_groups * -(-length // page_tokens)
        yield {
            "case": "sequence", "model": name, "tokens": length, "page_tokens": page_tokens,
            "windows": list(layout.windows), "kv_bytes": used * layout.page_bytes,
            "kv_bytes_full_tables": full * layout.page_bytes, "saved_share": round(1 - used / full, 4),
        }  # fmt: skip


def busy(name: str, page_tokens: int, seqs: int, requests: int) -> Row:
    """ShareGPT-like requests, `seqs` at once, until `requests` have ended."""
    model = model_of(name)
    layout = kv_layout(model, page_tokens, BF16)
    pages = Pages(model, layout, seqs, 4096 + 1)
    rng = np.random.default_rng(0)
    for _ in range(requests + seqs):
        pages.add(*sharegpt_lengths(rng))
    ended, unused, kv_bytes = 0, [], []
    while ended < requests:
        used, visible, done = pages.step()
        if ended >= seqs:  # all rows have been through a request
            unused.append(1 - visible / (used * page_tokens))
            kv_bytes.append(used * layout.page_bytes)
        ended += done
    return {
        "case": "busy", "model": name, "seqs": seqs, "requests": requests, "page_tokens": page_tokens,
        "kv_bytes_mean": round(statistics.fmean(kv_bytes)), "kv_bytes_max": max(kv_bytes),
        "unused_share_mean": round(statistics.fmean(unused), 4), "unused_share_max": round(max(unused), 4),
    }  # fmt: skip


def processes(args: argparse.Namespace) -> Iterator[Row]:
    """Of a server with its default options, by what each process is for."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server, _ = startup.start(argparse.Namespace(model=args.model, port=port))
    try:
        yield from _held("ready", server.pid, args.model)
        body = {
            "prompt": [1000 + index for index in range(128)],
            "max_tokens": 64,
            "ignore_eos": True,
            "n": 8,
        }
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=600)
        answer.raise_for_status()
        yield from _held("after 8 × (128, 64)", server.pid, args.model)
    finally:
        server.terminate()
        server.wait(60)


def _held(when: str, pid: int, model: str) -> Iterator[Row]:
    found = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for process in found:
        words = " ".join(process.cmdline())
        role = next((role for module, role in ROLES.items() if module in words), "server")
        memory = process.memory_full_info()
        yield {
            "case": "processes", "when": when, "model": model, "process": role,
            "rss_mib": memory.rss >> 20, "pss_mib": memory.pss >> 20,
        }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    about: Row = {"benchmark": "memory", **environment()}
    if args.processes:
        for row in processes(args):
            emit({**row, **about}, args.out)
        return
    for name in args.models:
        for row in sequence(name, args.page_tokens, args.lengths):
            emit({**row, **about}, args.out)
        emit({**busy(name, args.page_tokens, args.seqs, args.requests), **about}, args.out)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS), help="Gemma 2 by size, or demo"
    )
    p.add_argument("--page-tokens", type=int, default=16)
    p.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 6144, 8192])
    p.add_argument("--seqs", type=int, default=32, help="busy: requests at once")
    p.add_argument("--requests", type=int, default=128, help="busy: that end")
    p.add_argument("--processes", action="store_true", help="the processes of a server, nothing else")
    p.add_argument("--model", default="demo", help="with --processes: demo, a directory or a Hub id")
    p.add_argument("--out", type=Path)
    return p.parse_args(argv)


if __name__ == "__main__":
    main()
