"""What a model on a machine takes: seconds of a step, of a transfer and of a start, bytes of KV.

A profile is measured (`crossdock profile`), or derived from the model's shape and the machine's
data sheet: `derived`, whose arithmetic docs/performance.md writes out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from crossdock.proto.errors import ConfigError
from crossdock.proto.settings import setting

if TYPE_CHECKING:
    from crossdock.kvcache.sequence import StepPlan

BF16_BYTES = 2
MIB = 1 << 20
MOST_CONTENTION = 100.0


def _check_contention(path: str, parts: tuple[float, ...]) -> None:
    for others, part in enumerate(parts):
        if not 0 <= part <= MOST_CONTENTION:
            limits = f"must be from 0 to {MOST_CONTENTION:g}"
            raise ConfigError(f"{path}[{others}]", f"{part!r} is not allowed; {limits}")


@dataclass(frozen=True)
class Profile:
    """Seconds of a step, a transfer and a start, and the size of a token's KV.

    A step that computes prompts takes prefill_s + prefill_token_s * tokens
    + prefill_attention_s * (tokens * the context that they attend to on average, summed over the
    prompts); one that decodes decode_s + decode_sequence_s * sequences + decode_context_s * their
    tokens. One that does both reads the weights once: the larger of prefill_s + prefill_token_s *
    tokens and decode_s, and all the other terms.
    """

    kv_bytes_per_token: int = setting(
        46_080, "KV of a token, bytes: how many blocks kv_memory_mb holds.", low=8, high=1 << 30
    )
    prefill_s: float = setting(0.0, "Prefill step: seconds.", low=0, high=60)
    prefill_token_s: float = setting(0.0, "… more for each token.", low=0, high=60)
    prefill_attention_s: float = setting(
        0.0, "… for each token and token before it, those before the chunk included.", low=0, high=1
    )
    decode_s: float = setting(0.0, "Decode step: seconds.", low=0, high=60)
    decode_sequence_s: float = setting(0.0, "… more for each sequence.", low=0, high=60)
    decode_context_s: float = setting(0.0, "… for each token of their contexts.", low=0, high=1)
    link_latency_s: float = setting(
        0.0, "Reading KV of another worker: seconds, however little it is.", low=0, high=60
    )
    link_bytes_per_s: float = setting(
        0.0,
        "… bytes a second of a worker's network interface, each way; 0: any number.",
        low=0,
        high=10**13,
    )
    contention: tuple[float, ...] = setting(
        (),
        "Where workers share one host's cores: by what part a step takes longer while one other "
        "worker computes, two others, …; empty: each has hardware of its own.",
        check=_check_contention,
    )
    start_s: float = setting(0.0, "Start of a worker until it is ready: seconds.", low=0, high=3600)
    gpus: int = setting(0, "GPUs of a worker.", low=0, high=64)
    usd_per_gpu_hour: float = setting(
        0.0, "Price of a GPU for an hour, USD; 0: not known.", low=0, high=10_000
    )
    kv_memory_mb: int = setting(
        0,
        "KV pool of a worker, MB, that crossdock plan goes by; 0: not known.",
        low=0,
        high=4_000_000,
    )

    NAMED: ClassVar[dict[str, Profile]]

    def step_s(self, plan: StepPlan) -> float:
        """Seconds that this step takes."""
        work, seconds = plan.work, 0.0
        if work.tokens:
            seconds = self.prefill_s + self.prefill_token_s * work.tokens
        if work.sequences:
            seconds = max(seconds, self.decode_s) + self.decode_sequence_s * work.sequences
            seconds += self.decode_context_s * work.context
        if work.tokens:
            # Of what work counts to the end of each chunk, its tokens attend to half of themselves.
            own = sum(chunk.length**2 for chunk in plan.chunks if chunk.length > 1)
            seconds += self.prefill_attention_s * (work.attention - own / 2)
        return seconds

    def slowdown(self, others: int) -> float:
        """Times as long as alone that a step takes while so many other workers compute. Beyond
        those that `contention` knows, each costs as much as these on the average."""
        parts = self.contention
        if not parts or others <= 0:
            return 1.0
        if others <= len(parts):
            return 1.0 + parts[others - 1]
        return 1.0 + parts[-1] * others / len(parts)

    def pull_s(self, tokens: int) -> float:
        """Seconds to read the KV of so many tokens over an idle link."""
        if not self.link_bytes_per_s:
            return self.link_latency_s
        return self.link_latency_s + tokens * self.kv_bytes_per_token / self.link_bytes_per_s


@dataclass(frozen=True)
class Shape:
    """What of a Llama-like model costs time, in elements."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @property
    def layer_weights(self) -> int:
        """Of all layers together: projections of attention, and the gated MLP."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def step_weights(self) -> int:
        """What a decode step reads: the layers and the output matrix."""
        return self.layer_weights + self.hidden * self.vocab

    @property
    def weights(self) -> int:
        """What lies in memory: the input embedding as well."""
        return self.step_weights + self.hidden * self.vocab

    @property
    def attention_flops(self) -> int:
        """For one token and one token before it: scores and their sum of values."""
        return 4 * self.layers * self.heads * self.head_dim

    @property
    def kv_bytes(self) -> int:
        """Keys and values of a token in bf16."""
        return 2 * self.layers * self.kv_heads * self.head_dim * BF16_BYTES


@dataclass(frozen=True)
class Gpu:
    """A GPU's data sheet, and how much of it an engine like vLLM gets out of it."""

    memory_mib: int
    bandwidth: float  # of its memory, bytes a second
    flops: float = 989e12  # dense bf16
    nvlink: float = 450e9  # bytes a second each way
    nic: float = 50e9  # 400 Gb/s, one for each GPU

    usable: float = 0.9  # of memory: vLLM's gpu_memory_utilization
    other_mib: int = 4096  # of that, activations and CUDA graphs
    read: float = 0.8  # of bandwidth, weights and KV
    products: float = 0.55  # of flops, all but attention
    attention: float = 0.5  # of flops
    reduced: float = 0.7  # of nvlink, all-reduce of a prompt's activations
    sent: float = 0.85  # of nic
    all_reduce_s: float = 10e-6  # of a decode step's activations
    prefill_overhead_s: float = 3e-3  # scheduling, launches, sampling
    decode_overhead_s: float = 1.1e-3  # the same, with CUDA graphs
    sequence_s: float = 5e-6  # scheduling and sampling of one sequence
    link_latency_s: float = 100e-6  # posting a read of many blocks, the fence
    disk: float = 6e9  # bytes a second of weights, read once by all GPUs of a worker
    warm_up_s: float = 40.0  # process, imports, compiled kernels from a cache, CUDA graphs


LINE_BATCH = 256  # a decode step is a line through its length with none and with so many sequences


def derived(shape: Shape, gpu: Gpu, gpus: int = 1, warm_up_s: float = 0.0) -> Profile:
    """The profile of a model in bf16 on `gpus` GPUs of one host, tensor parallel. Arithmetic is a
    roofline: docs/performance.md, "Profiles from first principles", writes it out."""
    flops, bandwidth = gpus * gpu.flops, gpus * gpu.bandwidth * gpu.read
    reduces = 2 * shape.layers if gpus > 1 else 0  # behind attention, behind the MLP
    moved = 2 * (gpus - 1) / gpus * reduces * shape.hidden * BF16_BYTES  # for a token, by each GPU
    reduce_s = moved / (gpu.nvlink * gpu.reduced)
    read_s = shape.step_weights * BF16_BYTES / bandwidth
    compute_s = 2 * shape.step_weights / (flops * gpu.products)  # of a decode token
    beyond_reading_s = max(0.0, compute_s - read_s / LINE_BATCH)
    weights_s = shape.weights * BF16_BYTES / gpu.disk
    return Profile(
        kv_bytes_per_token=shape.kv_bytes,
        prefill_s=gpu.prefill_overhead_s,
        prefill_token_s=_short(2 * shape.layer_weights / (flops * gpu.products) + reduce_s),
        prefill_attention_s=_short(shape.attention_flops / (flops * gpu.attention)),
        decode_s=_short(read_s + gpu.decode_overhead_s + reduces * gpu.all_reduce_s),
        decode_sequence_s=_short(beyond_reading_s + gpu.sequence_s + reduce_s),
        decode_context_s=_short(shape.kv_bytes / bandwidth),
        link_latency_s=gpu.link_latency_s,
        link_bytes_per_s=gpus * gpu.nic * gpu.sent,
        start_s=float(round(weights_s + (warm_up_s or gpu.warm_up_s))),
        gpus=gpus,
        kv_memory_mb=kv_memory_mb(shape, gpu, gpus),
    )


def kv_memory_mb(shape: Shape, gpu: Gpu, gpus: int = 1) -> int:
    """What `gpus` GPUs leave for KV beside the weights, MB as kv_memory_mb counts them (2^20)."""
    usable = gpus * (gpu.usable * gpu.memory_mib - gpu.other_mib)
    return int(usable - shape.weights * BF16_BYTES / MIB)


def _short(value: float) -> float:
    """Four digits: no derived figure is better."""
    return float(f"{value:.4g}")


LLAMA_8B = Shape(
    layers=32, hidden=4096, intermediate=14_336, heads=32, kv_heads=8, head_dim=128, vocab=128_256
)
LLAMA_70B = Shape(
    layers=80, hidden=8192, intermediate=28_672, heads=64, kv_heads=8, head_dim=128, vocab=128_256
)
H200 = Gpu(memory_mib=143_771, bandwidth=4.8e12)
H100 = Gpu(memory_mib=81_559, bandwidth=3.35e12)

Profile.NAMED = {
    "instant": Profile(),
    # The default model on one core, float32: docs/performance.md, "The engine".
    "cpu-135m": Profile(
        kv_bytes_per_token=46_080,
        prefill_s=8e-3,
        prefill_token_s=8.78e-4,
        prefill_attention_s=5.72e-7,
        decode_s=16.8e-3,
        decode_sequence_s=9.5e-4,
        decode_context_s=3.6e-6,
        link_latency_s=0.5e-3,
        link_bytes_per_s=15.4e9,
        start_s=5.0,
    ),
    "h200-llama-3.1-8b": derived(LLAMA_8B, H200),
    "h100x4-llama-3.1-70b": derived(LLAMA_70B, H100, gpus=4, warm_up_s=60.0),
}
