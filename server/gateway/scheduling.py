"""Filter, scorers and picker of the GKE Inference Gateway's endpoint picker, on plain numbers.

Source: llm-d-router, pkg/epp/framework/plugins/scheduling (scorer/queuedepth, kvcacheutilization, prefix,
loraaffinity; picker/maxscore) and flowcontrol/saturationdetector/utilization. The weights are those of its
default profile, which has no LoRA affinity.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cabochon.server.gateway.endpoint_metrics import EndpointMetrics
from cabochon.server.gateway.prefix_index import PrefixIndex, chunk_hashes, chunk_tokens

STALE_S = 0.2
QUEUE_LIMIT = 5  # waiting requests
KV_LIMIT = 0.8
ACTIVE, FREE_SLOT, AWAITED, FULL = 1.0, 0.8, 0.6, 0.0  # of an adapter on an endpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """How much each scorer counts."""

    queue: float = 2
    kv: float = 2
    prefix: float = 3
    lora: float = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a pick depends on."""

    model: str
    prompts: tuple[bytes, ...] = ()
    salt: str = ""


Pool = Mapping[str, EndpointMetrics]  # by address, host:port


def is_stale(metrics: EndpointMetrics, now_s: float) -> bool:
    """Whether the endpoint counts as full because nobody knows how full it is."""
    return metrics.updated_s is None or now_s - metrics.updated_s > STALE_S


def saturation(pool: Pool, now_s: float) -> float:
    """The mean over endpoints of the scarcer of queue and KV memory; nothing is dispatched from 1 on."""
    if not pool:
        return 1.0
    return sum(
        1.0 if is_stale(metrics, now_s) else max(metrics.waiting / QUEUE_LIMIT, metrics.kv_usage / KV_LIMIT)
        for metrics in pool.values()
    ) / len(pool)


def open_endpoints(pool: Pool, now_s: float) -> Pool:
    """Those with fresh metrics, a short queue and free memory; all of them if there is none."""
    return {
        address: metrics
        for address, metrics in pool.items()
        if not is_stale(metrics, now_s) and metrics.waiting < QUEUE_LIMIT and metrics.kv_usage < KV_LIMIT
    } or pool


def queue_scores(pool: Pool) -> dict[str, float]:
    """1 for the shortest queue, 0 for the longest, 1 for all if they are equal; none without metrics."""
    queues = {address: metrics.waiting for address, metrics in pool.items() if metrics.updated_s is not None}
    if not queues:
        return {}
    low, high = min(queues.values()), max(queues.values())
    return {
        address: (high - queue) / (high - low) if high > low else 1.0 for address, queue in queues.items()
    }


def kv_scores(pool: Pool) -> dict[str, float]:
    """The free share of the KV cache; none without metrics."""
    return {a: 1 - metrics.kv_usage for a, metrics in pool.items() if metrics.updated_s is not None}


def prefix_scores(matches: Mapping[str, int], num_chunks: int) -> dict[str, float]:
    """The share of the prompt's chunks that an endpoint has."""
    return {address: count / num_chunks for address, count in matches.items()} if num_chunks else {}


def lora_scores(pool: Pool, model: str) -> dict[str, float]:
    """Is the adapter there, is a slot free, does it wait for one."""

    def score(metrics: EndpointMetrics) -> float:
        if model in metrics.active_adapters:
            return ACTIVE
        if len(metrics.active_adapters) + len(metrics.waiting_adapters) < metrics.max_adapters:
            return FREE_SLOT
        return AWAITED if model in metrics.waiting_adapters else FULL

    return {address: score(metrics) for address, metrics in pool.items()}


@dataclass
class Scheduler:
    """Picks the endpoint with the largest weighted sum; equal ones take turns. Remembers what went where."""

    weights: Weights = field(default_factory=Weights)
    index: PrefixIndex = field(default_factory=PrefixIndex)
    num_ties: int = 0

    def pick(self, request: Request, pool: Pool, now_s: float) -> str:
        """The address for a request; `pool` must not be empty."""
        hashes = self._hashes(request, pool)
        candidates = open_endpoints(pool, now_s)
        totals = self._totals(request, candidates, hashes)
        best = [address for address in candidates if totals[address] == max(totals.values())]
        picked = best[0]
        if len(best) > 1:
            picked = best[self.num_ties % len(best)]
            self.num_ties += 1
        for names in hashes:
            self.index.add(picked, names, pool[picked].num_pages)
        return picked

    def _totals(self, request: Request, pool: Pool, hashes: Sequence[Sequence[bytes]]) -> dict[str, float]:
        matches: dict[str, int] = {}
        for names in hashes:
            for address, count in self.index.matches(names).items():
                matches[address] = matches.get(address, 0) + count
        weighted = (
            (self.weights.queue, queue_scores(pool)),
            (self.weights.kv, kv_scores(pool)),
            (self.weights.prefix, prefix_scores(matches, sum(map(len, hashes)))),
            (self.weights.lora, lora_scores(pool, request.model)),
        )
        return {
            address: sum(weight * min(1.0, max(0.0, scores.get(address, 0.0))) for weight, scores in weighted)
            for address in pool
        }

    def _hashes(self, request: Request, pool: Pool) -> list[list[bytes]]:
        """A list for each prompt; the first endpoint's pages say how long a chunk is."""
        tokens = chunk_tokens(next(iter(pool.values())).page_tokens)
        return [chunk_hashes(prompt, tokens, request.model, request.salt) for prompt in request.prompts]
