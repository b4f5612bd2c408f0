"""/metrics: vLLM's names, which endpoint pickers, dashboards and autoscalers key on. One series per gauge.

Gauges and engine counters are rendered from the engine's last snapshot; nothing here asks the engine.
"""

import time
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cabochon.engine.engine import Engine
from cabochon.engine.messages import EngineInfo, EngineStats, GenerateRequest, RequestOutput
from cabochon.server.histogram import Histogram
from cabochon.server.recent import Recent

disable_created_metrics()  # type: ignore[no-untyped-call]  # prometheus_client's

# Bounds in seconds and tokens as vLLM's (v1/metrics/loggers.py), so that dashboards line up.
FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
                 80, 160, 640, 2560)  # fmt: skip
TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
FINISHED = ("stop", "length", "abort", "error")


class Metrics:
    """A registry of its own, so that two apps in a process do not meet."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        engine.on_step(lambda step: self.observe_step(step.stats))
        self.registry = CollectorRegistry()
        self.recent = Recent()
        self._model = model_name
        self._histograms: list[Histogram] = []
        self.registry.register(_Snapshot(engine, model_name))
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "arrival to first token", FIRST_TOKEN_S
        )
        self._inter_token = self._histogram("inter_token_latency_seconds", "time between tokens", TOKEN_S)
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds", "mean time per token after the first", TOKEN_S
        )
        self._whole = self._histogram("e2e_request_latency_seconds", "arrival to last token", REQUEST_S)
        self._queue = self._histogram("request_queue_time_seconds", "arrival to first scheduled", REQUEST_S)
        self._prefill = self._histogram("request_prefill_time_seconds", "scheduled to first token", REQUEST_S)
        self._decode = self._histogram("request_decode_time_seconds", "first to last token", REQUEST_S)
        self._inference = self._histogram(
            "request_inference_time_seconds", "scheduled to last token", REQUEST_S
        )
        self._step = self._histogram("iteration_tokens_total", "tokens of a step", STEP_TOKENS)
        self._success = Counter(
            "vllm:request_success",
            "Requests ended, by reason",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        for reason in FINISHED:
            self._success.labels(model_name, reason)

    def render(self) -> bytes:
        """Prometheus text format 0.0.4."""
        histograms = "".join([histogram.render() for histogram in self._histograms])
        return generate_latest(self.registry) + histograms.encode()

    def observe_step(self, stats: EngineStats) -> None:
        """After every step of the engine."""
        if stats.step_tokens:
            self._step.observe(stats.step_tokens)

    def observe_output(
        self, output: RequestOutput, request: GenerateRequest, last_token_s: float, now: float
    ) -> None:
        """For every output with tokens. last_token_s is 0 before the first."""
        if not output.token_ids:
            return
        if last_token_s == 0:
            self._first_token.observe(now - request.arrival_s)
            self.recent.first_token(now - request.arrival_s, len(request.prompt_ids), output.cached_tokens)
            self._queue.observe(max(0.0, output.scheduled_s - request.arrival_s))
            self._prefill.observe(max(0.0, output.first_token_s - output.scheduled_s))
        else:
            self._inter_token.observe((now - last_token_s) / len(output.token_ids))

    def observe_end(
        self, request: GenerateRequest, output: RequestOutput, num_tokens: int, reason: str, now: float
    ) -> None:
        """When a request finished by itself or by a stop string."""
        self.count_end(reason)
        decode_s = max(0.0, now - output.first_token_s)
        self._whole.observe(now - request.arrival_s)
        self._decode.observe(decode_s)
        self._inference.observe(max(0.0, now - output.scheduled_s))
        if num_tokens > 1:
            self._per_token.observe(decode_s / (num_tokens - 1))

    def count_end(self, reason: str) -> None:
        """reason: stop, length, abort or error."""
        self._success.labels(self._model, reason).inc()

    def _histogram(self, name: str, text: str, bounds: Sequence[float]) -> Histogram:
        histogram = Histogram(f"vllm:{name}", text, bounds, self._model)
        self._histograms.append(histogram)
        return histogram


class _Snapshot(Collector):
    """The engine's last stats as families, made anew at each scrape."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        self._engine = engine
        self._labels = [model_name]

    def collect(self) -> Iterator[Metric]:
        stats, info = self._engine.stats(), self._engine.info
        for name, text, value in (
            ("num_requests_running", "Requests in the running batch", stats.running),
            ("num_requests_waiting", "Requests waiting for a row or pages", stats.waiting),
            (
                "kv_cache_usage_perc",
                "Pages referenced by live requests over all pages, 0 to 1",
                stats.kv_usage,
            ),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            gauge.add_metric(self._labels, value)
            yield gauge
        for name, text, value in (
            ("prompt_tokens", "Prompt tokens computed or found in the cache", stats.prompt_tokens),
            ("generation_tokens", "Tokens sampled", stats.generation_tokens),
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache", stats.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache", stats.prefix_hits),
            ("num_preemptions", "Requests preempted", stats.preemptions),
        ):
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            counter.add_metric(self._labels, value)
            yield counter
        labels = {
            "block_size": str(info.page_tokens),
            "num_gpu_blocks": str(info.num_pages // info.num_groups),  # times block_size is tokens
            "cache_dtype": info.dtype,
            "model_name": self._labels[0],
        }
        config = GaugeMetricFamily("vllm:cache_config_info", "Shape of the KV cache", labels=list(labels))
        config.add_metric(list(labels.values()), 1)
        yield config
        if info.max_loras:
            yield _adapters(info, stats)


def _adapters(info: EngineInfo, stats: EngineStats) -> Metric:
    """As llm-d's picker reads it: `running` draws requests here; running + waiting < max_lora invites others.

    The value is when it was true: of several series the picker takes the latest, and here is one.
    """
    # Idle ones too: what is in a slot costs nothing to use, and would be loaded again elsewhere
    running = dict.fromkeys(stats.resident_adapters)
    waiting = [
        name for name in dict.fromkeys(stats.waiting_adapters) if name not in running
    ]  # or it counts twice
    labels = {
        "max_lora": str(info.max_loras),
        "waiting_lora_adapters": ",".join(waiting),
        "running_lora_adapters": ",".join(running),
    }
    gauge = GaugeMetricFamily(
        "vllm:lora_requests_info", "Adapters in slots, and those that requests wait for", labels=list(labels)
    )
    gauge.add_metric(list(labels.values()), time.time())
    return gauge
